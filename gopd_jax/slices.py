"""TPU slices: which devices share their fast links."""

from __future__ import annotations


def by_slice(devices: list, slices: int) -> list[list]:
    """The devices of each slice: as the platform tells, else equal runs of them in their order.

    ValueError where the platform tells of another number of slices, or of unequal ones.
    """
    known = _slice_indices(devices)
    if known is None:
        size = len(devices) // slices
        return [devices[i * size : (i + 1) * size] for i in range(slices)]
    groups = [[d for d, i in zip(devices, known) if i == one] for one in sorted({*known})]
    if len(groups) != slices:
        raise ValueError(
            f"mesh.slices = {slices} and the devices lie on {len(groups)} slices; set "
            f"--config.mesh.slices={len(groups)} (a plan names them: --topology=2xv5e:4x4)"
        )
    if len(sizes := {len(group) for group in groups}) > 1:
        raise ValueError(f"slices have {sorted(sizes)} devices; give each the same number")
    return groups


def _slice_indices(devices: list) -> list[int] | None:
    """The slice of each device; None where the platform has none.

    A GPU's slice_index is its host or its NVLink domain, over which parameters may be sharded. A
    topology of one slice, for compiling, leaves it out.
    """
    if devices[0].platform != "tpu":
        return None
    return [getattr(device, "slice_index", 0) for device in devices]
