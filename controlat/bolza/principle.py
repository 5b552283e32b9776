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
from scipy.integrate import OdeSolution, solve_bvp, solve_ivp, trapezoid

from controlat.bolza.problem import Bolza, candidates, grid_of_q, no_whole_k, whole_cap
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["Criterion", "Path", "boundary_problem", "comparisons", "criterion", "derived_cost"]
__all__ += ["derived_path", "gamma_limit", "gamma_range", "maximise", "multiplier", "schedule_path"]

POINTS = 101  # instants of [0, T] in results
ALIKE = 1e-6  # relative differences of K up to this are none
LARGEST_GAMMA = 1e4  # beyond it a limit on gamma is called infinite
_EVALUATIONS = 6000  # of F along one path; some hundred are usual
# (t, theta, the whole K that is held) -> alpha/alpha*, K, whether alpha sits on the bound alpha*
Control = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
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


class _Course(NamedTuple):
    """A state that was followed: J, (theta, integral of K) of t, and the stretches (begin, end, whole K)."""

    cost: float
    states: Callable[[Any], Array]
    stretches: list[tuple[float, float, float]]

    def held(self, t: Any) -> Array:
        """The whole K that is held at times t."""
        ends, k = [end for _, end, _ in self.stretches], np.array([k for _, _, k in self.stretches])
        return np.asarray(k[np.searchsorted(ends[:-1], t)])


@np.errstate(all="ignore")
def _solve(slopes: Callable[..., Any], span: tuple[float, float], start: Any, k: float, event: Any) -> Any:
    """`solve_ivp` with a K that is held, to small tolerances and with a dense output."""
    options: dict[str, Any] = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-12, "dense_output": True}
    return solve_ivp(slopes, span, start, args=(k,), events=event, **options)


def _joined(paths: list[Any]) -> Callable[[Any], Array]:
    """Solutions that follow each other, as one function of t."""
    times = [paths[0].sol.ts[:1], *(path.sol.ts[1:] for path in paths)]
    return OdeSolution(np.concatenate(times), [each for path in paths for each in path.sol.interpolants])


def _forward(problem: Bolza, control: Control) -> _Course:
    """State and cost, in stretches on which a whole K is held; real K have one.

    Raises:
        LandscapeError: the flow leaves the range where the inner maximum exists.
    """
    horizon, calls, start = problem.horizon, itertools.count(), f"the flow from theta = {problem.theta0:g}"
    t, y, paths, stretches = 0.0, np.array([problem.theta0, 0.0]), list[Any](), list[Any]()

    def slopes(s: float, y: Array, held: float) -> list[Any]:
        if next(calls) > _EVALUATIONS:
            raise LandscapeError(
                f"{start} changes too fast to be followed beyond t = {s:.4g}, theta = {float(y[0]):.6g}"
            )
        q, k, _ = control(s, y[0], held)
        return [problem.flow(y[0], q, k), k]

    def switch(s: float, y: Array, held: float) -> float:
        return 1.0 if problem.policy(y[0])[1] == held else -1.0

    switch.terminal = True  # type: ignore[attr-defined]
    while t < horizon:
        ahead = y[0]
        if paths:  # the switch may be found a little early
            ahead = ahead + 1e-9 * horizon * slopes(t, y, float(problem.policy(ahead)[1]))[0]
        held = float(problem.policy(ahead)[1])
        if problem.whole and math.isnan(held):
            raise no_whole_k(float(y[0]))
        paths.append(_solve(slopes, (t, horizon), y, held, switch if problem.whole else None))
        begin, t, y = t, float(paths[-1].t[-1]), paths[-1].y[:, -1]
        stretches.append((begin, t, held))
        if paths[-1].status < 0 or not np.isfinite(paths[-1].y).all():
            low, high = problem.branch.domain
            raise LandscapeError(
                f"{start} cannot be followed beyond t = {t:.4g}, theta = {y[0]:.6g}: the inner maximum is "
                f"known on [{low:g}, {high:g}]. Shorten the horizon or follow the maximum further"
            )
    cost = float(problem.branch.robust(y[0]) + problem.gamma * y[1])
    return _Course(cost, _joined(paths), stretches)


def _follow(problem: Bolza, name: str, control: Control) -> Path:
    """State and cost forward, costate backward: p' = -a p + gamma b, with b = dK*/dtheta on the bound alone.

    Raises:
        LandscapeError: as of `_forward`, or a derivative of l is not finite.
    """
    course, paths = _forward(problem, control), list[Any]()

    def slopes(s: float, y: Array, held: float) -> list[Any]:
        theta = course.states(s)[0]
        q, k, bound = control(s, theta, held)
        a = problem.robust_flow_slope(theta) if bound else problem.flow_slope(theta, q, k)
        b = problem.count_slope(theta) if bound and problem.admissible == "product" else 0.0
        return [-a * y[0], b - a * y[1]]

    p = np.array([-float(problem.branch.robust_slope(course.states(problem.horizon)[0])), 0.0])
    for begin, end, held in reversed(course.stretches):
        paths.append(_solve(slopes, (end, begin), p, held, None))
        p = paths[-1].y[:, -1]
        if paths[-1].status < 0 or not np.isfinite(p).all():
            raise LandscapeError(f"the costate of the schedule {name!r} is not finite: a derivative is not")
    t = np.linspace(0, problem.horizon, POINTS)
    theta = course.states(t)[0]
    theta, q, k, bound = np.broadcast_arrays(theta, *control(t, theta, course.held(t)))
    p0, p1, raised = *_joined(paths)(t), float(trapezoid(bound.astype(float), t)) / problem.horizon
    return Path(name, t, theta, q, k, p0, p1, gamma=problem.gamma, raised=raised, cost=course.cost)


