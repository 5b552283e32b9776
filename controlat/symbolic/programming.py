"""Dynamic programming on a grid of theta: the best value for any admissible set, no necessary conditions.

Backward in time, V(theta) <- min over u of { gamma K h + V(theta + step(theta, u)) }, with one Runge-Kutta
step of order 4 per time step (alpha/alpha* held, or K where alpha = tau/K) and cubic interpolation in theta.
The policy alpha* is evaluated by the same scheme, so the errors of the grid are in both and cancel in the
difference. The problem is autonomous: successors and interpolation weights are computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlat.symbolic.bolza import SETS, Bolza, candidates
from controlat.symbolic.landscape import LandscapeError

__all__ = ["Programming", "programme", "reachable"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Programming:
    """Values at theta0 of the best candidate feedback on the grid and of the derived policy, by one scheme.

    Args:
        value: the smallest J found.
        policy: J of alpha = alpha*(theta) (K = ceil(K*), alpha = tau/K for "integer").
        difference: policy - value: what the policy gives away on this grid.
        tolerance: differences up to this are taken for errors of the grid.
        better: difference > tolerance.
        theta_range: the grid in theta; `clipped` where the domain of the inner maximum cut it.
        t, theta, q, k: the best schedule rolled out from theta0, if better; theta has one more entry than q.
    """

    admissible: str
    value: float
    policy: float
    difference: float
    tolerance: float
    better: bool
    theta_range: tuple[float, float]
    clipped: bool
    nodes: int
    steps: int
    t: Array
    theta: Array
    q: Array
    k: Array


def _control(problem: Bolza, theta: Array, q: Array, k: Array) -> tuple[Array, Array]:
    """What is held over a time step, at another theta: q (K = K*/q), K (q = K*/K), or both."""
    if problem.admissible == "product":
        return q, problem.count(theta) / q
    return (problem.ratio(theta, k), k) if SETS[problem.admissible].tied else (q, k)


def _step(problem: Bolza, theta: Array, q: Array, k: Array, h: float) -> tuple[Array, Array]:
    """theta after a time h, and the mean K on the way; nan where the landscape ends or u is not in G(theta).

    What belongs to G at the beginning of the step is held to its end (clip).
    """
    count, slopes, at = np.zeros(np.broadcast(theta, q).shape), list[Array](), theta
    with np.errstate(all="ignore"):
        for ahead, weight in ((0.5, 1), (0.5, 2), (1.0, 2), (0.0, 1)):
            now = _control(problem, at, q, k)
            slopes.append(weight * problem.flow(at, *now, clip=bool(slopes)))
            count = count + weight * now[1] / 6
            at = theta + ahead * h * slopes[-1] / weight
        return theta + h * sum(slopes) / 6, count


def _extremes(problem: Bolza, theta: Array) -> tuple[Array, Array]:
    """min and max over u in G(theta) of F(theta, u), nan counted out; both 0 where no control does."""
    q, k = candidates(problem, theta, points=16, thin=True)
    with np.errstate(all="ignore"):
        flow = problem.flow(theta[:, None], q, k)
    good = np.isfinite(flow)
    least, most = np.where(good, flow, np.inf).min(axis=1), np.where(good, flow, -np.inf).max(axis=1)
    known = good.any(axis=1)
    return np.where(known, least, 0.0), np.where(known, most, 0.0)


def _spread(problem: Bolza, margin: float, steps: int) -> tuple[float, float, bool]:
    """The hull of all states that controls reach from within margin of theta0, cut to the domain."""
    low, high = problem.domain
    ends = np.clip(problem.theta0 + np.array([-margin, margin]), low, high)
    h, clipped = problem.horizon / steps, False
    for _ in range(steps):
        least, most = _extremes(problem, ends)
        ends = ends + h * np.array([min(0.0, least[0]), max(0.0, most[1])])
        clipped |= bool(ends[0] < low or ends[1] > high)
        ends = np.clip(ends, low, high)
    return float(ends[0]), float(ends[1]), clipped


def reachable(problem: Bolza, steps: int | None = None) -> tuple[float, float, bool]:
    """An interval around all theta that controls reach; and whether the domain ends before.

    Its ends follow theta' = min and max over u of F, by the comparison theorem for scalar equations; from a
    little beside theta0, so that what lies beyond the grid does not reach theta0 by interpolation. By 60
    steps, or 20 where every inner step has to be computed.
    """
    steps = steps or (60 if problem.landscape.quadratic else 20)
    low, high, _ = _spread(problem, 0.0, steps)
    margin = 0.05 * (high - low) + 1e-3 * max(1.0, abs(problem.theta0))
    low, high, clipped = _spread(problem, margin, steps)
    bottom, top = problem.domain
    return max(bottom, low - margin), min(top, high + margin), clipped


def _fronts(problem: Bolza, steps: int) -> tuple[Array, Array]:
    """For each instant the states from which some control stays in the domain until the end.

    Traced backward from its ends: upward flow that no control holds back moves the upper front down.
    """
    bottom, top = problem.domain
    low, high, h = np.full(steps + 1, bottom), np.full(steps + 1, top), problem.horizon / steps
    for n in range(steps - 1, -1, -1):
        at = np.clip(np.array([low[n + 1], high[n + 1]]), bottom, top)
        least, most = _extremes(problem, at)
        low[n], high[n] = max(bottom, low[n + 1] - h * most[0]), min(top, high[n + 1] - h * least[1])
        if low[n] > high[n]:
            low[: n + 1], high[: n + 1] = math.inf, -math.inf
            break
    return low, high


def _weights(grid: Array, theta: Array) -> tuple[NDArray[np.int64], Array]:
    """Cubic Lagrange interpolation on a uniform grid: the first of four nodes, and weights (4, ...)."""
    h = grid[1] - grid[0]
    place = np.where(np.isfinite(theta), (theta - grid[0]) / h, 0.0)
    place = np.clip(place, 0.0, len(grid) - 1.0)
    first = np.clip(np.floor(place).astype(np.int64) - 1, 0, len(grid) - 4)
    s = place - first
    a, b, c, d = s, s - 1, s - 2, s - 3
    return first, np.array([-b * c * d / 6, a * c * d / 2, -a * b * d / 2, a * b * c / 6])


class _Scheme:
    """Successors, running costs and interpolation weights of candidates on a grid.

    Beyond the grid the value of its end is taken: such states start where theta0 cannot come by then.
    """

    def __init__(self, problem: Bolza, grid: Array, h: float, q: Array, k: Array) -> None:
        self.after, count = _step(problem, grid[:, None], q, k, h)
        good = np.isfinite(self.after)
        self.price = np.where(good, problem.gamma * h * np.where(good, count, 0.0), np.inf)
        self.first, self.weights = _weights(grid, self.after)

    def back(
        self, v: Array, low: float = -math.inf, high: float = math.inf
    ) -> tuple[Array, NDArray[np.int64]]:
        """One step backward: min over candidates of gamma K h + V at the successor, and which.

        Successors outside (low, high) are avoided by all nodes that can; the others only serve as neighbours.
        """
        found = self.price.copy()
        for j in range(4):
            found += self.weights[j] * v[self.first + j]
        with np.errstate(invalid="ignore"):
            lost = np.where((self.after < low) | (self.after > high), np.inf, found)
        free = np.asarray(np.isfinite(lost).any(axis=1))
        found = np.where(free[:, None], lost, found)
        best = np.argmin(found, axis=1)
        least = found[np.arange(len(v)), best]
        return np.where(np.isfinite(least), least, v), best


def _controls(problem: Bolza, grid: Array, points: int) -> tuple[Array, Array]:
    """Candidates at every node, the derived policy first."""
    q, k = candidates(problem, grid, points, thin=True)
    own = [np.asarray(v)[:, None] for v in problem.policy(grid)]
    if not np.isfinite(own).all():
        theta = float(grid[int(np.argmin(np.isfinite(own[1][:, 0])))])
        raise LandscapeError(
            f"at theta = {theta:.4g} no whole K keeps the ascent with alpha = tau/K before x*"
        )
    return np.concatenate([own[0], q], axis=1), np.concatenate([own[1], k], axis=1)


def _recursion(
    problem: Bolza, grid: Array, steps: int, q: Array, k: Array, clipped: bool
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Values at time 0 of the best candidates and of the policy (the first), and the choices made."""
    h, value = problem.horizon / steps, problem.branch.robust(grid)
    best, policy = _Scheme(problem, grid, h, q, k), _Scheme(problem, grid, h, q[:, :1], k[:, :1])
    if not np.isfinite(value).all():
        raise LandscapeError(f"the robust loss is not finite on the whole of [{grid[0]:g}, {grid[-1]:g}]")
    fronts = np.tile([[-math.inf], [math.inf]], steps + 1)
    if clipped:
        fronts = np.array(_fronts(problem, steps))
        if not fronts[0, 0] <= problem.theta0 <= fronts[1, 0]:
            raise LandscapeError(
                f"every flow from theta0 = {problem.theta0:g} leaves [{grid[0]:g}, {grid[-1]:g}]"
            )
    kept, choices = value, np.empty((steps, len(grid)), dtype=np.int64)
    for n in range(steps - 1, -1, -1):
        value, choices[n] = best.back(value, *fronts[:, n + 1])
        kept, _ = policy.back(kept)
    return value, kept, choices


