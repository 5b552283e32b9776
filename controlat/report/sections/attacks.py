"""The accuracy that each attack in turn left."""

from __future__ import annotations

from controlat._util.texts import table
from controlat.report._contents import summaries
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def text(result: Result) -> str:
    """A column for each attack: what survived it and those before."""
    cells = [
        [entry["text"], *(f"{100 * a['mean']:.1f}" for a in entry["summary"]["after"].values())]
        for entry in result["schedules"]
    ]
    heads = ["schedule", *summaries(result)[0]["after"]]
    return f"## Accuracy left after each attack in turn (%)\n\n{table(heads, cells)}"


SECTION = Section(order=120, text=text)
