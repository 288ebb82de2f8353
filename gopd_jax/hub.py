"""A model's path to a directory on disk: one that is there, or a name on the Hugging Face hub.

A name is ORG/NAME or ORG/NAME@REVISION (branch, tag or commit). It is downloaded once, into
huggingface_hub's cache, without pickles and without code. Each process resolves it by itself:
those of one host share a cache and the library's locks, and no two hosts have to share a disk.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
# Model, tokenizer, template, stop tokens and licence: data, all of it.
ALLOWED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    "adapter_config.json",  # to refuse it
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja"),
    *("LICENSE*", "NOTICE", "USE_POLICY.md"),
)
# Other copies of the weights, in other layouts, that some repositories hold besides.
IGNORED = ("*/*", "consolidated*")


@dataclasses.dataclass(frozen=True, slots=True)
class Located:
    """Where a model lies. name: the path as given, or ORG/NAME@COMMIT with the commit in full."""

    directory: Path
    name: str


def parse(path: str) -> tuple[str, str] | None:
    """(repository, revision) of a name on the hub, None for anything that is or was to be a path.

    What exists is a path. So is models/Qwen3-4B beside a directory models/, where somebody mistyped
    it: say models/Qwen3-4B@main for the repository.
    """
    match = NAME.fullmatch(path)
    if match is None or Path(path).exists():
        return None
    if match["revision"] is None and Path(path).parent.exists():
        return None
    return match["repo"], match["revision"] or "main"


def named(name: str) -> tuple[str, str | None]:
    """(repository, commit) of a Located's name; (the path, None) where it is none of the hub."""
    found = parse(name)
    return found if found and "@" in name else (name, None)


def locate(path: str) -> Located:
    """The directory of a model, downloaded where it is a name on the hub that is not cached yet.

    ValueError where the hub does not have it or cannot be reached. A path is returned as it is.
    """
    if (named := parse(str(path))) is None:
        return Located(Path(path), str(path))
    repo, revision = named
    directory = _had(repo, revision, allow_patterns=ALLOWED, ignore_patterns=IGNORED)
    # The cache names a snapshot's directory after its commit.
    return Located(Path(directory), f"{repo}@{Path(directory).name}")


def fetch(path: str, file: str) -> Path:
    """One file of a name on the hub. ValueError where the hub does not have it, as in `locate`."""
    if (named := parse(path)) is None:
        raise ValueError(f"{path!r} is no name on the hub")
    file_of_repo = Path(_had(*named, allow_patterns=(file,))) / file
    if not file_of_repo.is_file():
        raise ValueError(f"{path!r} on the Hugging Face hub has no {file}; correct the name")
    return file_of_repo


def _had(repo: str, revision: str, **patterns) -> str:
    """The directory of a snapshot; ValueError with the cure where it cannot be had."""
    import huggingface_hub  # takes a while, and most runs read directories

    try:
        return huggingface_hub.snapshot_download(repo, revision=revision, **patterns)
    except (OSError, ValueError) as error:  # which all of the library's are, and those of the disk
        why = " ".join(str(error).split())
        given = repo if revision == "main" else f"{repo}@{revision}"
        raise ValueError(
            f"{given!r} is no directory here, and could not be had from the Hugging Face hub: "
            f"{type(error).__name__}: {why[:300]}\nCorrect the path, or download it where there is "
            f"a network (after `hf auth login` if it is gated) and give that directory: "
            f"hf download {repo} --revision {revision} --local-dir DIR"
        ) from error
