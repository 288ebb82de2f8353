"""The launchers of GKE and Slurm, as tests/test_launch.py has that of TPU VMs."""

import re
import shlex
import signal
import sys

import pytest
import tiny
import yaml
from launching import FLAGS, GKE, LAUNCH, WORKDIR, asked, begin, build, run, start

from gopd_jax.planning import chips


@pytest.fixture
def there(tmp_path):
    return build(tmp_path)


# --- GKE


def manifest(there, *arguments):
    done = run(there, *GKE, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert asked(there) == []
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("slices", "options", "n", "hosts", "per_host", "selected"),
    [
        ("v5e:4x4", (), 1, 4, 4, ("tpu-v5-lite-podslice", "4x4")),
        ("2xv5p:4x4x4", (), 2, 16, 4, ("tpu-v5p-slice", "4x4x4")),
        ("v6e:2x4", ("--chips-per-host=8",), 1, 1, 8, ("tpu-v6e-slice", "2x4")),
        ("v5e:1x1", (), 1, 1, 1, ("tpu-v5-lite-podslice", "1x1")),
    ],
)
def test_a_jobset_has_a_pod_for_each_host_and_a_replica_for_each_slice(
    there, slices, options, n, hosts, per_host, selected
):
    made = manifest(there, *options, "opd", slices, "--", *FLAGS, WORKDIR)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slice_job,) = made["spec"]["replicatedJobs"]
    job = slice_job["template"]["spec"]
    assert (slice_job["name"], slice_job["replicas"]) == ("slice-job", n)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": selected[0],
        "cloud.google.com/gke-tpu-topology": selected[1],
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": per_host}
    assert n * hosts * per_host == chips.n_devices(slices)
    one_slice = ["--distributed", *FLAGS, WORKDIR]
    assert container["args"] == one_slice + ["--config.mesh.slices=2"] * (n == 2)
    assert not any("MEGASCALE" in e["name"] for e in container["env"])  # they are GKE's to set


@pytest.mark.parametrize("word", ["on", "no", "null", "y"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(there, word):
    options = (f"--queue={word}", "--image=12:34", "--claim=1234")
    made = manifest(there, *options, word, "v5e:4x4", "--", *FLAGS, WORKDIR)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    labels = {"kueue.x-k8s.io/queue-name": word, "xpk.google.com/workload": word}
    assert made["metadata"]["name"] == word
    assert made["metadata"]["labels"] == labels
    assert job["metadata"]["labels"] == {"xpk.google.com/workload": word}
    assert job["spec"]["containers"][0]["image"] == "12:34"
    assert job["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "1234"


def test_a_jobset_starts_again_after_all_but_wrong_input(there):
    made = manifest(there, "--restarts=7", "opd", "v5e:4x4", "--", *FLAGS, WORKDIR)
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_checkpoints_and_compiled_programs_of_a_jobset_lie_on_the_claim(there):
    made = manifest(there, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}}]
    (mount,) = container["volumeMounts"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert mount == {"name": "shared", "mountPath": "/shared"}
    assert env["JAX_COMPILATION_CACHE_DIR"].startswith("/shared/")
    assert WORKDIR.startswith("--config.workdir=/shared/")
    assert container["command"] == ["python", "-m", "gopd_jax.main"]  # no shell takes the SIGTERM
    # The template itself is YAML, so that editors and linters can read it.
    assert yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["kind"] == "JobSet"


def test_kubectl_is_given_what_a_dry_run_prints(there):
    shown = run(there, *GKE, "--dry-run", "opd", "v5e:4x4", "--", *FLAGS, WORKDIR).stdout
    assert run(there, *GKE, "opd", "v5e:4x4", "--", *FLAGS, WORKDIR).returncode == 0
    ((_, words, text, _),) = asked(there)
    assert words == ["apply", "-f", "-"]
    assert text == shown


# --- Slurm

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}


def directives():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    last = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[last:])  # sbatch reads no further
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return dict((*one.split("=", 1), True)[:2] for one in found)


