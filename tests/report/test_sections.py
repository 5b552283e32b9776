"""The folder of sections: its order, and what a file in it must define."""

from types import ModuleType
from typing import Any

import pytest

from controlat import report
from controlat._util import registry
from controlat.report import sections
from controlat.report.sections import Section

RESULT: dict[str, Any] = {"schedules": [{"text": "none"}, {"text": "fgsm"}]}


def test_sections_stand_in_the_order_that_they_give() -> None:
    orders = {name: sections.named(name).order for name in sections.names()}
    assert len(set(orders.values())) == len(orders), "no two claim the same place"
    assert min(orders, key=orders.__getitem__) == "problem"


def test_a_section_adds_what_it_has_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Section(order=2, numbers=lambda result: {"b": ["3", "4"]}, notes=lambda result: ["later"])
    early = Section(order=1, numbers=lambda result: {"a": ["1", "2"]})
    unwanted = Section(order=0, wanted=lambda result: False, notes=lambda result: ["never"])
    every = {"alpha": late, "beta": early, "gamma": unwanted}
    monkeypatch.setattr(sections, "names", lambda: tuple(every))
    monkeypatch.setattr(sections, "named", every.__getitem__)
    assert report.rows(RESULT) == (["schedule", "a", "b"], [["none", "1", "3"], ["fgsm", "2", "4"]])
    assert report.notes(RESULT) == ["later"]
    assert report.figures(RESULT) == {}


def test_a_column_that_lacks_a_schedule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Section(order=1, numbers=lambda result: {"a": ["1"]})
    monkeypatch.setattr(sections, "chosen", lambda result: [short])
    with pytest.raises(ValueError, match="column 'a' has 1 cells for 2 schedules; the numbers of a section"):
        report.rows(RESULT)


@pytest.mark.parametrize("content", [{}, {"SECTION": "text"}, {"SECTION": Section}])
def test_a_file_without_a_section_is_refused(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("mine")
    vars(module).update(content)
    monkeypatch.setattr(registry, "member", lambda package, name: module)
    with pytest.raises(ValueError, match=r"sections\.mine must define SECTION = Section\(order="):
        sections.named("mine")


def test_a_section_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="did you mean 'horizons'"):
        sections.named("horizon")
