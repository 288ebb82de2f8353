"""What the compiler leaves on the heap goes back to the system."""

import ctypes
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gopd_jax import memory

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = (ctypes.c_size_t,)
LIBC.free.argtypes = (ctypes.c_void_p,)

glibc = pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="the C library is not glibc")


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@glibc
def test_freed_memory_below_what_is_in_use_is_given_back():
    # Pieces too small for a mapping of their own; the last one, in use, keeps the heap's end up.
    pieces = [LIBC.malloc(64 * 1024) for _ in range(3200)]
    for piece in pieces:
        ctypes.memset(piece, 1, 64 * 1024)
    full = resident_mib()
    for piece in pieces[:-1]:
        LIBC.free(piece)
    assert resident_mib() > full - 20
    memory.give_back()
    assert resident_mib() < full - 180
    LIBC.free(pieces[-1])


def test_a_compiled_program_is_followed_by_giving_back_and_one_that_is_kept_is_not(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_back", lambda: given.append(1))
    monkeypatch.setattr(memory, "SECONDS", 0.0)
    memory.give_back_after_compiling()
    memory.give_back_after_compiling()
    double = jax.jit(lambda x: 2 * x)
    three, four = jnp.ones(3), jnp.ones(4)
    given.clear()
    double(three)
    assert len(given) == 1
    double(three)
    assert len(given) == 1
    double(four)
    assert len(given) == 2


def test_short_compilations_and_other_events_are_passed_over(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_back", lambda: given.append(1))
    memory._after(memory.COMPILED, memory.SECONDS / 2)
    memory._after("/jax/core/compile/jaxpr_trace_duration", 10.0)
    assert not given
    memory._after(memory.COMPILED, memory.SECONDS, fun_name="step")
    assert given
