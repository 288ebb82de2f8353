"""SIGTERM and Ctrl-C as a question that the loop asks between two steps."""

import collections
import contextlib
import os
import signal
import threading

import jax

from gopd_jax import processes


@contextlib.contextmanager
def stop_signals():
    """A function that gives the SIGTERM or SIGINT that came, on any process, or None.

    Several processes have to agree on it, over devices that are at work: each question is answered
    when the next one is asked, so that nobody waits for a step that was dispatched in between.
    A second signal of a kind acts as if there were no handler, for a run that hangs. A signal that
    was ignored before (nohup, a shell's background job) stays ignored.
    """
    caught, before, asked = [], {}, collections.deque()

    def handle(number, _frame):
        caught.append(number)
        signal.signal(number, before[number])
        # Not print: a signal may come in the middle of another write.
        os.write(2, b"\nstopping after the step in hand; once more to stop at once\n")

    def stop() -> int | None:
        if jax.process_count() == 1:
            return caught[0] if caught else None
        found = processes.largest(max(caught, default=0))  # SIGTERM is above SIGINT
        asked.append(processes.in_turn(found))
        answer = int(asked.popleft().addressable_data(0)) if len(asked) > 1 else 0
        return signal.Signals(answer) if answer else None

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
