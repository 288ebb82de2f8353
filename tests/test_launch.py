"""The launchers, with programs in place of gcloud, kubectl and Slurm's that note their calls.

No TPU VM, GKE cluster or Slurm was there when these were written: what is held is what the scripts
ask for, in which order, and how they answer what those programs say.
"""

import os
import re
import shlex
import signal
import subprocess

import pytest
import tiny
from launching import (
    FLAGS,
    GKE,
    LAUNCH,
    TPU,
    WORKDIR,
    asked,
    begin,
    build,
    environment,
    program,
    run,
    start,
)

from gopd_jax.planning import chips


@pytest.fixture
def there(tmp_path):
    return build(tmp_path)


def verbs(there):
    """What was asked of gcloud, questions left out."""
    words = [call[1] for call in asked(there, "gcloud")]
    assert all(w[:3] == ["compute", "tpus", "queued-resources"] for w in words)
    found = []
    for w in words:
        command = next((x for x in w if x.startswith("--command=")), "")
        is_run = "--distributed" in command
        found.append("run" if is_run else "install" if "pip install" in command else w[3])
    asks = ("describe", "ssh")
    return [verb for verb in found if verb not in asks]


SLICES = "--config.mesh.slices"
CONTRADICTION = "--config.mesh.slices={} contradicts the slices asked for, {}; leave it out"
SHARED = "common.sh"  # which the others source
SCRIPTS = sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_launcher_is_bash_that_can_be_started(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True).returncode == 0
    assert os.access(LAUNCH / name, os.X_OK) == (name != SHARED)
    assert {"local.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch"} <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (TPU, "usage"),
        ((*TPU, "opd", "v5e:4x4", *FLAGS, WORKDIR), "usage"),
        ((*TPU, "opd", "v5e:4x4", "--"), "usage"),
        ((*TPU, "--sp", "opd", "v5e:4x4", "--", WORKDIR), "there is no option --sp"),
        ((*TPU, "opd", "v9:4x4", "--", WORKDIR), "v9:4x4 is no slice; give v5e:4x4"),
        ((*TPU, "opd", "v5e:4x4", "--", *FLAGS), "give --config.workdir=/DIR/NAME, DIR shared"),
        *(  # the compiled programs' place beside it would not be shared
            (
                (*TPU, "opd", "v5e:4x4", "--", *FLAGS, f"--config.workdir={workdir}"),
                "give --config.workdir=/DIR/NAME",
            )
            for workdir in ("a", "a/b", "/", "/shared", "/shared/", "//shared//")
        ),
        ((*TPU, "opd", "v5e:4x4", "--", WORKDIR), "no --config=FILE is given"),
        ((*TPU, "opd", "v5e:4x4", "--", "--config=", WORKDIR), "no --config=FILE is given"),
        ((*TPU, "opd", "v5e:4x4", "--", WORKDIR, *FLAGS), "mine stands before --config; give"),
        (
            (*TPU, "opd", "2xv5e:4x4", "--", *FLAGS, WORKDIR, f"{SLICES}=4"),
            CONTRADICTION.format(4, 2),
        ),
        ((*TPU, "o", "v5e:4x4", "--", *FLAGS, WORKDIR, SLICES, "2"), CONTRADICTION.format(2, 1)),
        ((*TPU, "--attempts=many", "opd", "v5e:4x4", "--", WORKDIR), "no option --attempts=many"),
        (GKE, "usage"),
        (("gke.sh", "--claim=disk", "opd", "v5e:4x4", "--", WORKDIR), "give --image and --claim"),
        ((*GKE, "opd", "v5e", "--", WORKDIR), "v5e is no slice"),
        ((*GKE, "Opd_1", "v5e:4x4", "--", WORKDIR), "Opd_1 is no name of a JobSet"),
        ((*GKE, "opd", "v5e:4x4", "--", *FLAGS, "--config.workdir=/x"), "workdir=/shared/DIR"),
        ((*GKE, "opd", "v5e:4x4", "--", WORKDIR), "no --config=FILE is given"),
        ((*GKE, "opd", "v5e:4x4", "--", WORKDIR, *FLAGS), "mine stands before --config; give"),
        (
            (*GKE, "opd", "2xv5e:4x4", "--", *FLAGS, WORKDIR, f"{SLICES}=4"),
            CONTRADICTION.format(4, 2),
        ),
        ((*GKE, "--chips-per-host=3", "o", "v5e:4x4", "--", WORKDIR), "16 chips, not a multiple"),
        ((*GKE, "--restarts=x", "o", "v5e:4x4", "--", WORKDIR), "--restarts=x is no number"),
        (("slurm.sbatch",), "no --config=FILE is given"),
        (("slurm.sbatch", "--config=", WORKDIR), "no --config=FILE is given"),
        (("slurm.sbatch", *FLAGS), "this is no job of Slurm: submit it, or add --dry-run"),
    ],
    ids=str,
)
def test_wrong_use_ends_with_status_2_before_anything_is_asked(there, arguments, says):
    done = run(there, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "usage: " in done.stderr
    assert asked(there) == []


@pytest.mark.parametrize("launcher", [TPU, GKE], ids=["tpu_vm", "gke"])
@pytest.mark.parametrize(
    ("slices", "says"),
    [
        ("v5e:4xx4", "v5e:4xx4 is no slice; give v5e:4x4"),  # in bash a power
        ("v5e:4x4x", "v5e:4x4x is no slice; give v5e:4x4"),
        ("v5e:4x0", "v5e:4x0 is no slice; give v5e:4x4"),
        ("0xv5e:4x4", "0xv5e:4x4 is no slice; give v5e:4x4"),
        ("v5e:16", "v5e:16 has a shape of 1 axes, and v5e has 2"),
        ("v6e:4x4x4", "v6e:4x4x4 has a shape of 3 axes, and v6e has 2"),
        ("2xv5p:4x4", "2xv5p:4x4 has a shape of 2 axes, and v5p has 3"),
        ("v5e:4x5", "v5e:4x5 is no slice that can be had; those of v5e are 1x1 2x2"),
        ("2xv6e:4x16", "2xv6e:4x16 is no slice that can be had; those of v6e are 1x1 2x2"),
    ],
)
def test_a_slice_that_does_not_exist_is_not_asked_for(there, launcher, slices, says):
    done = run(there, *launcher, "opd", slices, "--", *FLAGS, WORKDIR)
    assert done.returncode == 2
    assert says in done.stderr
    assert asked(there) == []
    if "axes" in says:  # in the words of the plan
        with pytest.raises(ValueError, match=re.escape(says)):
            chips.parse(slices)


# --- TPU VMs


@pytest.mark.parametrize(
    "preset",
    [
        "configs/none.py",
        "configs",
        "launch/common.sh",  # of the tree, and not sent
        f"{tiny.REPOSITORY}/configs/opd.py",
        "configs/../configs/opd.py:1.7b",
        "README.md",
    ],
)
def test_a_preset_that_the_workers_do_not_get_is_refused_before_slices_are_made(there, preset):
    done = run(there, *TPU, "opd", "v5e:4x4", "--", f"--config={preset}", WORKDIR)
    assert done.returncode == 2
    assert f"{preset.split(':')[0]} is no file of {tiny.REPOSITORY} that" in done.stderr
    assert asked(there) == []


@pytest.mark.parametrize(
    "preset",
    [
        ["--config=configs/qwen3.py:1.7b"],
        ["--config", "configs/qwen3.py:1.7b"],
        ["-config", "./configs/opd.py"],
        ["--config=gopd_jax/config.py"],
    ],
    ids=str,
)
@pytest.mark.parametrize("launcher", [TPU, GKE], ids=["tpu_vm", "gke"])
def test_a_preset_is_given_as_main_takes_it(there, launcher, preset):
    done = run(there, *launcher, "--dry-run", "opd", "v5e:4x4", "--", *preset, WORKDIR)
    assert done.returncode == 0, done.stderr
    assert preset[-1] in done.stdout


@pytest.mark.parametrize("launcher", [TPU, GKE], ids=["tpu_vm", "gke"])
@pytest.mark.parametrize("slices", ["2xv5e:4x4", "1xv5e:4x4", "v5e:4x4"])
def test_slices_that_the_flags_tell_too_are_told_once(there, launcher, slices):
    n = 2 if slices.startswith("2x") else 1
    flags = (*FLAGS, WORKDIR, f"{SLICES}={n}")
    done = run(there, *launcher, "--dry-run", "opd", slices, "--", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{SLICES}={n}") == 1


def test_a_slice_is_made_filled_run_on_by_all_workers_and_given_back(there):
    setup = "sudo mount host:/share /shared"
    done = run(
        there, *TPU, "--spot", f"--setup={setup}", "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate="0"
    )
    assert done.returncode == 0, done.stderr
    assert verbs(there) == ["create", "scp", "install", "run", "delete"]
    calls = [call[1] for call in asked(there, "gcloud")]
    assert all(words[4].startswith("opd") or words[3] == "scp" for words in calls)
    assert all("--zone=z" in words for words in calls)
    (create,) = [words for words in calls if words[3] == "create"]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"} < {*create}
    assert {"--spot", "--node-id=opd"} < {*create}
    for words in calls:
        if words[3] in ("ssh", "scp"):
            assert {"--worker=all", "--node=all", "--batch-size=all"} < {*words}
    commands = [words[-1].removeprefix("--command=") for words in calls if words[3] == "ssh"]
    # The disk is mounted before anything is written.
    assert commands.index(setup) < next(i for i, c in enumerate(commands) if "pip install" in c)


@pytest.mark.parametrize(
    ("slices", "options"),
    [
        ("v5p:4x4x4", ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e:8x8", ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"]),
        ("3xv5e:4x8", ["--accelerator-type=v5litepod-32", "--node-count=3"]),
    ],
)
def test_a_slice_is_named_as_the_plan_names_it(there, slices, options):
    done = run(there, *TPU, "--dry-run", "opd", slices, "--", *FLAGS, WORKDIR)
    assert asked(there) == []
    create, *_, last, delete = map(shlex.split, done.stdout.strip().splitlines())
    assert [option for option in options if option not in create] == []
    assert ("--config.mesh.slices=3" in last[-1]) == slices.startswith("3x")
    assert delete[-2:] == ["--force", "--quiet"]
    assert chips.n_devices(slices) > 0


def test_the_workers_run_the_flags_as_they_were_given(there):
    """The command line that ssh carries, by a shell in a worker's place."""
    run(there, *TPU, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate="0")
    (command,) = [call[1][-1] for call in asked(there, "gcloud") if "--distributed" in call[1][-1]]
    python = there / "gopd/.venv/bin/python"
    program(there, python)
    shell = ["bash", "-c", command.removeprefix("--command=")]
    subprocess.run(shell, env=environment(there, HOME=str(there)), check=True)
    ((_, words, _, said),) = asked(there, "python")
    assert words == ["-m", "gopd_jax.main", "--distributed", *FLAGS, WORKDIR]
    assert said == {"JAX_COMPILATION_CACHE_DIR": "/shared/xla"}
    # What a broken connection left behind ends first; this shell is not among it.
    (pattern,) = {call[1][-1] for call in asked(there) if call[0] in ("pkill", "pgrep")}
    assert re.search(pattern, f"{python} -m gopd_jax.main --distributed")
    assert not re.search(pattern, shlex.join(shell))


def test_a_slice_that_is_taken_away_is_made_again_and_runs_the_same_command(there):
    done = run(there, *TPU, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate=["preempted", "0"])
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "install", "run", "delete"]
    assert verbs(there) == once * 2
    runs = [call[1] for call in asked(there, "gcloud") if "--distributed" in call[1][-1]]
    assert runs[0] == runs[1]


