"""Wrong input ends a run before its first compile, with both values, the cure and no traceback."""

import contextlib
import errno
import json
import re
import shutil
import sys
from pathlib import Path

import jax.monitoring
import numpy as np
import pytest
import tiny

from gopd_jax import checkpoint, data, main, processes, report, step, train
from gopd_jax.models import decoder as lm
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.recipe import init_state


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    tiny.build(root)
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy of the tiny run's files, to be spoilt."""
    root = tmp_path / "root"
    shutil.copytree(built, root)
    text = (root / "preset.py").read_text()
    (root / "preset.py").write_text(text.replace(str(built), str(root)))
    return root


@contextlib.contextmanager
def compiles():
    """The events of what is compiled inside."""
    seen = []

    def note(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def refused(root, **changes) -> str:
    """The message with which the run is refused; a run's files must outlive that unchanged."""
    workdir = root / "run"
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    config = tiny.config(root, **changes)
    with compiles() as seen, pytest.raises(ValueError) as error:
        train.begin(config)
    assert seen == []
    assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]
    assert (workdir / "metrics.jsonl").read_text().endswith('{"step": 2, "lo')
    return str(error.value)


def model(path):
    return tiny.settings.Model(path=str(path))


def test_compiling_would_be_noticed():
    with compiles() as seen:
        jax.jit(lambda x: x * 3 + len(seen))(np.arange(7))
    assert seen


def test_a_directory_that_is_missing_or_holds_no_checkpoint(root):
    said = refused(root, student=model(root / "nowhere"), reference=model(root / "tokenizer"))
    assert f"student.path is '{root}/nowhere', which has no config.json" in said
    assert f"reference.path is '{root}/tokenizer', which has no config.json" in said
    assert "give the directory of a Hugging Face checkpoint" in said
    (root / "teacher_code" / "model.safetensors").unlink()
    said = refused(root)
    assert f"teacher:code: {root}/teacher_code has no ['model.safetensors']; copy" in said


def test_weights_that_are_cut_short_or_of_another_model(root):
    file = root / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    cfg = tiny.dataclasses.replace(tiny.CFG, num_hidden_layers=1)
    params = lm_params.init(cfg, jax.random.key(0))
    hf.save(root / "other", cfg, params)
    shutil.copy(root / "other" / "model.safetensors", root / "teacher_math")
    said = refused(root)
    assert re.search(rf"- student: {file} is truncated or corrupt \(.*\); copy it again", said)
    assert re.search(r"- teacher:math: .*weights lack \['model.layers.1.*2 layers", said)


def test_a_teacher_of_another_tokenizer_is_named_with_the_ids_that_differ(root):
    file = root / "teacher_math" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary[a], vocabulary[b] = j, i
    file.write_text(json.dumps(words))
    said = refused(root)
    assert f"teacher:math {root}/teacher_math (512 ids) and student {root}/base (512 ids)" in said
    assert f"differ in 2 ids (id {min(i, j)}: student" in said
    assert "give a teacher:math of the student's tokenizer" in said


def test_an_embedding_with_more_rows_than_the_students_is_as_good(root):
    """Qwen2.5 pads its table to 151,936 rows or to 152,064, for the same tokens."""
    cfg = tiny.dataclasses.replace(tiny.CFG, vocab_size=640)
    params = lm_params.init(cfg, jax.random.key(7))
    hf.save(root / "teacher_math", cfg, params, tokenizer_dir=root / "tokenizer")
    this = train.prepare(tiny.config(root))
    assert [d.cfg.vocab_size for d in this.recipe.teachers] == [640, 512]
    assert this.recipe.n_vocab == 512  # further rows are neither drawn nor given any mass
    prompts = data.prompts(this.train, this.student.reader, 0, seed=0, n_prompts=8, rollouts=1)
    rows = processes.to_global(this.mesh, prompts.replace(records=()))
    state = init_state(this.recipe, this.student.params)
    advance = step.fused(this.recipe)
    _, rollout, found = advance(state, this.frozen, rows, jax.random.key(0))
    assert rollout.tokens_BL.max() < 512
    teacher, own = this.recipe.teachers[0], this.frozen.teachers[0]
    hidden = lm.hidden(teacher, own, rollout.tokens_BL, rollout.valid_BL)
    logp = jax.nn.log_softmax(lm.logits(teacher, own, hidden)[:, :-1, :512])
    logp = np.take_along_axis(np.asarray(logp), np.asarray(rollout.tokens_BL)[:, 1:, None], 2)
    mask_BT = np.asarray(rollout.mask_BT)
    gap_BT = np.asarray(rollout.logp_BT) - logp[..., 0]
    got = found["kl_teacher_task"]
    np.testing.assert_allclose(
        got.total[0] / got.count[0], gap_BT[:4][mask_BT[:4]].mean(), rtol=1e-4
    )


