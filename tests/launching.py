"""Programs in place of gcloud, kubectl and Slurm's that note how they are called."""

import json
import os
import subprocess
import sys
import time

import tiny

LAUNCH = tiny.REPOSITORY / "launch"
FLAGS = ("--config=configs/opd.py", '--config.data.tasks=("math",)', "--config.seed=3")
WORKDIR = "--config.workdir=/shared/it's mine"
TPU = ("tpu_vm.sh", "--zone=z")
GKE = ("gke.sh", "--image=repo/gopd:1", "--claim=disk")


# Notes its arguments and input, then acts. A queued resource is the file `state`; what becomes of
# each run on it is the next line of `fate`: a status, or "preempted", or "until stopped".
FAKE = """#!{python} -SE
import json, os, pathlib, sys, time

root, name, words = pathlib.Path({root!r}), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
known = "SLURM_JOB_ID", "SLURM_PROCID", "JAX_COMPILATION_CACHE_DIR"
said = {{key: os.environ[key] for key in known if key in os.environ}}
text = sys.stdin.read() if name == "kubectl" else None
with open(root / "asked", "a") as file:
    file.write(json.dumps([name, words, text, said]) + "\\n")
state, stopped, installed = root / "state", root / "stopped", root / "installed"


def fate():
    first, *rest = (root / "fate").read_text().splitlines()
    (root / "fate").write_text("\\n".join(rest))
    if first == "until stopped":
        (root / "begun").touch()
        while not stopped.exists():
            time.sleep(0.01)
        sys.exit(143)
    if first == "preempted":
        state.write_text("SUSPENDED")
        installed.unlink()
        sys.exit(255)
    sys.exit(int(first))


if name == "gcloud":
    verb, command = words[3], next((w for w in words if w.startswith("--command=")), "")
    if verb == "describe" and not state.exists():
        sys.exit("ERROR: NOT_FOUND: no such queued resource")
    elif verb == "describe":
        print(state.read_text())
    elif verb == "create":
        state.write_text("ACTIVE")
    elif verb == "delete":
        state.unlink()
    elif "--distributed" in command:
        fate()
    elif "pip install" in command:
        if (root / "no index").exists():
            sys.exit(1)
        installed.touch()
    elif command == "--command=test -e gopd/installed":
        sys.exit(not installed.exists())
    elif command.startswith("--command=pkill"):
        stopped.touch()
elif name == "srun":
    fate()
elif name == "scancel":
    stopped.touch()
elif name == "pgrep":
    sys.exit(1)
"""


def build(root):
    """A directory whose bin has the programs."""
    (root / "bin").mkdir()
    for name in ("gcloud", "kubectl", "srun", "scancel", "scontrol", "pkill", "pgrep", "tar"):
        program(root, root / "bin" / name)
    return root


def program(root, path):
    """A program that notes its calls in `root`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(python=sys.executable, root=str(root)))
    path.chmod(0o755)


def environment(there, **more):
    path = f"{there}/bin:/usr/bin:/bin"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_COMP"))}
    return clean | {"PATH": path, "PYTHON": sys.executable, "POLL": "0", "GRACE": "0"} | more


def start(there, script, *arguments, fate=(), **more):
    (there / "fate").write_text("\n".join(fate))
    return subprocess.Popen(
        ["bash", LAUNCH / script, *arguments],
        env=environment(there, HOME=str(there), **more),
        cwd=there,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(there, script, *arguments, **options):
    process = start(there, script, *arguments, **options)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def asked(there, name=None):
    """(program, its arguments, its input, some of its environment) of each call."""
    file = there / "asked"
    calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [call for call in calls if name in (None, call[0])]


def begin(process, there):
    while not (there / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
