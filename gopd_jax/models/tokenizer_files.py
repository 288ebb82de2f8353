"""A tokenizer's files in a Hugging Face directory, read as transformers reads them, or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers

_AGAIN = (
    "copy it from where the model came from, or write it with transformers: "
    "AutoTokenizer.from_pretrained(...).save_pretrained(directory)"
)
_ADDED = "added_tokens.json"
_NEEDED = ("bos_token", "eos_token", "pad_token", "unk_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Objects of tokenizer_config.json with more tokens that a template may name.
_MORE_NAMED = ("extra_special_tokens", "model_specific_special_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What the files say; see Tokenizer for the fields."""

    backend: tokenizers.Tokenizer
    contents: tuple[str | None, ...]
    special: dict[str, str]
    template: str
    eos_ids: tuple[int, ...]
    pad_id: int


def read(path: Path) -> Files:
    """ValueError names the file that is missing or wrong."""
    backend = _backend(path / "tokenizer.json")
    config = _json(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # of an older version, where the map comes first
        config |= _json(path / "special_tokens_map.json", optional=True)
    if config.get("split_special_tokens"):
        raise ValueError(
            f"split_special_tokens is {config['split_special_tokens']!r} in "
            f"{path / 'tokenizer_config.json'}: tokens such as the end would be read as letters, "
            "which is not supported; take it out"
        )
    _as_configured(backend, config)
    contents = _contents(backend, config, path)
    special = _special(config)
    template = _template(config, path)
    _require_named(config, special, template, contents, path)
    eos_ids = _eos_ids(special, contents, path)
    return Files(
        backend=backend,
        contents=contents,
        special=special,
        template=template,
        eos_ids=eos_ids,
        pad_id=contents.index(special["pad_token"]) if "pad_token" in special else eos_ids[0],
    )


def _json(path: Path, optional: bool = False) -> dict:
    """A JSON object's file; {} for one that may be missing and is."""
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"there is no {path}; give the directory of a Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"there is no {path}; {_AGAIN}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}); {_AGAIN}") from error
    # A file may ask for padding and cutting, which would change ids unseen.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _as_configured(backend: tokenizers.Tokenizer, config: dict) -> None:
    """Give added tokens the flags of tokenizer_config.json, which transformers puts first.

    Every named token is special, too: it is no part of a completion's text. Those that only the
    vocabulary has become added tokens under their id, which text is not spelt out for.
    """
    before = backend.get_added_tokens_decoder()
    have, named = dict(before), set(_special(config).values())
    for i, token in _decoder(config).items():
        # What `_contents` refuses is left as it is.
        if i in have and have[i].content == token.get("content"):
            have[i] = tokenizers.AddedToken(**{k: token[k] for k in _FLAGS if k in token})
            have[i].content = token["content"]
    for i, token in have.items():
        flags = {flag: getattr(token, flag) for flag in _FLAGS}
        flags["special"] |= token.content in named
        if flags != {flag: getattr(before[i], flag) for flag in _FLAGS}:
            add = backend.add_special_tokens if flags["special"] else backend.add_tokens
            add([tokenizers.AddedToken(token.content, **flags)])
    texts = named | {text for _, text in _listed(config)}
    unseen = sorted(texts - {token.content for token in have.values()})
    unseen = [text for text in unseen if backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in unseen])


def _decoder(config: dict) -> dict[int, dict]:
    """added_tokens_decoder, where the file has one: id -> a token's content and flags."""
    return {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}


def _contents(backend: tokenizers.Tokenizer, config: dict, path: Path) -> tuple[str | None, ...]:
    """Content of each id; tokenizer_config.json may repeat the added tokens, not change them."""
    ids = backend.get_vocab(with_added_tokens=True)
    if not ids:
        raise ValueError(f"{path / 'tokenizer.json'} has no tokens")
    contents: list[str | None] = [None] * (max(ids.values()) + 1)
    for content, i in ids.items():
        contents[i] = content
    for i, token in _decoder(config).items():
        have, text = contents[i] if i < len(contents) else None, token.get("content")
        if have != text:
            raise ValueError(
                f"id {i} is {text!r} in {path / 'tokenizer_config.json'} and {have!r} in "
                "tokenizer.json; save the tokenizer again with transformers' save_pretrained"
            )
    return tuple(contents)


def _special(config: dict) -> dict[str, str]:
    """bos_token, eos_token, ...: each a text, or an object with its content."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    for key in _MORE_NAMED:
        if isinstance(more := config.get(key), dict):
            named |= more
    return {key: text for key, value in named.items() if isinstance(text := _text(value), str)}


def _listed(config: dict) -> Iterator[tuple[str, str]]:
    """(key, text) of the tokens that lists name."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(tokens := config.get(key), list):
            yield from ((key, text) for t in tokens if isinstance(text := _text(t), str))


def _text(token):
    return token.get("content") if isinstance(token, dict) else token


def _require_named(config: dict, special: dict, template: str, contents: tuple, path: Path) -> None:
    """transformers gives new ids to tokens that tokenizer.json has not; here they are refused.

    But for those that nothing writes: CodeLlama's fill_token stands for a place in a text.
    """
    written = {
        (name, text)
        for name, text in special.items()
        if name in _NEEDED or name in template or text in template
    }
    written |= {*_listed(config)}
    if "added_tokens_decoder" not in config:
        written |= {(_ADDED, t) for t in _json(path / _ADDED, optional=True)}
    known = set(contents)
    for name, text in sorted(written):
        if text not in known:
            raise ValueError(
                f"{name} is {text!r} in {path}, which is no token of tokenizer.json; {_AGAIN}"
            )


def _template(config: dict, path: Path) -> str:
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{path} has no chat template: there is no chat_template.jinja, nor a chat_template "
            "(with the name default, if there are several) in tokenizer_config.json; copy "
            "chat_template.jinja from the instruction-tuned model of the same family"
        )
    return template


def _eos_ids(special: dict[str, str], contents: tuple, path: Path) -> tuple[int, ...]:
    """The ends that generation_config.json lists, in its order, then the tokenizer's own.

    config.json's where there is no such file, as transformers then makes one of it.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        file = path / "config.json"
    ids = _json(file, optional=True).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
        if type(i) is not int or not 0 <= i < len(contents) or contents[i] is None:
            raise ValueError(
                f"eos_token_id has {i!r} in {file}, and tokenizer.json has no such id; its highest "
                f"is {len(contents) - 1}"
            )
    if "eos_token" in special:
        ids = [*ids, contents.index(special["eos_token"])]
    if not ids:
        raise ValueError(
            f"{path} names no end token: set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    return tuple(dict.fromkeys(ids))
