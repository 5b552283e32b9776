"""The criterion C over the whole run, and the decrease D of J that was reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlat.report._contents import has_full, meaning_of_j, summaries
from controlat.report._formats import estimate, mean
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def numbers(result: Result) -> dict[str, list[str]]:
    """C over the whole run, and D."""
    every = [s["full"] for s in summaries(result)]
    return {"C full": list(map(_criterion, every)), "D": [mean(full.get("certificate")) for full in every]}


def _criterion(full: Mapping[str, Any]) -> str:
    if "failed" in full:
        return "not finite"
    return estimate(full["horizons"][-1]) + " not trusted" * bool(full["uncalibrated"])


def notes(result: Result) -> list[str]:
    """What they are, and where they are not to be trusted."""
    entries = [(entry["text"], entry["summary"]["full"]) for entry in result["schedules"]]
    lines = [
        f"{meaning_of_j(result)} C full: Amata's (13) over the whole run, from exact costates: the sum over "
        "epochs (shorter blocks where the control changes within one) of max over the candidates of the sum "
        "of H(v) - H(u) over their steps, divided by eta T; 95 % interval, up to "
        f"{result['settings']['looks']} steps of each were looked at. D: the largest decrease of J that "
        "relaxed controls really reached, half or a quarter of the way to the maximisers, or an eighth where "
        "first order does not reach so far.",
    ]
    if doubtful := [text for text, full in entries if full.get("uncalibrated")]:
        lines.append(
            f"not trusted ({', '.join(doubtful)}): a quarter of the way reached less than a quarter of what "
            "C promises, for one seed at least; go by D there."
        )
    lines += [f"WARNING, {text}: no C full, {full['failed']}." for text, full in entries if "failed" in full]
    if not all(full.get("same", True) for _, full in entries):
        lines.append("The recorded roll-out of some run did not end with the bits of its training.")
    dropped = sorted({name for _, full in entries for name in full.get("dropped", [])})
    return lines + [f"Costates leave out: {'; '.join(dropped)}."] * bool(dropped)


SECTION = Section(order=25, wanted=has_full, numbers=numbers, notes=notes)
