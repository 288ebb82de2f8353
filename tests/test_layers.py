"""The order of the layers, read off the imports of every module."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gopd_jax"

# Imports point to the left or stay within a layer. A prefix stands for its submodules too, but for
# those that are listed further right.
LAYERS = (
    ("spec", "types"),
    ("objectives", "verifiers", "microworld"),
    (
        *("hub", "config", "problems", "method", "notes", "microworld.preset"),
        *("slices", "processes", "sharding"),
        *("memory", "compiling", "planning"),
    ),
    ("models",),
    ("drawing", "sampler", "scoring", "records", "reader", "data", "rows", "checkpoint"),
    ("batching", "optimizer", "critic"),
    ("recipe",),
    ("heads",),
    ("update",),
    (
        *("step", "evaluate", "metrics", "progress", "signals", "card", "workdir"),
        "reporting",
    ),
    ("diagnose", "assembly"),
    ("setup",),
    ("probe", "preflight", "results", "advance", "planning.abstract"),
    ("planning.streamed", "planning.reads", "planning.evaluated"),
    ("planning.phases", "planning.least"),
    ("train", "planning.space"),
    ("planning.search", "planning.changes"),
    (
        *("main", "score", "generate", "command", "expo", "export", "plan"),
        *(
            "report",
            "reporting.checklist",
            "reporting.account",
            "reporting.plots",
            "reporting.charts",
        ),
    ),
    (
        *("microworld.make", "microworld.cells", "microworld.compare", "microworld.study"),
        *("microworld.study_bench", "microworld.study_cells", "microworld.study_tables"),
    ),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# The embedded world is one source of data among others: only these may know it.
KNOW_MICROWORLD = ("data", "records", "microworld")


def modules():
    """{name below gopd_jax: syntax tree}; the package's own __init__ is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix("__init__").removesuffix(".")
        if name:
            found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def layer_of(name):
    """The layer of the longest listed prefix of a module's name; None where there is none."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((LAYER[prefix] for prefix in prefixes if prefix in LAYER), None)


def imports(tree):
    """Modules of this package that a tree imports, anywhere in it, named below gopd_jax."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import at line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            head, _, below = name.partition(".")
            if head != "gopd_jax":
                continue
            # `from gopd_jax.types import Mean` names a thing in a module, not a module.
            while below and below not in MODULES:
                below = below.rpartition(".")[0]
            if below:
                found.add(below)
    return found


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def breaches(name, imported):
    """What a module imports from its right."""
    layers = {other: layer_of(other) for other in (name, *imported)}
    assert None not in layers.values(), f"no layer in LAYERS for one of {layers}"
    return [other for other in imported if layers[other] > layers[name]]


def test_every_module_has_a_layer():
    assert len(MODULES) > 25
    assert not [name for name in MODULES if layer_of(name) is None]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_left(name):
    assert not breaches(name, imports(MODULES[name]))


def test_the_architecture_names_every_file():
    """In its table; packages that are named as a whole, "models/", stand for their files."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    named = set()
    for cell in re.findall(r"^\| (`[^|]*`) \|", text, re.M):
        first, *others = re.findall(r"`([^`]*)`", cell)
        folder = first[: first.rfind("/") + 1]
        named |= {first, *(folder + other for other in others)}
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    files = {file for file in files if not file.endswith("__init__.py")}
    assert {name for name in named if name.endswith(".py")} <= files
    whole = tuple(name for name in named if name.endswith("/"))
    assert not [file for file in files if file not in named and not file.startswith(whole)]


def test_that_a_breach_would_be_seen():
    tree = ast.parse(
        "def f():\n    from gopd_jax import data, step\n    import gopd_jax.report.x\n"
    )
    assert imports(tree) == {"data", "step", "report"}
    assert sorted(breaches("sampler", imports(tree))) == ["report", "step"]
    assert breaches("microworld.tasks", {"microworld.make"}) == ["microworld.make"]
    assert layer_of("models.decoder") == layer_of("models") < layer_of("microworld.make")


def test_objectives_are_a_library_of_their_own():
    for name, tree in MODULES.items():
        if within(name, "objectives"):
            allowed = ("spec", "types", "objectives")
            assert all(any(within(i, a) for a in allowed) for i in imports(tree)), name


def test_models_know_nothing_of_meshes_settings_or_objectives():
    for name, tree in MODULES.items():
        if within(name, "models"):
            assert {i.split(".")[0] for i in imports(tree)} <= {"spec", "types", "models"}, name


def test_the_embedded_world_is_known_to_the_data_alone():
    for name, tree in MODULES.items():
        if any(within(i, "microworld") for i in imports(tree)):
            assert any(within(name, known) for known in KNOW_MICROWORLD), name


def test_only_sharding_names_the_mesh_axes():
    named = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    }
    assert named - {"config"} == {"sharding"}
