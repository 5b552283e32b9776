"""An inner maximum x*(theta): which one, how far it exists, and the step that reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicHermiteSpline

from controlat.symbolic.landscape import Array, Landscape, LandscapeError, Point, compiled, stretch
from controlat.symbolic.symbols import THETA

__all__ = ["Branch", "choose"]

_NODES = 300  # of a branch to either side of theta_0 at least; more where it bends
_ROUNDS = 20  # of Newton's method
_STEEP = 100.0  # l_xx grows so many times over the last thousandth of the way before a pole
_GONE, _POLE, _OUT, _UNDEFINED = (
    "There the inner maximum ceases to exist, or is flat",
    "There the landscape has a pole: l_xx is infinite",
    "There the inner maximum leaves x_range: give a wider one",
    "There l or a derivative is undefined",
)


class Branch:
    """One inner maximum x*(theta), followed from theta_0 as far as it exists.

    Called with numbers or arrays theta it gives x*(theta), to the precision that l_x allows, and nan outside
    its domain: dx*/dtheta = -l_xtheta/l_xx is integrated (implicit function theorem), and Newton's method
    polishes what it gives.

    Args:
        landscape: l.
        theta0: where it begins.
        x: the maximum there.
        theta_range: how far it is followed.
        formula: x*(theta) as an expression; needed where l_xx = 0 at the maximum, and not used elsewhere.

    Raises:
        LandscapeError: l_xx = 0 at the maximum and there is no formula.
    """

    def __init__(
        self,
        landscape: Landscape,
        theta0: float,
        x: float,
        theta_range: tuple[float, float],
        formula: sympy.Expr | None = None,
    ) -> None:
        self.landscape, self.theta0 = landscape, theta0
        self.formula: Callable[..., Array] | None = None
        if formula is not None:
            known = formula.subs(landscape.values)
            self.formula, self._turn = compiled(known, THETA), compiled(sympy.diff(known, THETA), THETA)
            self.domain = self._maximal(theta_range)
            lost = [end != wanted for end, wanted in zip(self.domain, theta_range, strict=True)]
            self.ends = _GONE * lost[0], _GONE * lost[1]
            return
        if not float(landscape("xx")(theta0, x)) < 0:
            raise LandscapeError(
                f"the inner maximum x = {x:.6g} at theta = {theta0:g} is flat (l_xx = 0), and there is no "
                "formula for it: it cannot be followed in theta"
            )
        (left, x_left, why_left), (right, x_right, why_right) = (self._follow(x, end) for end in theta_range)
        # Why it ends to the left and to the right; empty where the range of theta does.
        self.ends = why_left, why_right
        theta, x_star = np.concatenate([left[::-1], right[1:]]), np.concatenate([x_left[::-1], x_right[1:]])
        self.domain = float(theta[0]), float(theta[-1])
        self._spline = CubicHermiteSpline(theta, x_star, self._drift(theta, x_star))

    def _maximal(self, theta_range: tuple[float, float]) -> tuple[float, float]:
        """How far the formula is a maximum."""
        assert self.formula is not None
        theta = np.unique(np.append(np.linspace(*theta_range, 2001), self.theta0))
        (low, high), x = self.landscape.ends, self.formula(theta)
        h = 1e-6 * (high - low)
        rising, falling = (self.landscape("x")(theta, x + s * h) for s in (-1, 1))
        return stretch(theta, (rising > 0) & (falling < 0) & (low < x) & (x < high), self.theta0)

    def _drift(self, theta: Any, x: Any) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(-self.landscape("xt")(theta, x) / self.landscape("xx")(theta, x), dtype=float)

    def _follow(self, x: float, end: float) -> tuple[Array, Array, str]:
        """Nodes (theta, x*) from theta_0 towards an end, and why they stop before it."""
        (low, high), bend = self.landscape.ends, self.landscape("xx")

        def fold(theta: float, y: Array) -> float:
            return float(bend(theta, y[0]))

        def edge(theta: float, y: Array) -> float:
            return min(float(y[0]) - low, high - float(y[0]))

        fold.terminal = edge.terminal = True  # type: ignore[attr-defined]
        width = abs(end - self.theta0)
        options: Any = {"events": (fold, edge), "dense_output": True, "max_step": width / _NODES}
        options |= {"rtol": 1e-9, "atol": 1e-12 * (high - low)}
        path: Any = solve_ivp(lambda theta, y: self._drift(theta, y), (self.theta0, end), [x], **options)
        theta, x_star = path.t, path.y[0]
        if path.status == 0:
            return theta, x_star, ""
        keep = np.abs(theta - theta[-1]) > 1e-9 * width
        if not keep.any():
            raise LandscapeError(f"the inner maximum x = {x:.6g} at theta = {self.theta0:g}: {_GONE}")
        last = theta[-1] - np.sign(end - self.theta0) * 1e-9 * width  # a little before it is over
        theta, x_star = np.append(theta[keep], last), np.append(x_star[keep], path.sol(last))
        near, size = np.abs(theta - theta[-1]) >= 1e-3 * width, np.abs(bend(theta, x_star))
        pole = near.any() and size[-1] > _STEEP * size[near][-1]
        rest = _POLE if pole else _GONE if len(path.t_events[0]) else _UNDEFINED
        return theta, x_star, _OUT if len(path.t_events[1]) else rest

    def __call__(self, theta: Any) -> Array:
        """x*(theta)."""
        theta = np.asarray(theta, dtype=float)
        if self.formula is not None:
            return np.where(self._inside(theta), self.formula(theta), np.nan)
        x = guess = self._spline(np.clip(theta, *self.domain))
        with np.errstate(all="ignore"):  # where the maximum ceases to exist, 0/0
            for _ in range(_ROUNDS):
                bend = self.landscape("xx")(theta, x)
                step = self.landscape("x")(theta, x) / bend
                x = x - step
                if not (np.abs(step) > 1e-14 * (1 + np.abs(x))).any():
                    break
            size = 1 + np.abs(x)
            good = (np.abs(step) <= 1e-6 * size) & (bend < 0) & (np.abs(x - guess) <= 0.01 * size)
        return np.where(self._inside(theta) & good, x, np.nan)

    def _inside(self, theta: Array) -> NDArray[np.bool_]:
        return np.asarray((theta >= self.domain[0]) & (theta <= self.domain[1]))

    def slope(self, theta: Any) -> Array:
        """dx*/dtheta."""
        return self._drift(theta, self(theta)) if self.formula is None else self._turn(theta)

    def exact_step(self, theta: Any) -> Array:
        """alpha*(theta) = (x* - x0)/l_x(theta, x0): one step from the data point lands on x*.

        For l quadratic in x, and where the data point is itself the maximum, that is -1/l_xx.
        """
        theta, land = np.asarray(theta, dtype=float), self.landscape
        with np.errstate(all="ignore"):
            if land.quadratic:
                return np.where(self._inside(theta), -1.0 / land("xx")(theta, land.point), np.nan)
            x = self(theta)
            near = np.abs(x - land.point) < 1e-7
            distance, slope = x - land.point, land("x")(theta, land.point)
            return np.where(near, -1.0 / land("xx")(theta, x), distance / np.where(near, 1.0, slope))

    def robust(self, theta: Any) -> Array:
        """L(theta) = l(theta, x*(theta))."""
        return self.landscape("")(theta, self(theta))

    def robust_slope(self, theta: Any) -> Array:
        """dL/dtheta = l_theta(theta, x*(theta)), by Danskin's theorem."""
        return self.landscape("t")(theta, self(theta))


