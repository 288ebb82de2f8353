"""A run's student as a Hugging Face directory, which transformers and vLLM load.

    python -m gopd_jax.export --workdir=RUN --out=DIR

Tensor names, tied weights, config.json, tokenizer, chat template and generation_config.json are
those of the checkpoint that the student started from, of which the run keeps what is needed; the
ends in the last are those of sampling.stop where the run had it.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from gopd_jax import card, checkpoint, hub
from gopd_jax.command import WRONG_INPUT
from gopd_jax.models import hf, lora, safetensors_out
from gopd_jax.models import params as lm_params
from gopd_jax.models.params import Lora, ModelConfig
from gopd_jax.results import SOURCE

GB = 10**9


def export(
    workdir,
    out,
    *,
    dtype: str = "stored",
    step: int | None = None,
    max_shard_gb: float = 5.0,
    adapter: bool = False,
) -> int:
    """Write the student of a run after `step` (None: its newest checkpoint); the step.

    dtype: stored (as in the source checkpoint), float32 or bfloat16. adapter: of a run with
    adapters, these alone, as PEFT keeps them (float32, one file), instead of merged weights.
    ValueError where the workdir holds no such run or checkpoint, or `out` something that is no
    checkpoint, or something that the run is made from or goes on from.
    """
    if adapter and dtype != "stored":
        raise ValueError(f"dtype is {dtype} and adapters are float32; leave out --dtype")
    if not (math.isfinite(max_shard_gb) and max_shard_gb > 0):
        raise ValueError(f"max_shard_gb is {max_shard_gb}; it is a positive number, 5 say")
    workdir, out = Path(workdir), Path(out)
    run = card.read_run(workdir)
    source = workdir / SOURCE
    if not source.is_dir():
        raise ValueError(
            f"{workdir} has no {SOURCE}, which a run writes when it starts; start its command once "
            "more, which trains no step that it has already"
        )
    _require_free(out, workdir, run)
    steps = checkpoint.steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} has no checkpoint yet; let its run reach one")
    if step not in (None, *steps):
        raise ValueError(f"{workdir} has checkpoints of the steps {steps}, not of {step}; give one")
    step = steps[-1] if step is None else step
    cfg, text = hf.load_config(source), card.text(workdir, step)
    if (adapters := run["config"].get("lora")) is not None:
        options = {name: adapters[name] for name in ("rank", "alpha", "targets")}
        cfg = dataclasses.replace(cfg, lora=Lora(**options))
    elif adapter:
        raise ValueError(f"{workdir} trained no adapters; leave out --adapter")
    shapes, _ = lora.split(lm_params.abstract_params(cfg))
    # As they were trained: absent from runs of a version that had float32 alone.
    held = run["config"].get("optimizer", {}).get("weights_dtype", "float32")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, held), shapes)
    params = checkpoint.restore_params(workdir, step, shapes)
    if adapter:
        base, revision = hub.named(run["models"]["student"]["path"])
        with safetensors_out.told(out):
            lora.save_adapter(out, cfg, params, base_model=base, revision=revision, card=text)
        return step
    if cfg.lora is not None:
        params = lora.merge(cfg, lora.join(params, _base(run, cfg)))
    with safetensors_out.told(out):
        hf.export(
            out,
            params,
            source,
            dtype=dtype,
            max_shard_bytes=int(max_shard_gb * GB),
            card=text,
        )
    return step


def _require_free(out: Path, workdir: Path, run: dict) -> None:
    """ValueError where a checkpoint at `out` would take the place of what the run needs."""
    own = {"the run itself": workdir, "what its exports are made from": workdir / SOURCE}
    own |= {"its checkpoints": workdir / "checkpoints"}
    models = {
        f"the run's model of {role}, {model['path']}": Path(model["path"])
        for role, model in run["models"].items()
        if hub.parse(model["path"]) is None
    }
    place = out.resolve()
    for name, path in (own | models).items():
        if path.resolve().is_relative_to(place):
            raise ValueError(f"--out={out} would replace {name}; give another directory")
    for name, path in own.items():
        # What lies in the workdir beside these, export/ say, is nobody's.
        if path != workdir and place.is_relative_to(path.resolve()):
            raise ValueError(f"--out={out} would lie in {name}; give another directory")
    safetensors_out.require_ours(out)


def _base(run: dict, cfg: ModelConfig):
    """The weights that a run's adapters were trained beside. ValueError where they have changed."""
    student = run["models"]["student"]
    directory = hub.locate(student["path"]).directory
    if (digest := hf.weights_digest(directory)) != student["digest"]:
        raise ValueError(
            f"{directory} has the fingerprint {digest[:12]}, and the adapters were trained beside "
            f"{student['digest'][:12]}; give the old files back, or export with --adapter"
        )
    return hf.load_params(directory, lora.base_config(cfg), dtype="stored")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m gopd_jax.export", allow_abbrev=False
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--out", type=Path, required=True, help="the new checkpoint's directory")
    parser.add_argument(
        "--dtype",
        choices=("stored", "float32", "bfloat16"),
        default="stored",
        help="of the weights; stored: as in the checkpoint that the student started from",
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest if not given")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="10^9 bytes a file")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapters alone, as PEFT keeps them"
    )
    args = parser.parse_args(argv)
    there = args.out.is_dir() and any(args.out.iterdir())
    try:
        step = export(
            args.workdir,
            args.out,
            dtype=args.dtype,
            step=args.step,
            max_shard_gb=args.max_shard_gb,
            adapter=args.adapter,
        )
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    said = " (in the place of the checkpoint that was there)" if there else ""
    print(f"model after step {step}: {args.out}{said}")


if __name__ == "__main__":
    main()
