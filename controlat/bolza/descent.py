"""Discrete descent on a landscape with noise and an inexact inner ascent: what Theorem 1 is about."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from controlat._util.checks import whole
from controlat.bolza.constants import Constants, Range
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Array, LandscapeError, roots

__all__ = ["Case", "Inner", "Seen", "inner_ascent", "minimiser", "run"]

Inner = Callable[[Array, Array], Array]  # where the inner loop ends, from theta and x*(theta)


class Case(NamedTuple):
    """What all rows share."""

    branch: Branch
    theta0: float
    inner: Inner
    runs: int
    seed: int


class Seen(NamedTuple):
    """What runs did: left side of each run, largest errors, and where they were."""

    left: Array
    delta: float
    fosc: float
    theta: Range
    x: Range
    finite: bool


def minimiser(branch: Branch, theta0: float) -> float:
    """Where the robust flow from theta_0 ends."""
    slope = float(branch.robust_slope(theta0))
    if slope == 0:
        return theta0
    end = branch.domain[0 if slope > 0 else 1]
    grid = np.linspace(min(theta0, end), max(theta0, end), 4001)
    below = [v for v, _, _ in roots(branch.robust_slope, grid)]
    below += [end] if branch.robust_slope(end) == 0 else []
    if not below:
        raise LandscapeError(
            f"the robust loss falls from theta_0 = {theta0:.6g} as far as the inner maximum is followed "
            f"(theta = {end:.6g}): no minimum, Delta is infinite or unknown; give a theta_range"
        )
    return min(below, key=lambda v: abs(v - theta0))


def inner_ascent(branch: Branch, alpha: float | None, steps: int | None, delta: float) -> Inner:
    """An inner loop of steps of size alpha from x0, or one that ends delta from x*, where it hinders most."""
    if (alpha is None) != (steps is None):
        raise ValueError(
            f"an inner ascent needs alpha and steps, got alpha {alpha} and steps {steps}: give both"
        )
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0 <= delta < math.inf or (delta > 0 and alpha is not None):
        raise ValueError(
            f"delta must be at least 0, and 0 beside alpha and steps, got {delta}: leave one out"
        )
    if steps is not None:
        count = whole(steps, "steps", 0)
        return lambda theta, _: branch.landscape.ascent(theta, alpha, count)
    slope = branch.landscape("t")

    def away(theta: Array, best: Array) -> Array:
        exact, above, below = slope(theta, best), best + delta, best - delta
        return np.where(exact * slope(theta, above) < exact * slope(theta, below), above, below)

    return away if delta > 0 else lambda _, best: best


def run(case: Case, k: Constants, eta: float, T: int, sigma: float) -> Seen:
    """T steps of all runs at once; without noise they are all alike, so there is one."""
    l, rng = case.branch.landscape, np.random.default_rng(case.seed)  # noqa: E741
    theta, delta, fosc = np.full(case.runs if sigma > 0 else 1, case.theta0), 0.0, 0.0
    left, ends = np.zeros_like(theta), ([np.inf], [-np.inf], [np.inf], [-np.inf])
    for step in range(T + 1):
        best = case.branch(theta)
        point = case.inner(theta, best)
        for i, values in ((0, theta), (2, np.concatenate([best, point]))):
            fine = values[np.isfinite(values)]
            ends[i].append(float(fine.min(initial=np.inf)))
            ends[i + 1].append(float(fine.max(initial=-np.inf)))
        if step == T:  # theta_T is in no sum, but L(theta_T) >= min L is used: it has to be in range
            break
        slope = l("x")(theta, point)
        gap = np.maximum((k.x_range[1] - point) * slope, (k.x_range[0] - point) * slope)
        delta, fosc = max(delta, float(np.abs(point - best).max())), max(fosc, float(gap.max()))
        left += l("t")(theta, best) ** 2 / T
        noise = sigma * rng.standard_normal(len(theta)) if sigma > 0 else 0.0
        theta = theta - eta * (l("t")(theta, point) + noise)
    finite = bool(np.isfinite([left, point, best]).all())
    low, high, bottom, top = min(ends[0]), max(ends[1]), min(ends[2]), max(ends[3])
    return Seen(left, delta, fosc, (low, high), (bottom, top), finite)
