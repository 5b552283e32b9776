"""The robust flow theta' = -dL/dtheta in numbers, and why it cannot be followed where that is so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Array, LandscapeError

__all__ = ["integrate"]

_CALLS = 40_000  # of the flow's right side, beyond which another method is tried, and then none
_FAR = math.log(1e8)  # how far a flow is followed beyond all ranges: theta - theta_0 up to 1e8
_DECAY = 0.05  # theta' growing faster than |theta|^(1 + this) is taken for a blow-up
_SLACK = 1e-6  # of the horizon: a blow-up so little later is one at the horizon
_POLE = 1e6  # theta' so many times as fast as at the start stands before a pole


class _TooMany(Exception):
    """The flow took too many evaluations."""


def integrate(branch: Branch, theta0: float, horizon: float) -> Callable[[Any], Any]:
    """theta(t) for 0 <= t <= T, by Runge-Kutta of order 8, or by LSODA where that needs too many steps.

    Raises:
        LandscapeError: the flow leaves the domain of the branch before the horizon, is infinite before it,
            or is too stiff.
    """
    low, high = branch.domain

    def slope(t: float, theta: Array) -> Array:
        return -branch.robust_slope(np.clip(theta, low, high))

    def left(t: float, theta: Array) -> float:
        return min(float(theta[0]) - low, high - float(theta[0])) - 1e-9 * (high - low)

    size = min(max(abs(low), abs(high)), max(3.0, 2 * abs(theta0)))
    options = {"rtol": 1e-12, "atol": 1e-14 * size, "max_step": horizon / 20}
    for method in ("DOP853", "LSODA"):
        try:
            path = _solved(slope, horizon, [theta0], left, method=method, **options)
        except _TooMany:
            continue
        t, theta, dense = float(path.t[-1]), float(path.y[0, -1]), path.sol
        hurried = abs(float(branch.robust_slope(theta))) * horizon * _SLACK > 1 + abs(theta)
        gone = path.status != 0 or dense is None or not np.isfinite(path.y).all()
        if gone or hurried:  # rounding may have carried a hurried flow past its end
            end = _beyond(branch, theta0, horizon)
            if gone:
                raise LandscapeError(_why(branch, theta0, horizon, t, theta, end))
        return lambda t: dense(t)[0]
    _beyond(branch, theta0, horizon)  # says so where it blows up
    raise LandscapeError(
        f"the robust flow is too stiff to be followed over the horizon {horizon:g}; take a shorter one"
    )


def _solved(
    slope: Callable[..., Any], end: float, start: list[float], event: Callable[..., float], **options: Any
) -> Any:
    """`solve_ivp` from 0 to the end, or to where the event is 0; _TooMany after so many evaluations."""
    calls = itertools.count()

    def counted(t: float, y: Array) -> Any:
        if next(calls) >= _CALLS:
            raise _TooMany
        return slope(t, y)

    event.terminal = True  # type: ignore[attr-defined]
    return solve_ivp(counted, (0.0, end), start, events=event, dense_output=True, **options)


def _why(branch: Branch, theta0: float, horizon: float, t: float, theta: float, end: float | None) -> str:
    """Why the flow cannot be followed to the horizon, where theta is `end` if that is known."""
    low, high = branch.domain
    there = "" if end is None else f" (at the horizon theta is {end:.4g})"
    speed, first = (float(np.abs(branch.robust_slope(v))) for v in (theta, theta0))
    why = f"There |theta'| is {speed:.3g}"
    for edge, told in zip((low, high), branch.ends, strict=True):
        if abs(theta - edge) <= 1e-6 * (high - low):
            why = told or f"There theta_range ends: give a wider one{there}"
    if speed > _POLE * first and "_range" not in why:
        why = f"There theta' = -dL/dtheta has a pole: |theta'| is {speed:.3g}"
    return (
        f"the robust flow from theta = {theta0:g} comes to theta = {theta:.4g} at t = {t:.4g}, before the "
        f"horizon {horizon:g}. {why}; a shorter horizon helps too"
    )


def _beyond(branch: Branch, theta0: float, horizon: float) -> float | None:
    """Follow the flow without theta_range and x_range: theta at the horizon, if it is known.

    t and x* are functions of theta = theta_0 + s c (e^u - 1), s the direction of the flow: dt/du =
    (dtheta/du)/theta' and dx*/dtheta = -l_xtheta/l_xx. Where theta' grows as |theta|^p, dt/du falls as
    e^(-(p - 1) u): for p > 1 the rest of the time to infinity is dt/du/(p - 1).

    Raises:
        LandscapeError: the flow is infinite before the horizon.
    """
    land, scale = branch.landscape, max(1.0, abs(theta0))
    sign = -float(np.sign(branch.robust_slope(theta0)))
    if sign == 0 or branch.formula is not None:  # a flat maximum has no dx*/dtheta
        return None

    def at(u: float, x: float) -> tuple[float, float]:
        """theta, and x* after a step of Newton's method."""
        theta = theta0 + sign * scale * math.expm1(u)
        return theta, x - float(land("x")(theta, x)) / float(land("xx")(theta, x))

    def slopes(u: float, y: Array) -> Array:
        theta, x = at(u, float(y[0]))
        rate = sign * scale * math.exp(u)
        drift = -float(land("xt")(theta, x)) / float(land("xx")(theta, x))
        return np.array([drift * rate, -rate / float(land("t")(theta, x))])

    def late(u: float, y: Array) -> float:
        return float(y[1]) - horizon * (1 + _SLACK)

    start, options = [float(branch(theta0)), 0.0], {"method": "DOP853", "rtol": 1e-9, "atol": 1e-12}
    try:
        with np.errstate(all="ignore"):
            path = _solved(slopes, _FAR, start, late, **options)
    except (_TooMany, ZeroDivisionError):
        return None
    u, (x, t) = float(path.t[-1]), path.y[:, -1].tolist()
    if path.status == 1:
        return at(u, x)[0]
    rest = _rest([float(slopes(share * u, path.sol(share * u))[1]) for share in (0.6, 0.8, 1.0)], u)
    if rest is None:
        return None
    raise LandscapeError(
        f"the robust flow from theta = {theta0:g} blows up in finite time: |theta| grows beyond all bounds "
        f"as t comes to {t + rest:.6g}, not after the horizon {horizon:g}, and no theta_range is "
        "wide enough; take a shorter horizon"
    )


def _rest(rates: Sequence[float], u: float) -> float | None:
    """The time from u to infinity, by dt/du at 0.6 u, 0.8 u and u; None where it may be infinite."""
    before, middle, last = rates
    if last == 0:  # theta' is beyond all floats
        return 0.0
    if not before > middle > last > 0:
        return None
    early, decay = math.log(before / middle) / (0.2 * u), math.log(middle / last) / (0.2 * u)
    if decay <= max(_DECAY, 0.9 * early):  # theta' as |theta| log^2 |theta| is not told from |theta|
        return None
    return last / decay
