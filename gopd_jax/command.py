"""What score and generate share: flags, the model, and a file that can be continued.

At the end, what other commands read lists and numbers of their command line with.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from jax.sharding import Mesh

from gopd_jax import compiling, hub, memory, records, sharding
from gopd_jax.checkpoint import differences
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.decoder import Decoder
from gopd_jax.problems import DTYPES
from gopd_jax.progress import Progress

WRONG_INPUT = 2
IDENTITY = ".identity.json"  # beside the rows, so that these stay plain
COMMANDS = ("score", "generate")  # which write rows
# What an identity of an earlier version does not say, and its rows do not show to be otherwise.
UNRECORDED = ("encoding", "ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A Hugging Face directory on a mesh; its weights are read when they are first asked for."""

    path: str
    mesh: Mesh
    decoder: Decoder
    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def params(self):
        axes = lm_params.logical_axes(self.decoder.cfg)
        layout = sharding.shardings(self.mesh, axes)
        return hf.load_params(self.path, self.decoder.cfg, shardings=layout, dtype="stored")

    def identity(self) -> dict[str, str]:
        """What makes its numbers: weights, tokenizer and how it encodes, template, ends, dtype."""
        chat = self.tokenizer
        return {
            "model": hf.weights_digest(self.path),
            "tokenizer": chat.fingerprint(),
            "ids": str(chat.vocab_size),
            "encoding": chat.encoding_fingerprint(),
            "template": chat.template_fingerprint(),
            "end tokens": json.dumps(chat.eos_ids),
            "dtype": self.decoder.dtype,
        }


def open_model(
    path,
    *,
    dtype: str = "float32",
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    slices: int = 1,
    devices=None,
    template: str | None = None,
) -> Model:
    """The model of a Hugging Face directory or name, checked; dtype is that of the computation.

    template: options of its chat template, "enable_thinking=False".

    data, .., sequence: devices along each axis of the mesh over `devices` (None: all); data None
    takes what the others leave. slices: TPU slices, the outermost parts of data. ValueError for a
    model, tokenizer and mesh that do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it is one of {list(DTYPES)}")
    more = {"expert": expert, "sequence": sequence, "slices": slices}
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    sizes |= {f"mesh.{axis}": size for axis, size in more.items()}
    if wrong := {name: size for name, size in sizes.items() if size is not None and size < 1}:
        raise ValueError(f"{wrong}: an axis has at least one device")
    mesh = sharding.make_mesh(data, fsdp, tensor, **more, devices=devices)
    path = hub.locate(path).directory
    cfg, chat = hf.load_config(path), tokenizers.load(path).with_options(template)
    problems = sharding.mesh_problems(
        mesh, lm_params.abstract_params(cfg), lm_params.logical_axes(cfg), role=str(path)
    )
    try:
        chat = chat.within(cfg.vocab_size)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    sharding.require_experts(mesh, routed=cfg.traits.routed)
    return Model(path=str(path), mesh=mesh, decoder=Decoder(cfg, dtype=dtype), tokenizer=chat)


def check_batch(batch: int, mesh: Mesh) -> None:
    """ValueError unless a batch's rows divide over the mesh, to be scored or to be decoded."""
    shards = sharding.n_decode_shards(mesh)
    if batch < 1 or batch % shards:
        over = sharding.told_shards(mesh, sharding.DECODE_ROWS)
        raise ValueError(
            f"batch is {batch} rows, and the mesh has {over} = {shards} shards of "
            f"rows; make it a multiple of {shards}"
        )


def source(data) -> Iterator:
    """(where, row) of a file or another source, or of a list of rows: "row[i]"."""
    if isinstance(data, str | os.PathLike):
        return records.rows(str(data))
    return ((f"row[{i}]", row) for i, row in enumerate(data))


