"""Direct transcription of the control problem: minimise the discretised J itself, without costates.

Controls are constant on each of N intervals, states follow by a Runge-Kutta step of order 4 on each (single
shooting), and scipy's L-BFGS-B minimises J over the N numbers alpha/alpha*, from several starts. No maximum
principle is used, so that agreement with it says something. Only for the admissible set "product", whose
control is the one number q = alpha/alpha*(theta), K = K*/q; the other sets have whole K and are left to
dynamic programming.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize

from controlat._util.checks import whole
from controlat.bolza.problem import Bolza
from controlat.bolza.search import Q_MIN, Search
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["cost", "transcribe"]

_LOST = 1e30  # J where the states leave the range of the inner maximum
_DIFFERENCE = 1e-7  # of alpha/alpha*, for slopes of J


def _states(problem: Bolza, q: Array) -> tuple[Array, Array]:
    """States at the ends of the intervals and integral of K, for controls of shape (..., intervals)."""
    h, theta, spent = problem.horizon / q.shape[-1], [np.full(q.shape[:-1], problem.theta0)], 0.0
    for now in np.moveaxis(q, -1, 0):
        after, mean = problem.advance(theta[-1], now, problem.count(theta[-1]) / now, h)
        theta, spent = [*theta, after], spent + h * mean
    return np.stack(theta, axis=-1), np.asarray(spent)


def cost(problem: Bolza, q: Array) -> Array:
    """J of piecewise constant alpha/alpha* = q, of shape (..., intervals); nan where states are lost."""
    theta, spent = _states(problem, q)
    return problem.branch.robust(theta[..., -1]) + problem.gamma * spent


def transcribe(problem: Bolza, intervals: int = 40, starts: int = 3, tolerance: float = 1e-6) -> Search:
    """Minimise J over all controls, from several starts.

    Args:
        problem: with the set "product".
        intervals: how many pieces the control has.
        starts: how many starts: q = 1, q = 0.5, random ones from a fixed seed.
        tolerance: relative decrease of J from which "better" is said, if a finer mesh bears it out.

    Returns:
        `about` has max |q - 1| (deviation), and whether the minimiser met its tolerances from at least one
        start (success), which says nothing about `best`.

    Raises:
        ValueError: another set, or fewer than 2 intervals or 1 start.
        LandscapeError: the derived schedule leaves the range of the inner maximum.
    """
    if problem.admissible != "product":
        raise ValueError(f"direct transcription is for the set 'product', got {problem.admissible!r}")
    whole(intervals, "intervals", 2), whole(starts, "starts", 1)
    ones, rng, success = np.ones(intervals), np.random.default_rng(0), False
    best = derived = float(cost(problem, q := ones))
    if not np.isfinite(derived):
        raise LandscapeError("the derived schedule leaves the range of the inner maximum")
    options: Any = {"method": "L-BFGS-B", "options": {"ftol": 1e-13, "gtol": 1e-8, "maxiter": 100}}
    options["bounds"] = [(Q_MIN, 1.0)] * intervals
    for start in [ones, ones / 2, *(rng.uniform(0.2, 1, intervals) for _ in range(starts - 2))][:starts]:
        end = minimize(_with_slope, start, args=(problem,), jac=True, **options)
        success |= bool(end.success)
        if (value := float(cost(problem, end.x))) < best:
            best, q = value, end.x
    allowed, finer = tolerance * max(abs(derived), 1e-3), cost(problem, np.repeat([ones, q], 4, axis=1))
    better, theta = min(derived - best, finer[0] - finer[1]) > allowed, _states(problem, q)[0][:-1]
    about: dict[str, Any] = {"deviation": float(np.max(np.abs(q - 1))), "success": success}
    about |= {"intervals": intervals, "starts": starts}
    t = np.linspace(0, problem.horizon, intervals, endpoint=False)
    return Search(best, derived, bool(better), t, theta, q, problem.count(theta) / q, about)


def _with_slope(q: Array, problem: Bolza) -> tuple[float, Array]:
    """J and its slopes by one-sided differences that stay in the set: all of them in one roll-out."""
    moves = np.where(q + _DIFFERENCE > 1, -_DIFFERENCE, _DIFFERENCE)
    j = np.nan_to_num(cost(problem, np.vstack([q, q + np.diag(moves)])), nan=_LOST, posinf=_LOST)
    return float(j[0]), (j[1:] - j[0]) / moves
