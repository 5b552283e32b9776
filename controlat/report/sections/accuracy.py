"""Accuracy on test points, clean and after every attack."""

from __future__ import annotations

from controlat.report._contents import over_seeds, summaries
from controlat.report._formats import percent
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def numbers(result: Result) -> dict[str, list[str]]:
    """Clean and robust accuracy."""
    every = summaries(result)
    return {
        "clean %": [f"{100 * s['clean']['mean']:.1f}" for s in every],
        "robust %": [percent(s["robust"]) for s in every],
    }


def notes(result: Result) -> list[str]:
    """What robust means."""
    return [
        f"robust: survives {', '.join(result['settings']['attacks'])}; 95 % Wilson interval for "
        f"{result['sizes']['test']} points{over_seeds(result)}"
    ]


SECTION = Section(order=50, numbers=numbers, notes=notes)
