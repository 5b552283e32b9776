"""Dynamic programming on a grid of theta: the best value for any admissible set, no necessary conditions.

Backward in time, V(theta) <- min over u of { gamma K h + V(theta + step(theta, u)) }, with one Runge-Kutta
step of order 4 per time step (`Bolza.advance`) and cubic splines in theta. The policy alpha* is evaluated by
the same scheme, so the errors of the grid are in both and cancel in the difference.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, PchipInterpolator

from controlat.bolza.problem import Bolza, no_whole_k
from controlat.bolza.search import Search, candidates
from controlat.symbolic.landscape import Array, LandscapeError, stretch

__all__ = ["programme", "reachable"]


def _extremes(problem: Bolza, theta: Array) -> Array:
    """min and max over u in G(theta) of F(theta, u), as two rows; 0 where no control has one."""
    q, k = candidates(problem, theta, points=16, thin=True)
    end = problem.ascend(theta[:, None], q, k)
    flow = -problem.landscape("t")(theta[:, None], end.x)
    good = end.admitted & np.isfinite(flow)
    ends = np.array([np.where(good, flow, np.inf).min(axis=1), np.where(good, flow, -np.inf).max(axis=1)])
    return np.where(good.any(axis=1), ends, 0.0)


def _domain(problem: Bolza) -> tuple[float, float]:
    """The stretch around theta0 on which x* is known and a positive step from x0 lands on it."""
    theta = np.unique(np.append(np.linspace(*problem.branch.domain, 2001), problem.theta0))
    return stretch(theta, problem.branch.exact_step(theta) > 0, problem.theta0)


def reachable(problem: Bolza) -> tuple[float, float, bool]:
    """An interval around all theta that controls reach; and whether the domain ends before.

    Its ends follow theta' = min and max over u of F, by the comparison theorem for scalar equations; from a
    little beside theta0, so that what lies beyond the grid does not reach theta0 by interpolation. By 60
    steps, or 20 where every inner step has to be computed.
    """
    steps, domain = 60 if problem.landscape.quadratic else 20, _domain(problem)

    def spread(margin: float) -> tuple[Array, bool]:
        ends, clipped = np.clip(problem.theta0 + np.array([-margin, margin]), *domain), False
        for _ in range(steps):
            least, most = _extremes(problem, ends)
            ahead = ends + problem.horizon / steps * np.array([min(0.0, least[0]), max(0.0, most[1])])
            ends = np.clip(ahead, *domain)
            clipped |= bool((ends != ahead).any())
        return ends, clipped

    margin = 0.05 * float(np.ptp(spread(0.0)[0])) + 1e-3 * max(1.0, abs(problem.theta0))
    ends, clipped = spread(margin)
    low, high = np.clip(ends + np.array([-margin, margin]), *domain)
    return float(low), float(high), clipped


def _fronts(problem: Bolza, steps: int) -> Array:
    """For each instant the lowest and the highest state from which some control stays in the domain.

    Traced backward from its ends: upward flow that no control holds back moves the upper front down.
    """
    ends = _domain(problem)
    fronts = np.tile(ends, (steps + 1, 1))
    for n in range(steps - 1, -1, -1):
        least, most = _extremes(problem, fronts[n + 1])
        fronts[n] = np.clip(fronts[n + 1] - problem.horizon / steps * np.array([most[0], least[1]]), *ends)
        if not fronts[n, 0] <= problem.theta0 <= fronts[n, 1]:
            raise LandscapeError(
                f"every flow from theta0 = {problem.theta0:g} leaves [{ends[0]:g}, {ends[1]:g}]"
            )
    return fronts


def _recursion(
    problem: Bolza, grid: Array, q: Array, k: Array, fronts: Array
) -> tuple[float, float, NDArray[np.int64]]:
    """J from theta0 of the best candidates and of the policy (the first), and the choices made.

    Successors outside the fronts are avoided by all nodes that can; the others only serve as neighbours.
    Beyond the grid the value of its end is taken: such states start where theta0 cannot come by then.
    """
    steps, h = len(fronts) - 1, problem.horizon / (len(fronts) - 1)
    after, mean = problem.advance(grid[:, None], q, k, h)
    good = problem.admits(grid[:, None], q, k) & np.isfinite(after)
    price = np.where(good, problem.gamma * h * np.where(good, mean, 0.0), np.inf)
    at, rows = np.where(good, np.clip(after, grid[0], grid[-1]), grid[0]), np.arange(len(grid))
    best = policy = problem.branch.robust(grid)
    if not np.isfinite(best).all():
        raise LandscapeError(f"the robust loss is not finite on the whole of [{grid[0]:g}, {grid[-1]:g}]")
    choices = np.empty((steps, len(grid)), dtype=np.int64)
    # Where states are lost V has a cliff, over which a spline swings: then one that stays between its nodes.
    spline = PchipInterpolator if np.isfinite(fronts).all() else CubicSpline
    for n in range(steps - 1, -1, -1):
        total = price + spline(grid, best)(at)
        kept = np.where((after < fronts[n + 1, 0]) | (after > fronts[n + 1, 1]), np.inf, total)
        total = np.where(np.isfinite(kept).any(axis=1, keepdims=True), kept, total)
        choices[n] = np.argmin(total, axis=1)
        best = np.where(np.isfinite(total).any(axis=1), total[rows, choices[n]], best)
        policy = np.where(good[:, 0], price[:, 0] + spline(grid, policy)(at[:, 0]), policy)
    value, own = (float(spline(grid, v)(problem.theta0)) for v in (best, policy))
    return value, own, choices


def programme(
    problem: Bolza,
    nodes: int = 201,
    steps: int | None = None,
    points: int = 48,
    tolerance: float = 1e-5,
    follow: bool = True,
) -> Search:
    """The dynamic programme of a problem and the derived policy under the same scheme.

    Args:
        problem: with its admissible set.
        nodes: of the grid in theta.
        steps: in time; 80 if left out, 240 where K is whole: K = ceil(K*) kept over a step is too small at
            its end where K* rises, an error of first order in the step.
        points: how finely alpha/alpha* is spaced.
        tolerance: relative to max(|J|, 1e-3).
        follow: also roll the best schedule out from theta0, if it is better than the policy.

    Returns:
        With theta rolled out from theta0 where it is better, one more than q; `about` has the tolerance, the
        grid (theta_range, nodes, steps) and whether the domain of the inner maximum cut it (clipped).

    Raises:
        LandscapeError: no control keeps the state inside the range of the inner maximum.
    """
    low, high, clipped = reachable(problem)
    steps = steps or (240 if problem.whole else 80)
    grid, open_ends = np.linspace(low, high, nodes), np.tile([-math.inf, math.inf], (steps + 1, 1))
    own = problem.policy(grid)
    if (lost := ~np.isfinite(own[1])).any():
        raise no_whole_k(float(grid[lost][0]))
    pairs = zip(own, candidates(problem, grid, points, thin=True), strict=True)
    q, k = (np.column_stack(pair) for pair in pairs)  # the derived policy first
    fronts = _fronts(problem, steps) if clipped else open_ends
    value, policy, choices = _recursion(problem, grid, q, k, fronts)
    better = policy - value > (allowed := tolerance * max(abs(policy), 1e-3))
    path = _roll_out(problem, grid, q, k, choices) if follow and better else [np.array([])] * 3
    t = np.linspace(0, problem.horizon, steps + 1)
    about = {"tolerance": allowed, "theta_range": (low, high), "clipped": clipped, "nodes": nodes}
    return Search(value, policy, better, t, path[0], path[1], path[2], about | {"steps": steps})


def _roll_out(problem: Bolza, grid: Array, q: Array, k: Array, choices: NDArray[np.int64]) -> list[Array]:
    """The best candidate schedule followed from theta0: the choice of the nearest node, step by step."""
    theta, used, h = [np.asarray(problem.theta0)], [], problem.horizon / len(choices)
    for chosen in choices:
        i, now = int(np.argmin(np.abs(grid - theta[-1]))), theta[-1]
        ratio, count = q[i, chosen[i]], k[i, chosen[i]]
        if problem.admissible == "product":
            count = problem.count(now) / ratio
        elif problem.tied:  # the node's K may be too small here
            count = np.maximum(count, problem.policy(now)[1])
            ratio = problem.ratio(now, count)
        if not problem.admits(now, ratio, count):  # although the node's control is
            ratio, count = problem.policy(now)
        used.append((float(ratio), float(count)))
        theta.append(problem.advance(now, ratio, count, h)[0])
    return [np.array(theta), *np.array(used).T]
