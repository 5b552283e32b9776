"""What a result has, for several sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlat.report.sections import Result

__all__ = [
    "examined",
    "first_seed",
    "greedy_gamma",
    "has_examined",
    "has_full",
    "has_objective",
    "meaning_of_j",
    "objective",
    "over_seeds",
    "searched_knobs",
    "summaries",
    "terminal",
]


def summaries(result: Result) -> list[Any]:
    """What the runs of every schedule come to."""
    return [entry["summary"] for entry in result["schedules"]]


def objective(summary: Mapping[str, Any]) -> Any:
    """J over seeds, if it is known; results of release 0.1 have it beside the full criterion only."""
    return summary.get("objective", summary.get("full", {}).get("objective"))


def has_objective(result: Result) -> bool:
    """Whether J was computed, or should have been."""
    return has_full(result) or any(objective(s) for s in summaries(result))


def has_full(result: Result) -> bool:
    """Whether the criterion was computed over whole runs."""
    return "full" in summaries(result)[0]


def first_seed(result: Result) -> int:
    """The seed of the runs whose controls are shown epoch by epoch."""
    return int(result["schedules"][0]["runs"][0]["seed"])


def examined(result: Result) -> list[tuple[int, Any]]:
    """(place, schedule) of those whose criterion over the whole run is there and finite."""
    every = enumerate(result["schedules"])
    return [(i, e) for i, e in every if "failed" not in e["summary"].get("full", {"failed": ""})]


def has_examined(result: Result) -> bool:
    """Whether there is any of them."""
    return bool(examined(result))


def terminal(result: Result) -> str:
    """The terminal cost in words; results of before it could be chosen do not have them."""
    return str(result.get("terminal", "the adversarial loss on held-out data"))


def meaning_of_j(result: Result) -> str:
    """What J is, in a sentence."""
    told = f"J = Phi + gamma eta sum n, with Phi {terminal(result)} and eta the mean learning rate."
    if price := result.get("price"):
        told += (
            f" gamma = {price['gamma']:.4g}: the whole cost of {price['schedule']}, the most expensive one, "
            f"weighs {price['weight']:g} in J."
        )
    return told


def greedy_gamma(result: Result) -> Any:
    """gamma of the greedy forms."""
    return result["price"]["greedy"] if "price" in result else result["settings"]["gamma"]


def searched_knobs(result: Result) -> list[str]:
    """The knobs that the maximum is over, in the order in which controls are written."""
    return ["steps", "alpha", *result["grid"].get("more", {})]


def over_seeds(result: Result) -> str:
    """The end of a sentence on intervals: what stands behind ±."""
    several = len(result["settings"]["seeds"]) > 1
    return ", ± standard deviation over seeds." if several else "."
