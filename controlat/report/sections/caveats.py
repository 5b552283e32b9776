"""Schedules of another length than training, and what the numbers leave out."""

from __future__ import annotations

from controlat.pmp import FORMS
from controlat.report._contents import summaries
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def notes(result: Result) -> list[str]:
    """All of it, in lines."""
    epochs = result["settings"]["epochs"]
    lines = [
        f"{entry['text']} was made for {entry['schedule']['epochs']:g} epochs; this run has {epochs}."
        for entry in result["schedules"]
        if entry["schedule"]["epochs"] != epochs
    ]
    curves = [curve for entry in result["schedules"] for curve in entry["schedule"]["knobs"].values()]
    if any(curve.get("rounding") == "dither" for curve in curves):
        lines.append(
            "rounding=dither: steps take the whole numbers below and above K in turn, K on average; C norm "
            "and C costate look at the first step of each epoch."
        )
    criteria = [s["criterion"] for s in summaries(result)]
    greedy = sorted({name for c in criteria for form in FORMS for name in c[form].get("dropped", ())})
    if len(greedy) > 3:
        greedy = [*greedy[:3], f"{len(greedy) - 3} more in result.json"]
    if greedy:
        lines.append(f"C norm, C costate leave out: {'; '.join(greedy)}.")
    if result["settings"].get("weight_decay", 0):
        lines.append("C norm leaves out weight decay, which moves theta, too; in C costate it cancels.")
    if dropped := sorted({name for s in summaries(result) for name in s["dropped"]}):
        lines.append(f"Dropped dependences on theta: {'; '.join(dropped)}.")
    return lines


SECTION = Section(order=80, notes=notes)
