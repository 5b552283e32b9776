"""The optimal-control problem of a landscape: how far and how often to step on the way to the inner maximum.

    min over u of  J = L(theta_T) + gamma * integral_0^T K dt,    theta' = F(theta, u) = -l_theta(theta, x_K)

with u = (alpha, K), x_K the inner ascent from the data point and L(theta) = l(theta, x*(theta)). Controls are
written as (q, K) with q = alpha/alpha*(theta), so that q = 1 means *exactly* the step that lands on x*: as a
rounded 1 - alpha/alpha* it would leave (1e-16)^K behind, which is no longer small for K < 1.

alpha <= alpha*(theta) is there to exclude overshoot. For l quadratic in x it does; for others the first step
stays before x* and a later one may not, and may run off to infinity. So the sets with alpha <= alpha* contain
a control only if *every* step of its ascent (the first ceil(K) of them) stays between x0 and x*; "overshoot"
contains those whose steps stay finite and inside x_range. alpha = alpha* lands on x*, where l_x = 0, and
stays. Where 1 + alpha* l_xx(theta, x*) < 0 and K* > 1 the steps just below alpha* overshoot: alpha* is an
isolated point of the set. Controls outside their set have x_K = nan, H = -inf and cost inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape, LandscapeError

__all__ = ["SETS", "AdmissibleSet", "Bolza", "candidates", "whole_cap"]

Array = NDArray[np.float64]
Q_MIN = 0.02  # the smallest alpha/alpha* looked at: K up to 50 K*(theta), where x_K hardly moves any more
_MANY = 600  # steps of one ascent of a landscape that is not quadratic; fewer than 4 K* are never too many
_SLACK = 1e-10  # of |x* - x0|: by so much rounding may carry a step beyond x*


class AdmissibleSet(NamedTuple):
    """G(theta): its formula in words, whether K is whole, whether alpha K = tau."""

    formula: str
    whole: bool
    tied: bool


SETS = {
    "product": AdmissibleSet(
        "alpha K = tau, 0 < alpha <= alpha*(theta), K real, no step beyond x*", False, True
    ),
    "integer": AdmissibleSet(
        "alpha K = tau, alpha <= alpha*(theta), K = 1, 2, ..., no step beyond x*", True, True
    ),
    "free": AdmissibleSet(
        "0 < alpha <= alpha*(theta), K = 1, 2, ..., not tied to each other, no step beyond x*", True, False
    ),
    "overshoot": AdmissibleSet(
        "0 < alpha <= c alpha*(theta) with 1 < c < 2, K = 1, 2, ..., not tied, no step out of x_range",
        True,
        False,
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

    @cached_property
    def domain(self) -> tuple[float, float]:
        """The interval around theta0 on which x* is known and a positive step from x0 lands on it."""
        low, high = self.branch.domain
        theta = np.unique(np.append(np.linspace(low, high, 2001), self.theta0))
        star = self.branch(theta)
        with np.errstate(all="ignore"):  # near a fold the branch may have been polished into another root
            slope, bend = (np.abs(self.landscape(by)(theta, star)) for by in ("x", "xx"))
            scale = np.abs(self.landscape("x")(theta, self.start(theta)))
            known = slope <= 1e-7 * scale + 1e-9 * bend * np.maximum(1.0, np.abs(star)) + 1e-14
        bad = theta[~((self.step(theta) > 0) & known)]
        below, above = bad[bad < self.theta0], bad[bad > self.theta0]
        if len(below):
            low = float(theta[np.searchsorted(theta, below[-1]) + 1])
        if len(above):
            high = float(theta[np.searchsorted(theta, above[0]) - 1])
        return low, high

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
        """K*(theta) = tau/alpha*(theta); nan where no positive step lands on x*."""
        step = self.step(theta)
        with np.errstate(all="ignore"):
            return np.where(step > 0, self.tau / step, np.nan)

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

    def inner(self, theta: Any, q: Any, k: Any, clip: bool = False) -> Array:
        """x_K(theta, alpha) for alpha = q alpha*(theta) and real K >= 0; nan for controls outside the set.

        For l quadratic in x it is x* + rho^K (x0 - x*), rho = 1 - q. Otherwise floor(K) whole steps, and for
        the rest s = K - floor(K) the geometric interpolation x* + r^s (x_n - x*) with
        r = (x_{n+1} - x*)/(x_n - x*), which agrees with rho^K for quadratic l.
        q = 1 gives x* itself for every K > 0.

        Args:
            theta: a number or an array, like q and k.
            q: alpha/alpha*.
            k: K.
            clip: end an ascent at x* (or x0) where it would pass it, instead of refusing the control:
                within a time step, over which a control of the set is held while theta moves on, and for
                minimisers that need finite numbers. Such a control does what alpha* does, with more steps.
        """
        theta, q, k = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (theta, q, k)))
        star, start = self.branch(theta), self.start(theta)
        with np.errstate(all="ignore"):
            if self.landscape.quadratic:
                found = np.asarray(star + (1.0 - q) ** k * (start - star), dtype=float)
                return found if self.admissible != "overshoot" else self._in_range(star, q, found)
            exact = (q == 1) & (k > 0)
            if np.all(exact):
                return star
            n = np.where(exact, 0.0, np.floor(k))
            x, after, _, _ = self._ascend(theta, q, n, star, clip, tangent=False)
            s = np.where(exact, 0.0, k - n)
            r = (after - star) / np.where(x == star, 1.0, x - star)
            between = np.where(r >= 0, star + np.abs(r) ** s * (x - star), x + s * (after - x))
            between = np.where(s > 0, between, x)
            found = np.where(exact | (x == star), star, between)
            return np.where(np.isfinite(q) & np.isfinite(k), found, np.nan)

    def _in_range(self, star: Array, q: Array, found: Array) -> Array:
        """x_K of a quadratic l where the longest step, the first, ends inside x_range; else nan."""
        low, high = self.landscape.ends
        first = self.start(star) + q * (star - self.start(star))
        return np.where((first >= low) & (first <= high), found, np.nan)

    def _ascend(
        self, theta: Array, q: Array, n: Array, star: Array, clip: bool, tangent: bool
    ) -> tuple[Array, Array, Array, Array]:
        """x_n and x_{n+1}, and d/dtheta of both at fixed alpha (zeros unless asked for)."""
        start, alpha = self.start(theta), q * self.step(theta, star)
        if self.admissible == "overshoot":
            low, high = (np.full(theta.shape, end) for end in self.landscape.ends)
            clip = False
        else:
            low, high = np.minimum(start, star), np.maximum(start, star)
        turn = self.star_slope(theta) if tangent else np.zeros(theta.shape)
        walk = _Ascent(self.landscape, theta, alpha, low, high, clip)
        x, dx = walk.run(n, tangent)
        after, dafter = walk.step(x, dx, tangent)
        ended = x == star
        return (
            x,
            np.where(ended, star, after),
            np.where(ended, turn, dx),
            np.where(after == star, turn, dafter),
        )

    def inner_slope(self, theta: Any, q: Any, k: Any) -> Array:
        """d x_K/dtheta with alpha and K (not q) held fixed; K < 1 makes it infinite as alpha -> alpha*.

        Ascents are ended at x* as with `clip`.
        """
        theta, q, k = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (theta, q, k)))
        loss, star, start, turn = (
            self.landscape,
            self.branch(theta),
            self.start(theta),
            self.star_slope(theta),
        )
        with np.errstate(all="ignore"):
            if loss.quadratic:
                alpha, rho = (
                    q * self.step(theta, star),
                    np.where(k < 1, np.maximum(1.0 - q, 1e-14), 1.0 - q),
                )
                moved = k * rho ** (k - 1) * alpha * loss("xxt")(theta, start) * (start - star)
                return np.asarray(turn * (1 - rho**k) + moved, dtype=float)
            s = k - np.floor(k)
            x, after, dx, dafter = self._ascend(theta, q, np.floor(k), star, clip=True, tangent=True)
            d, e = x - star, after - star
            y = np.where(d < 0, -1.0, 1.0) * np.abs(e) ** s * np.abs(d) ** (1 - s)
            geometric = turn + y * (s * (dafter - turn) / e + (1 - s) * (dx - turn) / d)
            geometric = np.where((d == 0) | (e == 0), turn, geometric)
            between = np.where(e * d >= 0, geometric, dx + s * (dafter - dx))
            return np.where(s > 0, between, dx)

    def flow(self, theta: Any, q: Any, k: Any, clip: bool = False) -> Array:
        """F(theta, u) = -l_theta(theta, x_K); nan for controls outside the set, `clip` as for `inner`."""
        return np.asarray(-self.landscape("t")(theta, self.inner(theta, q, k, clip)), dtype=float)

    def flow_slope(self, theta: Any, q: Any, k: Any) -> Array:
        """dF/dtheta with alpha and K held fixed."""
        return self._total(theta, self.inner(theta, q, k, clip=True), self.inner_slope(theta, q, k))

    def robust_flow_slope(self, theta: Any) -> Array:
        """d/dtheta of F(theta, alpha*(theta)) = -L'(theta)."""
        return self._total(theta, self.branch(theta), self.star_slope(theta))

    def _total(self, theta: Any, x: Array, dx: Array) -> Array:
        with np.errstate(all="ignore"):
            found = -(self.landscape("tt")(theta, x) + self.landscape("tx")(theta, x) * dx)
        return np.asarray(found, dtype=float)

    def hamiltonian(self, theta: Any, p: Any, q: Any, k: Any, clip: bool = False) -> Array:
        """H = p F(theta, u) - gamma K; -inf for controls outside the set, `clip` as for `inner`."""
        with np.errstate(all="ignore"):
            found = p * self.flow(theta, q, k, clip) - self.gamma * np.asarray(k, dtype=float)
        return np.where(np.isfinite(found), found, -np.inf)

    def policy(self, theta: Any) -> tuple[Array, Array]:
        """The derived schedule (q, K) in this set: alpha = alpha*, K = K*.

        K is rounded up where it must be whole; where the two are tied alpha = tau/K then, and K is the next
        one whose ascent stays before x* (for l quadratic in x that is ceil(K*)); nan where there is none.
        """
        exact = self.count(theta)
        if not SETS[self.admissible].whole:
            return np.where(np.isnan(exact), np.nan, 1.0), exact
        whole = np.maximum(np.ceil(exact * (1 - 1e-12)), 1.0)  # K* = 20 computed as 20.000000000000004 is 20
        if not SETS[self.admissible].tied:
            return np.ones_like(exact), whole
        if not self.landscape.quadratic:
            whole = self._admitted(np.asarray(theta, dtype=float), whole)
        return self.ratio(theta, whole), whole

    def ratio(self, theta: Any, k: Any) -> Array:
        """q = K*/K of alpha = tau/K.

        At most 1 where l is not quadratic: a K kept over a time step may fall below K*, and by rounding.
        """
        with np.errstate(all="ignore"):
            q = np.asarray(self.count(theta) / k, dtype=float)
        return q if self.landscape.quadratic else np.minimum(q, 1.0)

    def admits(self, theta: Any, q: Any, k: Any) -> NDArray[np.bool_]:
        """Whether a control belongs to the set."""
        return np.isfinite(self.inner(theta, q, k))

    def _admitted(self, theta: Array, least: Array) -> Array:
        """The smallest whole K >= least whose ascent with alpha = tau/K stays before x*, by bisection."""
        low, high = least - 1, least
        missing = ~self.admits(theta, self.ratio(theta, high), high)
        for _ in range(9):  # up to 512 times as many
            if not missing.any():
                break
            low, high = np.where(missing, high, low), np.where(missing, 2 * high, high)
            missing = ~self.admits(theta, self.ratio(theta, high), high)
        high = np.where(missing, np.nan, high)
        while np.any(high - low > 1):
            middle = np.where(high - low > 1, np.floor((low + high) / 2), high)
            fine = self.admits(theta, self.ratio(theta, middle), middle)
            low, high = np.where(fine, low, middle), np.where(fine, middle, high)
        return high


