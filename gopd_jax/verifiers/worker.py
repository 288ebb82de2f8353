"""The process that runs untrusted code: a script of its own, started by sandbox.py.

It reads one job a line on descriptor 0, forks a child for it and answers one line on descriptor 1.
The child gives up what it could do harm with, runs the source, and writes what the entry function
returned. It is never told what the answer should be: the caller compares, in another process. So
whatever the source does to its own process, all it can do for its score is to compute the answer.

Script, not module: it runs without site-packages, and imports nothing of this package.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import random
import resource
import select
import signal
import sys
import time
import types

# What solutions may import. Loaded before the fork: the child cannot open a file to load it.
MODULES = """
__future__ abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime
decimal enum fractions functools heapq itertools json math numbers operator random re statistics
string sys textwrap time types typing
"""

# What these and the interpreter load only when it is used: strptime, "\N{...}", common codecs.
HIDDEN = """
_strptime unicodedata encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1
encodings.punycode encodings.raw_unicode_escape encodings.unicode_escape encodings.utf_16
encodings.utf_16_be encodings.utf_16_le encodings.utf_32 encodings.utf_32_be encodings.utf_32_le
encodings.utf_8_sig
"""

# Audit events of ordinary Python. All others (open, socket.*, os.*, ctypes.*, ...) are refused.
EVENTS = """
array.__new__ builtins.id compile exec object.__delattr__ object.__getattr__ object.__setattr__
sys._getframe sys.unraisablehook time.sleep
"""

# System calls of a running interpreter that opens nothing and starts nothing: write,
# memory (brk mmap munmap mremap mprotect madvise), futex, signals (rt_sigprocmask rt_sigreturn
# sigaltstack restart_syscall), clocks, getrandom, getpid, sched_yield, exit, exit_group.
# The second number names the architecture to the filter (linux/audit.h).
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        (
            1,
            9,
            10,
            11,
            12,
            14,
            15,
            24,
            25,
            28,
            35,
            39,
            60,
            96,
            131,
            201,
            202,
            219,
            228,
            230,
            231,
            318,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (64, 93, 94, 98, 101, 113, 115, 124, 128, 132, 135, 139, 169, 172, 214, 215, 216, 222, 226)
        + (233, 278),
    ),
}
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NOBODY = 65534

N_REPLY = 1 << 20  # bytes that a child may answer
N_NODES = 100_000  # values inside one returned value


class Discard(io.TextIOBase):
    """Standard output of the child: whatever is printed is gone."""

    def write(self, text):
        return len(text)


class _Filter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter))]


def seccomp_program():
    """A classic BPF program that answers EPERM to every call but SYSCALLS; None where unknown."""
    if sys.platform != "linux" or platform.machine() not in SYSCALLS:
        return None
    load, equal, ret = 0x20, 0x15, 0x06  # of linux/bpf_common.h
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # of linux/seccomp.h
    architecture, calls = SYSCALLS[platform.machine()]
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(ret, 0, 0, refuse), (ret, 0, 0, allow)]
    return _Program(len(steps), (_Filter * len(steps))(*steps))


def leave_network(libc) -> bool:
    """Move this process, and so its children, to a network with no interface."""
    if sys.platform != "linux":
        return False
    flags = CLONE_NEWNET | CLONE_NEWIPC
    return libc.unshare(flags if os.geteuid() == 0 else flags | CLONE_NEWUSER) == 0


def confine(result, libc, program, job, parent) -> list[str]:
    """Give up everything but computing and writing to `result`. Returns what could not be done."""
    missing = []
    os.closerange(0, result)
    os.closerange(result + 1, 4096)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:
            missing.append("a user without privileges")
    limits = {
        "CPU": (job["cpu_s"], job["cpu_s"] + 1),  # SIGXCPU, then SIGKILL
        "AS": (job["memory_mb"] << 20,) * 2,
        "FSIZE": (0, 0),
        "NOFILE": (0, 0),
        "NPROC": (0, 0),
        "CORE": (0, 0),
    }
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
        except (AttributeError, ValueError, OSError):
            missing.append(f"RLIMIT_{name}")
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if program is None or libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) != 0:
        missing.append("seccomp")
    sys.addaudithook(_audit(frozenset(EVENTS.split())))
    return missing


def _audit(permitted):
    def audit(event, args):
        if event not in permitted:
            raise PermissionError(f"{event} is not permitted in the sandbox")

    return audit


def guarded_builtins() -> dict:
    """The builtins of solutions, with an __import__ that knows MODULES, and what these load."""
    permitted, true_import = frozenset(MODULES.split()), builtins.__import__
    loaded = permitted | frozenset(HIDDEN.split())

    def __import__(name, globals=None, locals=None, fromlist=(), level=0):
        if name not in loaded:
            raise ImportError(f"import of {name!r} is not permitted; {sorted(permitted)} are")
        return true_import(name, globals, locals, fromlist, level)

    return {**vars(builtins), "__import__": __import__}


def check_plain(value) -> None:
    """TypeError where `value` is not made of exactly the types that JSON has."""
    left, stack = N_NODES, [value]
    while stack:
        item = stack.pop()
        kind = type(item)
        left -= 1
        if left < 0:
            raise TypeError(f"a value of more than {N_NODES} parts")
        if kind is list:
            stack += item
        elif kind is dict:
            for key in item:
                if type(key) is not str:
                    raise TypeError(f"a dict with a key of {type(key).__name__}, JSON has only str")
            stack += item.values()
        elif kind is tuple:
            raise TypeError("a tuple where JSON has only lists")
        elif item is not None and kind not in (int, float, str, bool):
            raise TypeError(f"a {kind.__name__}, which is no plain value")


def solve(job, emit) -> None:
    """Run job["source"], call its entry on each test's arguments and emit what it returns."""
    module = types.ModuleType("solution")
    module.__builtins__ = guarded_builtins()
    sys.modules["solution"] = module  # dataclasses look their module up
    # Without dont_inherit the source would get this file's `from __future__ import annotations`.
    exec(compile(job["source"], "<solution>", "exec", dont_inherit=True), vars(module))
    entry = vars(module).get(job["entry"])
    if not callable(entry):
        return emit({"error": f"defines no function {job['entry']}"})
    for args in job["args"]:
        value = entry(*args)
        try:
            check_plain(value)
            reply = {"value": value}
        except TypeError as error:
            reply = {"error": f"returned {error}"}
        emit(reply)


