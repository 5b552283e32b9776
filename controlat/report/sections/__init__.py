"""The sections of an evaluation's report. The folder is the registry: a file here is a section.

Each file names one `Section` ``SECTION``. Sections read the result file and nothing else. They are imported
when a report is made, not before, so that they may import matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from controlat._util import registry

__all__ = ["Figure", "Result", "Section", "chosen", "named", "names"]

Result = Mapping[str, Any]  # the content of result.json, see `controlat.records.Result`


class Figure(NamedTuple):
    """A figure of a report.

    Args:
        title: one line, for who cannot see it.
        draw: writes it, from (result, path of the PNG file).
    """

    title: str
    draw: Callable[[Result, Path], None]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one section adds to the report of a result; by default nothing.

    Args:
        order: where it stands: sections with smaller numbers come first, in every part of the report.
        wanted: whether the result has what it shows.
        numbers: columns of the table of schedules: the head of each, and a text for every schedule.
        notes: lines under that table, printed too.
        text: its part of summary.md, in Markdown.
        figures: figures by the names of their files.

    >>> seeds = lambda result: {"seeds": [str(len(entry["runs"])) for entry in result["schedules"]]}
    >>> Section(order=15, numbers=seeds).numbers({"schedules": [{"runs": [{}, {}]}]})
    {'seeds': ['2']}
    """

    order: float
    wanted: Callable[[Result], bool] = lambda result: True
    numbers: Callable[[Result], Mapping[str, Sequence[str]]] = lambda result: {}
    notes: Callable[[Result], Sequence[str]] = lambda result: ()
    text: Callable[[Result], str] = lambda result: ""
    figures: Callable[[Result], Mapping[str, Figure]] = lambda result: {}


def names() -> tuple[str, ...]:
    """The sections in this folder."""
    return registry.names(__name__)


def named(name: str) -> Section:
    """The section of a file.

    Raises:
        ValueError: there is no such file, or it names no section.
    """
    section = getattr(registry.member(__name__, name), "SECTION", None)
    if not isinstance(section, Section):
        raise ValueError(f"{__name__}.{name} must define SECTION = Section(order=..., ...)")
    return section


def chosen(result: Result) -> list[Section]:
    """The sections that a result has something for, in order."""
    every = sorted(((named(name), name) for name in names()), key=lambda pair: (pair[0].order, pair[1]))
    return [section for section, _ in every if section.wanted(result)]
