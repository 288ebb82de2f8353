"""Host memory and time of loading a checkpoint of 4 B parameters, against its size.

    python benchmarks/loading.py --dir=DIR

Makes a checkpoint of Qwen3-4B's shape in bfloat16 (8 GB in several files, random weights) below DIR
and loads it as stored in a process of its own: on one device, and on a mesh of eight emulated ones.
On CPU the parameters lie in the host's memory too, so what loading needs is the peak of the
process's memory less that before loading and less the parameters. Two figures of it: anonymous
memory, which is what a process has for itself, and all resident memory, which counts pages of the
mapped files too. Linux only.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

GB = 10**9
SIZES = {  # of the dimensions that make a model large
    "4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 32768,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}
MESHES = {1: (1, 1, 1), 8: (1, 4, 2)}  # devices -> data, fsdp, tensor


class Memory:
    """The most anonymous and the most resident memory of this process, in bytes, while inside."""

    def __enter__(self):
        self.start, self._done = self.now(), threading.Event()
        self.peak = self.start
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.002):
            self.peak = tuple(map(max, self.peak, self.now()))

    @staticmethod
    def now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
        return 1024 * int(found["RssAnon"]), 1024 * int(found["VmRSS"])


def make(path: Path, size: str) -> None:
    """A checkpoint of random bfloat16 weights in files of 2 GB, a tensor in memory at a time."""
    import ml_dtypes
    import numpy as np

    from gopd_jax.models import params as lm_params
    from gopd_jax.models import safetensors_out

    cfg = lm_params.ModelConfig(
        architecture="qwen3",
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        **SIZES[size],
    )
    draw, block = np.random.default_rng(0), 2**20
    noise = (0.02 * draw.standard_normal(block, np.float32)).astype(ml_dtypes.bfloat16)

    def tensor(name, shape):
        def read():
            return np.resize(np.roll(noise, draw.integers(block)), shape)

        return safetensors_out.Tensor(name, "BF16", shape, read)

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(lm_params.to_hf(cfg) | {"dtype": "bfloat16"}))
    tensors = [tensor(n, r.hf_shape(cfg)) for r in lm_params.table(cfg) for n in r.hf_names(cfg)]
    safetensors_out.write(path, tensors, max_shard_bytes=2 * GB)


def load(path: Path, n_devices: int, dtype: str) -> dict:
    """Load in this process; the figures, bytes."""
    import jax

    if n_devices > 1:
        jax.config.update("jax_num_cpu_devices", n_devices)
    from gopd_jax import sharding
    from gopd_jax.models import hf, safetensors_in
    from gopd_jax.models import params as lm_params

    mesh = sharding.make_mesh(*MESHES[n_devices], devices=jax.devices()[:n_devices])
    cfg = hf.load_config(path)
    where = sharding.shardings(mesh, lm_params.logical_axes(cfg))
    stored = safetensors_in.scan(path)
    start = time.perf_counter()
    with Memory() as memory:
        params = jax.block_until_ready(hf.load_params(path, cfg, shardings=where, dtype=dtype))
    seconds = time.perf_counter() - start
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    on_host = n_bytes if jax.default_backend() == "cpu" else 0
    largest = max(2 * math.prod(tensor.shape) for tensor in stored.values())  # bfloat16
    beyond = [peak - before - on_host for peak, before in zip(memory.peak, memory.start)]
    return {
        "device": f"{n_devices} x {jax.devices()[0].device_kind}",
        "dtype": dtype,
        "files": sum(file.stat().st_size for file in safetensors_in.files(path)),
        "parameters": n_bytes,
        "largest": largest,
        "before": memory.start[0],
        "peak_anonymous": memory.peak[0],
        "peak_resident": memory.peak[1],
        "beyond_anonymous": beyond[0],
        "beyond_resident": beyond[1],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where 8 GB are free")
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--devices", default="1,8", help="of which meshes")
    parser.add_argument("--dtype", choices=("stored", "float32"), default="stored")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # in the process started
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, int(args.devices), args.dtype)))
        return
    path, free = args.dir / f"loading-{args.size}", shutil.disk_usage(args.dir).free
    if args.size == "4b" and free < 10 * GB:
        sys.exit(f"{args.dir} has {free / GB:.1f} GB free and the checkpoint takes 8; give another")
    print(
        "| devices | dtype | files | parameters | largest tensor | beyond the parameters: "
        "anonymous | resident | s |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    try:
        make(path, args.size)
        for n in args.devices.split(","):
            command = [*(sys.executable, __file__, f"--dir={args.dir}", f"--dtype={args.dtype}")]
            command += [f"--devices={n}", f"--load={path}"]
            root = str(Path(__file__).resolve().parents[1])
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, check=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            gb = {key: f"{x / GB:.2f} GB" for key, x in row.items() if isinstance(x, int)}
            times = [row[f"beyond_{kind}"] / row["largest"] for kind in ("anonymous", "resident")]
            print(
                f"| {row['device']} | {row['dtype']} | {gb['files']} | {gb['parameters']} | "
                f"{gb['largest']} | {gb['beyond_anonymous']} ({times[0]:.1f} x) | "
                f"{gb['beyond_resident']} ({times[1]:.1f} x) | {row['seconds']:.0f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
