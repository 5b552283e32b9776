"""What an import costs, what it brings in, and the order in which the modules of the package stand."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from helpers import GUARD

import controlat
from controlat import bolza, symbolic

PACKAGE = Path(controlat.__file__).parent
TESTS = Path(__file__).parent

# The folders, from the bottom up: imports go to earlier ones only, those inside functions included.
ORDER = (
    "_util",
    "control",
    "models",
    "data",
    "attacks",
    "records",
    "methods",
    "robust_accuracy",
    "symbolic",
    "bolza",
    "dynamics",
    "pmp",
    "schedule_search",
    "report",
    "app",
)
# What must not see what, beyond the order: neighbours in the list that are independent by design.
APART = {
    "data": {"models"},
    "records": {"models", "data", "attacks"},
    "robust_accuracy": {"data", "records", "methods"},
    "symbolic": {"models", "data", "attacks", "records", "methods", "robust_accuracy"},
    "bolza": {"models", "data", "attacks", "records", "methods", "robust_accuracy"},
    "dynamics": {"records", "robust_accuracy", "symbolic", "bolza"},
    "pmp": {"records", "robust_accuracy", "symbolic", "bolza"},
    "schedule_search": {"models", "data", "attacks", "records", "robust_accuracy", "dynamics", "pmp"},
    "report": {"models", "data", "attacks", "methods", "symbolic", "bolza", "dynamics"},
}
LOOSE = {"__init__.py", "__main__.py", "py.typed"}

# What is asked for below: a process of its own for each, forked from one that has imported torch.
ASKED = {
    "nothing": "",
    "pgd": "controlat.pgd",
    "more": "controlat.Schedule, controlat.robustness, controlat.Dataset, controlat.attacks.fgsm",
    "criterion": "controlat.criterion",
    "commands": "import controlat.report\ncontrolat.train, controlat.evaluate, controlat.attack",
    "parser": "from controlat.app.parser import build_parser\nbuild_parser()",
}
_BROUGHT = """
import json, os, sys, torch
before = set(sys.modules)
for name, code in json.load(sys.stdin).items():
    if os.fork() == 0:
        import controlat
        exec(code)
        print(name, *set(sys.modules) - before, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{name} failed")
"""


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """Modules that each brings in beyond those of torch."""
    done = subprocess.run(
        [sys.executable, "-c", _BROUGHT],
        input=json.dumps(ASKED),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=GUARD,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(modules) for name, *modules in lines}


def _packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_an_import_brings_in_nothing_and_what_is_asked_for_no_package_beyond_torch(
    brought: dict[str, set[str]],
) -> None:
    assert brought["nothing"] == {"controlat"}
    modules = brought["pgd"]
    assert _packages(modules) == {"controlat"}
    parts = {name.split(".")[1] for name in modules if name.startswith("controlat.")}
    assert parts == {"_util", "control", "models", "attacks"}
    assert _packages(brought["more"]) == {"controlat"}


def test_the_criterion_brings_in_no_plotting_and_no_hyperopt(brought: dict[str, set[str]]) -> None:
    packages = _packages(brought["criterion"])
    assert "scipy" in packages, "Student's t"
    assert not packages & {"torchvision", "matplotlib", "hyperopt", "jsonargparse", "tensorboard", "PIL"}


def test_commands_bring_in_no_plotting_before_there_is_something_to_draw(
    brought: dict[str, set[str]],
) -> None:
    packages = _packages(brought["commands"])
    assert "pydantic" in packages, "records"
    assert "matplotlib" not in packages


def test_the_command_line_starts_without_sympy(brought: dict[str, set[str]]) -> None:
    """jsonargparse imports what annotations of settings name, even for type checkers only."""
    packages = _packages(brought["parser"])
    assert "jsonargparse" in packages
    assert "sympy" not in packages


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


@pytest.mark.parametrize("package", [symbolic, bolza], ids=["symbolic", "bolza"])
def test_every_name_of_the_landscapes_resolves(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name).__doc__, "the object, not a module of the same name"
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pdg'"):
        controlat.pdg  # noqa: B018


# ------------------------------------------------------------------------------------------ order of imports


def _home(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def _for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    """What is imported for annotations only."""
    guarded = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {inner for guard in guarded for inner in ast.walk(guard)}


def _imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Names below controlat of all that a file imports, anywhere in it: folder, module, and so on."""
    tree = ast.parse(file.read_text())
    skipped = _for_type_checkers(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("controlat."))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "controlat":
            yield from ((*(node.module or "").split(".")[1:], a.name) for a in node.names)


def _files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE]


def test_nothing_lies_loose_and_the_order_names_every_folder() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == LOOSE
    assert {_home(file) for file in _files()} == set(ORDER)


def test_tests_stand_where_what_they_test_does() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - {"gpu"} == set(ORDER)  # gpu: tests of every layer that need a card


def test_imports_go_down_the_layers_only() -> None:
    edges = {(_home(file), name[0]) for file in _files() for name in _imports(file)}
    edges = {(a, b) for a, b in edges if a != b and b in ORDER}
    assert ("attacks", "control") in edges, "the walk finds imports"
    assert ("app", "symbolic") in edges, "also inside functions"
    rank = {name: i for i, name in enumerate(ORDER)}
    assert not {(a, b) for a, b in edges if rank[a] <= rank[b]}
    assert not {(a, b) for a, b in edges if b in APART.get(a, ())}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Of one folder too: a file is read after all that it imports."""
    names = {
        f: ".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for f in _files()
    }
    known = set(names.values())
    needs: dict[str, set[str]] = {}
    for file, name in names.items():
        nearest = (".".join(n) if ".".join(n) in known else ".".join(n[:-1]) for n in _imports(file))
        needs[name] = {n for n in nearest if n in known and n != name}
    list(TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle


def test_relative_imports_do_not_hide_from_the_walk() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), file
