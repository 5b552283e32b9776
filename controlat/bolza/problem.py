"""The Bolza problem of a landscape: how far and how often to step on the way to the inner maximum.

    min over u of  J = L(theta_T) + gamma * integral_0^T K dt,    theta' = F(theta, u) = -l_theta(theta, x_K)

with u = (alpha, K), x_K the inner ascent from the data point and L(theta) = l(theta, x*(theta)). Controls are
written as (q, K) with q = alpha/alpha*(theta), so that q = 1 means *exactly* the step that lands on x*: as a
rounded 1 - alpha/alpha* it would leave (1e-16)^K behind, which is no longer small for K < 1.

alpha <= alpha*(theta) excludes overshoot where l is quadratic in x. For others the first step stays before x*
and a later one may not. So the sets with alpha <= alpha* contain a control only if *every* step of its ascent
stays between x0 and x*; "overshoot" contains those whose steps stay inside x_range.

Real K means x_K = x* + (1 - q)^K (x0 - x*), which holds for l quadratic in x alone: for others only whole K
are offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controlat._util.checks import number
from controlat.bolza.admissible import SETS, chosen_set
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Array, Landscape, LandscapeError

__all__ = ["Bolza", "no_whole_k"]
_SLACK = 1e-10  # of |x* - x0|: by so much rounding may carry a step beyond x*
_DOUBLINGS = 9  # of K, in search of one whose ascent does not overshoot


class Ascent(NamedTuple):
    """Where an inner ascent ends, d/dtheta of that at fixed alpha and K, and whether its control is in G.

    One that is not ends at x* (or at an end of x_range) where it would pass it.
    """

    x: Array
    slope: Array
    admitted: NDArray[np.bool_]


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

    Raises:
        ValueError: a number out of range or an unknown set.
        LandscapeError: K is real and l is not quadratic in x, or no positive step from the data point lands
            on the maximum at theta0.
    """

    branch: Branch
    theta0: float
    tau: float
    horizon: float
    gamma: float
    admissible: str = "product"
    overshoot: float = 1.9

    def __post_init__(self) -> None:
        for name in ("tau", "horizon", "gamma", "theta0", "overshoot"):
            value = number(getattr(self, name), name)
            if value <= 0 and name in ("tau", "horizon"):
                raise ValueError(f"{name} must be > 0, got {value:g}")
        if self.gamma < 0:
            raise ValueError(f"gamma is a price and must be >= 0, got {self.gamma:g}")
        chosen_set(self.landscape, self.admissible)
        if not 1 < self.overshoot < 2:
            raise ValueError(
                f"overshoot must be between 1 and 2 (from 2 on the ascent diverges), got {self.overshoot:g}"
            )
        low, high = self.branch.domain
        if not low <= self.theta0 <= high:
            raise ValueError(
                f"theta0 = {self.theta0:g} is outside [{low:g}, {high:g}], where the inner maximum is known: "
                "start inside, or follow the maximum further"
            )
        if not 0 < (step := float(self.branch.exact_step(self.theta0))) < math.inf:
            raise LandscapeError(
                f"the step from the data point to the inner maximum at theta = {self.theta0:g} is {step:g}; "
                "it must be > 0: choose a maximum uphill of the data point"
            )

    @property
    def landscape(self) -> Landscape:
        """l."""
        return self.branch.landscape

    @property
    def whole(self) -> bool:
        """Whether K is whole."""
        return SETS[self.admissible].whole

    @property
    def tied(self) -> bool:
        """Whether alpha K = tau."""
        return SETS[self.admissible].tied

    @property
    def reach(self) -> float:
        """The largest alpha/alpha* of the set."""
        return self.overshoot if self.admissible == "overshoot" else 1.0

    def count(self, theta: Any) -> Array:
        """K*(theta) = tau/alpha*(theta); nan where no positive step lands on x*."""
        step = self.branch.exact_step(theta)
        with np.errstate(all="ignore"):
            return np.where(step > 0, self.tau / step, np.nan)

    def count_slope(self, theta: Any) -> Array:
        """dK*/dtheta for l quadratic in x, where K* = -tau l_xx(theta)."""
        return np.asarray(-self.tau * self.landscape("xxt")(theta, self.landscape.point), dtype=float)

    def ascend(self, theta: Any, q: Any, k: Any, tangent: bool = False) -> Ascent:
        """The inner ascent of alpha = q alpha*(theta) and K: x_K, its slope at fixed alpha and K, u in G.

        q = 1 gives x* itself for every K > 0. For K < 1 the slope is infinite as alpha -> alpha*.

        Args:
            theta: a number or an array, like q and k.
            q: alpha/alpha*.
            k: K; whole where l is not quadratic in x.
            tangent: compute the slope, too.
        """
        theta, q, k = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (theta, q, k)))
        with np.errstate(all="ignore"):
            return (self._power if self.landscape.quadratic else self._steps)(theta, q, k, tangent)

    def _power(self, theta: Array, q: Array, k: Array, tangent: bool) -> Ascent:
        """x* + rho^K (x0 - x*), rho = 1 - q."""
        land, star, slope = self.landscape, self.branch(theta), np.zeros(theta.shape)
        away, rho = land.point - star, 1.0 - q
        x = star + rho**k * away
        first = land.point - q * away  # of an overshooting ascent no later step is longer
        admitted = np.isfinite(x) & (first >= land.ends[0]) & (first <= land.ends[1])
        if tangent:
            inner = np.where(k < 1, np.maximum(rho, 1e-14), rho)
            moved = k * inner ** (k - 1) * q * self.branch.exact_step(theta) * land("xxt")(theta, star) * away
            slope = self.branch.slope(theta) * (1 - rho**k) + moved
        return Ascent(x, slope, admitted)

    def _steps(self, theta: Array, q: Array, k: Array, tangent: bool) -> Ascent:
        """K steps one by one; those of an ascent that has come to rest are not taken."""
        shape, land = theta.shape, self.landscape
        theta, q, k = (v.ravel() for v in (theta, q, k))
        star = self.branch(theta)
        low, high = np.minimum(land.point, star), np.maximum(land.point, star)
        if self.admissible == "overshoot":
            low, high = (np.full(theta.shape, end) for end in land.ends)
        slack = _SLACK * (high - low) + 1e-14 * np.maximum(1.0, np.abs(low))
        exact, alpha = (q == 1) & (k > 0), q * self.branch.exact_step(theta)
        x, dx = np.where(exact, star, land.point), np.zeros(theta.shape)
        admitted = np.isfinite(alpha + star) & (exact | (k == np.round(k)) & np.isfinite(k))
        left, n = np.flatnonzero(admitted & ~exact & (k > 0)), 0
        while left.size:
            t, a, before = theta[left], alpha[left], x[left]
            after = before + a * land("x")(t, before)
            kept = np.clip(after, low[left], high[left])
            if tangent:
                dx[left] += a * (land("xt")(t, before) + land("xx")(t, before) * dx[left])
            admitted[left] &= np.abs(after - kept) <= slack[left]
            x[left], n = kept, n + 1
            left = left[(k[left] > n) & (np.abs(kept - before) > 2e-16 * np.abs(before))]
        if tangent:
            dx = np.where(x == star, self.branch.slope(theta), dx)
        return Ascent(x.reshape(shape), dx.reshape(shape), admitted.reshape(shape))

    def flow(self, theta: Any, q: Any, k: Any) -> Array:
        """F(theta, u) = -l_theta(theta, x_K), also of controls outside the set (see `Ascent`)."""
        return np.asarray(-self.landscape("t")(theta, self.ascend(theta, q, k).x), dtype=float)

    def flow_slope(self, theta: Any, q: Any, k: Any) -> Array:
        """dF/dtheta with alpha and K held fixed."""
        return self._total(theta, *self.ascend(theta, q, k, tangent=True)[:2])

    def robust_flow_slope(self, theta: Any) -> Array:
        """d/dtheta of F(theta, alpha*(theta)) = -L'(theta)."""
        return self._total(theta, self.branch(theta), self.branch.slope(theta))

    @np.errstate(all="ignore")
    def _total(self, theta: Any, x: Array, slope: Array) -> Array:
        return np.asarray(-(self.landscape("tt")(theta, x) + self.landscape("tx")(theta, x) * slope))

    def admits(self, theta: Any, q: Any, k: Any) -> NDArray[np.bool_]:
        """Whether a control belongs to G(theta)."""
        return self.ascend(theta, q, k).admitted

    def hamiltonian(self, theta: Any, p: Any, q: Any, k: Any) -> Array:
        """H = p F(theta, u) - gamma K; -inf for controls outside the set."""
        end = self.ascend(theta, q, k)
        with np.errstate(all="ignore"):
            value = -p * self.landscape("t")(theta, end.x) - self.gamma * np.asarray(k, dtype=float)
        return np.where(end.admitted & np.isfinite(value), value, -np.inf)

    def policy(self, theta: Any) -> tuple[Array, Array]:
        """The derived schedule (q, K) in this set: alpha = alpha*, K = K*.

        K is rounded up where it must be whole; where the two are tied alpha = tau/K then, and K is the next
        one whose ascent stays before x* (for l quadratic in x that is ceil(K*)); nan where there is none.
        """
        star = self.count(theta)
        if not self.whole:
            return np.where(np.isnan(star), np.nan, 1.0), star
        k = np.maximum(np.ceil(star * (1 - 1e-12)), 1.0)  # K* = 20 computed as 20.000000000000004 is 20
        if not self.tied:
            return np.ones_like(star), k
        if not self.landscape.quadratic:
            k = self._least(np.asarray(theta, dtype=float), k)
        return self.ratio(theta, k), k

    def ratio(self, theta: Any, k: Any) -> Array:
        """q = K*/K of alpha = tau/K; at most 1: a K kept over a time step may fall below K*."""
        with np.errstate(all="ignore"):
            return np.asarray(np.minimum(self.count(theta) / k, 1.0), dtype=float)

    def advance(self, theta: Any, q: Any, k: Any, h: float) -> tuple[Array, Array]:
        """theta after a time h and the mean K on the way, by a Runge-Kutta step of order 4.

        alpha/alpha* is held, or K where it is whole and alpha = tau/K; nan where x* ends. What belongs to G
        at the beginning is held to the end of the step.
        """
        mean, slopes, at = np.zeros(np.broadcast(theta, q).shape), list[Array](), theta
        with np.errstate(all="ignore"):
            for ahead, weight in ((0.5, 1), (0.5, 2), (1.0, 2), (0.0, 1)):
                if self.tied:
                    q, k = (self.ratio(at, k), k) if self.whole else (q, self.count(at) / q)
                slopes.append(self.flow(at, q, k))
                mean = mean + weight * k / 6
                at = theta + ahead * h * slopes[-1]
            one, two, three, four = slopes
            return theta + h * (one + 2 * two + 2 * three + four) / 6, mean

    def _least(self, theta: Array, k: Array) -> Array:
        """The smallest whole K >= k whose ascent with alpha = tau/K stays before x*, by bisection."""

        def missing(at: Array) -> NDArray[np.bool_]:
            return ~self.admits(theta, self.ratio(theta, at), at)

        low, high = k - 1, k
        for _ in range(_DOUBLINGS):
            if not (lost := missing(high)).any():
                break
            low, high = np.where(lost, high, low), np.where(lost, 2 * high, high)
        high = np.where(missing(high), np.nan, high)
        while (apart := high - low > 1).any():
            middle = np.floor((low + high) / 2)
            lost = missing(middle)
            low, high = np.where(apart & lost, middle, low), np.where(apart & ~lost, middle, high)
        return high


def no_whole_k(theta: float) -> LandscapeError:
    """Why the derived schedule is not in a set of whole K."""
    return LandscapeError(f"at theta = {theta:.4g} no whole K keeps the ascent with alpha = tau/K before x*")
