"""The robust flow of a landscape in numbers: theta(t), alpha* and K*(t) along it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.integrate import fixed_quad

from controlat._util.limits import unhurried
from controlat.symbolic.branch import Branch, higher
from controlat.symbolic.flow import integrate
from controlat.symbolic.landscape import Array, LandscapeError, roots
from controlat.symbolic.task import Task

__all__ = ["Course"]

_POINTS = 2001  # of [0, T], where turning points of K* are looked for


class Course:
    """What follows from a `Task` on one branch of inner maxima, in numbers.

    Args:
        task: where the flow starts, how long it lasts, and what steps cost.
        branch: the inner maximum that is followed.

    Attributes:
        rising: the intervals of [0, T] on which K* increases.
        parts: J in its parts, "terminal" and "inner".
        cost: J.
        minima: stationary points of the "plain" and of the "robust" loss.

    Raises:
        LandscapeError: the robust flow leaves its domain before the horizon, or no step from the data point
            lands on the inner maximum.
    """

    @np.errstate(all="ignore")  # what is not finite is named
    def __init__(self, task: Task, branch: Branch) -> None:
        self.task, self.landscape, self.branch, self.end = task, task.landscape, branch, float(task.horizon)
        self.path = integrate(branch, float(task.theta0), self.end)
        self._check_steps()
        with unhurried():  # the numbers that follow are quick
            self._numbers()

    def _check_steps(self) -> None:
        t = np.linspace(0, self.end, 201)
        step = self.alpha(t)
        bad = ~(np.isfinite(step) & (step > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise LandscapeError(
                f"at t = {t[first]:.4g} (theta = {float(self.theta(t[first])):.4g}) no step from the data "
                f"point lands on the inner maximum: (x* - x0)/l_x(theta, x0) = {step[first]:.4g}; take "
                + ("a shorter horizon, or " if first else "")
                + "another branch or data point"
            )

    def _numbers(self) -> None:
        """Where K* increases, the cost of the schedule, and the stationary points of both losses."""
        land, (low, high) = self.landscape, self.task.reach
        t = np.linspace(0, self.end, _POINTS)
        self.rising = _rising(t, self.K(t))
        inner = float(fixed_quad(self.K, 0, self.end, n=400)[0])
        self.parts = {"terminal": float(self.branch.robust(self.theta(self.end))), "inner": inner}
        self.cost = self.parts["terminal"] + float(self.task.gamma) * inner
        loss = np.abs(land("")(np.linspace(low, high, 41)[:, None], np.linspace(*self.window(), 41)[None]))
        scale = float(np.max(loss, where=np.isfinite(loss), initial=0.0)) / (high - low)

        def plain_slope(theta: Array) -> Array:
            return land("t")(theta, np.full_like(theta, land.point))

        self.minima = {
            "plain": _zeros(plain_slope, low, high, scale),
            "robust": _zeros(self.branch.robust_slope, *self.branch.domain, scale),
        }

    def theta(self, t: Any) -> Array:
        """theta(t) of the robust flow, for numbers or arrays 0 <= t <= T."""
        return np.asarray(self.path(np.asarray(t, dtype=float)), dtype=float)

    def alpha(self, t: Any) -> Array:
        """alpha*(theta(t))."""
        return self.branch.exact_step(self.theta(t))

    def K(self, t: Any) -> Array:
        """K*(t) = tau/alpha*(theta(t)), as a real number."""
        with np.errstate(all="ignore"):
            return np.asarray(float(self.task.tau) / self.alpha(t), dtype=float)

    def linear(self, t: Any) -> Array:
        """Amata's approximation: the straight line from K*(0) to K*(T)."""
        first, last = self.K(np.array([0.0, self.end]))
        return np.asarray(first + (last - first) * np.asarray(t, dtype=float) / self.end)

    def sample(self) -> Array:
        """Values of theta at which formulas are compared with numbers: what the flow visits.

        Off the round ones, where 0/0 lurks; a little wider where the flow stands still.
        """
        visited, (left, right) = self.theta(np.linspace(0, self.end, 101)), self.branch.domain
        low, high = float(visited.min()), float(visited.max())
        margin = max(0.0, 1e-3 * (right - left) - (high - low))
        low, high = low - min(margin, (low - left) / 2), high + min(margin, (right - high) / 2)
        return np.asarray(low + (high - low) * (np.arange(40) + 0.6180339887) / 40.5)

    def still(self) -> bool:
        """Whether the data point is the inner maximum throughout."""
        x = self.branch(self.theta(np.linspace(0, self.end, _POINTS)))
        return bool((np.abs(x - self.landscape.point) < 1e-9).all())

    def remarks(self) -> Iterator[str]:
        """Where l is larger elsewhere, and what a reader might take for more than it is."""
        for t in np.linspace(0, self.end, 33):
            theta = float(self.theta(t))
            mine = float(self.branch.robust(theta))
            if (above := higher(self.landscape, theta, mine)) is not None:
                yield (
                    f"at t = {t:.3g} l is larger at x = {above[0]:.4g} (l = {above[1]:.4g}) than at the "
                    f"inner maximum that is followed (x = {float(self.branch(theta)):.4g}, l = {mine:.4g}): "
                    "what follows is about the maximum that is followed, not about the largest"
                )
                break
        share = np.mean(self.K(np.linspace(0, self.end, _POINTS)) < 1)
        if share > 0:
            yield (
                f"K* < 1 during {share:.0%} of the time: less than one step of alpha*, which is taken to "
                "reach x* at that share of a step's price; the set of whole K has no such control"
            )
        if self.still():
            yield "the data point is the inner maximum throughout: there is nothing to attack"

    def pictures(self, count: int = 4, points: int = 121) -> list[dict[str, Any]]:
        """l(theta, .) at several times of the flow, with an inner trajectory of each: data of a figure.

        The step of a trajectory is half the exact one, so that there is a trajectory to see.
        """
        loss, x, shown = self.landscape(""), np.linspace(*self.window(), points), []
        for t in np.linspace(0, self.end, count).tolist():
            theta, half = float(self.theta(t)), float(self.alpha(t)) / 2
            path = np.array([self.landscape.ascent(theta, half, k) for k in range(7)])
            path = path[np.isfinite(path)]
            shown.append(
                {"t": t, "theta": theta, "x": x.tolist(), "l": loss(theta, x).tolist()}
                | {"path": path.tolist(), "losses": loss(theta, path).tolist()}
                | {"maximum": [float(self.branch(theta)), float(self.branch.robust(theta))]}
            )
        return shown

    def window(self) -> tuple[float, float]:
        """The part of x that shows the data point and the inner maxima along the flow."""
        x = np.append(self.branch(self.theta(np.linspace(0, self.end, 101))), self.landscape.point)
        margin, ends = 0.35 * float(np.ptp(x)) or 1.0, self.landscape.ends
        return max(float(x.min()) - margin, ends[0]), min(float(x.max()) + margin, ends[1])


