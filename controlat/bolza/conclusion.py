"""What the checks of a derived schedule amount to, in sentences: given which set, price and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conclusion"]

Row = dict[str, Any]


def conclusion(
    problem: Row,
    derived: Row,
    better: Row | None,
    searches: Mapping[str, Row],
    gamma: Row | None,
    sets: list[Row],
) -> list[str]:
    """The sentences.

    Args:
        problem: the statement, with the name and the formula of the admissible set.
        derived: the derived schedule: C, whether it satisfies the principle, its multiplier.
        better: the best schedule found, if one undercuts the derived one.
        searches: the rows of the searches that were made, by name.
        gamma: the range of prices for which it satisfies the principle, where that is known.
        sets: a row of dynamic programming for each admissible set.
    """
    told = _verdict(problem, derived, better) + _search_words(derived, better, searches)
    return told + _gamma_words(gamma, problem) + _set_words(sets, problem["admissible"])


def _verdict(problem: Row, derived: Row, better: Row | None) -> list[str]:
    given = f"Given {problem['formula']} (set '{problem['admissible']}'), gamma = {problem['gamma']:g}"
    told = f"satisfies the maximum principle (C = {derived['C']:.3g})"
    if not derived["satisfies"]:
        told = f"violates the maximum principle (C = {derived['C']:.3g}, "
        told += f"largest violation {derived['largest_violation']:.3g})"
    lines = [f"{given}: the derived schedule {told}."]
    if better is not None:
        lines.append(
            f"It is not optimal given this set and gamma: {better['by']} found a J lower by "
            f"{better['gain']:.4g} (derived: J = {derived['J']:.6g})."
        )
    return lines


def _search_words(derived: Row, better: Row | None, searches: Mapping[str, Row]) -> list[str]:
    """Which searches were made, and what finding nothing means."""
    lost = [f"{by} gives no answer ({row['error']})" for by, row in searches.items() if "error" in row]
    small = "" if derived["satisfies"] else " beyond its tolerance: the loss, if any, is small"
    nothing = f"Given this set and gamma, the search ({', '.join(searches)}) found no better schedule{small}"
    told = f"{'; '.join([nothing, *lost])}. This is a check of these numbers, not a proof."
    if len(lost) == len(searches):
        told = f"Whether another schedule of this set is better was not found out: {'; '.join(lost)}."
    lines = [told] if better is None else []
    if derived["m"] is not None and derived["constant"]:
        lines.append(
            "K* is constant along the derived path: the constant and linear schedules are the derived one, "
            "and there is nothing to compare."
        )
    return lines


def _gamma_words(gamma: Row | None, problem: Row) -> list[str]:
    if gamma is None:
        return []
    told = f"gamma from {gamma['low']:.4g} to {gamma['high']:.4g}"
    if gamma["unlimited"]:
        told = f"every gamma from {gamma['low']:.4g} to 1e4, the largest looked at"
    told = "no gamma" if gamma["none"] else told
    return [f"Given {problem['formula']}, it satisfies the principle for {told}."]


def _set_words(rows: list[Row], own: str) -> list[str]:
    """What the derived (rounded) schedule gives away given each other set."""
    lines = []
    for row in (row for row in rows if row["admissible"] != own):
        if "error" in row:
            told = f"there is no answer: {row['error']}"
        elif row["better_exists"]:
            told = f"it gives away {row['given_away']:.4g}: {row['policy']:.4g} against {row['value']:.4g}"
        else:
            told = f"no candidate on the grid is better than it ({row['policy']:.4g})"
        lines.append(f"Given {row['formula']} (set '{row['admissible']}'), {told}.")
    return lines
