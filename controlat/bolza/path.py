"""A schedule on a landscape followed in time: state and cost forward, costate backward.

The derived schedule alpha = alpha*(theta), K = K*(theta), and those K(t) that it is compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import OdeSolution, solve_ivp, trapezoid

from controlat.bolza.problem import Bolza, no_whole_k
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["Path", "comparisons", "derived_cost", "derived_path", "schedule_path"]

POINTS = 101  # instants of [0, T] in results
ALIKE = 1e-6  # relative differences of K up to this are none
_EVALUATIONS = 6000  # of F along one path; some hundred are usual
# (t, theta, the whole K that is held) -> alpha/alpha*, K, whether alpha sits on the bound alpha*
Control = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
Count = Callable[[Any], Any]  # K(t)


@dataclass(frozen=True)
class Path:
    """A schedule with its state and costate at instants t; p = p0 + gamma p1, the two parts kept apart.

    Args:
        name: of the schedule.
        t, theta, q, k: instants, the state there, alpha/alpha*(theta) and K.
        p0, p1: the costate without the price of steps, and its slope in gamma.
        gamma: price of one inner step per unit of time.
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


class _Trajectory(NamedTuple):
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


def _forward(problem: Bolza, control: Control) -> _Trajectory:
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
    return _Trajectory(cost, _joined(paths), stretches)


def _follow(problem: Bolza, name: str, control: Control) -> Path:
    """State and cost forward, costate backward: p' = -a p + gamma b, with b = dK*/dtheta on the bound alone.

    Raises:
        LandscapeError: as of `_forward`, or a derivative of l is not finite.
    """
    trajectory, paths = _forward(problem, control), list[Any]()

    def slopes(s: float, y: Array, held: float) -> list[Any]:
        theta = trajectory.states(s)[0]
        q, k, bound = control(s, theta, held)
        a = problem.robust_flow_slope(theta) if bound else problem.flow_slope(theta, q, k)
        b = problem.count_slope(theta) if bound and problem.admissible == "product" else 0.0
        return [-a * y[0], b - a * y[1]]

    p = np.array([-float(problem.branch.robust_slope(trajectory.states(problem.horizon)[0])), 0.0])
    for begin, end, held in reversed(trajectory.stretches):
        paths.append(_solve(slopes, (end, begin), p, held, None))
        p = paths[-1].y[:, -1]
        if paths[-1].status < 0 or not np.isfinite(p).all():
            raise LandscapeError(f"the costate of the schedule {name!r} is not finite: a derivative is not")
    t = np.linspace(0, problem.horizon, POINTS)
    theta = trajectory.states(t)[0]
    theta, q, k, bound = np.broadcast_arrays(theta, *control(t, theta, trajectory.held(t)))
    p0, p1, raised = *_joined(paths)(t), float(trapezoid(bound.astype(float), t)) / problem.horizon
    return Path(name, t, theta, q, k, p0, p1, gamma=problem.gamma, raised=raised, cost=trajectory.cost)


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