def _zeros(slope: Callable[[Array], Array], low: float, high: float, scale: float) -> list[dict[str, Any]]:
    """Stationary points of a loss of theta, by its slope; none where that is rounding on its scale."""
    theta = np.linspace(low, high, 4002)[1:-1]
    if not (np.abs(slope(theta)) > 1e-12 * scale).any():
        return []
    kinds = {(-1, 1): "minimum", (1, -1): "maximum"}
    return [
        {
            "theta": 0.0 if abs(v) < 1e-12 * (high - low) else v,
            "kind": kinds.get((np.sign(before), np.sign(after)), "inflection"),
        }
        for v, before, after in roots(slope, theta)
    ]


def _rising(t: Array, k: Array) -> list[list[float]]:
    """The intervals on which K* increases, to the resolution of the grid and of 1e-10 of its size.

    Where K* has saturated it neither rises nor falls to that precision; an interval goes on over such parts.
    """
    steps = np.diff(k)
    moving = np.flatnonzero(np.abs(steps) > 1e-10 * np.abs(k).max())
    sign = np.sign(steps[moving])
    turns = np.flatnonzero(np.diff(sign, prepend=0))
    edges = np.append(t[moving[turns]], t[-1])
    return [[float(a), float(b)] for a, b, up in zip(edges, edges[1:], sign[turns], strict=False) if up > 0]
