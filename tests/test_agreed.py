"""Processes that hold the same rows learn from the same verdicts, whatever their clocks say."""

import socket
import subprocess
import sys

import pytest
import tiny

# A process of two with a device each: the verdicts of its rows differ by the process, as those on
# code do where one host is slower; what it makes of them comes back as a line.
PROCESS = """
import sys, types
import jax, numpy as np
from gopd_jax import advance, processes, sharding
from gopd_jax.verifiers import Verdict

process, address, shape = int(sys.argv[1]), sys.argv[2], map(int, sys.argv[3].split(","))
jax.distributed.initialize(address, 2, process)
mesh = sharding.make_mesh(*shape)
i, n = share = sharding.process_share(mesh, 4)
rows = np.arange(4, dtype=np.int32)[i * 4 // n : (i + 1) * 4 // n]
rollout = processes.to_global(mesh, rows)
found = {0: (1.0, 0.0, 0.5, 1.0), 1: (1.0, 1.0, 0.25, 0.0)}[process]
advance.completions = lambda tokenizer, rollout: rollout
advance.verify = lambda rows, records: [Verdict(found[row], "") for row in rows]
student = types.SimpleNamespace(tokenizer=None)
stepper = types.SimpleNamespace(run=types.SimpleNamespace(student=student), share=share)
reward_B = advance.Stepper._rewards(stepper, rollout, ())
print(rows.tolist(), reward_B.tolist(), reward_B.dtype)
"""


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("1,1,2", ["[0, 1, 2, 3] [1.0, 0.0, 0.25, 0.0] float32"] * 2),
        ("2,1,1", ["[0, 1] [1.0, 0.0] float32", "[2, 3] [0.25, 0.0] float32"]),
    ],
    ids=("one share", "a share each"),
)
def test_hosts_of_the_same_rows_agree_on_their_rewards(shape, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(process), address, shape],
            env=tiny.environment(n_devices=1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        done = [process.communicate(timeout=tiny.TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [out.splitlines()[-1:] for out, _ in done] == [[line] for line in said], done
