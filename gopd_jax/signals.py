"""SIGTERM and Ctrl-C as a question that the loop asks between two steps."""

import contextlib
import os
import signal
import threading

import jax

from gopd_jax import sharding


@contextlib.contextmanager
def stop_signals():
    """A function that gives the SIGTERM or SIGINT that came, on any process, or None.

    A second signal of a kind acts as if there were no handler, for a run that hangs. A signal that
    was ignored before (nohup, a shell's background job) stays ignored.
    """
    caught, before = [], {}

    def handle(number, _frame):
        caught.append(number)
        signal.signal(number, before[number])
        # Not print: a signal may come in the middle of another write.
        os.write(2, b"\nstopping after the step in hand; once more to stop at once\n")

    def stop() -> int | None:
        if jax.process_count() == 1:
            return caught[0] if caught else None
        if not sharding.any_process(bool(caught)):
            return None
        terminated = sharding.any_process(signal.SIGTERM in caught)
        return signal.SIGTERM if terminated else signal.SIGINT

    if threading.current_thread() is threading.main_thread():  # elsewhere they are the caller's
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                # None: a handler of C code, such as jax.distributed's notice of preemption.
                before[number] = signal.signal(number, handle) or signal.SIG_DFL
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
