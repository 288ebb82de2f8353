"""`python -m gopd_jax.main --config=configs/exopd.py`: train, evaluate, report.

Any setting of gopd_jax/config.py is a flag: `--config.objective.lam=1.5`. The same command
continues a run that was stopped. Exit status: 0 at the last step, 2 for wrong input, 1 where it
failed, on a full disk say, 143 and 130 after SIGTERM and Ctrl-C.
"""

import contextlib
import dataclasses
import difflib
import errno
import re
import runpy
import shlex
import sys
import traceback
import typing
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from gopd_jax import compiling, memory
from gopd_jax.config import Config, accept_none_and_dicts

CONFIG = config_flags.DEFINE_config_file("config", None, "Preset, such as configs/exopd.py.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes outside of a TPU pod."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, with --coordinator.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize: TPU pods, Slurm, several processes."
)
flags.mark_flag_as_required("config")

FAILED, WRONG_INPUT = 1, 2


def main(argv):
    if len(argv) > 1:
        refuse(f"unexpected arguments {argv[1:]}; settings are --config.key=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the checkpointer tells every move at INFO
    alone = [f"--{f.name}={f.value}" for f in (PROCESSES, PROCESS) if f.value is not None]
    if DISTRIBUTED.value or COORDINATOR.value:
        jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    elif alone:  # each process would be a run of its own, in one workdir
        refuse(
            f"{' '.join(alone)} without others to meet: give --coordinator=HOST:PORT of process 0, "
            "or --distributed where the cluster tells it"
        )
    compiling.keep_compiled()
    memory.give_back_after_compiling()

    from gopd_jax import report, train

    config = CONFIG.value
    try:
        begun = train.check(train.begin(config))
    except (ValueError, OSError) as error:
        refuse(error)
    with full_disk_told():
        summary = train.finish(begun)
    if summary.stopped_by:
        _say(f"stopped after step {summary.step} of {config.steps}; continue with: {_command()}")
        sys.exit(128 + summary.stopped_by)
    if jax.process_index() != 0:
        return
    with full_disk_told():
        page = report.write(summary.workdir)
    longer = f"continue with: {_command(steps=2 * config.steps)}"
    if config.optimizer.schedule != "constant":
        longer = f"a {config.optimizer.schedule} schedule is at its end; train again with: " + (
            f"{_command(workdir=f'{config.workdir}-2')}"
        )
    _say(
        f"report: {page}   metrics: {summary.workdir / 'metrics.jsonl'}   "
        f"model: {summary.export}   {longer}"
    )


@contextlib.contextmanager
def full_disk_told():
    """What could not be written, for want of space as a rule, ends the program with status 1."""
    from gopd_jax import checkpoint

    try:
        yield
    except checkpoint.NotSaved as error:
        said = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = f"{error}\nFree some space; the same command continues"
    else:
        return
    print(f"\n{said}", file=sys.stderr)
    sys.exit(FAILED)


def parse(argv):
    """Flags of the command line. What is wrong with them or with the preset ends the program."""
    accept_none_and_dicts()
    _check_preset(argv)
    if unknown := unknown_settings(argv):
        refuse("\n".join(unknown))
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.split(".")[0] in typing.get_type_hints(Config):
            refuse(f"there is no flag --{error.flagname}; did you mean --config.{error.flagname}?")
        refuse(f"{error}; --help lists the flags")
    except Exception as error:
        refuse(_where(error))


def _check_preset(argv) -> None:
    """Refuse a command line whose preset is not there, or comes after what changes it."""
    settings = [i for i, argument in enumerate(argv) if re.match(r"--?(no)?config\.", argument)]
    given = [i for i, argument in enumerate(argv) if re.match(r"--?config(=.|$)", argument)]
    elsewhere = any(re.match("--?(help|flagfile)", argument) for argument in argv)
    if not given and not elsewhere:
        refuse("no preset is given; begin with --config=configs/exopd.py, say")
    if given and settings and settings[0] < given[0]:
        refuse(f"put --config=..., the preset, before {argv[settings[0]]}, which changes it")
    if (preset := _preset()) and not preset.is_file():
        files = preset.parent.glob("[!_]*.py")
        known = sorted(file.stem for file in files if b"get_config" in file.read_bytes())
        there = f"; there are {known} in {preset.parent}" if known else ""
        refuse(f"there is no preset {preset}{there}")


def unknown_settings(argv) -> list[str]:
    """A message for each --config.key that is no field of Config."""
    found = []
    for argument in argv:
        if not (match := re.match(r"--?(?:no)?config\.([^=]+)", argument)):
            continue
        section = Config
        for name in match[1].split("."):
            fields = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
            if typing.get_origin(section) is dict:
                section = typing.get_args(section)[1]
            elif name in fields:
                kinds = typing.get_args(fields[name])
                optional = type(None) in kinds
                section = (
                    next(k for k in kinds if k is not type(None)) if optional else fields[name]
                )
            else:
                near = difflib.get_close_matches(name, fields, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                there = f"{section.__name__} has {list(fields)}" if fields else "it has no parts"
                found.append(f"there is no setting {match[1]}: {there}{meant}")
                break
    return found


def _where(error: Exception) -> str:
    """The first cause of an error while a preset was read or a flag applied, with its line."""
    while cause := error.__cause__ or error.__context__:
        if isinstance(error, flags.Error) and not str(error).count("Traceback"):
            # Such as a number that is none, which names the flag already.
            if section := re.match(
                r"flag --([\w.]+)=(.*?): Unable to parse value .* instance", f"{error}"
            ):
                name, value = section.groups()
                return f"--{name} is a section of settings; give one, --{name}.path={value} say"
            return str(error)
        error = cause
    said = f"{type(error).__name__}: {error}"
    if unset := re.match(
        r'Flag ([\w.]+) can not be applied because field "([\w.]+)" is None', f"{error}"
    ):
        return f"{unset[2]} is none here; give --config.{unset[2]}=build before --config.{unset[1]}"
    preset = _preset()
    if isinstance(error, KeyError) and (there := _names_beside(preset, *error.args)):
        said = (
            f"there is no {error}, but {there}; a flag changes what a preset has, a teacher say, "
            "and adds none: that is what a preset of your own is for (README.md, Your own models "
            "and data)"
        )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if preset and Path(frame.filename).absolute() == preset:
            return f"{preset}:{frame.lineno}: {said}"
    return f"{preset or 'flags'}: {said}"


def _preset() -> Path | None:
    """The file that --config names."""
    given = re.search(r"^--?config[=\n]([^:\n]+)", "\n".join(sys.argv[1:]), re.MULTILINE)
    return Path(given[1]).absolute() if given else None


def _names_beside(preset: Path | None, key) -> list[str]:
    """What the preset has where a flag looked for `key`; none, where no flag did."""
    given = "\n".join(sys.argv[1:])
    where = re.search(rf"^--?config\.([\w.]+)\.{re.escape(f'{key}')}[.=\n]", given, re.MULTILINE)
    if not (preset and where):
        return []
    word = re.search(r"^--?config[=\n][^:\n]+:(.+)$", given, re.MULTILINE)
    made = runpy.run_path(str(preset))["get_config"](*([word[1]] if word else []))
    for name in where[1].split("."):
        made = getattr(made, name)
    return sorted(made) if isinstance(made, dict) else []


def _command(**settings) -> str:
    """The command line of this process with `settings` in place of its own."""
    kept = [
        argument
        for argument in sys.argv[1:]
        if not any(argument.startswith(f"--config.{key}=") for key in settings)
    ]
    changed = [f"--config.{key}={value}" for key, value in settings.items()]
    return shlex.join(["python", "-m", "gopd_jax.main", *kept, *changed])


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def refuse(reason) -> typing.NoReturn:
    """End the program with status 2: wrong input, in words and without a traceback."""
    print(f"\n{reason}", file=sys.stderr)
    sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        sys.exit(130)  # while loading, or the second Ctrl-C: nothing more is saved
