"""An inner maximum x*(theta): which one, how far it exists, and the step that reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy
from scipy.interpolate import CubicHermiteSpline

from controlat.symbolic.formula import THETA
from controlat.symbolic.landscape import (
    Array,
    Landscape,
    LandscapeError,
    Point,
    compiled,
)

__all__ = ["Branch", "choose"]

_NODES = 600  # of a branch to either side of theta_0; more where it bends
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
    its domain. It is followed by the implicit function theorem and Newton's method, with steps that shrink
    where it bends; between the nodes Newton's method starts from a cubic spline.

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
        self.formula = None if formula is None else compiled(formula.subs(landscape.values), THETA)
        if self.formula is None and not float(landscape("xx")(theta0, x)) < 0:
            raise LandscapeError(
                f"the inner maximum x = {x:.6g} at theta = {theta0:g} is flat (l_xx = 0), and there is no "
                "formula for it: it cannot be followed in theta"
            )
        (left, x_left, why_left), (right, x_right, why_right) = (self._follow(x, end) for end in theta_range)
        theta = np.concatenate([left[::-1], right[1:]])
        self.domain = float(theta[0]), float(theta[-1])
        # Why it ends to the left and to the right; empty where the range of theta does.
        self.ends = why_left, why_right
        if len(theta) < 2:
            raise LandscapeError(f"the inner maximum x = {x:.6g} at theta = {theta0:g}: {why_left}")
        if self.formula is None:
            found = np.concatenate([x_left[::-1], x_right[1:]])
            self._spline = CubicHermiteSpline(theta, found, self._slope(theta, found))

    def _slope(self, theta: Any, x: Any) -> Array:
        """dx*/dtheta = -l_xtheta / l_xx (implicit function theorem)."""
        with np.errstate(all="ignore"):
            return np.asarray(-self.landscape("xt")(theta, x) / self.landscape("xx")(theta, x), dtype=float)

    def _newton(self, theta: Any, x: Any) -> tuple[Array, Array]:
        """Newton's method on l_x(theta, .) = 0: where it came to, and the length of its last step."""
        slope, curvature = self.landscape("x"), self.landscape("xx")
        last = np.full(np.shape(x), np.inf)
        for _ in range(_ROUNDS):
            with np.errstate(all="ignore"):  # where the maximum ceases to exist, 0/0
                step = slope(theta, x) / curvature(theta, x)
                x, last = x - step, np.abs(step)
            if not (last > 1e-14 * (1 + np.abs(x))).any():
                break
        return np.asarray(x, dtype=float), np.asarray(last, dtype=float)

    def _follow(self, x: float, end: float) -> tuple[Array, Array, str]:
        """Nodes (theta, x*) from theta_0 towards an end, and why they stop before it."""
        theta, width = self.theta0, abs(end - self.theta0) / _NODES
        nodes, step = [(theta, x)], width
        while theta != end:
            last = step >= abs(end - theta)
            target = end if last else theta + step * np.sign(end - theta)
            found, why = self._next(theta, x, target)
            if not why:
                theta, x = target, found
                nodes.append((theta, x))
                step = min(2 * step, width)
            elif step > 1e-12 * _NODES * width:
                step = min(step, abs(end - theta)) / 2
            else:
                break
        else:
            why = ""
        thetas, found_x = np.array(nodes).T
        if why in (_GONE, _UNDEFINED) and self._grows(thetas, found_x, end):
            why = _POLE
        return thetas, found_x, why

    def _grows(self, theta: Array, x: Array, end: float) -> bool:
        """Whether l_xx is much larger at the last node than a thousandth of the way before it."""
        near = np.flatnonzero(np.abs(theta - theta[-1]) >= 1e-3 * abs(end - self.theta0))
        bend = np.abs(self.landscape("xx")(theta, x))
        return bool(near.size and bend[-1] > _STEEP * bend[near[-1]])

    def _next(self, theta: float, x: float, target: float) -> tuple[float, str]:
        """x* at the next node, or why there is none: then a shorter step is tried."""
        low, high = self.landscape.ends
        if self.formula is not None:
            new = float(self.formula(target))
            h = 1e-6 * (high - low)
            rising, falling = (float(self.landscape("x")(target, new + s * h)) for s in (-1, 1))
            gone = not (rising > 0 > falling and abs(new - x) < 0.01 * (high - low))
        else:
            guess = x + float(self._slope(theta, x)) * (target - theta)
            found, last = self._newton(target, guess)
            new = float(found)
            bend, third = (float(self.landscape(by)(target, new)) for by in ("xx", "xxx"))
            # Newton's method is at home as far as l_xx keeps its size: beyond lies another stationary point.
            far = abs(new - guess) * abs(third) > 0.2 * abs(bend) or abs(new - guess) > 0.01 * (high - low)
            gone = not (bend < 0 and last <= 1e-9 * (1 + abs(new))) or far
        if not np.isfinite(new):
            return new, _UNDEFINED
        if not low < new < high:
            return new, _OUT
        return new, _GONE if gone else ""

    def __call__(self, theta: Any) -> Array:
        """x*(theta)."""
        theta = np.asarray(theta, dtype=float)
        inside = (theta >= self.domain[0]) & (theta <= self.domain[1])
        if self.formula is not None:
            return np.where(inside, self.formula(theta), np.nan)
        found, last = self._newton(theta, self._spline(np.clip(theta, *self.domain)))
        with np.errstate(all="ignore"):
            return np.where(inside & (last <= 1e-6 * (1 + np.abs(found))), found, np.nan)

    def exact_step(self, theta: Any) -> Array:
        """alpha*(theta) = (x* - x0)/l_x(theta, x0): one step from the data point lands on x*.

        Where the data point is itself the maximum both vanish, and the limit -1/l_xx is taken.
        """
        theta = np.asarray(theta, dtype=float)
        x, point = self(theta), self.landscape.point
        distance, slope = x - point, self.landscape("x")(theta, np.full_like(theta, point))
        curvature = self.landscape("xx")(theta, x)
        with np.errstate(all="ignore"):
            near = np.abs(distance) < 1e-7
            return np.where(near, -1.0 / curvature, distance / np.where(near, 1.0, slope))

    def robust(self, theta: Any) -> Array:
        """L(theta) = l(theta, x*(theta))."""
        return self.landscape("")(theta, self(theta))

    def robust_slope(self, theta: Any) -> Array:
        """dL/dtheta = l_theta(theta, x*(theta)), by Danskin's theorem."""
        return self.landscape("t")(theta, self(theta))