def _derived(problem: Bolza) -> Control:
    # "integer": alpha = tau/K moves with K; "overshoot": alpha* is inside the set, no bound
    limit = problem.admissible in ("product", "free")

    def control(_: Any, theta: Any, held: Any) -> tuple[Any, Any, Any]:
        k = held if problem.whole else problem.count(theta)
        return problem.ratio(theta, k) if problem.admissible == "integer" else 1.0, k, limit

    return control


def derived_path(problem: Bolza) -> Path:
    """The derived schedule alpha = alpha*(theta(t)), K = K*(theta(t)), rounded where K is whole."""
    return _follow(problem, "derived", _derived(problem))


def derived_cost(problem: Bolza) -> float:
    """J of the derived schedule."""
    return _forward(problem, _derived(problem)).cost


def schedule_path(problem: Bolza, name: str, count: Count) -> Path:
    """A schedule K(t) with alpha = tau/K, raised to K*(theta) wherever it is smaller (set "product").

    Raises:
        LandscapeError: the flow leaves the range of the inner maximum.
    """

    def control(t: Any, theta: Any, _: Any) -> tuple[Any, Any, Any]:
        wanted, least = count(t), problem.count(theta)
        return problem.ratio(theta, wanted), np.maximum(wanted, least), wanted <= least

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
    at, (q, k) = (theta[:, None], p[:, None]), candidates(problem, theta)
    values = problem.hamiltonian(*at, q, k)
    best = values.argmax(axis=1)[:, None]

    def chosen(table: Array, columns: Array) -> Array:
        return np.take_along_axis(table, np.clip(columns, 0, table.shape[1] - 1), axis=1)

    top, ratio, held = (chosen(table, best) for table in (values, q, k))
    stride = whole_cap(problem) if problem.whole else 1
    low, high = (chosen(q, best + side * stride) for side in (-1, 1))
    for _ in range(0 if problem.admissible == "integer" else 8):  # alpha = tau/K leaves nothing to refine
        fine = np.linspace(low[:, 0], high[:, 0], 9, axis=1)
        values = problem.hamiltonian(*at, fine, problem.count(at[0]) / fine if problem.tied else held)
        best = values.argmax(axis=1)[:, None]
        better = chosen(values, best) > top
        top, ratio = np.where(better, [chosen(values, best), chosen(fine, best)], [top, ratio])
        low, high = chosen(fine, best - 1), chosen(fine, best + 1)
    own = problem.count(at[0]) / ratio if problem.admissible == "product" else held
    return top[:, 0], ratio[:, 0], own[:, 0]


def criterion(problem: Bolza, path: Path) -> Criterion:
    """C of a schedule; its own control is among the candidates, so the gap is never negative."""
    own = path.p * problem.flow(path.theta, path.q, path.k) - problem.gamma * path.k
    if not np.isfinite(own).all():
        raise LandscapeError(f"the Hamiltonian along the schedule {path.name!r} is not finite")
    best, q, k = maximise(problem, path.theta, path.p)
    better = best > own
    gap = np.where(better, best - own, 0.0)
    q, k = np.where(better, q, path.q), np.where(better, k, path.k)
    searched = _searched(problem, path, np.maximum(best, own))
    c = float(trapezoid(gap, path.t)) / problem.horizon
    return Criterion(c, gap, float(gap.max()), q, k, searched)


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

    t, wanted = np.linspace(0, problem.horizon, 31), np.array([derived.theta, derived.p])
    guess = np.linspace(wanted[:, 0], wanted[:, -1], len(t), axis=1)
    with np.errstate(all="ignore"):
        solved = solve_bvp(slopes, ends, t, guess, tol=1e-8, max_nodes=4000)
        differences = np.abs(solved.sol(derived.t) - wanted).max(axis=1)
    success = bool(solved.success and np.isfinite(differences).all())
    theta, p = differences.tolist() if success else (None, None)
    return {"success": success, "theta_difference": theta, "p_difference": p}


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
    edge = np.where(own < 1, np.sign(-land("tx")(theta, x := problem.branch(theta)) * (land.point - x)), 0.0)
    moved, price = np.hstack([moved, edge]), np.hstack([own / q - own, 0 * own])
    a, b = path.p0[:, None] * moved, path.p1[:, None] * moved - price
    good = np.isfinite(a) & np.isfinite(b)
    a = np.where(good & (np.abs(a) > 1e-12 * max(1.0, float(np.abs(path.p0).max()))), a, 0.0)
    b = np.where(good, b, 0.0)
    low = float(np.max(-a[b < 0] / b[b < 0], initial=0.0))
    high = float(np.min(-a[b > 0] / b[b > 0], initial=math.inf))
    if np.any((a > 0) & (b >= 0)) or low > high:
        return math.nan, math.nan
    return low, math.inf if high > LARGEST_GAMMA else high


def gamma_limit(problem: Bolza) -> float:
    """The largest gamma for which the derived schedule satisfies the principle: see `gamma_range`."""
    return gamma_range(problem)[1]
