"""What can be said about the derived schedule alpha*(theta), K* = tau/alpha*: checked, in numbers and words.

Three checks that do not share their reasoning: the maximum principle with its multiplier (`principle`),
direct transcription (`transcription`) and dynamic programming (`programming`). The answer depends on the
admissible set: all four sets are always given a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlat.symbolic.bolza import SETS, Bolza, candidates
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import LandscapeError
from controlat.symbolic.limits import LATE, TimeLimit
from controlat.symbolic.principle import (
    ALIKE,
    POINTS,
    Path,
    boundary_problem,
    comparisons,
    criterion,
    derived_path,
    gamma_range,
    isolated,
    multiplier,
    schedule_path,
)
from controlat.symbolic.programming import Programming, programme
from controlat.symbolic.transcription import Transcription, transcribe

__all__ = ["Verification", "verify"]

Array = NDArray[np.float64]
COARSE = 0.05  # relative difference of J from which the grid of the dynamic programme says nothing
TOLERANCE = 1e-9  # on max_v H - H(u), relative to the largest |H|, at least 1


@dataclass(frozen=True)
class Verification:
    """The checks of one derived schedule.

    Args:
        problem: the statement: landscape, data point, theta0, tau, horizon, gamma, admissible set.
        derived: t, theta, p, m, K, alpha, gap, J, C, whether the principle holds ("satisfies"), and the
            fraction of the time in which alpha* is an isolated point of the set ("isolated"; no m there).
        comparisons: other schedules with K(t) >= K*(theta), set "product" only; none where K* is constant.
        hamiltonian: H over alpha/alpha* at three instants along the derived schedule.
        boundary: differences to the two-point boundary problem, set "product" only.
        transcription: direct minimisation, set "product" only.
        gamma: prices for which the derived schedule satisfies the principle, set "product" only.
        sets: a row of dynamic programming for each admissible set.
        better: the best schedule found, if one undercuts the derived one.
        conclusion: sentences.
        holds: the principle is satisfied, and a search for something better was made and found nothing.
        left_out: which of the above was left out because the deadline of `limits.within` had passed.
    """

    problem: dict[str, Any]
    derived: dict[str, Any]
    comparisons: list[dict[str, Any]]
    hamiltonian: list[dict[str, Any]]
    boundary: dict[str, Any] | None
    transcription: dict[str, Any] | None
    gamma: dict[str, Any] | None
    sets: list[dict[str, Any]]
    better: dict[str, Any] | None
    conclusion: list[str]
    holds: bool
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: lists for arrays, None for what is infinite or undefined."""
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries; None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return value if not isinstance(value, float) or math.isfinite(value) else None