def test_the_job_asks_for_a_task_a_gpu_a_warning_and_to_be_requeued():
    asks = directives()
    assert asks["ntasks-per-node"] == asks["gpus-per-node"]  # as JAX's Slurm detection counts
    assert asks["requeue"] is True
    # To the batch shell alone (B:): it passes SIGTERM on.
    assert re.fullmatch(r"B:USR1@\d{3}", asks["signal"])
    assert asks["open-mode"] == "append"  # one log of all the times it ran


def test_srun_starts_the_run_with_the_flags_as_they_were_given(there):
    done = run(there, "slurm.sbatch", *FLAGS, WORKDIR, fate="0", **JOB)
    assert done.returncode == 0, done.stderr
    ((_, words, _, said),) = asked(there)
    python = words.index(sys.executable)
    assert words[python:] == [
        *(sys.executable, "-m", "gopd_jax.main", *FLAGS, WORKDIR, "--distributed")
    ]
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none"} < {*words[:python]}
    assert said["JAX_COMPILATION_CACHE_DIR"] == f"{there}/.cache/gopd_jax/xla"  # as main's own
    run(there, "slurm.sbatch", *FLAGS, fate="0", JAX_COMPILATION_CACHE_DIR="/fast", **JOB)
    assert asked(there)[-1][-1]["JAX_COMPILATION_CACHE_DIR"] == "/fast"


def test_a_dry_run_of_the_job_prints_what_srun_would_be_given(there):
    shown = run(there, "slurm.sbatch", "--dry-run", *FLAGS, WORKDIR)
    assert asked(there) == []
    run(there, "slurm.sbatch", *FLAGS, WORKDIR, fate="0", **JOB)
    assert shlex.split(shown.stdout) == ["srun", *asked(there)[0][1]]


@pytest.mark.parametrize("preset", [["-config=configs/opd.py"], ["--config", "configs/opd.py"]])
def test_a_job_takes_a_preset_as_main_does(there, preset):
    shown = run(there, "slurm.sbatch", "--dry-run", *preset, WORKDIR)
    assert shown.returncode == 0, shown.stderr
    assert [*preset, WORKDIR, "--distributed"] == shlex.split(shown.stdout)[-len(preset) - 2 :]


def test_gpus_that_no_task_would_have_are_refused(there):
    done = run(there, "slurm.sbatch", *FLAGS, **JOB | {"SLURM_GPUS_ON_NODE": "8"})
    assert done.returncode == 2
    assert "4 tasks and 8 GPUs a node" in done.stderr
    assert "give --ntasks-per-node=8" in done.stderr
    assert asked(there) == []


def test_the_end_of_its_time_saves_the_run_and_requeues_the_job(there):
    process = start(there, "slurm.sbatch", *FLAGS, fate=["until stopped"], **JOB)
    begin(process, there)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 143, err
    assert [(name, words) for name, words, _, _ in asked(there)[1:]] == [
        ("scancel", ["--signal=TERM", "7"]),  # the tasks: without --batch, not this script
        ("scontrol", ["requeue", "7"]),
    ]


@pytest.mark.parametrize("status", [143, 1, 2])
def test_a_job_that_was_cancelled_or_failed_is_not_requeued(there, status):
    done = run(there, "slurm.sbatch", *FLAGS, fate=[str(status)], **JOB)
    assert done.returncode == status
    assert [call[0] for call in asked(there)] == ["srun"]


def test_jax_reads_the_processes_off_the_variables_that_a_task_of_slurm_has(monkeypatch):
    """Tasks of two nodes: each has the device of its own index there, so one task for each GPU."""
    from jax._src.clusters import ClusterEnv

    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-04],gpu9", "SLURM_NTASKS": "8"}
    for rank, local in ((1, 1), (5, 1)):
        ranks = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local)}
        for key, value in (task | ranks).items():
            monkeypatch.setenv(key, value)
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
        address, count, index, devices = found
        assert (count, index, devices) == (8, rank, [local])
        assert re.fullmatch(r"gpu03:\d+", address)