def require_same_tokenizer(data, tokenizer: tokenizers.Tokenizer) -> None:
    """ValueError where a file of rows was made by one of these commands with other ids.

    They would all be read, and mean something else. The tokenizer may have more of them.
    """
    made = _made_by_us(data)
    if made is None or "tokenizer" not in made:
        return
    n_ids = int(made.get("ids", tokenizer.vocab_size))
    theirs, ours = made["tokenizer"], tokenizer.fingerprint(n_ids)
    if theirs != ours:
        raise ValueError(
            f"the ids of {data} are of another tokenizer ({theirs} in {Path(data).name}{IDENTITY}) "
            f"than that of {tokenizer.path} ({ours}); give a model of the same, or rows of text "
            "without ids. Where you know that its ids are ids of the other, give a copy of the file"
        )


def _made_by_us(data) -> dict[str, str] | None:
    """What `Output` wrote beside a file of rows, None where it is none of its files."""
    if not isinstance(data, str | os.PathLike):
        return None
    beside = Path(f"{os.fspath(data)}{IDENTITY}")
    if not beside.is_file():
        return None
    try:
        made = json.loads(beside.read_text())
    except ValueError as error:
        raise ValueError(
            f"{beside} is not JSON ({error}), so whose ids {data} has is not known; give the file "
            "back, or remove it where you know that they are the model's"
        ) from error
    return made if isinstance(made, dict) and made.get("command") in COMMANDS else None


def finite(logp_C: np.ndarray, where: str) -> list[float]:
    """float32 log-probs as the shortest numbers that read back as them. ValueError for NaN."""
    if not np.isfinite(logp_C).all():
        raise ValueError(
            f"{where}: log-probs {logp_C[~np.isfinite(logp_C)][:3]} are not finite; the model's "
            "weights are not sound in this dtype"
        )
    return [float(str(x)) for x in logp_C]


