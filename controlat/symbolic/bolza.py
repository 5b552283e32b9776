"""The optimal-control problem of a landscape: how far and how often to step on the way to the inner maximum.

    min over u of  J = L(theta_T) + gamma * integral_0^T K dt,    theta' = F(theta, u) = -l_theta(theta, x_K)

with u = (alpha, K), x_K the inner ascent from the data point and L(theta) = l(theta, x*(theta)). Controls are
written as (q, K) with q = alpha/alpha*(theta), so that q = 1 means *exactly* the step that lands on x*: as a
rounded 1 - alpha/alpha* it would leave (1e-16)^K behind, which is no longer small for K < 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controlat.symbolic.landscape import Branch, Landscape, LandscapeError

__all__ = ["SETS", "AdmissibleSet", "Bolza", "candidates", "whole_cap"]

Array = NDArray[np.float64]
Q_MIN = 0.02  # the smallest alpha/alpha* looked at: K up to 50 K*(theta), where x_K hardly moves any more


class AdmissibleSet(NamedTuple):
    """G(theta): its formula in words, whether K is whole, whether alpha K = tau."""

    formula: str
    whole: bool
    tied: bool


SETS = {
    "product": AdmissibleSet("alpha K = tau, 0 < alpha <= alpha*(theta), K real", False, True),
    "integer": AdmissibleSet("alpha K = tau, alpha <= alpha*(theta), K = 1, 2, ...", True, True),
    "free": AdmissibleSet("0 < alpha <= alpha*(theta), K = 1, 2, ..., not tied to each other", True, False),
    "overshoot": AdmissibleSet(
        "0 < alpha <= c alpha*(theta) with 1 < c < 2, K = 1, 2, ..., not tied", True, False
    ),
}


@dataclass(frozen=True)
class Bolza:
    """The problem above on one branch of inner maxima.

    Args:
        branch: x*(theta).
        theta0: theta at time 0.
        tau: alpha K, in the units of alpha; it fixes K* = tau/alpha* also where the set does not tie them.
        horizon: T, in the time of the outer flow.
        gamma: price of one inner step per unit of time, >= 0.
        admissible: a name in `SETS`; the set is part of the problem.
        overshoot: c of the set "overshoot", 1 < c < 2.
        k_max: the largest whole K tried (beyond ceil(K*) for "integer"); chosen by `whole_cap` if left out.

    Raises:
        ValueError: a number out of range or an unknown set.
        LandscapeError: no positive step from the data point lands on the maximum at theta0.
    """

    branch: Branch
    theta0: float
    tau: float
    horizon: float
    gamma: float
    admissible: str = "product"
    overshoot: float = 1.9
    k_max: int | None = None

    def __post_init__(self) -> None:
        for name in ("tau", "horizon", "gamma", "theta0", "overshoot"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        for name in ("tau", "horizon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name):g}")
        if self.gamma < 0:
            raise ValueError(f"gamma is a price and must be >= 0, got {self.gamma:g}")
        if self.admissible not in SETS:
            raise ValueError(f"the admissible set is one of {', '.join(SETS)}, got {self.admissible!r}")
        if not 1 < self.overshoot < 2:
            raise ValueError(
                f"overshoot must be between 1 and 2 (from 2 on the ascent diverges), got {self.overshoot:g}"
            )
        if self.k_max is not None and self.k_max < 1:
            raise ValueError(f"k_max must be at least 1, got {self.k_max}")
        low, high = self.branch.domain
        if not low <= self.theta0 <= high:
            raise ValueError(
                f"theta0 = {self.theta0:g} is outside [{low:g}, {high:g}], where the inner maximum is known: "
                "start inside, or follow the maximum further"
            )
        step = float(self.step(self.theta0))
        if not (math.isfinite(step) and step > 0):
            raise LandscapeError(
                f"the step from the data point to the inner maximum at theta = {self.theta0:g} is {step:g}; "
                "it must be > 0: choose a maximum uphill of the data point"
            )

    @property
    def landscape(self) -> Landscape:
        """l."""
        return self.branch.landscape

    @property
    def reach(self) -> float:
        """The largest alpha/alpha* of the set."""
        return self.overshoot if self.admissible == "overshoot" else 1.0

    def start(self, theta: Any) -> Array:
        """The data point, in the shape of theta."""
        return np.full(np.shape(theta), float(self.landscape.x0))

    def step(self, theta: Any, star: Array | None = None) -> Array:
        """alpha*(theta): 1/|l_xx| for l quadratic in x, which is exact also where x* is the data point.

        x*(theta) may be given where it is already known.
        """
        theta = np.asarray(theta, dtype=float)
        land, start = self.landscape, self.start(theta)
        with np.errstate(all="ignore"):
            if land.quadratic:
                return np.asarray(-1.0 / land("xx")(theta, start), dtype=float)
            x = self.branch(theta) if star is None else star
            near = np.abs(x - start) < 1e-7  # then (x* - x0)/l_x is 0/0, with this limit:
            limit = -1.0 / land("xx")(theta, x) if near.any() else 0.0
            return np.where(near, limit, (x - start) / np.where(near, 1.0, land("x")(theta, start)))

    def count(self, theta: Any) -> Array:
        """K*(theta) = tau/alpha*(theta)."""
        with np.errstate(all="ignore"):
            return np.asarray(self.tau / self.step(theta), dtype=float)

    def count_slope(self, theta: Any) -> Array:
        """dK*/dtheta = -tau alpha*'/alpha*^2."""
        theta = np.asarray(theta, dtype=float)
        with np.errstate(all="ignore"):
            return np.asarray(-self.tau * self._step_slope(theta) / self.step(theta) ** 2, dtype=float)

    def _step_slope(self, theta: Array) -> Array:
        """dalpha*/dtheta; by differences where the data point is nearly the maximum, a limit of 0/0."""
        loss, start = self.landscape, self.start(theta)
        if loss.quadratic:
            return np.asarray(loss("xxt")(theta, start) / loss("xx")(theta, start) ** 2, dtype=float)
        distance, slope = self.branch(theta) - start, loss("x")(theta, start)
        exact = self.star_slope(theta) / slope - distance * loss("xt")(theta, start) / slope**2
        h = 1e-3 * max(1.0, abs(self.theta0))
        outer, inner = (self.step(theta + k * h) - self.step(theta - k * h) for k in (2, 1))
        return np.where(np.abs(distance) > 1e-3, exact, (8 * inner - outer) / (12 * h))

    def star_slope(self, theta: Any) -> Array:
        """dx*/dtheta; by differences where l_xx = 0 at the maximum."""
        theta = np.asarray(theta, dtype=float)
        x, h = self.branch(theta), 1e-3 * max(1.0, abs(self.theta0))
        with np.errstate(all="ignore"):
            exact = -self.landscape("xt")(theta, x) / self.landscape("xx")(theta, x)
        if np.isfinite(exact).all():
            return exact
        outer, inner = (self.branch(theta + k * h) - self.branch(theta - k * h) for k in (2, 1))
        return np.where(np.isfinite(exact), exact, (8 * inner - outer) / (12 * h))

    def inner(self, theta: Any, q: Any, k: Any) -> Array:
        """x_K(theta, alpha) for alpha = q alpha*(theta) and real K >= 0.

        For l quadratic in x it is x* + rho^K (x0 - x*), rho = 1 - q. Otherwise floor(K) whole steps, and for
        the rest s = K - floor(K) the geometric interpolation x* + r^s (x_n - x*) with
        r = (x_{n+1} - x*)/(x_n - x*), which agrees with rho^K for quadratic l; linear where r < 0.
        q = 1 gives x* itself for every K > 0.
        """
        theta, q, k = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (theta, q, k)))
        star, start = self.branch(theta), self.start(theta)
        with np.errstate(all="ignore"):
            if self.landscape.quadratic:
                return np.asarray(star + (1.0 - q) ** k * (start - star), dtype=float)
            if np.all((q == 1) & (k > 0)):
                return star
            alpha, s = q * self.step(theta, star), k - np.floor(k)
            x, _ = ascend(self.landscape, theta, alpha, np.floor(k), tangent=False)
            after = x + alpha * self.landscape("x")(theta, x)
            r = (after - star) / np.where(x == star, 1.0, x - star)
            between = np.where(r >= 0, star + np.abs(r) ** s * (x - star), x + s * (after - x))
            between = np.where(s > 0, between, x)
            return np.where(((q == 1) & (k > 0)) | (x == star), star, between)

    def inner_slope(self, theta: Any, q: Any, k: Any) -> Array:
        """d x_K/dtheta with alpha and K (not q) held fixed; K < 1 makes it infinite as alpha -> alpha*."""
        theta, q, k = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (theta, q, k)))
        loss, star, start, turn = (
            self.landscape,
            self.branch(theta),
            self.start(theta),
            self.star_slope(theta),
        )
        with np.errstate(all="ignore"):
            alpha = q * self.step(theta, star)
            if loss.quadratic:
                rho = np.where(k < 1, np.maximum(1.0 - q, 1e-14), 1.0 - q)
                moved = k * rho ** (k - 1) * alpha * loss("xxt")(theta, start) * (start - star)
                return np.asarray(turn * (1 - rho**k) + moved, dtype=float)
            s = k - np.floor(k)
            x, dx = ascend(loss, theta, alpha, np.floor(k), tangent=True)
            after = x + alpha * loss("x")(theta, x)
            dafter = dx + alpha * (loss("xt")(theta, x) + loss("xx")(theta, x) * dx)
            d, e = x - star, after - star
            y = np.where(d < 0, -1.0, 1.0) * np.abs(e) ** s * np.abs(d) ** (1 - s)
            geometric = turn + y * (s * (dafter - turn) / e + (1 - s) * (dx - turn) / d)
            geometric = np.where((d == 0) | (e == 0), turn, geometric)
            between = np.where(e * d >= 0, geometric, dx + s * (dafter - dx))
            return np.where(s > 0, between, dx)

    def flow(self, theta: Any, q: Any, k: Any) -> Array:
        """F(theta, u) = -l_theta(theta, x_K)."""
        return np.asarray(-self.landscape("t")(theta, self.inner(theta, q, k)), dtype=float)

    def flow_slope(self, theta: Any, q: Any, k: Any) -> Array:
        """dF/dtheta with alpha and K held fixed."""
        return self._total(theta, self.inner(theta, q, k), self.inner_slope(theta, q, k))

    def robust_flow_slope(self, theta: Any) -> Array:
        """d/dtheta of F(theta, alpha*(theta)) = -L'(theta)."""
        return self._total(theta, self.branch(theta), self.star_slope(theta))

    def _total(self, theta: Any, x: Array, dx: Array) -> Array:
        with np.errstate(all="ignore"):
            found = -(self.landscape("tt")(theta, x) + self.landscape("tx")(theta, x) * dx)
        return np.asarray(found, dtype=float)

    def hamiltonian(self, theta: Any, p: Any, q: Any, k: Any) -> Array:
        """H = p F(theta, u) - gamma K; -inf (no candidate) where the ascent leaves the real numbers."""
        with np.errstate(all="ignore"):
            found = p * self.flow(theta, q, k) - self.gamma * np.asarray(k, dtype=float)
        return np.where(np.isfinite(found), found, -np.inf)

    def policy(self, theta: Any) -> tuple[Array, Array]:
        """The derived schedule (q, K) in this set: alpha = alpha*, K = K*.

        K is rounded up where it must be whole, and alpha = tau/K then where the two are tied.
        """
        exact = self.count(theta)
        if not SETS[self.admissible].whole:
            return np.ones_like(exact), exact
        whole = np.ceil(exact * (1 - 1e-12))  # K* = 20 computed as 20.000000000000004 is 20
        return (exact / whole if SETS[self.admissible].tied else np.ones_like(exact)), whole


