"""On-policy distillation of language models in JAX."""

import os
import re

__version__ = "0.1.0"


def _emulated_devices() -> int:
    """CPU devices that the environment asks for."""
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    asked += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
    return int((asked or [1])[-1])


# Two collectives of a program may be under way on a device, each holding a thread. The pool has as
# many as there are cores or devices, if NPROC, which is read when the backend starts, says nothing:
# eight emulated devices on few cores could wait for each other until they were killed.
if _emulated_devices() > 1:
    os.environ.setdefault("NPROC", str(4 * _emulated_devices()))