class Output:
    """A .jsonl file of rows in a fixed order that a run, however it ended, is continued in.

    Beside it lies its identity: what the rows were made from. A torn last line is cut.
    """

    def __init__(self, path, identity: dict[str, str], names: list[dict]):
        """names: what each row has to begin with, {"index": 3} say. ValueError where the file is
        of another run, or of none."""
        self.path, self._identity, self._names = Path(path), identity, names
        self._beside = self.path.with_name(self.path.name + IDENTITY)
        self.done = self._resume() if self.path.exists() else 0

    def _resume(self) -> int:
        cure = "give another --out, or remove both to begin anew"
        if not self._beside.is_file():
            raise ValueError(
                f"{self.path} exists without {self._beside.name}, so what made it is not known; "
                "give another --out, or remove it to begin anew"
            )
        try:
            saved = {**json.loads(self._beside.read_text())}
        except (ValueError, TypeError) as error:  # a full disk leaves it empty, say
            raise ValueError(
                f"{self._beside} is damaged ({error}), so what made {self.path} is not known; "
                f"{cure}"
            ) from error
        if self._identity.get("append_eos") != "True":  # the end that is appended was another
            saved = {key: self._identity[key] for key in UNRECORDED} | saved
        if found := differences(saved, self._identity):
            # `differences` speaks of checkpoints.
            shown = "\n".join(f"- {line.replace('in the checkpoint', 'there')}" for line in found)
            raise ValueError(
                f"{self.path} is of another run than this command:\n{shown}\nUndo that, or {cure}"
            )
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        lines = whole[:end].splitlines()
        for number, (line, name) in enumerate(zip(lines, self._names), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or {key: row.get(key) for key in name} != name:
                raise ValueError(f"{self.path}:{number} is not row {name}; {cure}")
        if len(lines) > len(self._names):
            raise ValueError(f"{self.path} has {len(lines)} rows of {len(self._names)}; {cure}")
        if end < len(whole):
            os.truncate(self.path, end)
        return len(lines)

    def write(self, batches: Iterator[tuple[list[dict], int, int]]) -> None:
        """Append the rows of (rows, how many were made, tokens of that work), with a bar.

        A kill leaves whole rows behind, and part of one at most.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.done:
            part = self._beside.with_name(self._beside.name + ".part")
            part.write_text(json.dumps(self._identity, indent=2) + "\n")
            os.replace(part, self._beside)
        done, total = self.done, len(self._names)
        with (
            self.path.open("ab", buffering=0) as file,
            Progress(total, done, unit="row") as progress,
        ):
            if done:
                progress.note(f"{self.path} has {done} of {total} rows; continuing")
            before = time.perf_counter()
            for rows, n_made, n_tokens in batches:
                # ASCII: no character of a text can be taken for the end of a line.
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                done += n_made
                now = time.perf_counter()
                progress.update(done, {}, {"tokens_per_second": n_tokens / (now - before)})
                before = now
        self.done = done


def define(*, temperature: str) -> flags.FlagValues:
    """The flags that both commands have, of their own: a notebook may import the modules."""
    values = flags.FlagValues()
    add(values, "model", None, "Hugging Face directory: config.json, safetensors, tokenizer.")
    add(values, "data", None, "Rows: a .jsonl or .parquet file, microworld:test, tfds:NAME:SPLIT.")
    add(values, "out", None, "The .jsonl file to write; if it is there, it is continued.")
    add(values, "temperature", 1.0, temperature)
    add(
        values,
        "raw_prompt",
        False,
        'Take a text "prompt" as it is: no chat template, nothing added. By default it is a '
        "user's message and is rendered through the model's chat template, as messages are.",
    )
    add(values, "template", None, "Options of the chat template: enable_thinking=False.", str)
    add(values, "dtype", "float32", f"Of the computation: {' or '.join(DTYPES)}.")
    add(values, "batch", 16, "Rows at a time; a multiple of the devices over mesh.tensor.")
    add(values, "mesh.data", None, "Replicas; unset, the devices that the others leave.", int)
    add(values, "mesh.fsdp", 1, "Shards of weights and rows.")
    add(values, "mesh.expert", 1, "Shards of experts beside those of tensor, and rows.")
    add(values, "mesh.sequence", 1, "Shards of positions; of rows while tokens are decoded.")
    add(values, "mesh.tensor", 1, "Shards of heads, MLP and vocabulary.")
    add(values, "mesh.slices", 1, "TPU slices, outermost parts of mesh.data.")
    add(values, "help", False, "Show this.")
    return values


def add(values: flags.FlagValues, name: str, default, text: str, kind: type | None = None) -> None:
    """A flag of the type of its default, or of `kind`; text where that is None."""
    of = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define = of.get(kind or type(default), flags.DEFINE_string)
    define(name, default, text, flag_values=values)


def usage(values: flags.FlagValues) -> str:
    """Each flag with its default and what it says."""
    lines = [f"  --{name}={values[name].default}\n      {values[name].help}" for name in values]
    return "\n".join(line.replace("=None\n", "=...\n") for line in lines)


def run(values: flags.FlagValues, doc: str, work: Callable, argv: list[str]) -> None:
    """work(model, data, out, **the other flags), and where its file lies.

    Wrong input ends the program with status 2 and the message, Ctrl-C with 130.
    """
    try:
        rest = values(argv)[1:]
        if values["help"].value:
            print(f"{doc}\n{usage(values)}")
            return
        if rest:
            raise ValueError(f"unexpected arguments {rest}; flags are --name=value")
        given = {name: values[name].value for name in values if name != "help"}
        if missing := [f"--{name}" for name in ("model", "data", "out") if not given[name]]:
            raise ValueError(f"{missing} have to be given; --help lists the flags")
        mesh = {name: given.pop(f"mesh.{name}") for name in (*sharding.AXES, "slices")}
        compiling.keep_compiled()
        memory.give_back_after_compiling()
        options = {name: given.pop(name) for name in ("dtype", "template")}
        model = open_model(given.pop("model"), **options, **mesh)
        n_rows = work(model, given.pop("data"), out := given.pop("out"), **given)
    except (ValueError, OSError, flags.Error) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    print(f"{n_rows} rows: {out}")


def names(text: str) -> list[str]:
    """A flag's names, separated by commas and perhaps spaces, for argparse."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; put one on each side of ','")
    return found


def at_least(least: int) -> Callable[[str], int]:
    """For argparse, a flag's whole number that is not below `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}; give {least} or more")
        return value

    return number


def positive(text: str) -> float:
    """For argparse, a flag's number above 0."""
    if not (math.isfinite(value := float(text)) and value > 0):
        raise argparse.ArgumentTypeError(f"{value} is no number above 0; give one, 1e-4 say")
    return value
