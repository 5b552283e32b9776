"""A landscape l(theta, x) with its data point: an expression, functions of numbers, and its inner maxima."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import brentq

from controlat.symbolic import AMATA
from controlat.symbolic.formula import THETA, X, exact, parameter_symbols, parse

__all__ = ["Branch", "Landscape", "LandscapeError", "Point", "choose", "compiled"]

WIDTH = 10.0  # the default range of x reaches this far to either side of the data point
_GRID, _TABLE = 4001, 1201  # points in x where stationary points are looked for; in theta along a branch
Array = NDArray[np.float64]


class LandscapeError(ValueError):
    """There is no answer: no inner maximum, a flat one, or a flow that leaves its domain."""


class Point(NamedTuple):
    """A stationary point of x -> l(theta, x): where, its value, l_xx, and maximum, minimum or inflection."""

    x: float
    value: float
    curvature: float
    kind: str


@dataclass(frozen=True)
class Landscape:
    """A loss of one parameter theta and one input x, with the data point x0 where the inner ascent starts.

    Args:
        text: a formula in theta, x and named parameters (`controlat.symbolic.parse`).
        x0: the data point.
        parameters: values of the named parameters.
        x_range: where inner maxima are looked for; 10 to either side of x0 if left out.

    Raises:
        ValueError: the formula is refused, a number is out of range, or l does not depend on x.

    >>> l = Landscape()  # Ye et al. (2021), equation 11
    >>> float(l("")(1.0, 0.0)), float(l("x")(1.0, 0.0)), [p.kind for p in l.stationary(1.0)]
    (0.0, 1.0, ['maximum'])
    """

    text: str = AMATA
    x0: float | str | sympy.Rational = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    x_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        symbols, values = parameter_symbols(self.parameters)
        expression = parse(self.text, symbols)
        point = exact(self.x0, "x0")
        unused = sorted(str(s) for s in set(values) - expression.free_symbols)
        if unused:
            raise ValueError(f"the formula has no {', '.join(unused)}, but a value was given for it")
        low, high = self.x_range or (float(point) - WIDTH, float(point) + WIDTH)
        if not low < float(point) < high:
            raise ValueError(
                f"x_range must be an interval around the data point {point}, got {low:g} {high:g}"
            )
        object.__setattr__(self, "x0", point)
        object.__setattr__(self, "x_range", (float(low), float(high)))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_expression", expression)
        object.__setattr__(self, "_compiled", {})
        if sympy.diff(expression, X) == 0:
            raise LandscapeError(f"l = {expression} does not depend on x: every x is an inner maximum")

    @property
    def expression(self) -> sympy.Expr:
        """l(theta, x), parameters as symbols."""
        return self._expression  # type: ignore[attr-defined]

    @property
    def values(self) -> dict[sympy.Symbol, sympy.Rational]:
        """The value of every parameter."""
        return dict(self._values)  # type: ignore[attr-defined]

    @property
    def ends(self) -> tuple[float, float]:
        """The range of x."""
        assert self.x_range is not None
        return self.x_range

    @property
    def point(self) -> float:
        """The data point as a float."""
        return float(self.x0)

    @cached_property
    def quadratic(self) -> bool:
        """Whether l is quadratic in x: then all ascents are geometric, and alpha* = 1/|l_xx|."""
        if self.derivative("xxx") == 0:
            return True
        # Not by simplify, which may take any time: at many points, beside l_xx.
        x, theta = np.meshgrid(np.linspace(*self.ends, 41)[1::2] + 1e-3, np.linspace(-3, 3, 40))
        third, second = self("xxx")(theta, x), self("xx")(theta, x)
        good = np.isfinite(third) & np.isfinite(second)
        return bool(good.any() and (np.abs(third[good]) <= 1e-9 * np.abs(second[good])).all())

    def derivative(self, by: str = "") -> sympy.Expr:
        """A partial derivative, such as ``"tx"`` for the mixed one (t is theta here)."""
        found = self.expression
        for name in by:
            found = sympy.diff(found, {"t": THETA, "x": X}[name])
        return found

    def __call__(self, by: str = "") -> Callable[[Any, Any], Array]:
        """A partial derivative as a function of numbers or arrays (theta, x); nan or inf where undefined."""
        known: dict[str, Callable[[Any, Any], Array]] = self._compiled  # type: ignore[attr-defined]
        if by not in known:
            known[by] = compiled(self.derivative(by).subs(self.values), THETA, X)
        return known[by]

    def stationary(self, theta: float) -> list[Point]:
        """All zeros of l_x(theta, .) in the range of x, in increasing order.

        Raises:
            LandscapeError: l_x vanishes on a whole interval.
        """
        slope = self("x")
        x = np.linspace(*self.ends, _GRID)
        y = slope(theta, x)
        finite = np.where(np.isfinite(y), np.abs(y), 0.0)
        with np.errstate(all="ignore"):
            rounding = 1e-13 * (1 + np.nan_to_num(np.abs(self("")(theta, x)), posinf=0.0))
        if (finite <= rounding).all():
            raise LandscapeError(f"l({theta:g}, x) does not depend on x: every x is an inner maximum")
        scale = float(np.nanmax(np.abs(np.where(np.isfinite(y), y, np.nan)), initial=0.0))
        if np.mean(np.abs(y) <= 1e-12 * max(scale, 1e-300)) > 0.01:
            raise LandscapeError(
                f"l_x({theta:g}, x) vanishes on a whole interval of x: the maximum is flat there"
            )
        roots = [float(x[i]) for i in np.flatnonzero(y == 0)]
        for i in np.flatnonzero(y[:-1] * y[1:] < 0):
            root = float(
                brentq(lambda v: float(slope(theta, v)), x[i], x[i + 1], xtol=1e-14, maxiter=500, disp=False)
            )
            if abs(float(slope(theta, root))) <= 1e-6 * scale:  # else the sign changes at a pole
                roots.append(root)
        return [self._point(theta, root) for root in sorted(roots)]

    def _point(self, theta: float, x: float) -> Point:
        """A stationary point by the second derivative; where that is 0, by the signs of l_x beside it."""
        value, curvature = float(self("")(theta, x)), float(self("xx")(theta, x))
        small = 1e-9 * max(1.0, abs(value))
        if abs(curvature) > small:
            return Point(x, value, curvature, "maximum" if curvature < 0 else "minimum")
        h = 1e-4 * (self.ends[1] - self.ends[0])
        left, right = float(self("x")(theta, x - h)), float(self("x")(theta, x + h))
        kind = "maximum" if left > 0 > right else "minimum" if left < 0 < right else "inflection"
        return Point(x, value, curvature, kind)

    def ascent(self, theta: Any, alpha: Any, steps: int, x: Any = None) -> Array:
        """x_K after whole steps x <- x + alpha l_x(theta, x) from the data point (or from x)."""
        found = np.broadcast_to(self.point if x is None else x, np.broadcast(theta, alpha).shape)
        slope = self("x")
        for _ in range(steps):
            found = found + alpha * slope(theta, found)
        return np.asarray(found, dtype=float)


def compiled(expression: sympy.Expr, *symbols: sympy.Symbol) -> Callable[..., Array]:
    """An expression as a function of numbers and arrays; nan or inf where undefined, without warnings."""
    raw = sympy.lambdify(symbols, expression, modules=["numpy", "scipy"], cse=True)

    def call(*values: Any) -> Array:
        arrays = [np.asarray(v, dtype=float) for v in values]
        with np.errstate(all="ignore"):
            found = raw(*arrays)
        if np.iscomplexobj(found):
            found = np.where(np.abs(np.imag(found)) < 1e-12, np.real(found), np.nan)
        return np.broadcast_to(
            np.asarray(found, dtype=float), np.broadcast_shapes(*(a.shape for a in arrays))
        )

    return call


class Branch:
    """One inner maximum x*(theta), followed from theta_0 as far as it exists.

    Called with numbers or arrays theta it gives x*(theta) to machine precision, nan outside its domain.

    Args:
        landscape: l.
        theta0: where it begins.
        x: the maximum there.
        theta_range: how far it is followed.
        formula: x*(theta) as an expression, if one is known; needed where l_xx = 0 at the maximum.

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
        left = np.linspace(theta0, theta_range[0], _TABLE)
        right = np.linspace(theta0, theta_range[1], _TABLE)
        sides = [self._follow(side, x) for side in (left, right)]
        theta = np.concatenate([left[: len(sides[0])][::-1], right[1 : len(sides[1])]])
        found = np.concatenate([sides[0][::-1], sides[1][1:]])
        self.domain = float(theta[0]), float(theta[-1])
        self.whole = self.domain == (min(theta_range), max(theta_range))
        if len(theta) < 2:
            raise LandscapeError(
                f"the inner maximum x = {x:.6g} at theta = {theta0:g} cannot be followed in theta"
            )
        if self.formula is None:
            self._spline = CubicHermiteSpline(theta, found, self._slope(theta, found))

    def _slope(self, theta: Any, x: Any) -> Array:
        """dx*/dtheta = -l_xtheta / l_xx (implicit function theorem)."""
        with np.errstate(all="ignore"):
            return np.asarray(-self.landscape("xt")(theta, x) / self.landscape("xx")(theta, x), dtype=float)

    def _polish(self, theta: Any, x: Any, rounds: int) -> Array:
        """Newton's method on l_x(theta, .) = 0."""
        slope, curvature = self.landscape("x"), self.landscape("xx")
        for _ in range(rounds):
            with np.errstate(all="ignore"):  # where the maximum ceases to exist, 0/0
                x = x - slope(theta, x) / curvature(theta, x)
        return np.asarray(x, dtype=float)

    def _follow(self, thetas: Array, x: float) -> Array:
        """x* along a row of theta, up to where it ceases to be a maximum inside the range of x."""
        low, high = self.landscape.ends
        if self.formula is not None:
            found = self.formula(thetas)
            h = 1e-5 * (high - low)
            rising, falling = (self.landscape("x")(thetas, found + s * h) for s in (-1, 1))
            good = np.isfinite(found) & (found > low) & (found < high) & (rising > 0) & (falling < 0)
            return found[: len(good) if good.all() else int(np.argmin(good))]
        curvature, kept = self.landscape("xx"), [x]
        if not float(curvature(thetas[0], x)) < 0:
            raise LandscapeError(
                f"the inner maximum x = {x:.6g} at theta = {thetas[0]:g} is flat (l_xx = 0) and sympy found "
                "no formula for it: it cannot be followed in theta"
            )
        for before, theta in itertools.pairwise(thetas):
            guess = x + float(self._slope(before, x)) * (theta - before)
            new = float(self._polish(theta, guess, 8))
            steep = float(curvature(theta, new))
            moved = abs(new - guess) < 0.02 * (high - low)
            if not (low < new < high and steep < 0 and moved and np.isfinite(new)):
                break
            kept.append(x := new)
        return np.array(kept)

    def __call__(self, theta: Any) -> Array:
        """x*(theta)."""
        theta = np.asarray(theta, dtype=float)
        inside = (theta >= self.domain[0]) & (theta <= self.domain[1])
        with np.errstate(all="ignore"):
            if self.formula is not None:
                found = self.formula(theta)
            else:
                found = self._polish(theta, self._spline(theta), 3)
        return np.where(inside, found, np.nan)

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
    """The inner maximum to follow, and its rank by value."""
    low, high = landscape.ends
    maxima = sorted((p for p in points if p.kind == "maximum"), key=lambda p: -p.value)
    kinds = ", ".join(f"{p.kind} at {p.x:.4g}" for p in points) or "no stationary point"
    if not maxima:
        raise LandscapeError(
            f"l({theta:g}, x) has no inner maximum for x in [{low:g}, {high:g}] ({kinds}); give another "
            "landscape, theta0 or x_range"
        )
    if index is not None:
        if not 0 <= index < len(maxima):
            raise ValueError(f"branch must be from 0 to {len(maxima) - 1} at theta = {theta:g}, got {index}")
        return index, maxima[index]
    ends = landscape("")(theta, np.array([low, high]))
    reached = _reached(landscape, theta, points)
    best = maxima[0]
    if reached in maxima and reached.value >= best.value - 1e-9 * max(1.0, abs(best.value)):
        best = reached  # of equal maxima, the one that the ascent comes to
    beyond = [(x, v) for x, v in zip((low, high), ends, strict=True) if not v <= best.value]
    if beyond:
        raise LandscapeError(
            f"l({theta:g}, x) is larger at the end x = {beyond[0][0]:g} of its range ({beyond[0][1]:.4g}) "
            f"than at its largest inner maximum x = {best.x:.4g} ({best.value:.4g}): there is no inner "
            f"maximum in [{low:g}, {high:g}]; give a narrower x_range, or branch 0 to follow the local one"
        )
    if reached is not None and reached != best:
        raise LandscapeError(
            f"the ascent from the data point {landscape.point:g} climbs to x = {reached.x:.4g} "
            f"(l = {reached.value:.4g}), not to the largest inner maximum x = {best.x:.4g} "
            f"(l = {best.value:.4g}); branch {maxima.index(reached)} follows the one that it reaches"
        )
    return maxima.index(best), best


def _reached(landscape: Landscape, theta: float, points: Sequence[Point]) -> Point | None:
    """The stationary point that steepest ascent from the data point comes to first."""
    x0 = landscape.point
    slope = float(landscape("x")(theta, x0))
    if abs(slope) < 1e-14:
        here = [p for p in points if abs(p.x - x0) < 1e-9 and p.kind == "maximum"]
        if here:
            return here[0]
        raise LandscapeError(
            f"l_x({theta:g}, x0) = 0 at the data point {x0:g}, which is no maximum: no ascent starts there; "
            "give another x0 or theta0"
        )
    ahead = [p for p in points if (p.x - x0) * slope > 0 and p.kind != "inflection"]
    return min(ahead, key=lambda p: abs(p.x - x0), default=None)
