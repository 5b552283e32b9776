"""The objective J."""

from __future__ import annotations

from controlat.report._contents import has_full, has_objective, meaning_of_j, objective, summaries
from controlat.report._formats import mean
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def numbers(result: Result) -> dict[str, list[str]]:
    """J of every schedule."""
    return {"J": [mean(objective(s)) for s in summaries(result)]}


def notes(result: Result) -> list[str]:
    """What J is; where C over the whole run follows, its line begins with that."""
    return [] if has_full(result) else [meaning_of_j(result)]


SECTION = Section(order=20, wanted=has_objective, numbers=numbers, notes=notes)
