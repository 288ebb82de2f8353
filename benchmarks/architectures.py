"""Every architecture against torch's transformers, as a table (docs/architectures.md).

    python benchmarks/architectures.py > docs/architectures.md

Needs torch and transformers. The models are tiny and random (tests/families.py): what is compared
is the mathematics, in float32, on left-padded rows that are longer than every window and than the
context that YaRN and Llama 3 stretch.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import families
import jax
import numpy as np
from families import LENGTH, N_PROMPT

from gopd_jax import sharding
from gopd_jax.models import decoder as lm
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params

jax.config.update("jax_num_cpu_devices", 8)
MESH = (2, 2, 2)  # data, fsdp, tensor
HEAD = (
    "| model | import | export | logits, max error | greedy agreement | cached − full "
    "| mesh (2, 2, 2) − single |\n| --- | --- | --- | ---: | ---: | ---: | ---: |"
)


def far(got_BLV, want_BLV) -> float:
    """Largest absolute difference at valid positions."""
    valid_BL = families.batch()[1]
    return float(np.abs(got_BLV - want_BLV)[valid_BL].max())


def both_ways(cfg, directory: Path) -> tuple[str, str, float, str]:
    """(import, export, largest error of logits in either, share of greedy tokens that agree)."""
    theirs = families.torch_random(cfg)
    theirs.save_pretrained(directory / "theirs")
    params = hf.load_params(directory / "theirs", cfg)
    same = hf.load_config(directory / "theirs") == cfg
    error_in = far(families.our_logits(cfg, params), families.torch_logits(theirs))
    hf.save(directory / "ours", cfg, params)
    back = families.torch_load(directory / "ours")
    state, again = theirs.state_dict(), back.state_dict()
    exact = state.keys() == again.keys() and all((state[k] == again[k]).all() for k in state)
    error_out = far(families.our_logits(cfg, params), families.torch_logits(back))
    agree = families.our_greedy(cfg, params) == families.torch_greedy(back)
    share = f"{agree.sum()} / {agree.size}"
    return "yes" if same else "NO", "bit exact" if exact else "NO", max(error_in, error_out), share


def cached(cfg, params) -> float:
    """Largest difference of logits between cached decoding and whole rows."""
    decoder, (tokens_BL, valid_BL) = lm.Decoder(cfg), families.batch()
    want_BLV = families.our_logits(cfg, params)
    hidden_BD, cache = lm.prefill(
        decoder, params, tokens_BL[:, :N_PROMPT], valid_BL[:, :N_PROMPT], length=LENGTH
    )
    decode, worst = jax.jit(lm.decode, static_argnums=0), 0.0
    for t in range(N_PROMPT - 1, LENGTH):
        got_BV = lm.logits(decoder, params, hidden_BD)
        worst = max(worst, float(np.abs(got_BV - want_BLV[:, t]).max()))
        if t + 1 < LENGTH:
            hidden_BD, cache = decode(decoder, params, tokens_BL[:, t + 1], cache)
    return worst


def on_a_mesh(cfg, params) -> float:
    """Largest difference of logits between parameters on one device and spread over MESH."""
    mesh = sharding.make_mesh(*MESH)
    spread = jax.device_put(params, sharding.shardings(mesh, lm_params.logical_axes(cfg)))
    with sharding.use(mesh):
        got_BLV = families.our_logits(cfg, spread)
    return far(got_BLV, families.our_logits(cfg, params))


def main():
    print("# Architectures against transformers\n")
    print(f"Made by `python benchmarks/{Path(__file__).name} > docs/architectures.md`: tiny random")
    print("models in float32, left-padded rows longer than every window and stretched context.")
    print("Import and export go through files; largest absolute differences of logits, whose")
    print(f"standard deviation is 1 to 2; greedy tokens are decoded with the cache.\n\n{HEAD}")
    for name, cfg in families.MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            import_, export, error, share = both_ways(cfg, Path(directory))
        params = families.random_params(cfg)
        even = families.replace(cfg, vocab_size=98)  # the mesh divides it
        differences = cached(cfg, params), on_a_mesh(even, families.random_params(even))
        cells = (name, import_, export, f"{error:.1e}", share, *(f"{x:.1e}" for x in differences))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