def test_an_embedding_with_fewer_rows_than_the_tokenizer_has_ids(root):
    cfg = tiny.dataclasses.replace(tiny.CFG, vocab_size=256)
    params = lm_params.init(cfg, jax.random.key(0))
    hf.save(root / "teacher_math", cfg, params, tokenizer_dir=root / "tokenizer")
    assert "the tokenizer has 512 ids and the embedding 256 rows" in refused(root)


def spoil(root, name, **changes):
    """Change the second row of a file of problems."""
    lines = (root / name).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | changes)
    (root / name).write_text("\n".join(lines))


def test_rows_that_are_malformed_are_named_by_file_and_line(root):
    with (root / "train.jsonl").open("a") as file:
        file.write('{"messages": \n')
    spoil(root, "test.jsonl", verifier="maths")
    said = refused(root)
    assert re.search(rf"{root}/train.jsonl has 1 malformed rows:\n{root}/train.jsonl:25: ", said)
    assert re.search(rf"{root}/test.jsonl:2: there is no 'maths'; there are \['code', 'math'", said)


def test_an_unknown_task_is_named_with_the_tasks_that_have_teachers(root):
    spoil(root, "train.jsonl", task="chess")
    said = refused(root)
    assert "'chess' (1 rows)" in said
    assert "are not in data.tasks = ('math', 'code'); add them there" in said


def test_an_answer_that_its_verifier_cannot_read(root):
    spoil(root, "train.jsonl", answer="print(1)")
    said = refused(root)
    assert f"answer of {root}/train.jsonl:2 is 'print(1)'; the code verifier needs JSON" in said


def test_prompts_that_are_too_long_are_counted(root):
    said = refused(root, data={"prompt_length": 22})
    counts = re.findall(r"(\d+) of (\d+) prompts are longer than data.prompt_length = 22", said)
    assert [int(total) for _, total in counts] == [24, 6]
    assert all(0 < int(n) <= int(total) for n, total in counts)
    assert re.search(
        r"the longest has \d+, .*train.jsonl:\d+. Raise data.prompt_length to \d+", said
    )


