"""Direct transcription of the control problem: minimise the discretised J itself, without costates.

Implicit midpoint, theta_{k+1} = theta_k + h F((theta_k + theta_{k+1})/2, q_k), with states and controls as
the unknowns of a nonlinear programme. In it an ascent that would pass x* ends there, so that all is
continuous; such a control does what q = 1 does, with more steps. What is found is judged by rolling its
controls out, those that overshoot replaced by q = 1: J is that of admissible controls, whether or not the
minimiser converged. No maximum principle is used, so that agreement with it says something.
Only for the admissible set "product", whose control is the one number q = alpha/alpha*(theta), K = K*/q; the
other sets have whole K and are left to dynamic programming.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from controlat.symbolic.bolza import Q_MIN, Bolza, smallest_q
from controlat.symbolic.landscape import LandscapeError

__all__ = ["Transcription", "midpoint_cost", "transcribe"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Transcription:
    """What direct minimisation found, beside q = 1 under the same discretisation.

    Args:
        found: the smallest J, of controls re-run through the dynamics.
        derived: J of q = 1.
        difference: derived - found; > 0 if something better was found.
        deviation: max |q - 1| of the controls found.
        success: whether the solver met its tolerances from at least one start; says nothing about `found`.
        better: difference > tolerance, and so it is for the same controls on a mesh 4 times finer.
        t, q, k: the best controls, one per interval, with K at its midpoint; t is where it begins.
        theta: the states, one more.
    """

    found: float
    derived: float
    difference: float
    deviation: float
    success: bool
    better: bool
    intervals: int
    starts: int
    t: Array
    q: Array
    k: Array
    theta: Array


class _Programme:
    """The nonlinear programme in z = (theta_1..theta_N, q_1..q_N); derivatives by vectorised differences."""

    def __init__(self, problem: Bolza, intervals: int) -> None:
        self.problem, self.n, self.h = problem, intervals, problem.horizon / intervals

    def split(self, z: Array) -> tuple[Array, Array, Array]:
        """States, midpoints and controls."""
        theta = np.concatenate([[self.problem.theta0], z[: self.n]])
        return theta, (theta[1:] + theta[:-1]) / 2, z[self.n :]

    def flow(self, theta: Array, q: Array) -> Array:
        """F at midpoints."""
        return self.problem.flow(theta, q, self.problem.count(theta) / q, clip=True)

    def cost(self, z: Array) -> float:
        """J = L(theta_N) + gamma h sum K."""
        theta, middle, q = self.split(z)
        running = self.problem.gamma * self.h * float(np.sum(self.problem.count(middle) / q))
        return float(self.problem.branch.robust(theta[-1])) + running

    def cost_slope(self, z: Array) -> Array:
        """dJ/dz."""
        theta, middle, q = self.split(z)
        weight, slopes = self.problem.gamma * self.h, np.zeros(2 * self.n)
        half = weight * self.problem.count_slope(middle) / q / 2
        slopes[: self.n] = half
        slopes[: self.n - 1] += half[1:]
        slopes[self.n - 1] += float(self.problem.branch.robust_slope(theta[-1]))
        slopes[self.n :] = -weight * self.problem.count(middle) / q**2
        return slopes

    def defects(self, z: Array) -> Array:
        """theta_{k+1} - theta_k - h F: zero for a solution."""
        theta, middle, q = self.split(z)
        return np.asarray(np.diff(theta) - self.h * self.flow(middle, q), dtype=float)

    def slope(self, middle: Array, q: Array) -> Array:
        """dF/dtheta at fixed q; one-sided at the ends of the domain."""
        low, high = self.problem.domain
        behind, ahead = np.maximum(middle - 1e-6, low), np.minimum(middle + 1e-6, high)
        with np.errstate(all="ignore"):
            return np.asarray((self.flow(ahead, q) - self.flow(behind, q)) / (ahead - behind), dtype=float)

    def slopes(self, middle: Array, q: Array) -> tuple[Array, Array]:
        """dF/dtheta at fixed q, and dF/dq (one-sided at q = 1, where K < 1 makes it infinite)."""
        e = 1e-6
        by_theta = self.slope(middle, q)
        low, high = np.maximum(q - e, Q_MIN / 2), np.minimum(q + e, 1.0)
        by_q = (self.flow(middle, high) - self.flow(middle, low)) / (high - low)
        return by_theta, by_q

    def jacobian(self, z: Array) -> Array:
        """d defects/dz."""
        _, middle, q = self.split(z)
        by_theta, by_q = self.slopes(middle, q)
        found, rows = np.zeros((self.n, 2 * self.n)), np.arange(self.n)
        found[rows, rows] = 1 - self.h * by_theta / 2
        found[rows[1:], rows[:-1]] = -1 - self.h * by_theta[1:] / 2
        found[rows, self.n + rows] = -self.h * by_q
        return found

    def run(self, q: Array) -> Array:
        """z for given controls: the implicit midpoint rule, all steps at once or, failing that, one by one.

        Raises:
            LandscapeError: the states leave the range where the inner maximum exists.
        """
        theta = self._together(q)
        return np.concatenate([self._one_by_one(q) if theta is None else theta, q])

    def _together(self, q: Array) -> Array | None:
        """States by Newton's method on all equations; None if it does not converge."""
        theta, last = np.full(self.n, self.problem.theta0), math.inf
        for _ in range(25):
            z = np.concatenate([theta, q])
            with np.errstate(all="ignore"):
                defects = self.defects(z)
            half = self.h * self.slope(self.split(z)[1], q) / 2
            change, before = np.zeros(self.n), 0.0
            with np.errstate(all="ignore"):
                for i in range(self.n):
                    change[i] = before = (defects[i] + (1 + half[i]) * before) / (1 - half[i])
            size = float(np.abs(change).max())
            if not math.isfinite(size):
                return None
            theta = theta - change
            if size <= 1e-14 * max(1.0, float(np.abs(theta).max())) or (size < 1e-12 and size >= last / 2):
                return theta
            last = size
        return None

    def _one_by_one(self, q: Array) -> Array:
        """States step by step, each by Newton's method with one slope."""
        theta = [self.problem.theta0]
        for control in q:
            now, after = theta[-1], theta[-1]
            at = np.full(1, control)
            slope = 1 - self.h * float(self.slope(np.full(1, now), at)[0]) / 2
            step = math.inf
            for _ in range(60):
                middle = np.full(1, (now + after) / 2)
                step = (after - now - self.h * float(self.flow(middle, at)[0])) / slope
                after -= step
                if not abs(step) > 1e-14 * max(1.0, abs(now)):
                    break
            if not (math.isfinite(after) and abs(step) <= 1e-10 * max(1.0, abs(now))):
                raise LandscapeError(
                    f"the states leave the range of the inner maximum near theta = {now:.6g}, or the "
                    "implicit midpoint rule has no solution there"
                )
            theta.append(after)
        return np.array(theta[1:])

    def admits(self, z: Array) -> NDArray[np.bool_]:
        """Which of the controls belong to G at their midpoints."""
        _, middle, q = self.split(z)
        return self.problem.admits(middle, q, self.problem.count(middle) / q)

    def roll_out(self, q: Array) -> Array:
        """z for given controls, those that overshoot replaced by q = 1 (the same flow, with fewer steps).

        Raises:
            LandscapeError: the states leave the range where the inner maximum exists.
        """
        for _ in range(5):
            z = self.run(q)
            good = self.admits(z)
            if good.all():
                return z
            q = np.where(good, q, 1.0)
        raise LandscapeError("the controls found do not belong to the set")


