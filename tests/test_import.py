"""What an import costs, what it brings in, and the order in which the modules of the package stand."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import controlat
from controlat import symbolic

PACKAGE = Path(controlat.__file__).parent

# Imports go upwards in this list only. A folder is one entry.
ORDER = (
    "registry",
    "control",
    "texts",
    "ranges",
    "files",
    "settings_file",
    "drawing",
    "rng",
    "parallel",
    "losses",
    "rates",
    "augment",
    "vision",
    "balls",
    "kernels",
    "batchnorm",
    "borrowed",
    "asking",
    "network",
    "attacks",
    "evaluation",
    "schedules",
    "records",
    "families",
    "symbolic",
    "data",
    "models",
    "methods",
    "plan",
    "state",
    "dynamics",
    "adjoint",
    "recording",
    "runs",
    "pmp",
    "checkpoints",
    "training",
    "report",
    "plots",
    "config",
    "setting",
    "calibration",
    "hindsight",
    "candidate",
    "derived",
    "jobs",
    "parser",
    "cli",
    "__main__",
)
# What must not see what, beyond the order: neighbours in the list that are independent by design.
APART = {
    "schedules": {"attacks", "evaluation", "network", "balls"},
    "symbolic": {"attacks", "evaluation", "network", "balls", "kernels", "losses"},
    "methods": {"evaluation", "schedules", "data"},
    "evaluation": {"schedules", "data"},
    "training": {"pmp"},
    "pmp": {"runs", "evaluation"},
    "report": {"training", "dynamics", "models", "data"},
    "plots": {"training", "dynamics", "models", "data", "report"},
}

_TIMED = """
import json, sys, time
began = time.perf_counter()
import torch
middle = time.perf_counter()
import controlat
controlat.pgd
print(json.dumps([middle - began, time.perf_counter() - middle]))
"""


_AGAIN = "print(*set(sys.modules) - before)"


def _python(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    return done.stdout


def test_import_takes_less_than_a_third_of_a_second_beyond_torch() -> None:
    beyond = [json.loads(_python(_TIMED))[1] for _ in range(3)]
    assert min(beyond) < 0.3


_BROUGHT = """
import sys, torch
before = set(sys.modules)
import controlat
controlat.pgd, controlat.Schedule, controlat.robustness, controlat.Dataset
print(*set(sys.modules) - before)
"""


def test_import_and_attacks_bring_in_nothing_heavy_beyond_torch() -> None:
    heavy = {"torchvision", "matplotlib", "hyperopt", "sympy", "scipy", "jsonargparse", "tensorboard", "PIL"}
    brought = {name.partition(".")[0] for name in _python(_BROUGHT).split()}
    assert "controlat" in brought
    assert not brought & heavy


def test_the_criterion_brings_in_no_plotting_and_no_hyperopt() -> None:
    brought = {
        name.partition(".")[0] for name in _python(_BROUGHT + "controlat.criterion\n" + _AGAIN).split()
    }
    assert "scipy" in brought, "Student's t"
    assert not brought & {"torchvision", "matplotlib", "hyperopt", "jsonargparse", "tensorboard", "PIL"}


def test_the_command_line_starts_without_sympy() -> None:
    """jsonargparse imports what annotations of settings name, even for type checkers only."""
    code = "import sys, torch\nfrom controlat.parser import build_parser\nbuild_parser()\nprint(*sys.modules)"
    brought = {name.partition(".")[0] for name in _python(code).split()}
    assert "jsonargparse" in brought
    assert "sympy" not in brought


@pytest.mark.parametrize("name", controlat.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(controlat, name) is not None
    assert name in dir(controlat)


def test_type_checkers_see_the_names_that_are_loaded_lazily() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert seen == set(controlat.__all__) - {"__version__"}


@pytest.mark.parametrize("name", symbolic.__all__)
def test_every_name_of_the_landscapes_resolves(name: str) -> None:
    assert getattr(symbolic, name) is not None
    assert name in dir(symbolic)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pdg'"):
        controlat.pdg  # noqa: B018


# ------------------------------------------------------------------------------------------ order of imports


def _home(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """First parts below controlat of what is imported when a module is loaded; not for type checking only."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _imports(node.body + getattr(node, "orelse", []))
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("controlat."))
        if isinstance(node, ast.ImportFrom) and node.module == "controlat":
            yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("controlat."):
            yield (node.module or "").split(".")[1]


def _edges() -> set[tuple[str, str]]:
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "__init__.py":
            found |= {(_home(file), name) for name in _imports(ast.parse(file.read_text()).body)}
    return {(a, b) for a, b in found if a != b}


def test_the_list_names_every_module_of_the_package() -> None:
    homes = {_home(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert homes == set(ORDER)


def test_imports_go_down_the_layers_only() -> None:
    edges = _edges()
    assert ("attacks", "balls") in edges, "the walk finds imports"
    assert ("jobs", "training") in edges
    rank = {name: i for i, name in enumerate(ORDER)}
    upwards = {(a, b) for a, b in edges if rank[a] <= rank[b]}
    assert not upwards
    forbidden = {(a, b) for a, b in edges if b in APART.get(a, ())}
    assert not forbidden


def test_relative_imports_do_not_hide_from_the_walk() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), file
