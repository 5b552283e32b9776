"""What a result has, for several sections."""

from __future__ import annotations

from typing import Any

from controlat.report.sections import Result

__all__ = ["examined", "has_full", "over_seeds", "summaries", "terminal"]


def summaries(result: Result) -> list[Any]:
    """What the runs of every schedule come to."""
    return [entry["summary"] for entry in result["schedules"]]


def has_full(result: Result) -> bool:
    """Whether the criterion was computed over whole runs."""
    return "full" in summaries(result)[0]


def examined(result: Result) -> list[tuple[int, Any]]:
    """(place, schedule) of those whose criterion over the whole run is there and finite."""
    every = enumerate(result["schedules"])
    return [(i, e) for i, e in every if "failed" not in e["summary"].get("full", {"failed": ""})]


def terminal(result: Result) -> str:
    """The terminal cost in words; results of before it could be chosen do not have them."""
    return str(result.get("terminal", "the adversarial loss on held-out data"))


def over_seeds(result: Result) -> str:
    """The end of a sentence on intervals: what stands behind ±."""
    several = len(result["settings"]["seeds"]) > 1
    return ", ± standard deviation over seeds." if several else "."
