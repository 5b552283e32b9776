"""How far robust accuracy can be trusted: AutoAttack, transfer, checks for gradient masking."""

from __future__ import annotations

from controlat.report._contents import summaries
from controlat.report._formats import percent
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]

_TITLES = {"autoattack": "AutoAttack", "transfer": "transfer"}


def numbers(result: Result) -> dict[str, list[str]]:
    """Accuracy under AutoAttack and under transferred attacks, where they ran."""
    every = summaries(result)
    ran = [name for name in _TITLES if name in every[0]]
    return {f"{_TITLES[name]} %": [percent(s[name]) for s in every] for name in ran}


def notes(result: Result) -> list[str]:
    """On how many points, and the warnings."""
    first, s = summaries(result)[0], result["settings"]
    lines = []
    if "autoattack" in first:
        points = first["autoattack"]["points"]
        lines.append(f"AutoAttack (standard version, Croce and Hein 2020): on {points} of the test points.")
    if "transfer" in first:
        lines.append(f"transfer: survives the same attacks made on the surrogate {s['surrogate']}.")
    warnings = [
        f"WARNING, {entry['text']}, seed {', '.join(map(str, w['seeds']))}: {w['text']}."
        for entry in result["schedules"]
        for w in entry["summary"]["warnings"]
    ]
    checked = result["schedules"][0]["runs"][0]["evaluation"]["masking"]["points"]
    if warnings or not checked:
        return lines + warnings
    return [*lines, f"Checks for gradient masking on up to {s['checks']} points of each run: nothing found."]


SECTION = Section(order=60, numbers=numbers, notes=notes)
