"""What `benchmarks.plans` has been answered: lines of JSON, those of other settings passed over."""

import json
from collections.abc import Iterator
from pathlib import Path

from configs import qwen3
from gopd_jax.config import Config, Model, to_dict

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
    then = settings_of(default) | dict(leaves(line["plan"]["config"]))
    given = {flag.removeprefix("--config.").partition("=")[0] for flag in line["flags"]}
    return all(then.get(key) == x for key, x in settings_of(preset).items() if key not in given)


def settings_of(config: Config) -> dict[str, object]:
    """Dotted name -> value, as in JSON."""
    return dict(leaves(json.loads(json.dumps(to_dict(config)))))


def leaves(tree: dict, before: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every setting."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value
