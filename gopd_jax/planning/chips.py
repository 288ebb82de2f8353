"""Accelerators by name: what a chip can do at its best, and devices to compile for without any."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Peaks of one chip: bfloat16 FLOP/s, bytes/s of its HBM, and the bytes a program may use.

    usable is what the compiler itself allows a program (libtpu 0.0.42), below the capacity on the
    data sheet.
    """

    flops: float
    bandwidth: float
    usable: int
    source: str


CHIPS = {
    "v5e": Chip(
        flops=197e12,
        bandwidth=819e9,
        usable=int(15.75 * GIB),
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        flops=459e12,
        bandwidth=2765e9,
        usable=int(95.74 * GIB),
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        flops=918e12,
        bandwidth=1638e9,
        usable=int(31.25 * GIB),
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
}
# A float32 product at precision "highest" is this many bfloat16 passes of a TPU's matrix units.
FLOAT32_PASSES = 6
# Bytes/s of a chip's link to its host (PCIe): an order of magnitude for all kinds, as assumed in
# https://jax-ml.github.io/scaling-book/tpus. Chips that share a host's memory may get less.
HOST_LINK = 15e9
FORM = (
    "give KIND:SHAPE, such as v5e:1x1, v5e:4x4, v5p:4x4x4 or v6e:8x8, 2xv5e:4x4 for two slices of "
    "it; or cpu:8 to try it without libtpu"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to lay a mesh over; chip is None where they are emulated on the CPU."""

    name: str
    devices: tuple
    chip: Chip | None


def topology(name: str) -> Topology:
    """The devices of "v5e:4x4", "2xv5e:4x4" or "cpu:8". No accelerator is touched.

    ValueError where there is no such topology, or where the TPU compiler is not installed.
    """
    slices, kind, shape = parse(name)
    if kind == "cpu":
        return Topology(name=name, devices=_emulated(name), chip=None)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name} needs the TPU compiler, libtpu, which is not installed: "
            'pip install "jax[tpu]". It runs on any CPU; --topology=cpu:8 does without it'
        )
    from jax.experimental import topologies

    one = f"{kind}:{'x'.join(map(str, shape))}"
    options = {"num_slices": slices} if slices > 1 else {}
    if math.prod(shape) == 1:  # else libtpu divides it into hosts of 2x2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except (RuntimeError, ValueError) as error:  # among them jax.errors.JaxRuntimeError
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"libtpu has no topology {name}: {why}; {FORM}") from error
    return Topology(name=name, devices=tuple(found.devices), chip=CHIPS[kind])


def parse(name: str) -> tuple[int, str, tuple[int, ...]]:
    """(2, "v5e", (4, 4)) of "2xv5e:4x4": slices, kind, the shape of each.

    ValueError for what is no topology of a chip of the table.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None:
        raise ValueError(f"--topology={name} is no topology; {FORM}")
    slices, kind = int(match[1] or 1), match[2]
    shape = tuple(map(int, match[3].split("x")))
    if kind not in (*CHIPS, "cpu"):
        raise ValueError(f"--topology={name}: of {kind} nothing is known here; {FORM}")
    n_axes = {"cpu": 1, "v5p": 3}.get(kind, 2)
    if len(shape) != n_axes:
        raise ValueError(
            f"--topology={name} has a shape of {len(shape)} axes, and {kind} has {n_axes}; {FORM}"
        )
    return slices, kind, shape


def require_slices(name: str, slices: int) -> None:
    """ValueError where an emulated topology has another number of slices than mesh.slices.

    Of TPUs the devices know it themselves.
    """
    named, kind, shape = parse(name)
    if kind == "cpu" and named != slices:
        own = f"cpu:{shape[0]}" if named > 1 else f"{slices}xcpu:{max(shape[0] // slices, 1)}"
        raise ValueError(
            f"--topology={name} is of {named} slices and mesh.slices is {slices}; set "
            f"--config.mesh.slices={named}, or name another topology: {own}"
        )


def n_devices(name: str) -> int:
    """Devices of a topology by its name, of all its slices."""
    slices, _, shape = parse(name)
    return slices * math.prod(shape)


def without_accelerator(name: str) -> None:
    """Set this process up to compile for `name`: before JAX makes its first device."""
    _, kind, _ = parse(name)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", n_devices(name))
        return
    # Else libtpu looks for the machine that it is on, and for other programs that hold the chips.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def _emulated(name: str) -> tuple:
    n, devices = n_devices(name), jax.devices("cpu")
    if len(devices) < n:
        raise ValueError(
            f"--topology={name} and this process has {len(devices)} CPU devices; start it with "
            f"JAX_NUM_CPU_DEVICES={n}"
        )
    return tuple(devices[:n])
