"""Imports run one way: a module uses those before it in the list, and imports none in a function to hide a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [
    "kernels",
    "version",
    "backend",
    "streams",
    "reference",
    "checks",
    "metrics",
    "distances",
    "models",
    "checkpoint",
    "ops.layout",
    "ops.autograd",
    "ops.calls",
    "ops.rectifiers",
    "ops.samples",
    "ops.scores",
    "ops.penalty",
    "ops.weights",
    "ops",
    "functional",
    "optim.base",
    "optim.algorithms",
    "optim",
    "optim.adopt",
    "constraints",
    "engine",
    "engine.piecewise",
    "engine.structure",
    "engine.fused",
    "engine.watch",
    "engine.ranks",
    "engine.guard",
    "engine.latents",
    "engine.terms",
    "engine.settings",
    "engine.eager",
    "engine.compiled",
    "engine.player",
    "engine.graphs",
    "engine.steps",
    "data.batches",
    "data",
    "training.health",
    "training.logs",
    "training.fit",
    "training",
    "trainer",
    "verification.report",
    "verification.observed",
    "verification.oracle",
    "verification.judge",
    "verification.verify",
    "verification",
    "__init__",
    "data.files",
    "cli.common",
    "cli.pictures",
    "cli.runs",
    "cli.info",
    "cli.sample",
    "cli.train",
    "cli.verify",
    "cli",
    "__main__",
]


def name_of(path):
    return ".".join(path.relative_to(ROOT / "fastwgan").with_suffix("").parts).removesuffix(".__init__")


PATHS = {name_of(path): path for path in sorted((ROOT / "fastwgan").rglob("*.py")) if path.parent.name != "kernels"}


def imported(tree):
    """Return the package's modules that are imported in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module, alias.name) for alias in node.names}
    ours = [(module.removeprefix("fastwgan").strip("."), name) for module, name in found if module[:8] == "fastwgan"]
    names = {whole if (whole := f"{module}.{name}".strip(".")) in ORDER else module for module, name in ours}
    return {name or "__init__" for name in names}


def test_every_module_has_its_place():
    assert set(ORDER) == {"kernels", *PATHS}


@pytest.mark.parametrize("name", PATHS)
def test_a_module_imports_those_before_it(name):
    tree = ast.parse(PATHS[name].read_text())
    assert imported(tree) <= set(ORDER[: ORDER.index(name)])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert imported(node) <= {"cli.pictures"}, f"{node.name} imports late"  # which needs matplotlib


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_of_the_package(path):
    assert not imported(ast.parse(path.read_text()))


def test_at_most_sixteen_modules_lie_flat():
    assert len([name for name, path in PATHS.items() if path.parent.name == "fastwgan"]) <= 16