def programme(
    problem: Bolza,
    nodes: int = 201,
    steps: int | None = None,
    points: int = 48,
    tolerance: float = 1e-5,
    follow: bool = True,
) -> Programming:
    """The dynamic programme of a problem and the derived policy under the same scheme.

    Args:
        problem: with its admissible set.
        nodes: of the grid in theta.
        steps: in time; 80 if left out, 240 where K is whole: K = ceil(K*) kept over a step is too small at
            its end where K* rises, an error of first order in the step.
        points: how finely alpha/alpha* is spaced.
        tolerance: relative to max(|J|, 1e-3).
        follow: also roll the best schedule out from theta0, if it is better than the policy.

    Raises:
        LandscapeError: no control keeps the state inside the range of the inner maximum.
    """
    low, high, clipped = reachable(problem)
    steps = steps or (240 if SETS[problem.admissible].whole else 80)
    grid, h = np.linspace(low, high, nodes), problem.horizon / steps
    q, k = _controls(problem, grid, points)
    value, kept, choices = _recursion(problem, grid, steps, q, k, clipped)
    found, derived = _at(grid, value, problem.theta0), _at(grid, kept, problem.theta0)
    allowed = tolerance * max(abs(derived), 1e-3)
    better = derived - found > allowed
    path = _roll_out(problem, grid, h, q, k, choices) if follow and better else [np.array([])] * 3
    return Programming(
        admissible=problem.admissible,
        value=found,
        policy=derived,
        difference=derived - found,
        tolerance=allowed,
        better=better,
        theta_range=(low, high),
        clipped=clipped,
        nodes=nodes,
        steps=steps,
        t=np.linspace(0, problem.horizon, steps + 1),
        theta=path[0],
        q=path[1],
        k=path[2],
    )


def _at(grid: Array, v: Array, theta: float) -> float:
    """Interpolation of values on a grid."""
    first, weights = _weights(grid, np.array([theta]))
    return float(v[int(first[0]) : int(first[0]) + 4] @ weights[:, 0])


def _roll_out(
    problem: Bolza, grid: Array, h: float, q: Array, k: Array, choices: NDArray[np.int64]
) -> list[Array]:
    """The best candidate schedule followed from theta0: the choice of the nearest node, step by step."""
    theta, used = [problem.theta0], []
    for chosen in choices:
        i = int(np.argmin(np.abs(grid - theta[-1])))
        now = np.full(1, theta[-1])
        held = _control(problem, now, q[i, chosen[i]][None], k[i, chosen[i]][None])
        if SETS[problem.admissible].tied and SETS[problem.admissible].whole:
            whole = np.maximum(held[1], problem.policy(now)[1])  # the node's K may be too small here
            held = problem.ratio(now, whole), whole
        if not problem.admits(now, *held).all():  # although the node's control is
            held = problem.policy(now)
        used.append((float(held[0][0]), float(held[1][0])))
        theta.append(float(_step(problem, now, *held, h)[0][0]))
    qs, ks = np.array(used).T
    return [np.array(theta), qs, ks]