def ascend(loss: Landscape, theta: Array, alpha: Array, whole: Array, tangent: bool) -> tuple[Array, Array]:
    """x after whole[i] steps from the data point, and dx/dtheta at fixed alpha (zeros unless asked for)."""
    shape = theta.shape
    theta, alpha, whole = theta.ravel(), alpha.ravel(), whole.ravel()
    x, dx = np.full(theta.shape, float(loss.x0)), np.zeros(theta.shape)
    left = np.flatnonzero(whole > 0)
    n = 0
    while left.size:
        t, a, before = theta[left], alpha[left], x[left]
        if tangent:
            dx[left] = dx[left] + a * (loss("xt")(t, before) + loss("xx")(t, before) * dx[left])
        x[left] = before + a * loss("x")(t, before)
        n += 1
        going = (whole[left] > n) & np.isfinite(x[left])
        if not tangent:  # at a fixed point all further steps stay
            with np.errstate(all="ignore"):
                going &= np.abs(x[left] - before) > 2e-16 * np.abs(before)
        left = left[going]
    return x.reshape(shape), dx.reshape(shape)


def whole_cap(problem: Bolza) -> int:
    """How many whole K are tried: 1..cap, or ceil(K*)..ceil(K*) + cap - 1 where alpha = tau/K.

    Free alpha and l quadratic in x: every rho^K that K > 1 steps reach is reached by 1 step: 5 is plenty.
    """
    if problem.k_max is not None:
        return problem.k_max
    if not SETS[problem.admissible].tied and problem.landscape.quadratic:
        return 5
    return max(20, min(100, 2 * math.ceil(float(problem.count(problem.theta0)))))


