"""The constants of Theorem 1 (Ye et al., 2021) on a range of theta and x: L_tt, L_tx, mu, beta and Delta."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter

from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["Constants", "Range", "constants", "constants_on", "interval", "peak"]

_GRID, _PEAKS, _ZOOMS, _POLE = 301, 16, 20, 1e4
Range = tuple[float, float]
LINE: Range = (-math.inf, math.inf)
FLAT: Range = (0.0, 0.0)  # the range of x for functions of theta alone


class Constants(NamedTuple):
    """What the theorem needs, on a range of theta and x; drop is Delta = L(theta_0) - min L."""

    theta_range: Range
    x_range: Range
    l_tt: float
    l_tx: float
    mu: float
    beta: float
    drop: float
    rounding: float


def peak(what: str, f: Callable[[Any, Any], Array], theta: Range, x: Range) -> tuple[float, float, float]:
    """The largest value of f on a rectangle, and where: a grid, then finer ones around its local maxima."""
    ends, offsets = (theta, x), np.linspace(-1, 1, 9)

    def sound(t: Array, v: Array) -> Array:
        y = f(t, v)
        if (bad := ~(y < np.inf)).any():
            where = f"theta = {t[bad][0]:.6g}, x = {v[bad][0]:.6g}"
            raise LandscapeError(
                f"{what} is infinite or undefined at {where}: there is no finite constant on this range"
            )
        return y

    axes = np.meshgrid(*(np.linspace(*e, _GRID if e[0] < e[1] else 1) for e in ends), indexing="ij")
    y = sound(*axes)
    scale, top = float(np.abs(y[np.isfinite(y)]).max(initial=0.0)), np.flatnonzero(y == maximum_filter(y, 3))
    top = top[np.argsort(-y.ravel()[top], kind="stable")[:_PEAKS]]
    at, size = [axis.ravel()[top] for axis in axes], [(e[1] - e[0]) / (_GRID - 1) for e in ends]
    moves = [m.ravel() for m in np.meshgrid(*(offsets if s else [0.0] for s in size), indexing="ij")]
    for zoom in range(_ZOOMS):
        moved = zip(at, size, moves, ends, strict=True)
        near = [np.clip(c[:, None] + s * m / 2**zoom, *e) for c, s, m, e in moved]
        fine = sound(*near)
        best = fine.argmax(axis=1)[:, None]
        at = [np.take_along_axis(axis, best, axis=1)[:, 0] for axis in near]
    first = int(fine.max(axis=1).argmax())
    value, t, v = max(float(y.max()), float(fine.max())), float(at[0][first]), float(at[1][first])
    if value > _POLE * max(scale, 1e-10):  # it grew with every zoom: a pole between the points of the grid
        raise LandscapeError(f"{what} is unbounded near theta = {t:.6g}, x = {v:.6g}: no finite constant")
    return value, t, v


def constants_on(branch: Branch, theta0: float, theta: Range, x: Range) -> Constants:
    """As `constants`, of a range that is known to be one."""
    l = branch.landscape  # noqa: E741
    l_tt = peak("l_theta theta", lambda t, v: np.abs(l("tt")(t, v)), theta, x)[0]
    l_tx = peak("l_theta x", lambda t, v: np.abs(l("tx")(t, v)), theta, x)[0]
    flattest, at_theta, at_x = peak("l_xx", l("xx"), theta, x)
    start = float(branch.robust(theta0))
    lowest = -peak("-L", lambda t, _: -branch.robust(t), theta, FLAT)[0]
    # -l_xx that vanishes up to rounding is no strong concavity either
    if -flattest <= 1e-12 * abs(float(l("xx")(theta0, branch(theta0)))):
        raise LandscapeError(
            f"l_xx = {flattest:.6g} at theta = {at_theta:.6g}, x = {at_x:.6g}: l is not strongly concave in "
            f"x for theta in [{theta[0]:.6g}, {theta[1]:.6g}] and x in [{x[0]:.6g}, {x[1]:.6g}], "
            "so the theorem does not apply there"
        )
    beta = l_tx * l_tx / -flattest + l_tt
    if not 0 < beta < math.inf:
        raise LandscapeError(
            f"beta = {beta:g}: the step size 1/beta is not a positive number, the theorem says nothing"
        )
    rounding = 8 * float(np.finfo(float).eps) * max(abs(start), abs(lowest))
    return Constants(theta, x, l_tt, l_tx, -flattest, beta, max(start - lowest, 0.0), rounding)


def constants(branch: Branch, theta0: float, theta_range: Range, x_range: Range) -> Constants:
    """L_tt = max |l_theta theta|, L_tx = max |l_theta x|, mu = min -l_xx, beta = L_tx^2/mu + L_tt and Delta.

    By a grid of 301 x 301 points and local refinement, not by interval arithmetic.

    Args:
        branch: the inner maximum.
        theta0: where L(theta_0) of Delta is taken.
        theta_range: of theta, theta_0 in it.
        x_range: of x, x*(theta_0) in it.

    Raises:
        ValueError: a range is without its point, a constant is infinite, or l is not strongly concave in x.

    Source: Ye et al. (2021), assumptions of Theorem 1.

    >>> from controlat.symbolic.landscape import Landscape
    >>> saddle = Branch(Landscape("3*theta^2/2 + theta*x - 2*x^2/2"), 1.0, 0.5, (-3, 3))
    >>> k = constants(saddle, 1.0, (0, 1), (0, 1))
    >>> k.l_tt, k.l_tx, k.mu, k.beta, k.drop
    (3.0, 1.0, 2.0, 3.5, 1.75)
    """
    theta = interval("theta_range", theta_range, theta0, branch.domain)
    return constants_on(branch, theta0, theta, interval("x_range", x_range, float(branch(theta0))))


def interval(name: str, given: Range, around: float, most: Range = LINE) -> Range:
    """A range that contains a point, or why not."""
    low, high = map(float, given)
    if not most[0] <= low <= around <= high <= most[1] or not math.isfinite(low - high):
        raise ValueError(
            f"{name} must be two numbers around {around:g}, within [{most[0]:g}, {most[1]:g}], "
            f"got {low:g} {high:g}"
        )
    return low, high