def test_rows_longer_than_the_models_context(root):
    config = json.loads((root / "teacher_math" / "config.json").read_text())
    config["max_position_embeddings"] = 50
    (root / "teacher_math" / "config.json").write_text(json.dumps(config))
    said = refused(root)
    assert "teacher:math: data.prompt_length + sampling.completion_length = 54 tokens" in said
    assert "max_position_embeddings = 50; shorten one" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch": {"prompts": 12}},
            r"12 rows \(batch.prompts \* batch.rollouts\) do not divide over mesh.data",
        ),
        (
            {"batch": {"prompts": 16, "microbatches": 4}},
            r"microbatch of .* = 16 / 4 = 4 rows .* = 8; choose fewer batch.microbatches",
        ),
        (
            {"batch": {"prompts": 16, "microbatches": 2, "updates": 2}},
            r"of 16 / batch.updates \* batch.microbatches = 16 / 4 = 4 rows .* = 8; choose fewer",
        ),
        ({"batch": {"microbatches": 3}}, r"8 rows do not divide into batch.microbatches = 3"),
        ({"batch": {"prompts": 7}}, r"batch.prompts = 7 is not divisible by the 2 tasks"),
        ({"sampling": {"slots": 12}}, r"slots = 12 does not divide .* = 8; choose a multiple of 8"),
        (
            {"evaluation": {"rows": 4}},
            r"evaluation.rows = 4 does not divide .* choose a multiple of 8",
        ),
        ({"evaluation": {"rows": "8"}}, r"rows is '8', a str; it takes int \| None"),
        ({"sampling": {"slots": "8"}}, r"slots is '8', a str; it takes int \| None"),
        ({"batch": {"microbatches": "2"}}, r"microbatches is '2', a str; it takes int"),
        ({"mesh": {"fsdp": 3}}, r"mesh.fsdp \* mesh.tensor = 3 \* 1 does not divide the 8 devices"),
        ({"mesh": {"tensor": 8}}, r"student has 4 along 'heads', which mesh.tensor = 8"),
        ({"reference": None}, r"objective.lam is 1.25 and there is no reference.*or lam = 1"),
        (
            {"reference": None, "objective": {"lam": 1.5, "task_lam": {"math": 1.25}}},
            r"lam is 1.5, objective.task_lam is {'math': 1.25} and .*task_lam out with lam = 1",
        ),
        (
            {"reference": None, "objective": {"lam": 1.0, "task_lam": {"math": 1.25}}},
            r"objective.task_lam is {'math': 1.25} and there is no reference.*or take task_lam out",
        ),
        ({"evaluation": {"problems": 9}}, r"evaluation.problems = 9 .*'math': 3.*ask for 3"),
        ({"teachers": {}}, r"tasks \['code', 'math'\] of data.tasks have no teacher"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(root, changes, message):
    assert re.search(message, refused(root, **changes))


def test_a_workdir_that_cannot_be_made(root):
    (root / "file").write_text("")
    said = refused(root, workdir=f"{root}/file/run")
    assert f"workdir is '{root}/file/run'" in said
    assert f"{root}/file is no directory that can be written" in said


def test_several_problems_are_told_at_once(root):
    said = refused(
        root,
        student=model(root / "nowhere"),
        optimizer={"schedule": "linear", "learning_rate": -1.0},
        batch={"prompts": 12},
        mesh={"fsdp": 3},
    )
    for part in ("nowhere", "'linear'", "learning_rate is -1.0", "3 * 1 does not divide"):
        assert part in said
    assert all(line.startswith("- ") for line in said.splitlines())


def test_results_without_their_checkpoint_are_not_written_over(root):
    (root / "done" / "export").mkdir(parents=True)
    said = refused(root, workdir=f"{root}/done")
    assert f"holds the results of a finished run, {root}/done/export, and no checkpoint" in said


def test_fewer_steps_than_the_checkpoint_has(root):
    (root / "long" / "checkpoints" / "9").mkdir(parents=True)
    said = refused(root, workdir=f"{root}/long")
    assert said == (
        f"{root}/long holds step 9 and steps is 6; give --config.steps=9 or more, or another "
        "--config.workdir to start anew"
    )


# --- the command line


@pytest.fixture
def parse(monkeypatch):
    """parse(argument, ...) as the program's own command line."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        main.flags.FLAGS.unparse_flags()
        for name in [name for name in main.flags.FLAGS if name.startswith("config.")]:
            delattr(main.flags.FLAGS, name)  # of an earlier command line
        main.parse(sys.argv)

    return parse


def test_a_preset_that_is_not_there_is_refused_with_those_that_are(parse, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(f"--config={tiny.REPOSITORY / 'configs' / 'exodp.py:tiny'}")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().startswith(f"there is no preset {tiny.REPOSITORY}/configs/exodp.py; ")
    assert "'exopd', " in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no preset is given; begin with --config=configs/exopd.py"),
        (("--config.steps=3",), "no preset is given; begin with --config=configs/exopd.py"),
        (("--config=",), "no preset is given; begin with --config=configs/exopd.py"),
        (
            ("--config.steps=3", f"--config={tiny.REPOSITORY / 'configs' / 'exopd.py'}"),
            "put --config=..., the preset, before --config.steps=3, which changes it",
        ),
        (("--config", "/nowhere/x.py"), "there is no preset /nowhere/x.py"),
        (
            (
                f"--config={tiny.REPOSITORY / 'configs' / 'exopd.py:tiny'}",
                "--config.teachers.law.path=/nowhere",
            ),
            r"there is no 'law', but \['code', 'math'\]; a flag .* and adds none: .* your own",
        ),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(parse, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_preset_may_follow_its_flag_after_a_space(parse):
    parse("--config", f"{tiny.REPOSITORY / 'configs' / 'exopd.py:tiny'}", "--config.seed=3")
    assert main.CONFIG.value.seed == 3


def test_a_preset_may_be_named_in_a_file_of_flags(parse, tmp_path):
    preset = tiny.REPOSITORY / "configs" / "exopd.py:tiny"
    (tmp_path / "flags").write_text(f"--config={preset}\n--config.seed=4\n")
    parse(f"--flagfile={tmp_path / 'flags'}")
    assert main.CONFIG.value.seed == 4


@pytest.mark.parametrize(
    "error",
    [checkpoint.NotSaved("not written\nthe cure"), OSError(errno.ENOSPC, "No space left", "rows")],
)
def test_a_full_disk_ends_the_command_with_status_1_and_without_a_traceback(capsys, error):
    with pytest.raises(SystemExit) as ended, main.full_disk_told():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().startswith(str(error).strip())


def test_so_does_one_that_is_full_when_the_report_is_written(parse, monkeypatch, capsys):
    def full(workdir):
        raise OSError(errno.ENOSPC, "No space left on device", f"{workdir}/report.html")

    summary = train.Summary(workdir=Path("w"), step=2, stopped_by=None, export=Path("w/export"))
    for name in ("begin", "check", "finish"):
        monkeypatch.setattr(train, name, lambda _: summary)
    monkeypatch.setattr(report, "write", full)
    # What the program sets for its whole process, and this one is the suite's.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setattr(main.memory, "give_back_after_compiling", lambda: None)
    monkeypatch.setattr(main.logging, "set_verbosity", lambda _: None)
    parse(f"--config={tiny.REPOSITORY / 'configs' / 'exopd.py:tiny'}")
    with pytest.raises(SystemExit) as ended:
        main.main(["main"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "No space left on device: 'w/report.html'" in said
    assert "the same command continues" in said


def test_another_error_of_the_system_is_not_taken_for_a_full_disk():
    with pytest.raises(PermissionError), main.full_disk_told():
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.objective.lamm=2",
            "there is no setting objective.lamm: Objective has .*mean lam?",
        ),
        ("--config.stepss=2", "there is no setting stepss: Config has .*did you mean steps?"),
        ("--config.steps.more=2", "there is no setting steps.more: it has no parts"),
        ("--config.teachers.math.pth=x", "there is no setting teachers.math.pth: Model has"),
        (
            "--config.teachers.maths.path=x",
            r"there is no 'maths', but \['code', 'math'\]; a flag changes what a preset has",
        ),
        ("--config.student=/x", r"student is a section of settings; give .*student.path=/x say"),
        ("--config.teachers.math=/x", r"section of settings; give .*teachers.math.path=/x say"),
        ("--config.lora.rank=4", "lora is none here; give --config.lora=build before"),
        ("--workdir=x", "there is no flag --workdir; did you mean --config.workdir?"),
        ("--config.steps=many", "--config.steps=many: invalid literal"),
        ("--confg=x", "Unknown command line flag 'confg'.*config"),
    ],
)
def test_a_misspelt_flag_is_refused(built, parse, capsys, flag, message):
    with pytest.raises(SystemExit) as ended:
        parse(f"--config={built / 'preset.py'}", flag)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps=6", "stepps=6", r"preset.py:\d+: TypeError: .*stepps"),
        ("steps=6", "steps={}['six']", r"preset.py:\d+: KeyError: 'six'$"),
        ("steps=6", "steps=undefined", r"preset.py:\d+: NameError: .*undefined"),
        ("return Config(", "model('x').lamda = 2\n    return Config(", "AttributeError: .*lamda"),
    ],
    ids=lambda x: x[:20],
)
def test_a_misspelt_preset_is_refused_by_file_and_line(root, parse, capsys, old, new, message):
    preset = root / "preset.py"
    preset.write_text(preset.read_text().replace(old, new))
    with pytest.raises(SystemExit) as ended:
        parse(f"--config={preset}")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Traceback" not in said


def test_the_flags_of_a_right_command_are_read(built, parse):
    parse(
        f"--config={built / 'preset.py'}",
        "--config.objective.lam=2",
        "--config.mesh.data=4",
        "--config.teachers.math.dtype=bfloat16",
    )
    config = main.CONFIG.value
    assert (config.objective.lam, config.mesh.data) == (2.0, 4)
    assert config.teachers["math"].dtype == "bfloat16"


def test_the_command_ends_with_status_2_and_without_traceback(built):
    done = tiny.run(built, "--config.optimizer.schedule=x", "--config.workdir=/dev/null/run")
    assert done.returncode == 2
    assert done.stdout == ""
    said = done.stderr.strip().splitlines()
    assert [line[:2] for line in said] == ["- ", "- "]
    assert "optimizer.schedule is 'x'" in said[0]
    assert "workdir is '/dev/null/run'" in said[1]
