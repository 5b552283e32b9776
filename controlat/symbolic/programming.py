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
    return (problem.count(theta) / k, k) if SETS[problem.admissible].tied else (q, k)


def _step(problem: Bolza, theta: Array, q: Array, k: Array, h: float) -> tuple[Array, Array]:
    """theta after a time h, and the mean K on the way; nan where the landscape ends."""
    count, slopes, at = np.zeros(np.broadcast(theta, q).shape), [], theta
    for ahead, weight in ((0.5, 1), (0.5, 2), (1.0, 2), (0.0, 1)):
        now = _control(problem, at, q, k)
        slopes.append(weight * problem.flow(at, *now))
        count = count + weight * now[1] / 6
        with np.errstate(all="ignore"):
            at = theta + ahead * h * slopes[-1] / weight
    with np.errstate(all="ignore"):
        return theta + h * sum(slopes) / 6, count


def reachable(problem: Bolza, steps: int = 60) -> tuple[float, float, bool]:
    """The interval of theta that some control reaches from theta0, and whether the inner maximum ends before.

    Its ends follow theta' = min and max over u of F, by the comparison theorem for scalar equations.
    """
    ends = np.full(2, problem.theta0)
    low, high = problem.branch.domain
    h, clipped = problem.horizon / steps, False
    for _ in range(steps):
        q, k = candidates(problem, ends, points=16, thin=True)
        with np.errstate(all="ignore"):
            flow = problem.flow(ends[:, None], q, k)
        finite = np.where(np.isfinite(flow), flow, 0.0)
        clipped |= not bool(np.isfinite(flow).all())
        ends = ends + h * np.array([min(0.0, finite[0].min()), max(0.0, finite[1].max())])
        clipped |= bool(ends[0] < low or ends[1] > high)
        ends = np.clip(ends, low, high)
    pad = 0.05 * (ends[1] - ends[0]) + 1e-3 * max(1.0, abs(problem.theta0))
    return max(low, float(ends[0] - pad)), min(high, float(ends[1] + pad)), clipped


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
    """Successors, running costs and interpolation weights of candidates on a grid."""

    def __init__(self, problem: Bolza, grid: Array, h: float, q: Array, k: Array) -> None:
        after, count = _step(problem, grid[:, None], q, k, h)
        low, high = problem.branch.domain
        outside = ~np.isfinite(after) | (after < low) | (after > high)
        self.price = np.where(outside, np.inf, problem.gamma * h * np.where(outside, 0.0, count))
        # A successor beyond the grid but inside the domain starts where theta0 cannot come by then.
        self.first, self.weights = _weights(grid, after)

    def values(self, v: Array) -> Array:
        """gamma K h + V at the successor, for every node and candidate; linear beside nodes that leave."""
        lost = ~np.isfinite(v)
        filled, found = np.where(lost, 0.0, v), self.price.copy()
        for j in range(4):
            found += self.weights[j] * filled[self.first + j]
        if lost.any():
            near = lost[self.first] | lost[self.first + 1] | lost[self.first + 2] | lost[self.first + 3]
            found[near] = self._linear(v, near)
        return found

    def _linear(self, v: Array, near: NDArray[np.bool_]) -> Array:
        """The same by linear interpolation; infinite where a needed node is."""
        place = self.first[near] + sum(j * self.weights[j][near] for j in range(4))  # exact for polynomials
        left = np.clip(np.floor(place).astype(np.int64), 0, len(v) - 2)
        s = np.clip(place - left, 0.0, 1.0)
        with np.errstate(all="ignore"):
            ends = np.where(s < 1, (1 - s) * v[left], 0.0) + np.where(s > 0, s * v[left + 1], 0.0)
        return np.asarray(self.price[near] + np.where(np.isnan(ends), np.inf, ends), dtype=float)


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
        LandscapeError: no admissible control keeps theta0 inside the range of the inner maximum.
    """
    low, high, clipped = reachable(problem)
    steps = steps or (240 if SETS[problem.admissible].whole else 80)
    grid, h = np.linspace(low, high, nodes), problem.horizon / steps
    q, k = candidates(problem, grid, points, thin=True)
    own = [np.asarray(v)[:, None] for v in problem.policy(grid)]
    q, k = np.concatenate([own[0], q], axis=1), np.concatenate([own[1], k], axis=1)
    best, policy = _Scheme(problem, grid, h, q, k), _Scheme(problem, grid, h, *own)
    value = problem.branch.robust(grid)
    if not np.isfinite(value).all():
        raise LandscapeError(f"the robust loss is not finite on the whole of [{low:g}, {high:g}]")
    kept, choices = value, np.empty((steps, nodes), dtype=np.int64)
    with np.errstate(all="ignore"):
        for n in range(steps - 1, -1, -1):
            options = best.values(value)
            choices[n] = np.argmin(options, axis=1)
            value = options[np.arange(nodes), choices[n]]
            kept = policy.values(kept)[:, 0]
    found, derived = _at(grid, value, problem.theta0), _at(grid, kept, problem.theta0)
    if not (math.isfinite(found) and math.isfinite(derived)):
        raise LandscapeError(f"from theta0 = {problem.theta0:g} the flow leaves [{low:g}, {high:g}]")
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
    first, weights = _weights(grid, np.array([theta]))
    near = v[int(first[0]) : int(first[0]) + 4]
    return float(near @ weights[:, 0]) if np.isfinite(near).all() else math.inf


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
            held = problem.count(now) / whole, whole
        used.append((float(held[0][0]), float(held[1][0])))
        theta.append(float(_step(problem, now, *held, h)[0][0]))
    qs, ks = np.array(used).T
    return [np.array(theta), qs, ks]
