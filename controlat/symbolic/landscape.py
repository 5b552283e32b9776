"""A landscape l(theta, x) with its data point: an expression, functions of numbers, and its inner maxima."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy.optimize import brentq

from controlat._util.limits import check
from controlat.symbolic import AMATA
from controlat.symbolic.formula import parse
from controlat.symbolic.symbols import THETA, X, exact, parameter_symbols

__all__ = ["Array", "Landscape", "LandscapeError", "Point", "compiled", "roots", "stretch"]

WIDTH = 10.0  # the default range of x reaches this far to either side of the data point
_GRID = 4001  # points in x where stationary points are looked for
_KINKS = (sympy.DiracDelta, sympy.Derivative, sympy.Subs)
Array = NDArray[np.float64]


class LandscapeError(ValueError):
    """There is no answer: no inner maximum, a flat one, or a flow that leaves its domain."""


class Point(NamedTuple):
    """A stationary point of x -> l(theta, x): where, its value, l_xx, kind, and whether l_xx = 0 there."""

    x: float
    value: float
    curvature: float
    kind: str  # maximum, minimum or inflection
    flat: bool


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
    # l(theta, x) with parameters as symbols, their values, and derivatives as functions
    expression: sympy.Expr = field(init=False, repr=False, compare=False)
    values: dict[sympy.Symbol, sympy.Rational] = field(init=False, repr=False, compare=False)
    _compiled: dict[str, Callable[[Any, Any], Array]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        symbols, values = parameter_symbols(self.parameters)
        expression = parse(self.text, symbols, values)
        point = exact(self.x0, "x0")
        unused = sorted(str(s) for s in set(values) - expression.free_symbols)
        if unused:
            given = ", ".join(f"{name} = {self.parameters[name]}" for name in unused)
            raise ValueError(f"parameters: {given} was given, but the formula has no such name; leave it out")
        low, high = self.x_range or (float(point) - WIDTH, float(point) + WIDTH)
        if not low < float(point) < high:
            raise ValueError(
                f"x_range must be an interval around the data point {point}, got {low:g} {high:g}"
            )
        settled = {"x0": point, "x_range": (float(low), float(high)), "expression": expression}
        settled |= {"parameters": MappingProxyType(dict(self.parameters)), "values": values, "_compiled": {}}
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if sympy.diff(expression, X) == 0:
            raise LandscapeError(f"l = {expression} does not depend on x: every x is an inner maximum")
        if any(self.derivative(by).has(*_KINKS) for by in ("tt", "xt", "xx")):
            raise LandscapeError(f"l = {expression} has a kink, where second derivatives are no functions")

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
        far = np.geomspace(0.01, 1000, 40)
        x, theta = np.meshgrid(np.linspace(*self.ends, 41)[1::2] + 1e-3, np.concatenate([-far, far]))
        third, second = self("xxx")(theta, x), self("xx")(theta, x)
        good = np.isfinite(third) & np.isfinite(second)
        return bool(good.any() and (np.abs(third[good]) <= 1e-9 * np.abs(second[good])).all())

    def derivative(self, by: str = "") -> sympy.Expr:
        """A partial derivative, such as ``"tx"`` for the mixed one (t is theta here)."""
        return reduce(lambda f, name: sympy.diff(f, {"t": THETA, "x": X}[name]), by, self.expression)

    def __call__(self, by: str = "") -> Callable[[Any, Any], Array]:
        """A partial derivative as a function of numbers or arrays (theta, x); nan or inf where undefined."""
        if by not in self._compiled:
            self._compiled[by] = compiled(self.derivative(by).subs(self.values), THETA, X)
        return self._compiled[by]

    def stationary(self, theta: float) -> list[Point]:
        """All zeros of l_x(theta, .) in the range of x that 4001 points tell apart, in increasing order."""
        zeros = roots(lambda x: self("x")(theta, x), np.linspace(*self.ends, _GRID))
        return [self._point(theta, x) for x, _, _ in zeros]

    def _point(self, theta: float, x: float) -> Point:
        """A stationary point by l_xx; where that is 0 on the scale of l_x beside it, by the signs of l_x."""
        value, curvature = float(self("")(theta, x)), float(self("xx")(theta, x))
        h = 1e-6 * (self.ends[1] - self.ends[0])
        left, right = float(self("x")(theta, x - h)), float(self("x")(theta, x + h))
        kind = "maximum" if left > 0 > right else "minimum" if left < 0 < right else "inflection"
        flat = bool(abs(curvature) * h < 1e-3 * max(abs(left), abs(right)))
        return Point(x, value, curvature, kind, flat)

    def ascent(self, theta: Any, alpha: Any, steps: int) -> Array:
        """x_K after whole steps x <- x + alpha l_x(theta, x) from the data point."""
        x = np.full(np.broadcast(theta, alpha).shape, self.point)
        for _ in range(steps):
            x = x + alpha * self("x")(theta, x)
        return np.asarray(x, dtype=float)


def roots(f: Callable[[Any], Array], grid: Array) -> list[tuple[float, float, float]]:
    """The zeros of f that a grid tells apart, each with f at the grid points before and after it.

    A zero on the grid counts where it stands alone: far tails of exponentials are 0 for pages. A change of
    sign at a pole is none.

    >>> [(x, bool(a < 0 < b)) for x, a, b in roots(lambda v: v**2 - 1, np.linspace(-2, 2, 8))]
    [(-1.0, False), (1.0, True)]
    >>> roots(lambda v: 1 / (v - 1 / 3), np.array([0.0, 4.0]))
    []
    """
    y = f(grid)
    before, after = y[:-2], y[2:]
    alone = (y[1:-1] == 0) & (before != 0) & (after != 0) & np.isfinite(before) & np.isfinite(after)
    zeros = [(float(grid[i + 1]), float(before[i]), float(after[i])) for i in np.flatnonzero(alone)]
    for i in np.flatnonzero(np.sign(y[:-1]) * np.sign(y[1:]) < 0):  # a product of values overflows
        low, high, ends = float(grid[i]), float(grid[i + 1]), (float(y[i]), float(y[i + 1]))

        def value(v: float, beside: float = 1e-9 * (high - low)) -> float:
            y = float(f(np.asarray(v)))
            return y if not math.isnan(y) else float(f(np.asarray(v + beside)))  # 0/0 at a single point

        with contextlib.suppress(ValueError):  # undefined in between
            root = float(brentq(value, low, high, xtol=1e-15, maxiter=500, disp=False))
            zeros += [(root, *ends)] if abs(value(root)) <= 1e-3 * max(map(abs, ends)) else []
    return sorted(zeros)


def stretch(grid: Array, good: NDArray[np.bool_], at: float) -> tuple[float, float]:
    """The ends of the stretch of good points of a grid around a point of it.

    >>> stretch(np.arange(6.0), np.array([True, False, True, True, True, False]), 3.0)
    (2.0, 4.0)
    """
    here = int(np.argmin(np.abs(grid - at)))
    bad = np.flatnonzero(~good)
    left, right = bad[bad < here], bad[bad > here]
    low = grid[left[-1] + 1] if len(left) else grid[0]
    high = grid[right[0] - 1] if len(right) else grid[-1]
    return float(low), float(high)


def compiled(expression: sympy.Expr, *symbols: sympy.Symbol) -> Callable[..., Array]:
    """An expression as a function of numbers and arrays; nan or inf where undefined, without warnings.

    Each call first looks at the deadline of `controlat._util.limits.within`.
    """
    raw = sympy.lambdify(symbols, expression, modules=["numpy", "scipy"], cse=True)

    def call(*values: Any) -> Array:
        check()
        arrays = [np.asarray(v, dtype=float) for v in values]
        with np.errstate(all="ignore"):
            y = np.asarray(raw(*arrays))
        if np.iscomplexobj(y):
            y = np.where(np.abs(y.imag) < 1e-12, y.real, np.nan)
        y, shape = y.astype(float, copy=False), np.broadcast(*arrays).shape
        return y if y.shape == shape else np.broadcast_to(y, shape)

    return call