def test_it_is_asked_for_as_often_as_is_said(there):
    options = (*TPU, "--attempts=2", "opd", "v5e:4x4", "--", *FLAGS, WORKDIR)
    done = run(there, *options, fate=["preempted"] * 3)
    assert done.returncode == 1
    assert verbs(there).count("create") == 2
    assert "2 attempts have failed" in done.stderr


@pytest.mark.parametrize(
    ("fate", "status", "runs"),
    [
        (["255", "0"], 0, 2),  # a broken connection
        (["1"], 1, 1),  # the run's own failure
        (["2"], 2, 1),  # wrong input
    ],
)
def test_what_went_wrong_on_slices_that_are_there_is_told_apart(there, fate, status, runs):
    done = run(there, *TPU, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate=fate)
    assert done.returncode == status, done.stderr
    found = verbs(there)
    assert found == ["create", "scp", "install", *["run"] * runs, *["delete"] * (status == 0)]
    assert ("stays; it is deleted with: gcloud" in done.stderr) == (status != 0)
    if status == 2:  # nothing is waited for
        assert "--distributed" in asked(there, "gcloud")[-1][1][-1]


def test_slices_that_are_there_are_used_and_may_stay(there):
    (there / "state").write_text("ACTIVE")
    (there / "installed").touch()
    done = run(there, *TPU, "--keep", "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate="0")
    assert done.returncode == 0, done.stderr
    assert verbs(there) == ["run"]


def test_an_installation_that_fails_is_not_run_on(there):
    (there / "no index").touch()
    done = run(there, *TPU, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate="0")
    assert done.returncode == 1
    assert verbs(there) == ["create", "scp", "install"]
    assert "opd stays" in done.stderr


def test_sigterm_stops_the_run_and_leaves_the_slices(there):
    process = start(there, *TPU, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR, fate=["until stopped"])
    begin(process, there)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 143, err
    assert verbs(there) == ["create", "scp", "install", "run"]
    assert asked(there, "gcloud")[-1][1][-1].startswith("--command=pkill -TERM")
    assert "opd stays" in err