def midpoint_cost(problem: Bolza, q: Array) -> float:
    """J of piecewise constant alpha/alpha* = q under the implicit midpoint rule with len(q) intervals.

    Infinite where one of them is not in the set.
    """
    programme = _Programme(problem, len(q))
    z = programme.run(np.asarray(q, dtype=float))
    return programme.cost(z) if programme.admits(z).all() else math.inf


def _starts(intervals: int, count: int) -> list[Array]:
    """q = 1, q = 0.5, then random ones from a fixed seed."""
    rng = np.random.default_rng(0)
    random = [rng.uniform(0.2, 1.0, intervals) for _ in range(max(0, count - 2))]
    return [np.ones(intervals), np.full(intervals, 0.5), *random][:count]


def transcribe(
    problem: Bolza, intervals: int = 40, starts: int = 3, tolerance: float = 1e-6
) -> Transcription:
    """Minimise J over all states and controls by sequential quadratic programming, from several starts.

    Args:
        problem: with the set "product".
        intervals: steps of the implicit midpoint rule.
        starts: how many starts: q = 1, q = 0.5, random.
        tolerance: relative decrease of J from which "better" is said.

    Raises:
        ValueError: another set, or fewer than 2 intervals or 1 start.
        LandscapeError: the derived schedule leaves the range of the inner maximum.
    """
    if problem.admissible != "product":
        raise ValueError(f"direct transcription is for the set 'product', got {problem.admissible!r}")
    if intervals < 2 or starts < 1:
        raise ValueError(f"needed: at least 2 intervals and 1 start, got {intervals} and {starts}")
    programme = _Programme(problem, intervals)
    z = programme.run(np.ones(intervals))
    derived = programme.cost(z)
    best, success = (derived, z), False
    for start in _starts(intervals, starts):
        found = _solve(programme, start)
        if found is not None:
            success |= found[2]
            best = min(best, found[:2], key=lambda pair: pair[0])
    theta, middle, q = programme.split(best[1])
    difference = derived - best[0]
    allowed = tolerance * max(abs(derived), 1e-3)
    better = difference > allowed and _finer(problem, q) > allowed
    deviation = float(np.max(np.abs(q - 1)))
    return Transcription(
        found=best[0],
        derived=derived,
        difference=difference,
        deviation=deviation,
        success=success,
        better=better,
        intervals=intervals,
        starts=starts,
        t=problem.horizon / intervals * np.arange(intervals, dtype=np.float64),
        q=q,
        k=problem.count(middle) / q,
        theta=theta,
    )


