"""Slips put into the code on purpose, each with the tests that have to notice it.

    python -m benchmarks.mutants                   # all of them; writes docs/mutants.md
    python -m benchmarks.mutants --only=NAME,...   # some, or --file=objectives/credit.py

benchmarks/mutants_list.py has them. Each is applied to a copy of the tree, in which its tests are
then run by pytest: killed means that one of them failed by an assertion or by a ValueError of the
code, survived that all passed. One that fails otherwise (it does not import, a name or a shape is
wrong) is broken and proves nothing about the tests. The exit code is 1 unless all are killed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/mutants.md"
COPIED = ("benchmarks", "configs", "docs", "gopd_jax", "tests", "pyproject.toml")
# Seconds for the tests of one mutant (a slip may make a loop endless) and for all of them before.
LIMIT, LIMIT_OF_ALL = 600.0, 3600.0
# Imported once and inherited by the process of each mutant: nothing of ours, and no backend yet.
SHARED = (
    *("jax.numpy", "flax.struct", "optax", "orbax.checkpoint", "ml_collections", "tokenizers"),
    *("tensorboardX", "safetensors.numpy", "rich.progress", "pytest"),
)
HEAD = """# Mutants

Slips put into the code on purpose, each with the test that noticed it first. A mutant is killed if
one of the tests named for it in [benchmarks/mutants_list.py](../benchmarks/mutants_list.py) fails
by an assertion or by a ValueError of the code. Made by `python -m benchmarks.mutants`, which fails
where one survives; `--only=NAME` runs one.

| mutant | file | what slips | killed by |
|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """word: "killed", "survived" or "broken". by: the test that failed first, and why it did."""

    word: str
    by: str = ""
    why: str = ""


class _First:
    """A plugin of pytest that keeps what failed first: (test or "", whether it is a kill, why)."""

    def __init__(self):
        self.found = None

    def pytest_exception_interact(self, node, call, report):
        if self.found is None:
            noticed = (AssertionError, ValueError, pytest.fail.Exception)
            is_test = isinstance(node, pytest.Item)
            killed = is_test and issubclass(call.excinfo.type, noticed)
            self.found = (node.nodeid, killed, call.excinfo.exconly().splitlines()[0])


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file's text with the slip. ValueError unless the old text occurs once in it."""
    text = (root / mutant.file).read_text()
    if (n := text.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.name}: its old text occurs {n} times in {mutant.file}; it has to be there "
            "once, so follow the code in benchmarks/mutants_list.py"
        )
    return text.replace(mutant.old, mutant.new)


def copy(tree: Path) -> None:
    """The tree as it is, without what tools have left in it."""
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)


@contextlib.contextmanager
def applied(mutant: Mutant, tree: Path):
    """The slip in the copy, for as long as the context lasts."""
    path = tree / mutant.file
    whole = path.read_text()
    # Python takes bytecode for the source's own if both times and sizes are equal.
    stale = Path(importlib.util.cache_from_source(path))
    try:
        path.write_text(mutated(mutant, tree))
        stale.unlink(missing_ok=True)
        yield
    finally:
        path.write_text(whole)
        stale.unlink(missing_ok=True)


def outcome(tree: Path, targets: tuple[str, ...], limit: float = LIMIT):
    """(pytest's exit code or None if it took too long, what failed first) of targets in the copy.

    A process of its own, which starts as a copy of one that has imported the libraries.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(SHARED))
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_pytest, args=(tree, targets, sender))
    process.start()
    sender.close()
    found = None, None
    with contextlib.suppress(EOFError):  # a process that died has said nothing
        if receiver.poll(limit):
            found = receiver.recv()
    process.kill()
    process.join()
    return found


def _pytest(tree: Path, targets, sender) -> None:
    """The body of that process: what it prints goes to `log` in the tree."""
    os.chdir(tree)
    for name in [m for m in sys.modules if m.partition(".")[0] in ("benchmarks", "gopd_jax")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    with Path("log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        first = _First()
        code = pytest.main(
            ["-x", "-q", "-m", "", "-p", "no:cacheprovider", *targets], plugins=[first]
        )
        sender.send((int(code), first.found))


def verdict(mutant: Mutant, tree: Path) -> Verdict:
    """Of one mutant, applied to the copy."""
    with applied(mutant, tree):
        code, first = outcome(tree, mutant.targets)
    if code == 0:
        return Verdict("survived")
    if code is None:
        return Verdict("broken", why=f"no answer in {LIMIT:g} seconds, or its process died")
    if code != 1 or first is None:
        return Verdict("broken", why=first[2] if first else f"pytest ended with {code}")
    test, killed, why = first
    return Verdict("killed" if killed else "broken", test.split("[")[0], why)


def document(rows: list[tuple[Mutant, Verdict]]) -> str:
    """docs/mutants.md."""
    lines = [HEAD]
    for mutant, found in rows:
        test = found.by.removeprefix("tests/").replace(".py::", ": ")
        what = mutant.slips.replace("|", chr(92) + "|")
        lines.append(f"| {mutant.name} | {mutant.file} | {what} | {test} |\n")
    return "".join(lines)


def chosen(only: str | None, file: str | None) -> list[Mutant]:
    """Those asked for. ValueError where that is nothing."""
    wanted = only.split(",") if only else None
    if unknown := set(wanted or ()) - {m.name for m in MUTANTS}:
        raise ValueError(f"no mutant is called {sorted(unknown)}; see benchmarks/mutants_list.py")
    found = [m for m in MUTANTS if not wanted or m.name in wanted]
    found = [m for m in found if not file or file in m.file]
    if not found:
        raise ValueError(f"no mutant of {file!r}; files are {sorted({m.file for m in MUTANTS})}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--file", help="those of the files whose path has this")
    args = parser.parse_args()
    mutants = chosen(args.only, args.file)
    targets = tuple(dict.fromkeys(target for m in mutants for target in m.targets))
    screen = Console()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    rows = []
    with tempfile.TemporaryDirectory() as root, Progress(*columns, console=screen) as bar:
        copy(tree := Path(root) / "tree")
        task = bar.add_task("", total=len(mutants), at="the tests without any mutant")
        code, _ = outcome(tree, targets, LIMIT_OF_ALL)
        if code != 0:
            said = (tree / "log").read_text() if (tree / "log").exists() else ""
            screen.print(said[-4000:], markup=False, highlight=False, soft_wrap=True)
            screen.print("the tests fail without a mutant; mend them first", markup=False)
            return 2
        for mutant in mutants:
            bar.update(task, at=mutant.name)
            rows.append((mutant, verdict(mutant, tree)))
            found = rows[-1][1]
            # A log has no bar: there each verdict is a line as it comes.
            if found.word != "killed" or not screen.is_terminal:
                line = f"{found.word}: {mutant.name} ({mutant.file}) {found.by} {found.why}"
                screen.print(line, markup=False, highlight=False, soft_wrap=True)
            bar.advance(task)
        bar.update(task, at="")
    for mutant, found in rows:
        print(f"{found.word:9}{mutant.name:45}{found.by}")
    words = [found.word for _, found in rows]
    counts = [f"{words.count(word)} {word}" for word in ("killed", "survived", "broken")]
    print(f"{len(rows)} mutants: {', '.join(counts)}")
    if set(words) != {"killed"}:
        return 1
    if len(rows) == len(MUTANTS):
        DOCUMENT.write_text(document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
