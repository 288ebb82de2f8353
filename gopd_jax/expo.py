"""ExPO: extrapolation of weights from the student past the mean of its teachers, no training.

    python -m gopd_jax.expo --base=DIR --teachers=DIR,DIR --alpha=0.25 --out=DIR

W = W_T + alpha (W_T - W_S), W_T the mean of the teachers' weights, W_S those that they were trained
from. arXiv 2404.16792; for several teachers arXiv 2602.12125. alpha = 0 is plain averaging.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gopd_jax import command
from gopd_jax.models import hf, safetensors_out
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.params import ModelConfig
from gopd_jax.types import Params


def extrapolate(base: Params, teachers: Sequence[Params], *, alpha: float) -> Params:
    """W_T + alpha (W_T - W_S) for each array, W_T the mean of `teachers` and W_S in `base`.

    float32 arrays of the same tree. ValueError for alpha < 0 or not finite, no teacher, or a
    teacher whose tree or shapes are not the base's.
    """
    _check_alpha(alpha)
    if not teachers:
        raise ValueError("there is no teacher to extrapolate to; give one at least")
    want = _shapes(base)
    for i, teacher in enumerate(teachers):
        found = _shapes(teacher)
        if differing := sorted(k for k in want | found if want.get(k) != found.get(k)):
            name = differing[0]
            raise ValueError(
                f"teacher {i} differs from the base in {len(differing)} arrays, {name} is "
                f"{found.get(name)} and {want.get(name)}; extrapolate between models of one shape"
            )

    def one(start, *ends):
        mean = sum(ends) / len(ends)
        return mean + alpha * (mean - start)

    return jax.tree.map(one, base, *teachers)


def write(base, teachers: Sequence, out, *, alpha: float) -> None:
    """`extrapolate` between Hugging Face directories, into the directory `out` in float32.

    ValueError for checkpoints of different models or tokenizers and for an `out` that is none of
    its own, before any weights are read; for an alpha that leads out of float32, after.
    """
    _check_alpha(alpha)
    out = Path(out)
    for source in (base, *teachers):
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out={out} would replace {source}; give another directory")
    safetensors_out.require_ours(out)
    cfg, ids = hf.load_config(base), tokenizers.load(base)
    for teacher in teachers:
        if differing := _differing(hf.load_config(teacher), cfg):
            raise ValueError(
                f"{teacher} differs from {base}: {differing}; weights can be extrapolated between "
                "models of one shape only"
            )
        theirs = tokenizers.load(teacher)
        tokenizers.require_same_ids(ids, theirs, str(teacher))
        if set(theirs.eos_ids) != set(ids.eos_ids):
            raise ValueError(
                f"completions of {teacher} end with {_told(theirs)}, those of {base} with "
                f"{_told(ids)}, and the new model's would end with the latter; make eos_token_id "
                "of their generation_config.json alike"
            )
    start, ends = hf.load_params(base, cfg), [hf.load_params(t, cfg) for t in teachers]
    for teacher, end in zip(teachers, ends):
        if alpha and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), start, end)):
            raise ValueError(
                f"the weights of {teacher} are those of {base}, so there is nothing to "
                "extrapolate; give what was trained from it"
            )
    params = extrapolate(start, ends, alpha=alpha)
    if not all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(params)):
        raise ValueError(
            f"alpha is {alpha}, too large for these weights: some leave the range of float32; give "
            "a smaller one, such as 0.25"
        )
    with safetensors_out.told(out):
        hf.save(out, cfg, params, tokenizer_dir=base)


# What a teacher may have otherwise than its base; the new checkpoint has the base's. What ends a
# completion is not in config.json alone and is compared by itself.
_MAY_DIFFER = ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")


def _told(chat: tokenizers.Tokenizer) -> list[str]:
    return sorted(chat.contents[i] for i in chat.eos_ids)


def _differing(theirs: ModelConfig, ours: ModelConfig) -> str:
    """The fields that differ and may not, with both values."""
    names = [f.name for f in dataclasses.fields(ours) if f.name not in _MAY_DIFFER]
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    return ", ".join(f"{name} is {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b)


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha is {alpha}; it is a finite number >= 0, such as 0.25")


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m gopd_jax.expo"
    )
    parser.add_argument("--base", type=Path, required=True, help="what the teachers started from")
    parser.add_argument(
        "--teachers", type=command.names, required=True, help="directories, separated by commas"
    )
    parser.add_argument("--alpha", type=float, required=True, help="0.25 or 0.5, say")
    parser.add_argument("--out", type=Path, required=True, help="the new checkpoint's directory")
    args = parser.parse_args(argv)
    try:
        write(args.base, args.teachers, args.out, alpha=args.alpha)
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(command.WRONG_INPUT)
    print(f"model: {args.out}")


if __name__ == "__main__":
    main()