def choose(
    landscape: Landscape, theta: float, points: Sequence[Point], index: int | None
) -> tuple[int, Point]:
    """The inner maximum to follow, and its rank by value.

    Args:
        landscape: l.
        theta: theta_0.
        points: the stationary points there.
        index: the rank that is wanted; None for the largest, which the ascent from x0 must reach.

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
    reached = _reached(landscape, theta, points)
    above = higher(landscape, theta, maxima[0].value)
    if above is not None:
        raise LandscapeError(
            f"l({theta:g}, x) is larger at x = {above[0]:.4g} ({above[1]:.4g}) than at its largest inner "
            f"maximum x = {maxima[0].x:.4g} ({maxima[0].value:.4g}): there is no inner maximum in "
            f"[{low:g}, {high:g}]; give a narrower x_range, or branch 0 to follow the local one"
        )
    if reached not in maxima:
        raise LandscapeError(
            f"the ascent from the data point {landscape.point:g} comes to no inner maximum; give another x0"
        )
    if higher_than(landscape, theta, maxima[0].value, reached.value):
        raise LandscapeError(
            f"the ascent from the data point {landscape.point:g} climbs to x = {reached.x:.4g} "
            f"(l = {reached.value:.4g}), not to the largest inner maximum x = {maxima[0].x:.4g} "
            f"(l = {maxima[0].value:.4g}); branch {maxima.index(reached)} follows the one that it reaches"
        )
    return maxima.index(reached), reached


def higher(landscape: Landscape, theta: float, value: float) -> tuple[float, float] | None:
    """Where l(theta, .) is largest on a grid, and how large, if that is more than a value; else None."""
    x = np.linspace(*landscape.ends, 4001)
    there = landscape("")(theta, x)
    i = int(np.argmax(np.where(np.isnan(there), -np.inf, there)))
    return (float(x[i]), float(there[i])) if higher_than(landscape, theta, float(there[i]), value) else None


def higher_than(landscape: Landscape, theta: float, one: float, other: float) -> bool:
    """Whether one value of l(theta, .) is larger than another by more than rounding."""
    known = np.abs(landscape("")(theta, np.linspace(*landscape.ends, 101)))
    scale = float(np.max(np.where(np.isfinite(known), known, 0.0)))
    return one > other + 1e-12 * max(scale, abs(other))


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
