"""Imports run one way: each module uses those above it in the list, and nothing is imported late to hide a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [
    "kernels",
    "backend", "streams", "reference", "checks", "metrics", "distances", "models", "checkpoint",
    "ops.layout", "ops.autograd", "ops.calls", "ops.rectifiers", "ops.samples", "ops.scores", "ops.penalty",
    "ops.weights", "ops", "functional",
    "optim.state", "optim.cpu", "optim.base", "optim.rmsprop", "optim.adam", "optim", "optim.adopt",
    "constraints",
    "engine", "engine.structure", "engine.ranks", "engine.guard", "engine.latents", "engine.settings",
    "engine.sharing", "engine.eager", "engine.compiled", "engine.player", "engine.graphs", "engine.steps",
    "training.health", "training.logs", "training.fit", "training",
    "trainer",
    "verification.report", "verification.observed", "verification.oracle", "verification.judge",
    "verification.verify", "verification",
    "__init__",
    "data", "data.files",
    "verification.command",
    "cli.runs", "cli.pictures", "cli.main", "cli", "__main__",
]  # fmt: skip


def modules():
    files = {path for path in (ROOT / "fastwgan").rglob("*.py") if "kernels" not in path.parts[-2:-1]}
    for path in files:
        name = ".".join(path.relative_to(ROOT / "fastwgan").with_suffix("").parts)
        yield (name.removesuffix(".__init__"), path)


def imported(node, known):
    """Return the package's modules that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == "fastwgan"]
    elif node.module and node.module.split(".")[0] == "fastwgan":
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return set()
    found = set()
    for name in names:
        inside = name.removeprefix("fastwgan").removeprefix(".")
        parent = inside.rpartition(".")[0]
        found.add(inside if inside in known else parent if parent in known else inside.split(".")[0])
    return {name if name in known else "__init__" for name in found}


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(["kernels", *(name for name, _ in modules())])


@pytest.mark.parametrize(("name", "path"), sorted(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_those_above_it_and_nothing_late(name, path):
    tree = ast.parse(path.read_text())
    above = set(ORDER[: ORDER.index(name)])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = imported(node, ORDER)
            assert found <= above, f"{name} imports {found - above}"
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    for node in inside:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not imported(node, ORDER), f"{name} imports {ast.unparse(node)} in a function"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_of_the_package(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not imported(node, ORDER)
