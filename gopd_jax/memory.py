"""Memory that the process's allocator keeps, given back to the system."""

import ctypes
import functools

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
# A program compiled or loaded in less leaves too little to be worth a walk of the heap.
SECONDS = 0.1


def give_back() -> None:
    """What was freed, of every arena, to the system: glibc's malloc_trim.

    Other C libraries have no such call, and nothing happens.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@functools.cache
def give_back_after_compiling() -> None:
    """From now on what the compiler leaves is given back when it is done; once for a process.

    LLVM takes some 500 MiB for a fused step, in pieces of the heap that glibc keeps once they are
    freed: without this a run holds them to its end.
    """
    jax.monitoring.register_event_duration_secs_listener(_after)


def _after(event: str, seconds: float, **_) -> None:
    if event == COMPILED and seconds >= SECONDS:
        give_back()