def grid_of_q(reach: float, points: int) -> Array:
    """alpha/alpha* from `Q_MIN` to reach: log-spaced, linear, and dense towards 1 from below; 1 exactly."""
    logs = np.geomspace(Q_MIN, 1.0, points)
    near = 1.0 - np.geomspace(1e-9, 0.1, points // 4)
    line = np.linspace(reach / points, reach, points)
    return np.unique(np.concatenate([logs, near, line[line >= Q_MIN], [1.0, reach]]))


def candidates(problem: Bolza, theta: Array, points: int = 100, thin: bool = False) -> tuple[Array, Array]:
    """Controls of G(theta) to look at, as arrays (q, K) of shape (theta, candidates); q = 1 is among the q.

    Args:
        problem: with the set.
        theta: a row of theta.
        points: how finely alpha/alpha* is spaced.
        thin: leave out most of the larger K (1, 2, 3, 4, 6, 8, 12, ...).
    """
    cap = whole_cap(problem)
    counts = np.arange(1.0, cap + 1)
    if thin:
        counts = np.unique(np.round(np.concatenate([counts[:4], np.geomspace(1, cap, 9)])))
    exact = problem.count(theta)[:, None]
    if problem.admissible == "product":
        q = np.broadcast_to(grid_of_q(1.0, points), (len(theta), len(grid_of_q(1.0, points))))
        return q, exact / q
    if problem.admissible == "integer":
        k = np.ceil(exact * (1 - 1e-12)) + (counts - 1)
        return exact / k, k
    q, k = np.meshgrid(grid_of_q(problem.reach, points // 2), counts, indexing="ij")
    shape = (len(theta), q.size)
    return np.broadcast_to(q.ravel(), shape), np.broadcast_to(k.ravel(), shape)
