"""Calibration of a landscape: theta_0 and the scale of time from what was measured on a network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import least_squares

from controlat.symbolic.branch import Branch, choose
from controlat.symbolic.landscape import Array, LandscapeError, stretch
from controlat.symbolic.task import Task

__all__ = ["Fit", "fit"]

_LEAST, _MOST = 0.02, 20.0  # horizons c E that are searched, in units of the landscape's time
_FEWEST = 5
_WIDEST = 5.0  # standard error of log c beyond which c is not known at all
_GRID, _REFINED = 33, 3


@dataclass(frozen=True)
class Fit:
    """A landscape fitted to measurements at epochs t_e: log v_e = log(s/alpha*(theta(c t_e))) + r_e.

    Args:
        theta0: the landscape's parameter at the first of the times.
        scale: c, the landscape's time per epoch.
        amplitude: s, what one unit of 1/alpha* is in units of the measurement.
        times: t_e in epochs.
        values: v_e as measured.
        fitted: s/alpha*(theta(c t_e)).
        residuals: r_e, in natural logarithms.
        rms: root mean square of the residuals.
        explained: share of the variance of log v_e that the landscape explains.
        rms_constant: that of the best constant, which knows of no change.
        rms_line: that of the best straight line in log v_e: two numbers instead of three.
        errors: standard errors of theta_0, log c and log s from the curvature of the sum of squares; None
            where they cannot be told apart.
        notes: what is to be said about the fit.
    """

    theta0: float
    scale: float
    amplitude: float
    times: tuple[float, ...]
    values: tuple[float, ...]
    fitted: tuple[float, ...]
    residuals: tuple[float, ...]
    rms: float
    explained: float
    rms_constant: float
    rms_line: float
    errors: tuple[float, float, float] | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def task(self, task: Task, tau: float) -> Task:
        """The task with the fitted theta_0, the length of the run in the landscape's time, and a tau."""
        horizon = self.scale * (self.times[-1] - self.times[0])
        low, high = task.reach
        margin = 0.01 * (high - low)  # theta_0 may lie on the edge of what was searched
        reach = min(low, self.theta0 - margin), max(high, self.theta0 + margin)
        start, length, tau = (float(f"{value:.6g}") for value in (self.theta0, horizon, tau))
        return replace(task, theta0=start, horizon=length, tau=tau, theta_range=reach)


def fit(
    task: Task, times: Sequence[float], values: Sequence[float | None], since: float | None = None
) -> Fit:
    """Fit theta_0, c and s by least squares in log v.

    A network first learns something to attack: inner problems are hard at random weights, and ease until the
    loss drops. A landscape has no such phase, so that the fit begins where the measurement is lowest.

    theta_0 is looked for where the robust loss falls monotonically from the task's theta_0 (both ways within
    its range of theta); c T from 0.02 to 20.

    Args:
        task: the landscape; its theta0 says on which side to look, its horizon is not used.
        times: epochs t_e, increasing.
        values: v_e > 0, the network's 1/alpha* or steps needed, in any unit; None where there is none.
        since: fit from this epoch on; from the lowest value on if left out.

    Raises:
        ValueError: fewer than five measurements, or one that is not positive and finite.

    >>> import numpy as np
    >>> t = np.arange(13.0)
    >>> fitted = fit(Task(theta0=1), t, 7 / (1 + 1.44 * np.exp(-0.6 * t)))  # (11) with theta_0 = 1.2, c = 0.3
    >>> round(fitted.theta0, 3), round(fitted.scale, 3)
    (1.2, 0.3)
    """
    t, v = _selected(times, values, since)
    model, y = _Model(task, float(t[-1] - t[0])), np.log(v)
    solved = _least_squares(model, t - t[0], y)
    sigma, log_scale, log_amplitude = solved.x
    line = np.polyval(np.polyfit(t, y, 1), t)
    misfits = solved.fun, y - y.mean(), y - line
    rms, rms_constant, rms_line = (float(np.sqrt(np.mean(r**2))) for r in misfits)
    return Fit(
        theta0=model.theta0(sigma),
        scale=float(np.exp(log_scale)),
        amplitude=float(np.exp(log_amplitude)),
        times=tuple(t.tolist()),
        values=tuple(v.tolist()),
        fitted=tuple(np.exp(y - solved.fun).tolist()),
        residuals=tuple(solved.fun.tolist()),
        rms=rms,
        explained=1 - rms**2 / max(rms_constant**2, 1e-300),
        rms_constant=rms_constant,
        rms_line=rms_line,
        errors=_errors(model, solved),
        notes=tuple(_remarks(model, sigma, log_scale, rms, rms_constant, rms_line)),
    )


def _selected(
    times: Sequence[float], values: Sequence[float | None], since: float | None
) -> tuple[Array, Array]:
    """The measurements from the lowest one on, or from the epoch that is given."""
    if len(times) != len(values) or not (np.diff(times) > 0).all():
        raise ValueError(f"measurements need increasing times, got {len(values)} at {len(times)} times")
    known = [(t, v) for t, v in zip(times, values, strict=True) if v is not None]
    for at, value in known:
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"measurements must be > 0 and finite, got {value:.4g} at epoch {at:g}")
    lowest = min(known, key=lambda pair: pair[1], default=(0.0, 0.0))[0]
    begin, told = (lowest, "which is where it is lowest") if since is None else (since, "as asked for")
    kept = np.array([pair for pair in known if pair[0] >= begin], dtype=float)
    if len(kept) < _FEWEST:
        raise ValueError(
            f"there are {len(kept)} measurements from epoch {begin:g} on, {told}; a fit needs {_FEWEST}: "
            "take a longer run, or another since"
        )
    return kept[:, 0], kept[:, 1]


