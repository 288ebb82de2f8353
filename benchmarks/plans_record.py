"""What `benchmarks.plans` has been answered: lines of JSON, those of other settings passed over."""

import json
from pathlib import Path

from configs import qwen3
from gopd_jax.config import Config, Model
from gopd_jax.problems import leaves

ANSWERED = (0, 1)  # it fits, it does not


class Record:
    """Answers by cell and phase, kept in a file of JSON lines; the last of each counts.

    A line {"note": text} says what a reader of these answers has to know; it goes with them.
    """

    def __init__(self, file: Path):
        self.file, self.of, self.note = file, {}, ""
        for text in file.read_text().splitlines() if file.is_file() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # the line that a killed run was writing
            self._keep(line)

    def _keep(self, line: dict) -> None:
        if "note" in line:
            self.note = line["note"]
            return
        if of_the_preset(line):
            key = line["preset"], line["topology"], tuple(line["flags"]), line["what"]
            self.of[key] = line

    def get(self, cell, what: str) -> dict | None:
        return self.of.get((cell.preset, cell.topology, cell.flags, what))

    def answered(self, cell, what: str) -> bool:
        line = self.get(cell, what)
        return line is not None and line["status"] in ANSWERED

    def add(self, line: dict) -> None:
        self._keep(line)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text() if self.file.is_file() else ""
        begun = "" if not text or text.endswith("\n") else "\n"
        with self.file.open("a") as out:
            out.write(f"{begun}{json.dumps(line)}\n")


def of_the_preset(line: dict) -> bool:
    """Whether an answer is of the preset's settings of today, but for those that its flags give.

    Settings that came later were at their defaults.
    """
    if line["plan"] is None:
        return True
    preset, blank = qwen3.get_config(line["preset"]), Model(path="")
    teachers = dict.fromkeys(preset.teachers, blank)
    default = Config(workdir="", student=blank, reference=blank, teachers=teachers)
    defaults = {key: value for key, value, _ in leaves(default)}
    given = {flag.removeprefix("--config.").partition("=")[0] for flag in line["flags"]}
    return all(
        _recorded(line["plan"]["config"], key, _plain(defaults.get(key))) == _plain(value)
        for key, value, _ in leaves(preset)
        # Of the step's phases evaluation is no part.
        if key not in given and (line["what"] == "evaluate" or not key.startswith("evaluation."))
    )


def _recorded(tree, key: str, default):
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return default
        tree = tree[name]
    return tree


def _plain(value):
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
