"""The folder as registry, and the user's own code by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlat._util import registry


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project folder as current directory; modules imported from it are forgotten after."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def package(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package `zoo` with the public modules ant and bee; importing bee fails."""
    monkeypatch.syspath_prepend(str(project))
    (project / "zoo").mkdir()
    for name, text in {"__init__": "", "ant": "legs = 6", "bee": "1 / 0", "_hidden": ""}.items():
        (project / "zoo" / f"{name}.py").write_text(text)
    (project / "zoo" / "notes.txt").write_text("no module")
    return "zoo"


def test_names_are_the_public_files_and_none_is_imported(package: str) -> None:
    assert registry.names(package) == ("ant", "bee")
    assert not {"zoo.ant", "zoo.bee", "zoo._hidden"} & set(sys.modules)


def test_a_new_file_is_a_new_name(package: str, project: Path) -> None:
    (project / "zoo" / "cat.py").write_text("")
    assert registry.names(package) == ("ant", "bee", "cat")


@pytest.mark.parametrize("wrong", ["no_such_package", "no_such_package.inner", "math"])
def test_names_of_no_package(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"there is no package '{wrong}'"):
        registry.names(wrong)


def test_member_imports_one_module(package: str) -> None:
    assert registry.member(package, "ant").legs == 6


def test_member_unknown_lists_choices_and_guesses(package: str) -> None:
    with pytest.raises(ValueError, match=r"^zoo has no 'ants'; did you mean 'ant'\? choose from: ant, bee$"):
        registry.member(package, "ants")
    with pytest.raises(ValueError, match=r"^zoo has no 'whale'; choose from: ant, bee$"):
        registry.member(package, "whale")
    with pytest.raises(ValueError, match="has no '_hidden'"):
        registry.member(package, "_hidden")


def test_import_path_sees_the_current_directory_only_while_importing(project: Path) -> None:
    (project / "own_registered.py").write_text(
        "import own_sibling\nclass Net:\n    depth = own_sibling.depth"
    )
    (project / "own_sibling.py").write_text("depth = 3")
    before = sys.path.copy()
    assert registry.import_path("own_registered:Net.depth") == 3
    assert sys.path == before


def test_import_path_restores_the_path_after_an_error(project: Path) -> None:
    before = sys.path.copy()
    (project / "own_broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError) as caught:
        registry.import_path("own_broken:x")
    assert caught.value.__notes__ == ["while importing module 'own_broken' for 'own_broken:x'"]
    assert sys.path == before


def test_import_path_keeps_what_the_module_does_to_the_path(project: Path) -> None:
    text = "import os, sys\nsys.path.remove(os.getcwd())\nsys.path.append('added')"
    (project / "own_path.py").write_text(text)
    before = sys.path.copy()
    registry.import_path("own_path:os")
    assert sys.path == [*before, "added"]
    sys.path.remove("added")


@pytest.mark.parametrize(
    "text", ["", "module", "module:", ":attribute", "a/b.py:f", "a:b:c", ".a:b", "a:b()"]
)
def test_import_path_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"must read 'package\.module:attribute'"):
        registry.import_path(text)


def test_import_path_unknown_module(project: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot import module 'own_none' for attribute 'f': No module"
    ) as caught:
        registry.import_path("own_none:f")
    assert "without '.py'" in str(caught.value)
    assert os.getcwd() in str(caught.value)


def test_import_path_names_the_import_that_is_missing(project: Path) -> None:
    (project / "own_needs.py").write_text("import not_installed_anywhere")
    with pytest.raises(ValueError, match=r"'own_needs'.*No module named 'not_installed_anywhere'"):
        registry.import_path("own_needs:f")


def test_import_path_unknown_attribute(project: Path) -> None:
    (project / "own_two.py").write_text("first = 1\nsecond = 2\n_third = 3")
    expected = "module 'own_two' has no attribute 'third'; it defines: first, second$"
    with pytest.raises(ValueError, match=expected):
        registry.import_path("own_two:third")


@pytest.fixture
def factories(project: Path) -> str:
    text = """
def nothing(): return "nothing"
def one(a): return a
def everything(**keywords): return keywords
def optional(a, extra=5): return a, extra
def asks_more(a, extra): return a
def positional(a, /): return a
def fails(a): raise KeyError("inside")
number = 3
"""
    (project / "own_factories.py").write_text(text)
    return "own_factories"


@pytest.mark.parametrize(
    ("name", "result"),
    [("nothing", "nothing"), ("one", 1), ("everything", {"a": 1, "b": 2}), ("optional", (1, 5))],
)
def test_call_factory_passes_what_is_accepted(factories: str, name: str, result: object) -> None:
    assert registry.call_factory(f"{factories}:{name}", {"a": 1, "b": 2}) == result


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "is a int; it must be a function or class"),
        ("asks_more", "cannot be called: missing a required argument: 'extra'; it is offered: a, b"),
        ("positional", "cannot be called: missing a required"),
        ("nothing", r"accepts no keyword 'b'; add it to \(\) or do not give it"),
    ],
)
def test_call_factory_refuses(factories: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.call_factory(
            f"{factories}:{name}", {"a": 1, "b": 2}, needed=["b"] if name == "nothing" else []
        )


def test_call_factory_adds_a_note(factories: str) -> None:
    with pytest.raises(KeyError, match="inside") as caught:
        registry.call_factory(f"{factories}:fails", {"a": 1})
    assert caught.value.__notes__ == ["while calling the factory 'own_factories:fails' with a 1"]