class _Model:
    """log 1/alpha*(theta(c t)) for given theta_0 and log c, on one falling side of the robust loss.

    The flow is autonomous: the path from the far end of the side passes through every theta_0, at time sigma,
    so that one solution of the equation serves all.
    """

    def __init__(self, task: Task, length: float) -> None:
        theta0 = float(task.theta0)
        point = choose(task.landscape, theta0, task.landscape.stationary(theta0), task.branch)[1]
        self.branch = Branch(task.landscape, theta0, point.x, task.reach)
        begin, end = self._side(theta0)
        self.width = abs(end - begin)
        self.scales = math.log(_LEAST / length), math.log(_MOST / length)

        def near(t: float, y: Array) -> float:
            return abs(float(y[0]) - end) - 2e-2 * self.width

        near.terminal = True  # type: ignore[attr-defined]
        # the latest time at which a start is still worth a look
        self.latest = float(self._solve(begin, 1e4, events=near).t[-1])
        self.path: Any = self._solve(begin, self.latest + _MOST, dense_output=True)

    def _side(self, theta0: float) -> tuple[float, float]:
        """The ends, downhill, of where around theta_0 dL/dtheta keeps its sign and alpha* is positive."""
        grid = np.unique(np.append(np.linspace(*self.branch.domain, 4001), theta0))
        slope, sign = self.branch.robust_slope(grid), np.sign(self.branch.robust_slope(theta0))
        if sign == 0:
            raise LandscapeError(f"the robust loss is stationary at theta = {theta0:g}: give another theta0")
        low, high = stretch(grid, (np.sign(slope) == sign) & (self.branch.exact_step(grid) > 0), theta0)
        return (high, low) if sign > 0 else (low, high)

    def _solve(self, begin: float, length: float, **options: Any) -> Any:
        def slope(t: float, y: Array) -> Array:
            return -self.branch.robust_slope(np.clip(y, *self.branch.domain))

        return solve_ivp(slope, (0.0, length), [begin], "DOP853", rtol=1e-10, atol=1e-12, **options)

    def theta0(self, sigma: float) -> float:
        """theta_0 of a start at time sigma on the path."""
        return float(self.path.sol(sigma)[0])

    def shape(self, sigma: Any, log_scale: Any, times: Array) -> Array:
        """log 1/alpha* at the times of the measurements."""
        t = np.clip(sigma + np.exp(log_scale) * times, 0, self.path.t[-1])
        theta = self.path.sol(t.ravel())[0].reshape(t.shape)
        return np.asarray(-np.log(self.branch.exact_step(theta)))


def _least_squares(model: _Model, times: Array, y: Array) -> Any:
    """(sigma, log c, log s) by scipy's least squares, from the best points of a grid."""

    def residuals(p: Array) -> Array:
        return np.asarray(y - model.shape(p[0], p[1], times) - p[2])

    sigma, log_scale = np.meshgrid(np.linspace(0, model.latest, _GRID), np.linspace(*model.scales, _GRID))
    rest = y - model.shape(sigma[..., None], log_scale[..., None], times)
    best = np.argsort(rest.var(axis=-1), axis=None)[:_REFINED]
    starts = np.stack([each.ravel()[best] for each in (sigma, log_scale, rest.mean(axis=-1))], axis=1)
    bounds = [0.0, model.scales[0], -np.inf], [model.latest, model.scales[1], np.inf]
    tight: Any = {"ftol": 1e-14, "xtol": 1e-12, "gtol": 1e-14, "x_scale": (model.latest, 1.0, 1.0)}
    ends = [least_squares(residuals, start, bounds=bounds, method="dogbox", **tight) for start in starts]
    return min(ends, key=lambda end: float(end.cost))


def _errors(model: _Model, solved: Any) -> tuple[float, float, float] | None:
    """Standard errors of theta_0, log c and log s by the Gauss-Newton approximation; None if singular."""
    free = len(solved.fun) - 3
    scaled = solved.jac * (model.latest, 1.0, 1.0)
    if free <= 0 or not np.isfinite(scaled).all() or np.linalg.cond(scaled) > 1e8:
        return None
    variance = 2 * float(solved.cost) / free
    deviations = np.sqrt(variance * np.diag(np.linalg.inv(scaled.T @ scaled))) * (model.latest, 1.0, 1.0)
    speed = abs(float(model.branch.robust_slope(model.theta0(solved.x[0]))))
    sigma, log_scale, log_amplitude = map(float, deviations)
    unknown = sigma * speed >= model.width or log_scale >= _WIDEST
    return None if unknown else (sigma * speed, log_scale, log_amplitude)


def _remarks(
    model: _Model, sigma: float, log_scale: float, rms: float, rms_constant: float, rms_line: float
) -> Iterator[str]:
    """What a reader must know before trusting the fit."""
    start, edge = f"theta_0 = {model.theta0(sigma):.4g} lies", f"c T {_LEAST} to {_MOST:g}"
    if sigma < 1e-3 * model.latest:
        yield (
            f"{start} at the end of what was searched: the network changes more than the landscape can "
            "within theta_range"
        )
    if sigma > 0.999 * model.latest:
        yield f"{start} next to the minimum: nothing changes"
    if min(log_scale - model.scales[0], model.scales[1] - log_scale) < 1e-3:
        yield f"the scale of time lies at the edge of what was searched, {edge}"
    if rms_line < 0.8 * rms:
        yield f"a straight line fits better: residuals of {rms_line:.3g} (root mean square)"
    if rms > 0.8 * rms_constant:
        yield "the landscape explains little of it: a constant fits almost as well"
