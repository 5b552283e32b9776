"""Calibration of a landscape: theta_0 and the scale of time from what was measured on a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from controlat.symbolic.branch import Branch, choose
from controlat.symbolic.landscape import Array, LandscapeError
from controlat.symbolic.task import Task

__all__ = ["Fit", "fit"]

_LEAST, _MOST = 0.02, 20.0  # horizons c E that are searched, in units of the landscape's time
_FEWEST = 5
_WIDEST = 5.0  # standard error of log c beyond which c is not known at all
_STARTS, _SCALES, _REFINED = 33, 33, 3


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
    >>> found = fit(Task(theta0=1), t, 7 / (1 + 1.44 * np.exp(-0.6 * t)))  # (11) with theta_0 = 1.2, c = 0.3
    >>> round(found.theta0, 3), round(found.scale, 3)
    (1.2, 0.3)
    """
    t, v = _selected(times, values, since)
    model = _Model(task, t - t[0], np.log(v))
    sigma, log_scale = model.best()
    shape = model.shape(sigma, log_scale)
    offset = float(np.mean(model.y - shape))
    residuals = model.y - shape - offset
    fitted = np.exp(shape + offset)
    return Fit(
        theta0=model.theta0(sigma),
        scale=float(np.exp(log_scale)),
        amplitude=float(np.exp(offset)),
        times=tuple(t.tolist()),
        values=tuple(v.tolist()),
        fitted=tuple(fitted.tolist()),
        residuals=tuple(residuals.tolist()),
        rms=_rms(residuals),
        explained=float(
            1 - (residuals**2).sum() / max(float(((model.y - model.y.mean()) ** 2).sum()), 1e-300)
        ),
        rms_constant=_rms(model.y - model.y.mean()),
        rms_line=_rms(model.y - np.polyval(np.polyfit(t, model.y, 1), t)),
        errors=model.errors(sigma, log_scale, residuals),
        notes=tuple(model.remarks(sigma, log_scale, residuals)),
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
    begin = lowest if since is None else since
    kept = np.array([pair for pair in known if pair[0] >= begin], dtype=float)
    if len(kept) < _FEWEST:
        told = "which is where it is lowest" if since is None else "as asked for"
        raise ValueError(
            f"there are {len(kept)} measurements from epoch {begin:g} on, {told}; a fit needs {_FEWEST}: "
            "take a longer run, or another since"
        )
    return kept[:, 0], kept[:, 1]


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


class _Model:
    """log 1/alpha*(theta(c t)) for given theta_0 and log c, on one falling side of the robust loss.

    The flow is autonomous: the path from the far end of the side passes through every theta_0, at time sigma,
    so that one solution of the equation serves all.
    """

    def __init__(self, task: Task, times: Array, y: Array) -> None:
        self.task, self.times, self.y = task, times, y
        theta0 = float(task.theta0)
        point = choose(task.landscape, theta0, task.landscape.stationary(theta0), task.branch)[1]
        self.branch = Branch(task.landscape, theta0, point.x, task.reach)
        self.low, self.high = self._side(theta0)
        length = float(times[-1])
        self.scales = np.log(_LEAST / length), np.log(_MOST / length)
        self._solve()

    def _side(self, theta0: float) -> tuple[float, float]:
        """The interval around theta_0 on which dL/dtheta keeps its sign and alpha* is positive."""
        grid = np.linspace(*self.branch.domain, 4001)
        slope, step = self.branch.robust_slope(grid), self.branch.exact_step(grid)
        here = int(np.argmin(np.abs(grid - theta0)))
        self.down = float(slope[here]) > 0
        good = (np.sign(slope) == np.sign(slope[here])) & np.isfinite(step) & (step > 0) & (slope != 0)
        if not good[here]:
            raise LandscapeError(f"the robust loss is stationary at theta = {theta0:g}: give another theta0")
        bad = np.flatnonzero(~good)
        left, right = bad[bad < here], bad[bad > here]
        low = grid[left[-1] + 1] if len(left) else grid[0]
        high = grid[right[0] - 1] if len(right) else grid[-1]
        return float(low), float(high)

    def _solve(self) -> None:
        """The path from the far end, and the latest time sigma at which a start is still worth a look."""
        begin, end = (self.high, self.low) if self.down else (self.low, self.high)

        def near(t: float, y: Array) -> float:
            return abs(float(y[0]) - end) - 2e-2 * abs(end - begin)

        def solve(length: float, **options: Any) -> Any:
            return solve_ivp(
                lambda t, y: -self.branch.robust_slope(np.clip(y, *self.branch.domain)),
                (0.0, length),
                [begin],
                method="DOP853",
                dense_output=True,
                rtol=1e-10,
                atol=1e-12,
                **options,
            )

        near.terminal = True  # type: ignore[attr-defined]
        self.latest = float(solve(1e4, events=near).t[-1])
        self.path = solve(self.latest + _MOST)
        self.until = float(self.path.t[-1])

    def theta0(self, sigma: float) -> float:
        """theta_0 of a start at time sigma on the path."""
        return float(self.path.sol(sigma)[0])

    def shape(self, sigma: float, log_scale: float) -> Array:
        """log 1/alpha* at the times of the measurements; nan beyond the end of the path."""
        t = sigma + np.exp(log_scale) * self.times
        found = -np.log(self.branch.exact_step(self.path.sol(np.clip(t, 0, self.until))[0]))
        return np.where(t <= self.until + 1e-12, found, np.nan)

    def loss(self, sigma: float, log_scale: float) -> float:
        """Sum of squares with the best s; bounds as a wall."""
        over = max(-sigma, sigma - self.latest, 0.0) / self.latest
        over += max(self.scales[0] - log_scale, log_scale - self.scales[1], 0.0)
        shape = self.shape(float(np.clip(sigma, 0, self.latest)), float(np.clip(log_scale, *self.scales)))
        rest = self.y - shape
        total = float(((rest - rest.mean()) ** 2).sum())
        return float((total if np.isfinite(total) else 1e6) + over)

    def _at(self, p: Array) -> float:
        return self.loss(float(p[0]), float(p[1]))

    def best(self) -> tuple[float, float]:
        """(sigma, log c): a grid over both, and the simplex method from its best points."""
        starts, scales = np.linspace(0, self.latest, _STARTS), np.linspace(*self.scales, _SCALES)
        tried = sorted((self.loss(a, b), a, b) for a in starts for b in scales)[:_REFINED]
        options: Any = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 600}
        ends = [
            minimize(self._at, np.array([a, b]), method="Nelder-Mead", options=options) for _, a, b in tried
        ]
        best = min(ends, key=lambda end: float(end.fun)).x
        return float(np.clip(best[0], 0, self.latest)), float(np.clip(best[1], *self.scales))

    def errors(self, sigma: float, log_scale: float, residuals: Array) -> tuple[float, float, float] | None:
        """Standard errors of theta_0, log c and log s by the Gauss-Newton approximation; None if singular."""
        h = 1e-5 * self.latest, 1e-5
        inside = float(np.clip(sigma, h[0], self.latest - h[0]))
        columns = [
            (self.shape(inside + h[0], log_scale) - self.shape(inside - h[0], log_scale)) / (2 * h[0]),
            (self.shape(inside, log_scale + h[1]) - self.shape(inside, log_scale - h[1])) / (2 * h[1]),
            np.ones(len(self.times)),
        ]
        matrix = np.stack(columns, axis=1)
        if not np.isfinite(matrix).all() or np.linalg.cond(matrix) > 1e8 or len(residuals) <= 3:
            return None
        variance = float((residuals**2).sum()) / (len(residuals) - 3)
        deviations = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))
        speed = abs(self.theta0(inside + h[0]) - self.theta0(inside - h[0])) / (2 * h[0])
        found = float(deviations[0] * speed), float(deviations[1]), float(deviations[2])
        return found if found[0] < self.high - self.low and found[1] < _WIDEST else None

    def remarks(self, sigma: float, log_scale: float, residuals: Array) -> list[str]:
        """What a reader must know before trusting the fit."""
        found = []
        if sigma < 1e-3 * self.latest:
            found.append(
                f"theta_0 = {self.theta0(sigma):.4g} lies at the end of what was searched: the network "
                "changes more than the landscape can within theta_range"
            )
        if sigma > 0.999 * self.latest:
            found.append(f"theta_0 = {self.theta0(sigma):.4g} lies next to the minimum: nothing changes")
        if min(log_scale - self.scales[0], self.scales[1] - log_scale) < 1e-3:
            found.append(
                f"the scale of time lies at the edge of what was searched, c T {_LEAST} to {_MOST:g}"
            )
        line = _rms(self.y - np.polyval(np.polyfit(self.times, self.y, 1), self.times))
        if line < 0.8 * _rms(residuals):
            found.append(f"a straight line fits better: residuals of {line:.3g} (root mean square)")
        if _rms(residuals) > 0.8 * _rms(self.y - self.y.mean()):
            found.append("the landscape explains little of it: a constant fits almost as well")
        return found
