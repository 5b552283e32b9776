"""Pontryagin's principle for a schedule on a landscape: Hamiltonian, multiplier and the criterion

    H = p F(theta, u) - gamma K,   p' = -dH/dtheta,   p(T) = -L'(theta_T),
    C(u) = 1/T integral [ max over v in G(theta_t) of H(theta_t, p_t, v) - H(theta_t, p_t, u_t) ] dt.

G depends on the state through alpha <= alpha*(theta). Where a schedule sits on that bound the multiplier
m = dH/dalpha >= 0 enters: p' = -H_theta - m alpha*_theta, which is minus the total derivative
-d/dtheta [H(theta, p, alpha*(theta))]. C = 0 is necessary for a minimum, not sufficient.
Source: Ye et al. (AAAI 2021), equations 6-13; the multiplier is not in that paper.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import solve_bvp, trapezoid

from controlat.bolza.path import Path, derived_path
from controlat.bolza.problem import Bolza
from controlat.bolza.search import candidates, grid_of_q, whole_cap
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["Criterion", "boundary_problem", "criterion", "gamma_limit", "gamma_range"]
__all__ += ["maximise", "multiplier"]

LARGEST_GAMMA = 1e4  # beyond it a limit on gamma is called infinite


class Criterion(NamedTuple):
    """C and where it comes from: max_v H - H(u) at each instant, its maximiser, what was looked at."""

    c: float
    gap: Array
    largest: float
    q: Array
    k: Array
    searched: str


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
