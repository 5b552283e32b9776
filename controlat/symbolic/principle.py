"""Pontryagin's principle for a schedule on a landscape: trajectories, costates and the criterion

    H = p F(theta, u) - gamma K,   p' = -dH/dtheta,   p(T) = -L'(theta_T),
    C(u) = 1/T integral [ max over v in G(theta_t) of H(theta_t, p_t, v) - H(theta_t, p_t, u_t) ] dt.

G depends on the state through alpha <= alpha*(theta). Where a schedule sits on that bound the multiplier
m = dH/dalpha >= 0 enters: p' = -H_theta - m alpha*_theta, which is minus the total derivative
-d/dtheta [H(theta, p, alpha*(theta))]. C = 0 is necessary for a minimum, not sufficient.
Source: Ye et al. (AAAI 2021), equations 6-13; the multiplier is not in that paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import solve_bvp, solve_ivp, trapezoid

from controlat.symbolic.bolza import Bolza, candidates, grid_of_q, no_whole_k, whole_cap
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = [
    "Criterion",
    "Path",
    "boundary_problem",
    "comparisons",
    "criterion",
    "derived_cost",
    "derived_path",
    "gamma_limit",
    "gamma_range",
    "maximise",
    "multiplier",
    "schedule_path",
]

POINTS = 101  # instants of [0, T] in results
ALIKE = 1e-6  # relative differences of K up to this are none
LARGEST_GAMMA = 1e4  # beyond it a limit on gamma is called infinite
_EVALUATIONS = 6000  # of F along one path; some hundred are usual
_TOLERANCES: dict[str, Any] = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-12}
# (t, theta, the whole K that is held) -> alpha/alpha*, K, whether alpha sits on the bound alpha*
Control = Callable[[Any, Any, float], tuple[Any, Any, Any]]
Count = Callable[[Any], Any]  # K(t)


@dataclass(frozen=True)
class Path:
    """A schedule with its state and costate at instants t; p = p0 + gamma p1, the two parts kept apart.

    Args:
        raised: fraction of the time in which K(t) was raised to K*(theta), being too small to be admissible.
        cost: J, by quadrature.
    """

    name: str
    t: Array
    theta: Array
    q: Array
    k: Array
    p0: Array
    p1: Array
    gamma: float
    raised: float
    cost: float

    @property
    def p(self) -> Array:
        """The costate."""
        return np.asarray(self.p0 + self.gamma * self.p1, dtype=float)


class Criterion(NamedTuple):
    """C and where it comes from: max_v H - H(u) at each instant, its maximiser, what was looked at."""

    c: float
    gap: Array
    largest: float
    q: Array
    k: Array
    searched: str


class _Piece(NamedTuple):
    """A stretch of time: its end, (theta, integral of K) as a function of t, and the whole K that is held."""

    end: float
    states: Callable[[Any], Array]
    k: float


def _forward(problem: Bolza, control: Control) -> list[_Piece]:
    """State and cost, in pieces on which a whole K is held; real K have one piece.

    Raises:
        LandscapeError: the flow leaves the range where the inner maximum exists.
    """
    calls, pieces, horizon = itertools.count(), list[_Piece](), problem.horizon
    t, y = 0.0, np.array([problem.theta0, 0.0])

    def slopes(s: float, y: Array, held: float) -> list[Any]:
        if next(calls) > _EVALUATIONS:
            raise LandscapeError(
                f"the flow from theta = {problem.theta0:g} changes too fast to be followed beyond "
                f"t = {s:.4g}, theta = {float(y[0]):.6g}"
            )
        q, k, _ = control(s, y[0], held)
        return [problem.flow(y[0], q, k), k]

    def switch(s: float, y: Array, held: float) -> float:
        return 1.0 if problem.policy(y[0])[1] == held else -1.0

    switch.terminal = True  # type: ignore[attr-defined]
    events: Any = switch if problem.whole else None
    while t < horizon:
        held = float(problem.policy(y[0])[1])
        if pieces:  # the switch may be found a little early
            ahead = y[0] + 1e-9 * horizon * slopes(t, y, held)[0]
            held = float(problem.policy(ahead)[1])
        if problem.whole and math.isnan(held):
            raise no_whole_k(float(y[0]))
        with np.errstate(all="ignore"):
            solved: Any = solve_ivp(
                slopes,
                (t, horizon),
                y,
                args=(held,),
                events=events,
                dense_output=True,
                **_TOLERANCES,
            )
        t, y = float(solved.t[-1]), solved.y[:, -1]
        if solved.status < 0 or not np.isfinite(solved.y).all():
            low, high = problem.branch.domain
            raise LandscapeError(
                f"the flow from theta = {problem.theta0:g} cannot be followed beyond t = {t:.4g}, "
                f"theta = {y[0]:.6g}: the inner maximum is known on [{low:g}, {high:g}]. "
                "Shorten the horizon or follow the maximum further"
            )
        pieces.append(_Piece(t, solved.sol, held))
    return pieces


def _follow(problem: Bolza, name: str, control: Control) -> Path:
    """State and cost forward, costate backward: p' = -a p + gamma b, with b = dK*/dtheta on the bound alone.

    Raises:
        LandscapeError: the flow leaves the range where the inner maximum exists.
    """
    pieces, every = _forward(problem, control), np.linspace(0, problem.horizon, POINTS)

    def backward(s: float, y: Array, piece: _Piece) -> list[Any]:
        theta = piece.states(s)[0]
        q, k, bound = control(s, theta, piece.k)
        a = problem.robust_flow_slope(theta) if bound else problem.flow_slope(theta, q, k)
        b = problem.count_slope(theta) if bound and problem.admissible == "product" else 0.0
        return [-a * y[0], b - a * y[1]]

    end = pieces[-1].states(problem.horizon)[0]
    p, columns = np.array([-float(problem.branch.robust_slope(end)), 0.0]), list[Array]()
    for piece, begin in zip(pieces[::-1], [*(each.end for each in pieces[-2::-1]), 0.0], strict=True):
        t = every[(every <= piece.end) & ((every > begin) | (begin == 0))]
        with np.errstate(all="ignore"):
            solved: Any = solve_ivp(
                backward,
                (piece.end, begin),
                p,
                args=(piece,),
                dense_output=True,
                **_TOLERANCES,
            )
            p = solved.y[:, -1]
            if not solved.success or not np.isfinite(p).all():
                raise LandscapeError(
                    f"the costate of the schedule {name!r} is not finite: a derivative of l is not"
                )
            if not t.size:
                continue
            theta = piece.states(t)[0]
            control_row = np.broadcast_arrays(theta, *control(t, theta, piece.k))
            columns.insert(0, np.stack([t, *control_row, *solved.sol(t)]))
    t, theta, q, k, bound, p0, p1 = np.concatenate(columns, axis=1)
    raised = float(trapezoid(bound, t)) / problem.horizon
    return Path(name, t, theta, q, k, p0, p1, gamma=problem.gamma, raised=raised, cost=_cost(problem, pieces))


def _cost(problem: Bolza, pieces: list[_Piece]) -> float:
    end, spent = pieces[-1].states(problem.horizon)
    return float(problem.branch.robust(end) + problem.gamma * spent)


def _derived(problem: Bolza) -> Control:
    # "integer": alpha = tau/K moves with K; "overshoot": alpha* is inside the set, no bound
    limit = problem.admissible in ("product", "free")

    def control(t: Any, theta: Any, held: float) -> tuple[Any, Any, Any]:
        k = held if problem.whole else problem.count(theta)
        return problem.ratio(theta, k) if problem.admissible == "integer" else 1.0, k, limit

    return control


def derived_path(problem: Bolza) -> Path:
    """The derived schedule alpha = alpha*(theta(t)), K = K*(theta(t)), rounded where K is whole."""
    return _follow(problem, "derived", _derived(problem))


def derived_cost(problem: Bolza) -> float:
    """J of the derived schedule."""
    return _cost(problem, _forward(problem, _derived(problem)))


def schedule_path(problem: Bolza, name: str, count: Count) -> Path:
    """A schedule K(t) with alpha = tau/K, raised to K*(theta) wherever it is smaller (set "product").

    Raises:
        LandscapeError: the flow leaves the range of the inner maximum.
    """

    def control(t: Any, theta: Any, _: float) -> tuple[Any, Any, Any]:
        wanted, least = count(t), problem.count(theta)
        return np.where(wanted <= least, 1.0, least / wanted), np.maximum(wanted, least), wanted <= least

    return _follow(problem, name, control)


def comparisons(problem: Bolza, derived: Path) -> dict[str, Count]:
    """K(t) of the schedules that the derived one is compared with; none where K* is constant.

    The line from K*(0) to K*(T) is raised as a whole by the least amount (rounded up to 3 digits) that makes
    it admissible along the derived path; so is any other that is nowhere above K*, and would be the derived
    one. The name says by how much.
    """
    t, k, span = derived.t, derived.k, problem.horizon
    first, last, most, mean = float(k[0]), float(k[-1]), float(k.max()), float(trapezoid(k, t)) / span
    if most - float(k.min()) <= ALIKE * most:
        return {}
    rising = "linear from K*(0) to K*(T)"
    lines = {
        "constant at the largest K*": (most, most),
        "constant at the mean K*": (mean, mean),
        rising: (first, last),
        "linear from K*(T) to K*(0)": (last, first),
    }
    counts: dict[str, Count] = {}
    for name, (begin, end) in lines.items():
        line = begin + (end - begin) * t / span
        below, shift = float((k - line).max()), 0.0
        if below > ALIKE * most and (name == rising or np.all(line <= k * (1 + ALIKE))):
            unit = 10.0 ** (math.floor(math.log10(below)) - 2)
            shift = math.ceil(below / unit * (1 - 1e-12)) * unit
        told = f"{name}, raised by {shift:.3g}" if shift > 0 else name
        counts[told] = lambda s, a=begin + shift, b=end - begin: a + b * s / span  # type: ignore[misc]
    return counts


def maximise(problem: Bolza, theta: Array, p: Array) -> tuple[Array, Array, Array]:
    """max over G(theta) of H at each (theta, p): value, alpha/alpha*, K; candidates, then ever finer ones."""
    rows, tied = np.arange(len(theta)), problem.tied
    column, price = theta[:, None], p[:, None]
    q, k = candidates(problem, theta)
    values = problem.hamiltonian(column, price, q, k)
    best = np.argmax(values, axis=1)
    if problem.admissible == "integer":  # alpha = tau/K: nothing is left to refine
        return values[rows, best], q[rows, best], k[rows, best]
    stride = whole_cap(problem) if problem.whole else 1
    low = q[rows, np.where(best >= stride, best - stride, best)]
    high = q[rows, np.where(best + stride < q.shape[1], best + stride, best)]
    top, q_best, fixed = values[rows, best], q[rows, best], k[rows, best]
    for _ in range(8):
        fine = np.linspace(low, high, 9, axis=1)
        values = problem.hamiltonian(
            column, price, fine, problem.count(column) / fine if tied else fixed[:, None]
        )
        best = np.argmax(values, axis=1)
        better = values[rows, best] > top
        top, q_best = np.where(better, values[rows, best], top), np.where(better, fine[rows, best], q_best)
        low, high = fine[rows, np.maximum(best - 1, 0)], fine[rows, np.minimum(best + 1, 8)]
    return top, q_best, problem.count(theta) / q_best if tied else fixed


def criterion(problem: Bolza, path: Path) -> Criterion:
    """C of a schedule; its own control is among the candidates, so the gap is never negative."""
    own = path.p * problem.flow(path.theta, path.q, path.k) - problem.gamma * path.k
    if not np.isfinite(own).all():
        raise LandscapeError(f"the Hamiltonian along the schedule {path.name!r} is not finite")
    best, q, k = maximise(problem, path.theta, path.p)
    better = best > own
    gap = np.where(better, best - own, 0.0)
    c = float(trapezoid(gap, path.t)) / problem.horizon
    q, k = np.where(better, q, path.q), np.where(better, k, path.k)
    return Criterion(c, gap, float(gap.max()), q, k, _searched(problem, path, np.maximum(best, own)))


def _searched(problem: Bolza, path: Path, best: Array) -> str:
    """Which K were looked at, and whether larger ones are ruled out.

    For quadratic l (and alpha K = tau) x_K stays between x0 and x*, so p F is at most its maximum there.
    """
    cap, land = whole_cap(problem), problem.landscape
    if not problem.whole:
        return f"alpha/alpha* from {grid_of_q(1, 2)[0]:.2g} to 1, K = K*/(alpha/alpha*)"
    if land.quadratic and not problem.tied:
        return f"K = 1..{cap}; one step reaches whatever more steps reach, so larger K cannot be better"
    text = f"the first {cap} admissible K" if problem.tied else f"K = 1..{cap}"
    if land.quadratic:
        theta, line = path.theta[:, None], np.linspace(0, 1, 101)
        x = land.point * (1 - line) + problem.branch(theta) * line
        most = np.max(-path.p[:, None] * land("t")(theta, x), axis=1)
        if np.all(most - problem.gamma * (np.ceil(problem.count(path.theta)) + cap) < best):
            return text + "; larger K cost more than they could gain"
    return text + "; larger K were not looked at"


def multiplier(problem: Bolza, path: Path) -> Array:
    """m = dH/dalpha at alpha = alpha*(theta) from below, along the derived schedule of the set "product".

    x_K moves with l_x(theta, x0) 0^(K-1): not at all for K > 1, infinitely fast for K < 1. On (11):
    4 gamma tau/(theta^2 + 1)^2 where K* > 1.
    """
    theta, land, k = path.theta, problem.landscape, path.k
    price = problem.gamma * problem.tau / problem.branch.exact_step(theta) ** 2
    moved = -path.p * land("tx")(theta, problem.branch(theta)) * land("x")(theta, land.point)
    edge = np.where(moved == 0, price, np.sign(moved) * np.inf)
    return np.where(k > 1, price, np.where(k == 1, price + moved, edge))


def boundary_problem(problem: Bolza, derived: Path) -> dict[str, Any]:
    """theta and p of the derived schedule as a two-point boundary problem, by scipy's solve_bvp.

    Returns:
        success, and the largest differences in theta and p from the initial-value solutions.
    """

    def slopes(t: Array, y: Array) -> Array:
        down = -y[1] * problem.robust_flow_slope(y[0]) + problem.gamma * problem.count_slope(y[0])
        return np.array([-problem.branch.robust_slope(y[0]), down])

    def ends(a: Array, b: Array) -> Array:
        return np.array([a[0] - problem.theta0, b[1] + float(problem.branch.robust_slope(b[0]))])

    t = np.linspace(0, problem.horizon, 31)
    guess = np.array([np.interp(t, derived.t[[0, -1]], v[[0, -1]]) for v in (derived.theta, derived.p)])
    with np.errstate(all="ignore"):
        solved = solve_bvp(slopes, ends, t, guess, tol=1e-8, max_nodes=4000)
        theta, p = solved.sol(derived.t)
    differences = float(np.abs(theta - derived.theta).max()), float(np.abs(p - derived.p).max())
    fine = bool(solved.success and np.isfinite(differences).all())
    return {
        "success": fine,
        "theta_difference": differences[0] if fine else None,
        "p_difference": differences[1] if fine else None,
    }


def gamma_range(problem: Bolza, path: Path | None = None) -> tuple[float, float]:
    """The prices gamma for which the derived schedule satisfies the principle on the set "product".

    With p = p0 + gamma p1 each candidate's H - H(u) is A + gamma B, so each (t, candidate) allows a half-line
    of gamma, and their intersection is an interval: no search is needed beyond the one over candidates. In
    the limit alpha -> alpha* with K* < 1 F moves infinitely faster than the price: there p dF decides.

    Args:
        problem: with the set "product"; its gamma is not used.
        path: its derived path, where that is known already.

    Returns:
        (smallest, largest); largest = inf if there is no violation up to 1e4; (nan, nan) if none will do.

    Raises:
        ValueError: the set is not "product".
    """
    if problem.admissible != "product":
        raise ValueError(f"the range of gamma is for the set 'product', got {problem.admissible!r}")
    path, land = path or derived_path(problem), problem.landscape
    theta, own, q = path.theta[:, None], path.k[:, None], grid_of_q(1.0, 400)[:-1]
    moved = problem.flow(theta, q, own / q) + problem.branch.robust_slope(theta)
    x = problem.branch(theta)
    edge = np.where(own < 1, np.sign(-land("tx")(theta, x) * (land.point - x)), 0.0)
    a = path.p0[:, None] * np.hstack([moved, edge])
    b = path.p1[:, None] * np.hstack([moved, edge]) - np.hstack([own / q - own, 0 * own])
    good = np.isfinite(a) & np.isfinite(b)
    a[~good | (np.abs(a) <= 1e-12 * max(1.0, float(np.abs(path.p0).max())))] = 0.0
    b[~good] = 0.0
    low = float(np.max(-a[b < 0] / b[b < 0], initial=0.0))
    high = float(np.min(-a[b > 0] / b[b > 0], initial=math.inf))
    if np.any((a > 0) & (b >= 0)) or low > high:
        return math.nan, math.nan
    return low, math.inf if high > LARGEST_GAMMA else high


def gamma_limit(problem: Bolza) -> float:
    """The largest gamma for which the derived schedule satisfies the principle: see `gamma_range`."""
    return gamma_range(problem)[1]