def child(job, result, libc, program, parent) -> None:
    """The forked process: confine, solve, exit. Source None asks only what cannot be confined."""

    def emit(message):
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(result, data) :]

    sys.stdin = sys.stdout = sys.stderr = Discard()
    random.seed(0)
    missing = confine(result, libc, program, job, parent)
    if job["source"] is None:
        emit({"missing": missing})
        os._exit(0)
    try:
        solve(job, emit)
    except BaseException as error:
        said = f"{type(error).__name__}"
        with contextlib.suppress(BaseException):
            said += f": {error}" if str(error) else ""
        emit({"error": f"raised {said[:300]}"})
    os._exit(0)


def supervise(pid, result, wall_s) -> dict:
    """Collect what the child writes until it ends or is overdue; it is dead when this returns."""
    poll = select.poll()
    poll.register(result, select.POLLIN)
    deadline, chunks, n_bytes, stopped = time.monotonic() + wall_s, [], 0, None
    while stopped is None:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000 + 1):
            stopped = "wall"
        elif chunk := os.read(result, 1 << 16):
            chunks.append(chunk)
            n_bytes += len(chunk)
            stopped = "output" if n_bytes > N_REPLY else None
        else:
            break
    # Also for a child that closed its pipe and went on. One that is exiting keeps its status.
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = b"".join(chunks)[:N_REPLY].decode("ascii", "replace")
    return {"output": output, "stopped": stopped, "status": status}


def judge(job, libc, program) -> dict:
    """Run one job in a child of its own."""
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            child(job, writer, libc, program, parent)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        return supervise(pid, reader, job["wall_s"])
    finally:
        os.close(reader)


def main() -> None:
    for name in [*MODULES.split(), *HIDDEN.split()]:
        importlib.import_module(name)
    libc = ctypes.CDLL(None)
    program = seccomp_program()
    offline = leave_network(libc)
    gc.freeze()  # the children's collections then leave the shared pages alone
    trial = {"source": None, "cpu_s": 10, "wall_s": 20.0, "memory_mb": 256}
    hello = judge(trial, libc, program) | {"offline": offline}
    with open(0, "rb") as jobs, open(1, "wb") as replies:
        reply = hello
        while True:
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()
            if not (line := jobs.readline()):
                break
            reply = judge(json.loads(line), libc, program)


if __name__ == "__main__":
    main()
