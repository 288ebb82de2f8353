"""The plan's command: what it refuses and why, what it prints, and the TPU's compiler behind it."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest
import tiny
from test_plan import preset

from gopd_jax import assembly, setup, sharding
from gopd_jax.config import Mesh, Model
from gopd_jax.models import params as lm_params
from gopd_jax.models.published import PUBLISHED
from gopd_jax.planning import abstract, chips, phases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p", "is no topology; give KIND:SHAPE"),
        ("v5e:0x4", "is no topology"),
        ("v9:4x4", "of v9 nothing is known"),
        ("v5p:4x4", "a shape of 2 axes, and v5p has 3"),
        ("cpu:2x4", "a shape of 2 axes, and cpu has 1"),
        ("cpu:64", "has 8 CPU devices; start it with JAX_NUM_CPU_DEVICES=64"),
    ],
)
def test_a_wrong_topology_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        chips.topology(name)


def test_without_libtpu_the_cure_is_said(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]".*--topology=cpu:8'):
        chips.topology("v5e:2x2")


def test_a_model_that_is_not_there_is_refused_with_the_names_that_need_no_download(root):
    config = tiny.config(root, student=Model(path="/models/Qwen3-4B"))
    with pytest.raises(
        ValueError, match=r"student: '/models/Qwen3-4B' has no config.json"
    ) as caught:
        abstract.prepare(config, jax.devices())
    assert all(name in str(caught.value) for name in PUBLISHED)
    assert "--config.student.path=Qwen/Qwen3-4B" in str(caught.value)


def test_an_attention_that_the_devices_do_not_run_is_refused_by_plan_and_run(root):
    config = tiny.config(root, batch={"attention": "splash"})
    for prepare in (setup.prepare, lambda config: abstract.prepare(config, jax.devices())):
        with pytest.raises(ValueError, match=r"splash', which runs on TPUs, and .* CPUs; .*=auto"):
            prepare(config)
    config.batch.attention = "xla"
    made = setup.prepare(config)
    told = assembly.attention_told(config, made.mesh, made.roles)
    assert told == "attention of whole rows: xla (it was asked for)"


def test_a_mesh_that_does_not_divide_is_refused(root):
    for mesh, says in (
        (Mesh(data=3), r"mesh.data \* .* \* mesh.tensor = 3 \* 1 \* 1 = 3 and there are 8 devices"),
        (Mesh(tensor=8), "student has 4 along 'heads', which mesh.tensor = 8 does not divide"),
        (Mesh(expert=2), r"mesh.expert = 2, and no model has routed experts.* mesh.fsdp by 2"),
    ):
        with pytest.raises(ValueError, match=says):
            abstract.prepare(tiny.config(root, mesh=mesh), jax.devices())
    with pytest.raises(ValueError, match=r"12 rows .* do not divide over mesh.data"):
        abstract.prepare(tiny.config(root, batch={"prompts": 12}), jax.devices())


def test_settings_that_main_refuses_are_refused_and_absent_data_is_not(root):
    config = tiny.config(root, data={"train": "absent.jsonl", "test": "absent.jsonl"})
    assert any("absent.jsonl" in text for text in config.problems())
    abstract.prepare(config, jax.devices())
    config.objective.lam = -1.0
    with pytest.raises(ValueError, match=r"objective.lam is -1.0"):
        abstract.prepare(config, jax.devices())


def test_a_context_that_the_model_does_not_have_is_refused(root):
    student = Model(path="Qwen/Qwen3-1.7B")
    config = tiny.config(root, student=student, sampling={"completion_length": 40_960})
    with pytest.raises(ValueError, match="max_position_embeddings = 40960"):
        abstract.prepare(config, jax.devices())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-1.7B", 1.72),
        ("Qwen/Qwen3-4B", 4.02),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-32B", 32.76),
        ("Qwen/Qwen3-30B-A3B", 30.53),
    ],
)
def test_a_published_shape_has_as_many_parameters_as_its_model(name, billions):
    # the totals of the hub's safetensors; tied heads once
    cfg, stored = abstract.model_config(name)
    count = sum(x.size for x in jax.tree.leaves(lm_params.abstract_params(cfg)))
    assert count / 1e9 == pytest.approx(billions, abs=0.006)
    assert stored == "bfloat16"


def command(*arguments):
    environment = tiny.environment()
    given = os.environ.get("PYTHONPATH", "")  # where libtpu may be
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], given])
    return subprocess.run(
        [sys.executable, "-m", "gopd_jax.plan", *arguments],
        env=environment,
        cwd=tiny.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT,
    )


def test_the_command_refuses_with_status_2():
    done = command("--config=configs/exopd.py:tiny")
    assert done.returncode == 2
    assert "--topology has to be given; give KIND:SHAPE" in done.stderr


def test_a_search_without_a_limit_is_refused_with_status_2():
    done = command("--config=configs/exopd.py:tiny", "--topology=cpu:4", "--search")
    assert done.returncode == 2
    assert "cpu:4 has no limit that is known; give a slice: --topology=v5e:4x4" in done.stderr


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--phase=", "--phase names none; the phases are"),
        ("--phase=evaluation", r"--phase has \['evaluation'\]; .* 'fused', 'evaluate'\]"),
        ("--json={tmp_path}", "Is a directory: '{tmp_path}'"),
        ("--json={tmp_path}/no/plan.json", "No such file or directory: '{tmp_path}/no/plan.json'"),
        ("--topology=2xcpu:2", "2xcpu:2 is of 2 slices and mesh.slices is 1; set --config.mesh.sl"),
        ("--config.mesh.slices=2", "cpu:4 is of 1 slices and mesh.slices is 2; .* name .* 2xcpu:2"),
    ],
)
def test_what_would_be_noticed_after_minutes_is_refused_at_once(tmp_path, flag, says):
    flag, says = flag.format(tmp_path=tmp_path), says.format(tmp_path=tmp_path)
    done = command("--config=configs/exopd.py:tiny", "--topology=cpu:4", flag)
    assert done.returncode == 2
    assert re.search(says, done.stderr), done.stderr
    assert "tracing" not in done.stderr


@pytest.mark.slow
def test_the_command_prints_a_plan_of_every_phase(tmp_path):
    file = tmp_path / "plan.json"
    tiny_exopd = "--config=configs/exopd.py:tiny"
    done = command(tiny_exopd, "--topology=cpu:4", f"--json={file}", "--config.batch.prompts=16")
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text())
    assert list(values["phases"]) == list(phases.PHASES)
    assert (values["devices"], values["config"]["batch"]["prompts"]) == (4, 16)
    stages = [values["phases"][name]["flops"]["float32"] for name in phases.STEP]
    assert sum(stages[:3]) == stages[3]  # the fused step is its stages


# --- with the TPU's compiler


@pytest.fixture(scope="module")
def needs_libtpu():
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_a_small_config_fits_a_tpu(tmp_path):
    file = tmp_path / "plan.json"
    done = command(
        *("--config=configs/exopd.py:tiny", "--topology=v5e:2x2", "--phase=score"),
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr
    assert "fits: score on v5e:2x2" in done.stdout
    values = json.loads(file.read_text())
    assert values["phases"]["score"]["fits"] is True
    assert values["estimated_seconds"]


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_experts_on_the_host_are_no_arguments_of_the_device(tmp_path):
    file = tmp_path / "plan.json"
    done = command(
        *("--config=configs/qwen3.py:4b_moe", "--topology=v5e:4x4", "--phase=score"),
        *("--config.mesh.fsdp=4", "--config.batch.prompts=16", "--config.batch.microbatches=4"),
        *("--config.data.prompt_length=128", "--config.sampling.completion_length=128"),
        *("--config.teachers.large.placement=host", f"--json={file}"),
    )
    assert done.returncode == 0, done.stderr
    memory = json.loads(file.read_text())["phases"]["score"]["memory"]
    # The reference in bfloat16, over 16 chips; the teacher's 57 GiB come in as temporaries.
    assert memory["arguments"] == pytest.approx(4.022e9 * 2 / 16, rel=0.01)
    assert memory["temporaries"] > 30.53e9 * 2 / 16


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_a_plan_for_a_tpu_attends_as_the_run_would():
    config = preset("qwen3", None)
    for model in (config.student, config.reference, *config.teachers.values()):
        model.path = "Qwen/Qwen3-4B"
    config.reference.dtype = "float32"
    run = abstract.prepare(config, chips.topology("v5p:4x4x4").devices)
    taken = {name: role.decoder.attention for name, role in run.roles.items()}
    assert taken.pop("reference") == "xla"
    assert set(taken.values()) == {"splash"}
    assert (run.recipe.student.attention, run.recipe.student.remat) == ("splash", "layers")
    told = assembly.attention_told(config, run.recipe.mesh, run.roles)
    assert "splash (the devices are TPUs) of student, teacher:math, teacher:code" in told
    assert "xla (splash multiplies in bfloat16, and dtype is 'float32'" in told
    config.batch.attention = "splash"
    with pytest.raises(ValueError, match=r"reference: batch.attention is 'splash', which multipli"):
        abstract.prepare(config, chips.topology("v5p:4x4x4").devices)


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_one_chip_is_a_topology_though_hosts_have_four():
    done = command(
        *("--config=configs/exopd.py:tiny", "--topology=v6e:1x1", "--phase=score", "--nochanges")
    )
    assert done.returncode == 0, done.stderr
    assert "v6e:1x1: 1 device, mesh data 1 x fsdp 1 x tensor 1;" in done.stdout
    assert "of 31.25 GiB" in done.stdout
    assert " M params, float32" in done.stdout
    assert len(chips.topology("v5e:1x1").devices) == 1
    assert len(chips.topology("2xv5e:1x1").devices) == 2


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_a_config_that_cannot_fit_a_tpu_is_told_so():
    teachers = [f"--config.teachers.{task}.path=Qwen/Qwen3-32B" for task in ("math", "code")]
    done = command(
        *("--config=configs/exopd.py:tiny", "--topology=v5e:2x2", "--phase=score", "--nochanges"),
        *("--config.student.path=Qwen/Qwen3-1.7B", "--config.reference.path=Qwen/Qwen3-1.7B"),
        *teachers,
    )
    assert done.returncode == 1, done.stderr
    assert "does not fit: score on v5e:2x2" in done.stdout
    assert "of 15.75" in done.stdout


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
def test_a_shape_that_no_tpu_has_is_refused():
    with pytest.raises(ValueError, match="libtpu has no topology v5e:3x3"):
        chips.topology("v5e:3x3")


@pytest.mark.tpu
@pytest.mark.usefixtures("needs_libtpu")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4"])
def test_an_axis_may_part_a_ring_of_links_on_every_kind(topology):
    devices = chips.topology(topology).devices
    mesh = sharding.make_mesh(1, 8, 2, devices=devices)
    assert sharding.shape(mesh) == {"data": 1, "fsdp": 8, "tensor": 2}
    assert {*mesh.devices.flat} == {*devices}