@np.errstate(all="ignore")  # what is not finite is named
def verify(
    branch: Branch,
    theta0: float,
    tau: float,
    horizon: float,
    gamma: float,
    admissible: str = "product",
    overshoot: float = 1.9,
) -> Verification:
    """Check the derived schedule of a branch of inner maxima against everything in this package.

    Args: as of `Bolza`.

    Raises:
        ValueError: a number out of range.
        LandscapeError: the flow under the derived schedule leaves the range of the inner maximum.
        TimeLimit: the deadline of `limits.within` passed before the criterion was known.
    """
    problem = Bolza(branch, theta0, tau, horizon, gamma, admissible, overshoot)
    path, late = derived_path(problem), list[str]()

    def part(what: str, otherwise: Any, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except TimeLimit:
            late.append(what)
            return otherwise

    def programmed(name: str) -> tuple[Programming | str, float]:
        what = f"dynamic programming for the set '{name}'"
        return part(what, (LATE, math.nan), _programmed, problem, name)  # type: ignore[no-any-return]

    product, curves = admissible == "product", _curves(problem, path)
    prices = part("the range of gamma", None, _gamma, problem) if product else None
    derived = _derived(problem, path, prices)
    rows = {admissible: programmed(admissible)}
    direct = part("direct transcription", LATE, _transcribed, problem) if product else None
    boundary = part("the boundary problem", None, boundary_problem, problem, path) if product else None
    compared = part("other schedules", [], _compared, problem, path) if product else []
    rows |= {name: programmed(name) for name in SETS if name != admissible}
    better = _better(rows[admissible][0], direct)
    found: dict[str, Any] = {
        "problem": _statement(problem),
        "derived": derived,
        "comparisons": compared,
        "hamiltonian": curves,
        "boundary": boundary,
        "transcription": _direct_row(direct) if product else None,
        "gamma": prices,
        "sets": [_row(name, *rows[name]) for name in SETS],
        "better": better,
        "holds": bool(derived["satisfies"] and better is None and _searched(rows[admissible][0], direct)),
    }
    return Verification(**found, conclusion=_conclusion(found), left_out=late)


def _statement(problem: Bolza) -> dict[str, Any]:
    land = problem.landscape
    return {
        "landscape": str(land.expression),
        "parameters": {str(k): float(v) for k, v in land.values.items()},
        "x0": float(land.x0),
        "theta0": problem.theta0,
        "tau": problem.tau,
        "horizon": problem.horizon,
        "gamma": problem.gamma,
        "admissible": problem.admissible,
        "formula": SETS[problem.admissible].formula,
        "overshoot": problem.overshoot,
        "quadratic": land.quadratic,
    }


def _at_points(problem: Bolza, path: Path) -> NDArray[np.int64]:
    """Indices of the instants nearest to an even spacing: paths also have instants where schedules jump."""
    wanted = np.linspace(0, problem.horizon, POINTS)
    return np.asarray(np.argmin(np.abs(path.t[None, :] - wanted[:, None]), axis=1), dtype=np.int64)


def _derived(problem: Bolza, path: Path, prices: dict[str, Any] | None) -> dict[str, Any]:
    """The derived schedule with costate, multiplier and gap."""
    at, gap = _at_points(problem, path), criterion(problem, path)
    own = problem.hamiltonian(path.theta, path.p, path.q, path.k)
    satisfies = gap.largest <= TOLERANCE * max(1.0, float(np.abs(own).max()))
    if prices is not None:  # sharper: beside a limit on gamma the violation is tiny
        satisfies &= prices["low"] <= problem.gamma <= (math.inf if prices["unlimited"] else prices["high"])
    m, alone = None, None
    if problem.admissible == "product":
        m = multiplier(problem, path)
        away = isolated(problem, path.theta)
        alone = float(np.diff(path.t) @ (away[1:] / 2 + away[:-1] / 2)) / problem.horizon
    known = None if m is None else m[~np.isnan(m)]
    return {
        "t": path.t[at],
        "theta": path.theta[at],
        "p": path.p[at],
        "m": None if m is None else m[at],
        "m_nonnegative": None if known is None or not known.size else bool(np.all(known >= 0)),
        "isolated": alone,
        "constant": bool(path.k.max() - path.k.min() <= ALIKE * path.k.max()),
        "K": path.k[at],
        "alpha": (path.q * problem.step(path.theta))[at],
        "gap": gap.gap[at],
        "best_K": gap.k[at],
        "best_ratio": gap.q[at],
        "J": path.cost,
        "C": gap.c,
        "largest_violation": gap.largest,
        "searched": gap.searched,
        "satisfies": bool(satisfies),
    }


def _compared(problem: Bolza, derived: Path) -> list[dict[str, Any]]:
    """The comparison schedules; one that leaves the landscape says so."""
    rows: list[dict[str, Any]] = []
    for name, count in comparisons(problem, derived).items():
        try:
            path = schedule_path(problem, name, count)
            gap, at = criterion(problem, path), _at_points(problem, path)
        except LandscapeError as error:
            rows.append({"name": name, "error": str(error)})
            continue
        rows.append(
            {
                "name": name,
                "t": path.t[at],
                "theta": path.theta[at],
                "K": path.k[at],
                "p": path.p[at],
                "gap": gap.gap[at],
                "C": gap.c,
                "J": path.cost,
                "raised": path.raised,  # fraction of the time at which K had to be raised to K*(theta)
            }
        )
    return rows


def _curves(problem: Bolza, path: Path) -> list[dict[str, Any]]:
    """H over alpha/alpha*, the best K for each, at the beginning, the middle and the end."""
    rows = []
    for i in (0, len(path.t) // 2, len(path.t) - 1):
        theta, p = path.theta[i : i + 1], path.p[i : i + 1]
        q, k = (v[0] for v in candidates(problem, theta, points=48))
        values = problem.hamiltonian(theta, p, q, k)
        ratios = np.unique(q)
        best = np.array([values[q == ratio].max() for ratio in ratios])
        keep = np.unique(np.linspace(0, len(ratios) - 1, POINTS).astype(int))
        rows.append({"t": float(path.t[i]), "ratio": ratios[keep], "H": best[keep]})
    return rows


def _programmed(problem: Bolza, name: str) -> tuple[Programming | str, float]:
    """The dynamic programme given a set, or why there is none; and J of the derived schedule there."""
    there = replace(problem, admissible=name)
    try:
        found, exact = programme(there, follow=name == problem.admissible), derived_path(there).cost
    except LandscapeError as error:
        return str(error), math.nan
    if abs(found.policy - exact) > COARSE * max(abs(exact), 1e-2):
        return (
            f"the grid in theta does not resolve it: the derived schedule costs {found.policy:.4g} on it, "
            f"in fact {exact:.4g}"
        ), exact
    return found, exact


def _row(name: str, result: Programming | str, exact: float) -> dict[str, Any]:
    """One admissible set: the best value on the grid, the derived policy by the same scheme and exactly."""
    row: dict[str, Any] = {"admissible": name, "formula": SETS[name].formula}
    if isinstance(result, str):
        return {**row, "error": result}
    return {
        **row,
        "value": result.value,
        "policy": result.policy,
        "given_away": result.difference,
        "tolerance": result.tolerance,
        "better_exists": result.better,
        "derived_J": exact,
        "theta_range": result.theta_range,
        "clipped": result.clipped,
        "nodes": result.nodes,
        "steps": result.steps,
    }


def _transcribed(problem: Bolza) -> Transcription | str:
    try:
        return transcribe(problem)
    except LandscapeError as error:
        return str(error)


def _direct_row(result: Transcription | str | None) -> dict[str, Any]:
    if not isinstance(result, Transcription):
        return {"error": result}
    names = ("found", "derived", "difference", "deviation", "success", "better", "intervals", "starts")
    return {name: getattr(result, name) for name in names}


def _searched(grid: Programming | str, direct: Transcription | str | None) -> bool:
    """Whether anything was searched for a better schedule without an error."""
    return isinstance(grid, Programming) or isinstance(direct, Transcription)


def _better(grid: Programming | str, direct: Transcription | str | None) -> dict[str, Any] | None:
    """The schedule that undercuts the derived one by most, each by the discretisation it was found with."""
    options = []
    if isinstance(grid, Programming) and grid.better:
        at = np.unique(np.linspace(0, grid.steps - 1, POINTS).astype(int))
        states = {"t": grid.t[at], "theta": grid.theta[at], "ratio": grid.q[at], "K": grid.k[at]}
        options.append({"by": "dynamic programming", "J": grid.value, "gain": grid.difference, **states})
    if isinstance(direct, Transcription) and direct.better:
        states = {"t": direct.t, "theta": direct.theta[:-1], "ratio": direct.q, "K": direct.k}
        options.append({"by": "direct transcription", "J": direct.found, "gain": direct.difference, **states})
    return max(options, key=lambda row: float(row["gain"])) if options else None


def _gamma(problem: Bolza) -> dict[str, Any]:
    low, high = gamma_range(problem)
    return {"low": low, "high": high, "none": math.isnan(low), "unlimited": math.isinf(high)}


def _conclusion(found: Mapping[str, Any]) -> list[str]:
    """The answer in words: given which set, at which price, by which checks."""
    problem, derived, better = found["problem"], found["derived"], found["better"]
    given = f"Given {problem['formula']} (set '{problem['admissible']}'), gamma = {problem['gamma']:g}"
    lines = []
    if derived["satisfies"]:
        only = ", though the set leaves it hardly a rival" if (derived["isolated"] or 0) > 0.5 else ""
        lines.append(
            f"{given}: the derived schedule satisfies the maximum principle (C = {derived['C']:.3g}){only}."
        )
    else:
        lines.append(
            f"{given}: the derived schedule violates the maximum principle "
            f"(C = {derived['C']:.3g}, largest violation {derived['largest_violation']:.3g})."
        )
    if better is not None:
        lines.append(
            f"It is not optimal given this set and gamma: {better['by']} found a J lower by "
            f"{better['gain']:.4g} (derived: J = {derived['J']:.6g})."
        )
    else:
        lines.append(_nothing_better(found))
    lines += _alone_words(derived)
    if problem["admissible"] == "product" and derived["constant"]:
        lines.append(
            "K* is constant along the derived path: the constant and linear schedules are the derived one, "
            "and there is nothing to compare."
        )
    lines += _gamma_words(found["gamma"], problem)
    lines += _set_words(found["sets"], problem["admissible"])
    return lines


def _nothing_better(found: Mapping[str, Any]) -> str:
    """Which of the two searches were made, and what finding nothing means."""
    own = next(row for row in found["sets"] if row["admissible"] == found["problem"]["admissible"])
    reasons = {"dynamic programming": own.get("error"), "direct transcription": None}
    if found["transcription"] is not None:
        reasons["direct transcription"] = found["transcription"].get("error")
    lost = [f"{name} gives no answer ({reason})" for name, reason in reasons.items() if reason]
    if own.get("error") and (found["transcription"] is None or found["transcription"].get("error")):
        return f"Whether another schedule of this set is better was not found out: {'; '.join(lost)}."
    told = "Given this set and gamma, the search found no better schedule"
    if not found["derived"]["satisfies"]:
        told += " beyond its tolerance: the loss, if any, is small"
    told += "; " + "; ".join(lost) if lost else ""
    return told + ". This is a check of these numbers, not a proof."


def _alone_words(derived: Mapping[str, Any]) -> list[str]:
    """Where alpha* has no neighbours in the set."""
    if not derived["isolated"]:
        return []
    return [
        f"During {derived['isolated']:.0%} of the time steps a little shorter than alpha* pass x* later and "
        "so do not belong to this set, of which alpha* is an isolated point there."
    ]


def _gamma_words(gamma: Mapping[str, Any] | None, problem: Mapping[str, Any]) -> list[str]:
    if gamma is None:
        return []
    head = f"Given {problem['formula']}, it satisfies the principle"
    if gamma["none"]:
        return [f"{head} for no gamma."]
    if gamma["unlimited"]:
        return [f"{head} for every gamma from {gamma['low']:.4g} to 1e4, the largest looked at."]
    return [f"{head} for gamma from {gamma['low']:.4g} to {gamma['high']:.4g}."]


def _set_words(rows: list[dict[str, Any]], own: str) -> list[str]:
    """What the derived (rounded) schedule gives away given each other set."""
    lines = []
    for row in rows:
        if row["admissible"] == own:
            continue
        what = f"Given {row['formula']} (set '{row['admissible']}'),"
        if "error" in row:
            lines.append(f"{what} there is no answer: {row['error']}.")
            continue
        if row["better_exists"]:
            values = f"{row['policy']:.4g} against {row['value']:.4g}"
            lines.append(f"{what} it gives away {row['given_away']:.4g}: {values}.")
        else:
            lines.append(f"{what} no candidate on the grid is better than it ({row['policy']:.4g}).")
    return lines
