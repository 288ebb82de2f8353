"""A run's student as a Hugging Face directory, which transformers and vLLM load.

    python -m gopd_jax.export --workdir=RUN --out=DIR

Tensor names, tied weights, config.json, tokenizer, chat template and generation_config.json are
those of the checkpoint that the student started from, of which the run keeps what is needed.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from gopd_jax import card, checkpoint
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.train import SOURCE

GB = 10**9


def export(
    workdir, out, *, dtype: str = "stored", step: int | None = None, max_shard_gb: float = 5.0
) -> int:
    """Write the student of a run after `step` (None: its newest checkpoint); the step.

    dtype: stored (as in the source checkpoint), float32 or bfloat16. ValueError where the workdir
    holds no such run or checkpoint, or `out` something that is no checkpoint.
    """
    if not (math.isfinite(max_shard_gb) and max_shard_gb > 0):
        raise ValueError(f"max_shard_gb is {max_shard_gb}; it is a positive number, 5 say")
    workdir, out = Path(workdir), Path(out)
    card.read_run(workdir)
    source = workdir / SOURCE
    if not source.is_dir():
        raise ValueError(
            f"{workdir} has no {SOURCE}, which a run writes when it starts; start its command once "
            "more, which trains no step that it has already"
        )
    if out.resolve() == workdir.resolve() or workdir.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out={out} would replace the run itself; give another directory")
    steps = checkpoint.steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} has no checkpoint yet; let its run reach one")
    if step not in (None, *steps):
        raise ValueError(f"{workdir} has checkpoints of the steps {steps}, not of {step}; give one")
    step = steps[-1] if step is None else step
    shapes = lm_params.abstract_params(hf.load_config(source))
    params = checkpoint.restore_params(workdir, step, shapes)
    hf.export(
        out,
        params,
        source,
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * GB),
        card=card.text(workdir, step),
    )
    return step


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
    args = parser.parse_args(argv)
    try:
        step = export(
            args.workdir,
            args.out,
            dtype=args.dtype,
            step=args.step,
            max_shard_gb=args.max_shard_gb,
        )
    except ValueError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    print(f"model after step {step}: {args.out}")


if __name__ == "__main__":
    main()