def _finer(problem: Bolza, q: Array) -> float:
    """What controls gain over q = 1 on a mesh 4 times finer: a gain of the discretisation vanishes there."""
    programme = _Programme(problem, 4 * len(q))
    try:
        found = programme.cost(programme.roll_out(np.repeat(q, 4)))
        gain = programme.cost(programme.run(np.ones(4 * len(q)))) - found
    except LandscapeError:
        return -math.inf
    return gain if math.isfinite(gain) else -math.inf


def _solve(programme: _Programme, start: Array) -> tuple[float, Array, bool] | None:
    """The result of one start, its controls rolled out so that no unmet constraint passes for a gain."""
    n, (low, high) = programme.n, programme.problem.domain
    least = smallest_q(programme.problem, np.array([programme.problem.theta0]))
    defects: Any = {"type": "eq", "fun": programme.defects, "jac": programme.jacobian}
    try:
        with np.errstate(all="ignore"):
            found = minimize(
                programme.cost,
                programme.run(start),
                jac=programme.cost_slope,
                bounds=[(low, high)] * n + [(least, 1.0)] * n,
                constraints=defects,
                method="SLSQP",
                options={"maxiter": 120, "ftol": 1e-12},
            )
            z = programme.roll_out(np.clip(found.x[n:], least, 1.0))
    except (LandscapeError, ValueError):  # this start left the landscape; the others count
        return None
    value = programme.cost(z)
    return (value, z, bool(found.success)) if math.isfinite(value) else None