class _Ascent:
    """Steps x <- x + alpha l_x from the data point inside [low, high]; beyond it nan, or its end (clip)."""

    def __init__(
        self, loss: Landscape, theta: Array, alpha: Array, low: Array, high: Array, clip: bool
    ) -> None:
        self.loss, self.theta, self.alpha, self.clip = loss, theta, alpha, clip
        slack = _SLACK * (high - low) + 1e-14 * np.maximum(1.0, np.abs(low))
        self.low, self.high, self.slack = low, high, slack

    def _kept(self, x: Array, low: Array, high: Array, slack: Array) -> Array:
        """x where it is inside."""
        if self.clip:
            return np.clip(x, low, high)
        return np.where((x >= low - slack) & (x <= high + slack), x, np.nan)

    def step(self, x: Array, dx: Array, tangent: bool) -> tuple[Array, Array]:
        """One step of all."""
        after, dafter = x + self.alpha * self.loss("x")(self.theta, x), dx
        if tangent:
            dafter = dx + self.alpha * (self.loss("xt")(self.theta, x) + self.loss("xx")(self.theta, x) * dx)
        return self._kept(after, self.low, self.high, self.slack), dafter

    def run(self, whole: Array, tangent: bool) -> tuple[Array, Array]:
        """x after whole[i] steps from the data point, and dx/dtheta at fixed alpha (0 unless asked for)."""
        shape = self.theta.shape
        every = (self.theta, self.alpha, self.low, self.high, self.slack, whole)
        theta, alpha, low, high, slack, whole = (v.ravel() for v in every)
        x, dx = np.full(theta.shape, float(self.loss.x0)), np.zeros(theta.shape)
        left = np.flatnonzero(whole > 0)
        rows = [v[left] for v in (theta, alpha, low, high, slack, whole)]
        n = 0
        while left.size:
            t, a, bottom, top, slack, most = rows
            before = x[left]
            if tangent:
                dx[left] = dx[left] + a * (self.loss("xt")(t, before) + self.loss("xx")(t, before) * dx[left])
            now = self._kept(before + a * self.loss("x")(t, before), bottom, top, slack)
            x[left] = now
            n += 1
            # At a fixed point all further steps stay; so they do at the end where an ascent was clipped.
            going = (most > n) & np.isfinite(now)
            if not tangent:
                going &= np.abs(now - before) > 2e-16 * np.abs(before)
            if self.clip:
                going &= (now > bottom) & (now < top)
            if not going.all():
                left, rows = left[going], [v[going] for v in rows]
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