def choose(
    landscape: Landscape, theta: float, points: Sequence[Point], index: int | None
) -> tuple[int, Point]:
    """The inner maximum to follow among the stationary points at theta, and its rank by value.

    It is the one of the rank `index`; without one the largest, which the ascent from x0 must reach.

    Raises:
        LandscapeError: there is no inner maximum, l is larger elsewhere, or the ascent reaches another one.
        ValueError: no maximum has that rank.
    """
    low, high = landscape.ends
    if not np.isfinite(landscape("")(theta, landscape.point)):
        raise LandscapeError(
            f"l({theta:g}, x0) is undefined at the data point {landscape.point:g}; give another x0 or theta0"
        )
    maxima = sorted((p for p in points if p.kind == "maximum"), key=lambda p: -p.value)
    if not maxima:
        kinds = ", ".join(f"{p.kind} at {p.x:.4g}" for p in points) or "no stationary point"
        raise LandscapeError(
            f"l({theta:g}, x) has no inner maximum for x in [{low:g}, {high:g}] ({kinds}); give another "
            "landscape, theta0 or x_range"
        )
    if index is not None:
        if not 0 <= index < len(maxima):
            raise ValueError(f"branch must be from 0 to {len(maxima) - 1} at theta = {theta:g}, got {index}")
        return index, maxima[index]
    reached, largest = _reached(landscape, theta, points), maxima[0]
    ascent = f"the ascent from the data point {landscape.point:g}"
    if (above := higher(landscape, theta, largest.value)) is not None:
        raise LandscapeError(
            f"l({theta:g}, x) is larger at x = {above[0]:.4g} ({above[1]:.4g}) than at its largest inner "
            f"maximum x = {largest.x:.4g} ({largest.value:.4g}): there is no inner maximum in "
            f"[{low:g}, {high:g}]; give a narrower x_range, or branch 0 to follow the local one"
        )
    if reached not in maxima:
        raise LandscapeError(f"{ascent} comes to no inner maximum; give another x0")
    if largest.value > reached.value + rounding(landscape, theta, reached.value):
        raise LandscapeError(
            f"{ascent} climbs to x = {reached.x:.4g} (l = {reached.value:.4g}), not to the largest inner "
            f"maximum x = {largest.x:.4g} (l = {largest.value:.4g}); branch {maxima.index(reached)} follows "
            "the one that it reaches"
        )
    return maxima.index(reached), reached


def higher(landscape: Landscape, theta: float, value: float) -> tuple[float, float] | None:
    """Where l(theta, .) is largest on a grid, and how large, if that is more than a value; else None."""
    x = np.linspace(*landscape.ends, 4001)
    loss = np.nan_to_num(landscape("")(theta, x), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    i = int(np.argmax(loss))
    above = loss[i] > value + rounding(landscape, theta, value)
    return (float(x[i]), float(loss[i])) if above else None


def rounding(landscape: Landscape, theta: float, value: float) -> float:
    """Differences of l(theta, .) up to this are none."""
    known = np.abs(landscape("")(theta, np.linspace(*landscape.ends, 101)))
    return 1e-12 * max(float(np.max(known, where=np.isfinite(known), initial=0.0)), abs(value))


def _reached(landscape: Landscape, theta: float, points: Sequence[Point]) -> Point | None:
    """The stationary point that steepest ascent from the data point comes to first."""
    x0 = landscape.point
    slope = float(landscape("x")(theta, x0))
    here = [p for p in points if abs(p.x - x0) < 1e-9]
    if here or slope == 0:
        if here and here[0].kind == "maximum":
            return here[0]
        raise LandscapeError(
            f"l_x({theta:g}, x0) = 0 at the data point {x0:g}, which is no maximum: no ascent starts there; "
            "give another x0 or theta0"
        )
    ahead = [p for p in points if (p.x - x0) * slope > 0 and p.kind != "inflection"]
    return min(ahead, key=lambda p: abs(p.x - x0), default=None)
