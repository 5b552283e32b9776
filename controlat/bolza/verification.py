"""What can be said about the derived schedule alpha*(theta), K* = tau/alpha*: checked in numbers.

The maximum principle with its multiplier (`principle`), and a search for something better that does not share
its reasoning: dynamic programming (`programming`), by option direct transcription too (`transcription`). The
answer depends on the admissible set: all four sets are always given a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from controlat._util.limits import LATE, TimeLimit
from controlat.bolza.admissible import SETS, chosen_set
from controlat.bolza.conclusion import conclusion
from controlat.bolza.path import ALIKE, POINTS, Path, comparisons, derived_cost, derived_path, schedule_path
from controlat.bolza.principle import boundary_problem, criterion, gamma_range, multiplier
from controlat.bolza.problem import Bolza
from controlat.bolza.programming import programme
from controlat.bolza.search import Search, candidates
from controlat.bolza.transcription import transcribe
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import LandscapeError

__all__ = ["Verification", "verify"]

COARSE = 0.05  # relative difference of J from which the grid of the dynamic programme says nothing
TOLERANCE = 1e-9  # on max_v H - H(u), relative to the largest |H|, at least 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Verification:
    """The checks of one derived schedule.

    Args:
        problem: the statement: landscape, data point, theta0, tau, horizon, gamma, admissible set.
        derived: t, theta, p, m, K, alpha, gap, J, C, whether the principle holds ("satisfies").
        comparisons: other schedules with K(t) >= K*(theta), set "product" only; none where K* is constant.
        hamiltonian: H over alpha/alpha* at three instants along the derived schedule.
        boundary: differences to the two-point boundary problem, set "product" only.
        transcription: direct minimisation, set "product" only and if asked for.
        gamma: prices for which the derived schedule satisfies the principle, set "product" only.
        sets: a row of dynamic programming for each admissible set.
        better: the best schedule found, if one undercuts the derived one.
        conclusion: sentences.
        holds: the principle is satisfied, and a search for something better was made and found nothing.
        left_out: which of the above was left out because the deadline of `limits.within` had passed.
    """

    problem: Row
    derived: Row
    comparisons: list[Row]
    hamiltonian: list[Row]
    boundary: Row | None
    transcription: Row | None
    gamma: Row | None
    sets: list[Row]
    better: Row | None
    conclusion: list[str]
    holds: bool
    left_out: list[str]

    def to_json(self) -> Row:
        """Plain data: lists for arrays, None for what is infinite or undefined."""
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries; None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


@np.errstate(all="ignore")  # what is not finite is named
def verify(
    branch: Branch,
    theta0: float,
    tau: float,
    horizon: float,
    gamma: float,
    admissible: str | None = None,
    overshoot: float = 1.9,
    transcription: bool = False,
) -> Verification:
    """Check the derived schedule of a branch of inner maxima.

    Args: as of `Bolza`, and
        admissible: "product" where l is quadratic in x, else "integer", if left out.
        transcription: also look for something better by direct transcription (set "product").

    Raises:
        ValueError: a number out of range, or transcription for another set.
        LandscapeError: the flow under the derived schedule leaves the range of the inner maximum, or real K
            is asked for where l is not quadratic in x.
        TimeLimit: the deadline of `limits.within` passed before the criterion was known.

    >>> from controlat.symbolic.landscape import Landscape
    >>> checked = verify(Branch(Landscape(), 1.0, 1.0, (-3, 3)), 1.0, tau=10, horizon=1, gamma=0.01)
    >>> checked.holds, round(checked.derived["J"], 5), round(checked.derived["C"], 9)
    (True, 0.21105, 0.0)
    """
    admissible = chosen_set(branch.landscape, admissible)
    if transcription and admissible != "product":
        raise ValueError(f"transcription is for the set 'product' only, got {admissible!r}: leave it out")
    return _verified(
        Bolza(branch, theta0, tau, horizon, gamma, admissible=admissible, overshoot=overshoot), transcription
    )


def _verified(problem: Bolza, transcription: bool) -> Verification:
    """All checks of a problem: those that the deadline stops have no result, and are named."""
    product, path, late = problem.admissible == "product", derived_path(problem), list[str]()

    def part(what: str, otherwise: Any, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(problem, *given)
        except TimeLimit:
            late.append(what)
            return otherwise

    def programmed(name: str) -> Row:
        return part(f"dynamic programming for the set '{name}'", _set(name, LATE), _programmed, name)  # type: ignore[no-any-return]

    curves = _curves(problem, path)
    prices = part("the range of gamma", None, _gamma, path) if product else None
    derived, statement = _derived(problem, path, prices), _statement(problem)
    searches = {"dynamic programming": programmed(problem.admissible)}
    if transcription:
        searches["direct transcription"] = part("direct transcription", {"error": LATE}, _transcribed)
    boundary = part("the boundary problem", None, boundary_problem, path) if product else None
    compared = part("other schedules", [], _compared, path) if product else []
    own, better = searches["dynamic programming"], _best(searches)
    sets = [own if name == problem.admissible else programmed(name) for name in SETS]
    searched = any("error" not in row for row in searches.values())
    return Verification(
        problem=statement,
        derived=derived,
        comparisons=compared,
        hamiltonian=curves,
        boundary=boundary,
        transcription=searches.get("direct transcription"),
        gamma=prices,
        sets=sets,
        better=better,
        conclusion=conclusion(statement, derived, better, searches, prices, sets),
        holds=derived["satisfies"] and better is None and searched,
        left_out=late,
    )


# ---- numbers


def _statement(problem: Bolza) -> Row:
    land, names = problem.landscape, ("theta0", "tau", "horizon", "gamma", "admissible", "overshoot")
    row: Row = {"landscape": str(land.expression), "x0": land.point, "quadratic": land.quadratic}
    row |= {"parameters": {str(k): float(v) for k, v in land.values.items()}}
    return row | {name: getattr(problem, name) for name in names} | _set(problem.admissible)


def _derived(problem: Bolza, path: Path, prices: Row | None) -> Row:
    """The derived schedule with costate, multiplier and gap."""
    gap, k = criterion(problem, path), path.k
    own = path.p * problem.flow(path.theta, path.q, k) - problem.gamma * k
    satisfies = gap.largest <= TOLERANCE * max(1.0, float(np.abs(own).max()))
    if prices is not None:  # sharper: beside a limit on gamma the violation is tiny
        satisfies &= prices["low"] <= problem.gamma <= (math.inf if prices["unlimited"] else prices["high"])
    m = multiplier(problem, path) if problem.admissible == "product" else None
    row: Row = {"t": path.t, "theta": path.theta, "p": path.p, "K": k, "m": m, "J": path.cost}
    row |= {"alpha": path.q * problem.branch.exact_step(path.theta), "searched": gap.searched, "C": gap.c}
    row |= {"gap": gap.gap, "best_K": gap.k, "best_ratio": gap.q, "largest_violation": gap.largest}
    row["m_nonnegative"] = None if m is None else bool(np.all(m >= 0))
    return row | {"constant": bool(k.max() - k.min() <= ALIKE * k.max()), "satisfies": bool(satisfies)}


def _compared(problem: Bolza, derived: Path) -> list[Row]:
    """The comparison schedules; one that leaves the landscape says so."""
    rows: list[Row] = []
    for name, count in comparisons(problem, derived).items():
        try:
            path = schedule_path(problem, name, count)
            gap = criterion(problem, path)
        except LandscapeError as error:
            rows.append({"name": name, "error": str(error)})
        else:
            row = {"name": name, "C": gap.c, "J": path.cost, "raised": path.raised, "gap": gap.gap}
            rows.append(row | {"t": path.t, "theta": path.theta, "K": path.k, "p": path.p})
    return rows


def _curves(problem: Bolza, path: Path) -> list[Row]:
    """H over alpha/alpha*, the best K for each, at the beginning, the middle and the end."""
    rows = []
    for i in (0, len(path.t) // 2, len(path.t) - 1):
        theta, p = path.theta[i : i + 1], path.p[i : i + 1]
        q, k = (v[0] for v in candidates(problem, theta, points=48))
        values, ratios = problem.hamiltonian(theta, p, q, k), np.unique(q)
        best = np.array([values[q == ratio].max() for ratio in ratios])
        keep = np.unique(np.linspace(0, len(ratios) - 1, POINTS).astype(int))
        rows.append({"t": float(path.t[i]), "ratio": ratios[keep], "H": best[keep]})
    return rows


def _gamma(problem: Bolza, path: Path) -> Row:
    low, high = gamma_range(problem, path)
    return {"low": low, "high": high, "none": math.isnan(low), "unlimited": math.isinf(high)}


def _set(name: str, error: str = "") -> Row:
    return {"admissible": name, "formula": SETS[name].formula} | ({"error": error} if error else {})


def _programmed(problem: Bolza, name: str) -> Row:
    """One admissible set: the best value on the grid, the derived policy by the same scheme and exactly.

    With "schedule", if the set is the problem's own and something better was found.
    """
    try:
        there = replace(problem, admissible=name)
        grid, exact = programme(there, follow=name == problem.admissible), derived_cost(there)
    except LandscapeError as error:
        return _set(name, str(error))
    if abs(grid.derived - exact) > COARSE * max(abs(exact), 1e-2):
        told = f"the derived schedule costs {grid.derived:.4g} on it, in fact {exact:.4g}"
        return _set(name, f"the grid in theta does not resolve it: {told}")
    row = {"value": grid.best, "policy": grid.derived, "given_away": grid.difference, "derived_J": exact}
    return _set(name) | row | {"better_exists": grid.better} | grid.about | _schedule(grid)


def _transcribed(problem: Bolza) -> Row:
    try:
        direct = transcribe(problem)
    except LandscapeError as error:
        return {"error": str(error)}
    row = {"found": direct.best, "derived": direct.derived, "difference": direct.difference}
    return row | {"better": direct.better} | direct.about | _schedule(direct)


def _schedule(search: Search) -> Row:
    """The schedule of a search, if it is better and was followed."""
    if not (search.better and len(search.q)):
        return {}
    at = np.unique(np.linspace(0, len(search.q) - 1, POINTS).astype(int))
    states = {"t": search.t[at], "theta": search.theta[at], "ratio": search.q[at], "K": search.k[at]}
    return {"schedule": {"J": search.best, "gain": search.difference, **states}}


def _best(searches: Mapping[str, Row]) -> Row | None:
    """The best schedule that a search found, if any; it is taken out of the rows."""
    better = [row.pop("schedule") | {"by": by} for by, row in searches.items() if "schedule" in row]
    return max(better, key=lambda row: float(row["gain"]), default=None)