def smallest_q(problem: Bolza, theta: Array) -> float:
    """The smallest alpha/alpha* looked at: `Q_MIN`, or what makes 600 steps where each has to be computed.

    At least 1/4 is allowed for always: K up to 4 K*.
    """
    if problem.landscape.quadratic or not SETS[problem.admissible].tied:
        return Q_MIN
    count = problem.count(theta)
    most = float(np.max(count, where=np.isfinite(count), initial=1.0))
    return min(0.25, max(Q_MIN, most / _MANY))


def grid_of_q(reach: float, points: int, least: float = Q_MIN) -> Array:
    """alpha/alpha* from least to reach: log-spaced, linear, and dense towards 1 from below; 1 exactly."""
    logs = np.geomspace(least, 1.0, points)
    near = 1.0 - np.geomspace(1e-9, 0.1, points // 4)
    line = np.linspace(reach / points, reach, points)
    return np.unique(np.concatenate([logs, near, line[line >= least], [1.0, reach]]))


def candidates(problem: Bolza, theta: Array, points: int = 100, thin: bool = False) -> tuple[Array, Array]:
    """Controls to look at, as arrays (q, K) of shape (theta, candidates); q = 1 is among the q.

    Those of a landscape that is not quadratic in x belong to G(theta) only where `Bolza.admits` them.

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
        ratios = grid_of_q(1.0, points, smallest_q(problem, theta))
        q = np.broadcast_to(ratios, (len(theta), len(ratios)))
        with np.errstate(all="ignore"):
            return q, exact / q
    if problem.admissible == "integer":
        k = problem.policy(theta)[1][:, None] + (counts - 1)
        return problem.ratio(theta[:, None], k), k
    q, k = np.meshgrid(grid_of_q(problem.reach, points // 2), counts, indexing="ij")
    shape = (len(theta), q.size)
    return np.broadcast_to(q.ravel(), shape), np.broadcast_to(k.ravel(), shape)
