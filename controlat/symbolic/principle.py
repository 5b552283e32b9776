"""Pontryagin's principle for a schedule on a landscape: trajectories, costates and the criterion

    H = p F(theta, u) - gamma K,   p' = -dH/dtheta,   p(T) = -L'(theta_T),
    C(u) = 1/T integral [ max over v in G(theta_t) of H(theta_t, p_t, v) - H(theta_t, p_t, u_t) ] dt.

G depends on the state through alpha <= alpha*(theta). Where a schedule sits on that bound the multiplier
m = dH/dalpha >= 0 enters: p' = -H_theta - m alpha*_theta, which is minus the total derivative
-d/dtheta [H(theta, p, alpha*(theta))]. C = 0 is necessary for a minimum, not sufficient.
Source: Ye et al. (AAAI 2021), equations 6-13; the multiplier is not in that paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_bvp, solve_ivp
from scipy.interpolate import CubicHermiteSpline

from controlat.symbolic.bolza import (
    SETS,
    Bolza,
    candidates,
    grid_of_q,
    smallest_q,
    whole_cap,
)
from controlat.symbolic.landscape import LandscapeError, crossing

__all__ = [
    "Criterion",
    "Path",
    "boundary_problem",
    "comparisons",
    "criterion",
    "derived_path",
    "gamma_limit",
    "gamma_range",
    "isolated",
    "maximise",
    "multiplier",
    "schedule_path",
]

Array = NDArray[np.float64]
POINTS = 101  # instants of [0, T] in results
LARGEST_GAMMA = 1e4  # beyond it a limit on gamma is called infinite
_EVALUATIONS = 3000  # of F along one path; some hundred are usual
_PIECES = 200  # of [0, T] at least, in which a rounded schedule is followed
_HALVINGS = 30  # of a piece in which K switches, to find out where
# (t, theta) -> alpha/alpha*, K, and whether alpha sits on the bound alpha*(theta)
Control = Callable[[Array, Array], tuple[Array, Array, NDArray[np.bool_]]]
Count = Callable[[Array], Array]  # K(t)
ALIKE = 1e-6  # relative differences of K up to this are none


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


def _rule(order: int = 4) -> tuple[Array, Array, Array]:
    """Gauss collocation on [0, 1]: nodes, matrix of integrals up to the nodes, weights."""
    x, w = np.polynomial.legendre.leggauss(order)
    c = (x + 1) / 2
    powers = np.arange(order)
    inverse = np.linalg.inv(c[:, None] ** powers)
    return c, (c[:, None] ** (powers + 1) / (powers + 1)) @ inverse, w / 2


def _forward(problem: Bolza, control: Control, accuracy: float = 1e-10) -> Callable[[Array], Array]:
    """theta(t) by DOP853, dense.

    Raises:
        LandscapeError: the flow leaves the range where the inner maximum exists.
    """

    spent = 0

    def slope(t: float, y: Array) -> Array:
        nonlocal spent
        spent += 1
        if spent > _EVALUATIONS:  # F jumps where ascents begin to overshoot
            raise LandscapeError(
                f"the flow from theta = {problem.theta0:g} changes too fast to be followed beyond "
                f"t = {t:.4g}, theta = {float(y[0]):.6g}"
            )
        q, k, _ = control(np.asarray(t), y)
        return problem.flow(y, q, k, clip=True)  # whether the controls belong to the set is checked after

    with np.errstate(all="ignore"):
        found = solve_ivp(
            slope,
            (0.0, problem.horizon),
            [problem.theta0],
            "DOP853",
            rtol=accuracy,
            atol=accuracy / 100,
            dense_output=True,
        )
    if not found.success or not np.isfinite(found.y).all():
        low, high = problem.domain
        raise LandscapeError(
            f"the flow from theta = {problem.theta0:g} cannot be followed beyond t = {found.t[-1]:.4g}, "
            f"theta = {found.y[0, -1]:.6g}: the inner maximum is known on [{low:g}, {high:g}]. "
            "Shorten the horizon or follow the maximum further"
        )
    dense: Any = found.sol
    return lambda t: np.asarray(dense(np.ravel(t))[0], dtype=float).reshape(np.shape(t))


def _costate(
    problem: Bolza, name: str, theta_at: Callable[[Array], Array], control: Control, breaks: list[float]
) -> Path:
    """State, costate and cost on [0, T], cut at the instants of the result and at breaks of the schedule.

    Gauss nodes lie inside the pieces, so that the infinite dF/dtheta at the end of a boundary arc with K < 1
    (it is integrable) is never evaluated.
    """
    c, inner, weights = _rule()
    t = np.unique(np.concatenate([np.linspace(0, problem.horizon, POINTS), breaks]))
    t = t[np.concatenate([[True], np.diff(t) > 1e-12 * problem.horizon])]
    h = np.diff(t)
    nodes = t[1:, None] - h[:, None] * c  # backward from the end of each piece
    theta = theta_at(nodes)
    q, k, bound = control(nodes, theta)
    slope = np.where(bound, problem.robust_flow_slope(theta), problem.flow_slope(theta, q, k))
    tied = SETS[problem.admissible].tied
    price = np.where(bound & tied, problem.count_slope(theta), 0.0)
    matrix = np.eye(len(c)) - h[:, None, None] * inner * slope[:, None, :]
    right = np.stack([np.ones_like(price), -(h[:, None] * (price @ inner.T))], axis=-1)
    stages = np.linalg.solve(matrix, right)
    keep = 1 + h * ((slope * stages[..., 0]) @ weights)
    add = h * ((slope * stages[..., 1] - price) @ weights)
    at = theta_at(t)
    p0, p1 = np.zeros_like(t), np.zeros_like(t)
    p0[-1] = -float(problem.branch.robust_slope(at[-1]))
    for i in range(len(h) - 1, -1, -1):
        p0[i], p1[i] = keep[i] * p0[i + 1], keep[i] * p1[i + 1] + add[i]
    cost = float(problem.branch.robust(at[-1])) + problem.gamma * float(h @ (k @ weights))
    if not (np.isfinite(p0).all() and np.isfinite(p1).all() and math.isfinite(cost)):
        raise LandscapeError(f"the costate of the schedule {name!r} is not finite: a derivative of l is not")
    share = float(h @ (np.where(bound, 1.0, 0.0) @ weights)) / problem.horizon
    q, k, _ = control(t, at)
    return Path(name, t, at, q, k, p0, p1, problem.gamma, share, cost)


def derived_path(problem: Bolza) -> Path:
    """The derived schedule alpha = alpha*(theta(t)), K = K*(theta(t)).

    For sets of whole K it is rounded (`Bolza.policy`), and K switches where the rounded one does.
    """
    if problem.admissible == "integer":
        return _held_path(problem)
    limit = problem.admissible != "overshoot"  # there alpha* is inside the set, no bound

    def control(t: Array, theta: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        q, k = problem.policy(theta)
        return q, k, np.full(np.shape(theta), limit)

    theta_at = _forward(problem, lambda t, y: (np.ones_like(y), np.ones_like(y), np.ones_like(y, dtype=bool)))
    fine = np.linspace(0, problem.horizon, 1001)
    k = problem.policy(theta_at(fine))[1]
    jumps = np.flatnonzero(np.diff(k)) if SETS[problem.admissible].whole else np.array([], dtype=int)
    low, high = fine[jumps], fine[jumps + 1]
    for _ in range(_HALVINGS if jumps.size else 0):
        middle = (low + high) / 2
        same = problem.policy(theta_at(middle))[1] == k[jumps]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return _costate(problem, "derived", theta_at, control, high.tolist())


def _held_path(problem: Bolza) -> Path:
    """K = ceil(K*(theta)) (or the set's next), alpha = tau/K, K kept until another is the set's."""
    h, t, theta, held, slopes = (
        problem.horizon / _PIECES,
        [0.0],
        [problem.theta0],
        list[float](),
        list[float](),
    )
    while t[-1] < problem.horizon * (1 - 1e-12) and math.isfinite(theta[-1]):
        k, step = float(problem.policy(theta[-1])[1]), min(h, problem.horizon - t[-1])
        after, slope = _held_step(problem, theta[-1], k, step)
        if float(problem.policy(after)[1]) != k:  # it switches on the way
            low, high = 0.0, step
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                switched = float(problem.policy(_held_step(problem, theta[-1], k, middle)[0])[1]) != k
                low, high = (low, middle) if switched else (middle, high)
            step = min(max(high, h / 1000), step)
            after, _ = _held_step(problem, theta[-1], k, step)
        t.append(t[-1] + step)
        theta.append(after)
        held.append(k)
        slopes.append(slope)
        if len(t) > 20 * _PIECES:
            raise LandscapeError(f"the rounded schedule switches without end near theta = {theta[-1]:.6g}")
    slopes.append(_held_step(problem, theta[-1], float(problem.policy(theta[-1])[1]), h)[1])
    if not np.isfinite([*theta, *slopes]).all():
        raise LandscapeError(
            "the outer flow under the rounded schedule leaves the range of the inner maximum, or comes where "
            "no whole K keeps the ascent from x0 before x*"
        )
    curve, pieces = CubicHermiteSpline(t, theta, slopes), np.array(held)

    def control(s: Array, theta: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        k = pieces[np.clip(np.searchsorted(t, s, side="right") - 1, 0, len(pieces) - 1)]
        return problem.ratio(theta, k), k, np.zeros(np.shape(theta), dtype=bool)

    jumps = np.array(t[1:-1])[np.diff(pieces) != 0]
    return _costate(problem, "derived", lambda s: np.asarray(curve(s), dtype=float), control, list(jumps))


def _held_step(problem: Bolza, theta: float, k: float, h: float) -> tuple[float, float]:
    """theta after a time h under K and alpha = tau/K, by a Runge-Kutta step of order 4; its slope before."""

    def flow(y: float) -> float:
        at = np.asarray(y)
        return float(problem.flow(at, problem.ratio(at, k), np.asarray(k), clip=True))

    one = flow(theta)
    two = flow(theta + h / 2 * one)
    three = flow(theta + h / 2 * two)
    return theta + h / 6 * (one + 2 * two + 2 * three + flow(theta + h * three)), one


def _above(problem: Bolza, count: Count) -> Control:
    """A schedule K(t) with alpha = tau/K, raised to K*(theta) wherever it is smaller."""

    def control(t: Array, theta: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        wanted, least = np.broadcast_arrays(count(t), problem.count(theta))
        return np.where(wanted <= least, 1.0, least / wanted), np.maximum(wanted, least), wanted <= least

    return control


def _refused(problem: Bolza, control: Control, t: Array, theta: Array) -> str:
    """Where a schedule leaves the set along a path, in words; empty where it does not."""
    q, k, _ = control(t, theta)
    bad = ~problem.admits(theta, q, k)
    if not bad.any():
        return ""
    i = int(np.argmax(bad))
    return (
        f"at t = {t[i]:.4g} the ascent with alpha = {q[i]:.4g} alpha* and K = {k[i]:.4g} leaves the interval "
        "between x0 and x*: this schedule is not in the set"
    )


def schedule_path(problem: Bolza, name: str, count: Count) -> Path:
    """A schedule K(t) with alpha = tau/K, raised to K*(theta) wherever it is smaller (set "product").

    Raises:
        LandscapeError: the flow leaves the range of the inner maximum, or the schedule leaves the set.
    """
    control = _above(problem, count)
    theta_at = _forward(problem, control)
    fine = np.linspace(0, problem.horizon, 1001)
    if reason := _refused(problem, control, fine, theta_at(fine)):
        raise LandscapeError(reason)

    def excess(t: Any) -> Array:
        return np.asarray(count(np.asarray(t)) - problem.count(theta_at(np.asarray(t))), dtype=float)

    above = excess(fine)
    crossings = np.flatnonzero(np.sign(above[:-1]) * np.sign(above[1:]) < 0)
    found = (crossing(lambda s: float(excess(s)), float(fine[i]), float(fine[i + 1])) for i in crossings)
    return _costate(problem, name, theta_at, control, [v for v in found if v is not None])


def comparisons(problem: Bolza, derived: Path) -> dict[str, Count]:
    """K(t) of the schedules that the derived one is compared with; none where K* is constant.

    The line from K*(0) to K*(T) is raised as a whole by the least amount (rounded up to 3 digits) that makes
    it admissible along the derived path; so is any other that would be the derived one (nowhere above K*) or
    whose inner ascent would overshoot, there or along its own path. The name says by how much.
    """
    mean = float(np.sum(np.diff(derived.t) * (derived.k[1:] + derived.k[:-1]) / 2)) / problem.horizon
    first, last, most = float(derived.k[0]), float(derived.k[-1]), float(derived.k.max())
    span = problem.horizon
    if most - float(derived.k.min()) <= ALIKE * most:
        return {}
    rising = "linear from K*(0) to K*(T)"
    every: dict[str, Count] = {
        "constant at the largest K*": lambda t: np.full(np.shape(t), most),
        "constant at the mean K*": lambda t: np.full(np.shape(t), mean),
        rising: lambda t: first + (last - first) * np.asarray(t) / span,
        "linear from K*(T) to K*(0)": lambda t: last + (first - last) * np.asarray(t) / span,
    }
    found: dict[str, Count] = {}
    for name, count in every.items():
        shift = _shift(problem, derived, count, whole=name == rising)
        raised = f"{name}, raised by {shift:.3g}" if shift > 0 else name
        found[raised] = _moved(count, shift)
    return found


def _moved(count: Count, shift: float) -> Count:
    return (lambda t: count(t) + shift) if shift > 0 else count


def _up(shift: float) -> float:
    """The next number of 3 digits, the one that is printed."""
    if shift <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(shift)) - 2)
    return float(f"{math.ceil(shift / unit * (1 - 1e-12)) * unit:.3g}")


def _shift(problem: Bolza, derived: Path, count: Count, whole: bool) -> float:
    """By how much K(t) is raised: not below K* (if `whole`, or nowhere above it), and without overshoot."""
    t, theta, least = derived.t, derived.theta, derived.k
    below = float((least - count(t)).max())
    alike = bool(np.all(count(t) <= least * (1 + ALIKE)))
    shift = _up(below) if below > ALIKE * float(least.max()) and (whole or alike) else 0.0
    if problem.landscape.quadratic:
        return shift

    def fine(by: float) -> bool:
        return not _refused(problem, _above(problem, _moved(count, by)), t, theta)

    shift = shift if fine(shift) else _up(_least(fine, shift, float(least.max())))
    for _ in range(4):  # its own path is another one
        control = _above(problem, _moved(count, shift))
        try:
            theta = _forward(problem, control, 1e-5)(t)
        except LandscapeError:  # it leaves the landscape however it is raised; `schedule_path` says so
            break
        if not _refused(problem, control, t, theta):
            break
        shift = _up(1.1 * shift + 0.02 * float(least.max()))
    return shift


def _least(fine: Callable[[float], bool], low: float, scale: float) -> float:
    """The least number above low (to 1/1000 of what is added) that will do; as far as 1000 scales."""
    step = 0.02 * scale
    while not fine(low + step) and step < 1000 * scale:
        step *= 2
    bottom, top = low + step / 2 if step > 0.02 * scale else low, low + step
    for _ in range(10):
        middle = (bottom + top) / 2
        bottom, top = (bottom, middle) if fine(middle) else (middle, top)
    return top


def maximise(problem: Bolza, theta: Array, p: Array) -> tuple[Array, Array, Array]:
    """max over G(theta) of H at each (theta, p): value, alpha/alpha*, K; candidates, then golden section."""
    q, k = candidates(problem, theta)
    column, price = theta[:, None], p[:, None]
    values = problem.hamiltonian(column, price, q, k)
    rows, best = np.arange(len(theta)), np.argmax(values, axis=1)
    if problem.admissible == "integer":  # alpha = tau/K: nothing is left to refine
        return values[rows, best], q[rows, best], k[rows, best]
    stride = 1 if problem.admissible == "product" else whole_cap(problem)
    low = q[rows, np.where(best >= stride, best - stride, best)]
    high = q[rows, np.where(best + stride < q.shape[1], best + stride, best)]
    fixed, tied = k[rows, best], SETS[problem.admissible].tied
    golden = (math.sqrt(5) - 1) / 2

    def value(at: Array) -> Array:
        return problem.hamiltonian(theta, p, at, problem.count(theta) / at if tied else fixed)

    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        lower = value(left) < value(right)
        low, high = np.where(lower, left, low), np.where(lower, high, right)
    middle = (low + high) / 2
    refined, found = value(middle), values[rows, best]
    better = refined > found
    q_best = np.where(better, middle, q[rows, best])
    return np.where(better, refined, found), q_best, problem.count(theta) / q_best if tied else fixed


def criterion(problem: Bolza, path: Path) -> Criterion:
    """C of a schedule; its own control is among the candidates, so the gap is never negative."""
    own = problem.hamiltonian(path.theta, path.p, path.q, path.k, clip=True)
    if not np.isfinite(own).all():
        raise LandscapeError(f"the Hamiltonian along the schedule {path.name!r} is not finite")
    best, q, k = maximise(problem, path.theta, path.p)
    better = best > own
    gap = np.where(better, best - own, 0.0)
    c = float(np.sum(np.diff(path.t) * (gap[1:] + gap[:-1]) / 2)) / problem.horizon
    q, k = np.where(better, q, path.q), np.where(better, k, path.k)
    return Criterion(c, gap, float(gap.max()), q, k, _searched(problem, path, np.maximum(best, own)))


def _searched(problem: Bolza, path: Path, best: Array) -> str:
    """Which K were looked at, and whether larger ones are ruled out.

    For quadratic l (and alpha K = tau) x_K stays between x0 and x*, so p F is at most its maximum there.
    """
    cap = whole_cap(problem)
    if problem.admissible == "product":
        least = smallest_q(problem, path.theta)
        return f"alpha/alpha* from {least:.2g} to 1, K = K*/(alpha/alpha*)"
    if problem.landscape.quadratic and not SETS[problem.admissible].tied:
        return f"K = 1..{cap}; one step reaches whatever more steps reach, so larger K cannot be better"
    text = f"K = 1..{cap}" if problem.admissible != "integer" else f"the first {cap} admissible K"
    if problem.landscape.quadratic:
        theta, line = path.theta[:, None], np.linspace(0, 1, 101)
        x = float(problem.landscape.x0) * (1 - line) + problem.branch(theta) * line
        most = np.max(-path.p[:, None] * problem.landscape("t")(theta, x), axis=1)
        if np.all(most - problem.gamma * (np.ceil(problem.count(path.theta)) + cap) < best):
            return text + "; larger K cost more than they could gain"
    return text + "; larger K were not looked at"


def multiplier(problem: Bolza, path: Path) -> Array:
    """m = dH/dalpha at alpha = alpha*(theta) from below, along the derived schedule of the set "product".

    x_K moves with l_x(theta, x0) mu^(K-1), mu = 1 + alpha* l_xx(theta, x*), which is 0 for quadratic l and
    K > 1; for K < 1 it moves infinitely fast. On (11): 4 gamma tau/(theta^2 + 1)^2 where K* > 1.
    nan where alpha* is isolated: there is no alpha from below.
    """
    theta, alpha, k = path.theta, problem.step(path.theta), problem.count(path.theta)
    x, start, land = problem.branch(theta), problem.start(theta), problem.landscape
    mu = 0.0 if land.quadratic else 1 + alpha * land("xx")(theta, x)
    n = np.floor(np.maximum(k - 1, 0))
    s = np.maximum(k - 1, 0) - n
    with np.errstate(all="ignore"):
        power = np.where(mu >= 0, np.abs(mu) ** (n + s), mu**n * (1 + s * (mu - 1)))
        moved = -path.p * land("tx")(theta, x) * land("x")(theta, start)
        m = moved * power + problem.gamma * problem.tau / alpha**2
        m = np.where(k >= 1, m, np.where(moved == 0, m, np.sign(moved) * np.inf))
    return np.where(isolated(problem, theta), np.nan, m)


def isolated(problem: Bolza, theta: Array) -> NDArray[np.bool_]:
    """Where the steps just below alpha* (set "product") overshoot x* later and so are not in the set."""
    q = 1 - 1e-6
    return ~problem.admits(theta, q, problem.count(theta) / q)


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
        found = solve_bvp(slopes, ends, t, guess, tol=1e-8, max_nodes=4000)
        theta, p = found.sol(derived.t)
    differences = np.abs(theta - derived.theta).max(), np.abs(p - derived.p).max()
    fine = bool(found.success and np.isfinite(differences).all())
    return {
        "success": fine,
        "theta_difference": float(differences[0]) if fine else None,
        "p_difference": float(differences[1]) if fine else None,
    }


def _edge(problem: Bolza, path: Path) -> tuple[Array, Array]:
    """The limit alpha -> alpha* for K* < 1: there F moves infinitely faster than the price, p dF decides."""
    theta, x = path.theta, problem.branch(path.theta)
    toward = np.sign(-problem.landscape("tx")(theta, x) * (problem.start(theta) - x))
    fast = np.where(problem.count(theta) < 1, toward, 0.0)
    return path.p0 * fast, path.p1 * fast


def gamma_range(problem: Bolza, points: int = 400) -> tuple[float, float]:
    """The prices gamma for which the derived schedule satisfies the principle on the set "product".

    With p = p0 + gamma p1 each candidate's H - H(u) is A + gamma B, so each (t, candidate) allows a half-line
    of gamma, and their intersection is an interval: no search is needed beyond the one over candidates.

    Returns:
        (smallest, largest); largest = inf if there is no violation up to 1e4; (nan, nan) if none will do.

    Raises:
        ValueError: the set is not "product".
    """
    if problem.admissible != "product":
        raise ValueError(f"the range of gamma is for the set 'product', got {problem.admissible!r}")
    path = derived_path(problem)
    theta, own = path.theta[:, None], problem.count(path.theta)[:, None]
    near = 1 - np.geomspace(1e-9, 0.1, points // 4)  # for K < 1 the limit alpha -> alpha* decides
    ratios = grid_of_q(1.0, points, smallest_q(problem, path.theta))
    q = np.unique(np.concatenate([ratios, near]))[:-1]
    moved = problem.flow(theta, q, own / q) + problem.branch.robust_slope(theta)
    a, b = path.p0[:, None] * moved, path.p1[:, None] * moved - (own / q - own)
    good = np.isfinite(a) & np.isfinite(b)
    a = np.where(good & (np.abs(a) > 1e-12 * max(1.0, float(np.abs(path.p0).max()))), a, 0.0)
    b = np.where(good, b, 0.0)
    a, b = (
        np.concatenate([v, w[:, None]], axis=1) for v, w in zip((a, b), _edge(problem, path), strict=True)
    )
    if np.any((a > 0) & (b >= 0)):
        return math.nan, math.nan
    low = float(np.max(-a[a > 0] / b[a > 0], initial=0.0))
    high = float(np.min(-a[b > 0] / b[b > 0], initial=math.inf))
    if low > high:
        return math.nan, math.nan
    return low, math.inf if high > LARGEST_GAMMA else high


def gamma_limit(problem: Bolza) -> float:
    """The largest gamma for which the derived schedule satisfies the principle: see `gamma_range`."""
    return gamma_range(problem)[1]
