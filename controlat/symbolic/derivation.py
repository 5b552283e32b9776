"""From a landscape to a schedule: inner maximum, exact step, robust flow, K*(t), its series and its cost.

Every quantity is computed numerically, and symbolically where sympy finds it within its time; a formula is
believed only where it agrees with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from controlat.symbolic import questions
from controlat.symbolic.answers import Answer, agrees, ask
from controlat.symbolic.formula import THETA, X
from controlat.symbolic.landscape import Array, Branch, LandscapeError, choose
from controlat.symbolic.task import ALPHA, GAMMA, HORIZON, TAU, Task

__all__ = ["Derivation"]

T = questions.T
_POINTS = 2001  # of [0, T], where turning points of K* are looked for


class Derivation:
    """Everything that follows from a `Task`, derived at construction.

    Raises:
        LandscapeError: there is no inner maximum that the ascent reaches, or the robust flow leaves its
            domain before the horizon.

    >>> found = Derivation(Task(theta0=1, tau=10, horizon=1))
    >>> print(found.answers["K"].formula, "|", found.answers["theta"].formula)
    2*tau*exp(2*t)/(theta_0**2 + exp(2*t)) | theta_0*exp(-t)
    >>> round(found.cost, 4)
    0.211
    """

    def __init__(self, task: Task) -> None:
        self.task, self.landscape = task, task.landscape
        self.answers: dict[str, Answer] = {}
        self.notes: list[str] = []
        theta0 = float(task.theta0)
        self.points = self.landscape.stationary(theta0)
        chosen = choose(self.landscape, theta0, self.points, task.branch)
        self.index, self.point = chosen
        found = self._ask("the zeros of l_x", questions.stationary, self.landscape.expression)
        self._branch(*found)
        self._losses()
        self._steps()
        self._flow()
        self._schedule()
        self._check_others()

    # ---- asking sympy

    def _ask(self, name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str, str]:
        return ask(name, function, *arguments, numbers=self.landscape.values, seconds=self.task.seconds)

    def _tidy(self, found: sympy.Expr) -> sympy.Expr:
        """The shortest form that is found within the time limit, else the one that is given."""
        shorter = self._ask("a shorter form", questions.tidy, found)[0]
        return found if shorter is None else shorter

    def _agrees(self, formula: sympy.Expr, symbol: sympy.Symbol, at: Array, values: Array) -> bool:
        return agrees(formula.subs(self.task.values), symbol, at, values)

    def _keep(self, key: str, name: str, found: Sequence[Any], by: str, why: str, check: Any) -> None:
        """Keep the first of several answers that agrees with the numbers: check = (symbol, where, values)."""
        for formula in found:
            if self._agrees(formula, *check):
                self.answers[key] = Answer(name, formula, by)
                return
        why = why or f"what sympy found for {name} does not agree with the numbers"
        self.answers[key] = Answer(name, None, "scipy", why)

    def formula(self, key: str) -> sympy.Expr | None:
        """The formula of an answer, None where there is none."""
        return self.answers[key].formula if key in self.answers else None

    @property
    def _sample(self) -> Array:
        """Values of theta at which formulas are compared with numbers: what the flow visits and a tenth more.

        Off the round ones, where 0/0 lurks.
        """
        visited = self.theta(np.linspace(0, float(self.task.horizon), 101))
        margin = 0.1 * (visited.max() - visited.min()) + 1e-3
        low = max(self.branch.domain[0], float(visited.min()) - margin)
        high = min(self.branch.domain[1], float(visited.max()) + margin)
        return np.asarray(low + (high - low) * (np.arange(40) + 0.6180339887) / 40.5)

    # ---- the inner problem

    def _branch(self, formulas: Sequence[sympy.Expr] | None, by: str, why: str) -> None:
        """Follow the chosen maximum as far as it goes, and along the robust flow."""
        start = np.array([float(self.task.theta0)])
        every = [f for f in formulas or () if not f.has(sympy.I)]
        if self.landscape.expression.has(sympy.Function):  # of a periodic l sympy lists one period
            every += [f + 2 * sympy.pi * k for f in every for k in (-2, -1, 1, 2)]
        mine = [f for f in every if self._agrees(f, THETA, start, np.array([self.point.x]))]
        why = why or "sympy does not find this one among the real zeros of l_x"
        where = self.landscape, float(start[0]), self.point.x, self.task.reach
        if self.landscape("xx")(start[0], self.point.x) < -1e-9 * max(1.0, abs(self.point.value)):
            self.branch = Branch(*where)
        elif mine:
            self.branch = Branch(*where, formula=mine[0])
            told = "the inner maximum is flat (l_xx = 0 there): ascent near it is slower than geometric"
            self.notes.append(told)
        else:
            raise LandscapeError(
                f"the inner maximum x = {self.point.x:.6g} at theta = {start[0]:g} is flat (l_xx = 0), and "
                f"{why}"
            )
        self.path = self._integrate()
        self._check_steps(np.linspace(0, float(self.task.horizon), 201))
        at = self._sample
        self._keep("x", "x*(theta)", mine, by, why, (THETA, at, self.branch(at)))

    def _losses(self) -> None:
        """Robust and non-robust loss and their stationary points in theta."""
        loss, x0 = self.landscape.expression, self.landscape.x0
        at = self._sample
        plain = self._tidy(loss.subs(X, x0))
        self.answers["plain"] = Answer("l(theta, x0)", plain)
        robust = None if self.formula("x") is None else loss.subs(X, self.formula("x"))
        self._derived("robust", "L(theta) = l(theta, x*)", robust, (THETA, at, self.branch.robust(at)))
        slope = self.landscape("t")
        low, high = self.task.reach
        self.minima = {
            "plain": _zeros(lambda v: slope(v, np.full_like(v, self.landscape.point)), low, high),
            "robust": _zeros(self.branch.robust_slope, *self.branch.domain),
        }
        for key in ("plain", "robust"):
            known = self.formula(key)
            if known is None:
                continue
            found, _, why = self._ask(f"the minima of {self.answers[key].name}", questions.minima, known)
            numbers = [(f, _real(f.subs(self.task.values))) for f in found or ()]
            for zero in self.minima[key]:
                near = [f for f, v in numbers if v is not None and abs(v - zero["theta"]) < 1e-6]
                if near:
                    zero |= {"text": str(near[0]), "latex": sympy.latex(near[0])}
                elif why:
                    zero["why"] = why

    def _derived(self, key: str, name: str, raw: sympy.Expr | None, check: Any) -> None:
        """An answer that follows from x*(theta) by substitution."""
        if raw is None:
            self.answers[key] = Answer(name, None, "scipy", "there is no formula for x*(theta)")
            return
        found, by, why = self._ask(name, questions.tidy, raw)
        self._keep(key, name, [raw if found is None else found], by, why, check)

    def _steps(self) -> None:
        """Curvature, contraction, exact step, and the Newton step at the data point."""
        land, x = self.landscape, self.formula("x")
        at = self._sample
        at = at[np.isfinite(self.branch.exact_step(at))]
        bent = None if x is None else land.derivative("xx").subs(X, x)
        self._derived("curvature", "l_xx(theta, x*)", bent, (THETA, at, land("xx")(at, self.branch(at))))
        curvature = self.formula("curvature")
        if curvature is not None:
            self.answers["rho"] = Answer(
                "rho",
                1 + ALPHA * curvature,
                why=""
                if land.quadratic
                else "near x*: l is not quadratic in x, so that the first steps differ",
            )
        if x is not None:
            name = "alpha*(theta)"
            found, by, why = self._ask(name, questions.exact_step, land.expression, x, land.x0)
            check = (THETA, at, self.branch.exact_step(at))
            self._keep("alpha", name, [] if found is None else [found], by, why, check)
        else:
            self.answers["alpha"] = Answer(
                "alpha*(theta)", None, "scipy", "there is no formula for x*(theta)"
            )
        if not land.quadratic:
            bent, name = land.derivative("xx").subs(X, land.x0), "Newton step -1/l_xx(theta, x0)"
            flat = self._tidy(bent) == 0
            why = "l_xx = 0 at the data point" if flat else ""
            self.answers["newton"] = Answer(name, None if flat else self._tidy(-1 / bent), why=why)

    # ---- the flow

    def _flow(self) -> None:
        """The robust flow theta' = -dL/dtheta, and t -> theta(t) in closed form if it can be inverted."""
        t = np.linspace(0, float(self.task.horizon), 21)
        loss, start = self.formula("robust"), self.task.start
        name = "theta(t)"
        if loss is None:
            self.answers["theta"] = Answer(name, None, "scipy", "there is no formula for L(theta)")
            return
        speed = self._tidy(-sympy.diff(loss, THETA))
        self.answers["speed"] = Answer("theta' = -dL/dtheta", speed)
        if speed == 0:
            self.answers["theta"] = Answer(name, start)
            return
        values = self.task.values | {THETA: self.task.theta0}
        time, by, why = self._ask("t(theta)", questions.travel_time, speed, values)
        found = None
        if time is not None:
            found, by, why = self._ask(name, questions.flow, time, start)
            self.answers["time"] = Answer("t(theta) - t(theta_0) = t with t(theta)", time, by)
        self._keep("theta", name, found or [], by, why, (T, t, self.theta(t)))

    def _integrate(self) -> Callable[[Any], Any]:
        """theta(t) by Runge-Kutta of order 8."""
        low, high = self.branch.domain
        margin = 1e-9 * (high - low)

        def left(t: float, y: Array) -> float:
            return min(float(y[0]) - low, high - float(y[0])) - margin

        left.terminal = True  # type: ignore[attr-defined]
        horizon = float(self.task.horizon)
        found = solve_ivp(
            lambda t, y: -self.branch.robust_slope(np.clip(y, low, high)),
            (0.0, horizon),
            [float(self.task.theta0)],
            method="DOP853",
            dense_output=True,
            events=left,
            rtol=1e-12,
            atol=1e-13,
            max_step=horizon / 20,
        )
        dense = found.sol
        if found.status == 0 and dense is not None and np.isfinite(found.y).all():
            return lambda t: dense(t)[0]
        reached, where = float(found.t[-1]), float(found.y[0, -1])
        edge = self.task.reach
        why = "it leaves the range where the inner maximum was followed: give a wider theta_range"
        if found.status != 1:
            speed = float(np.abs(self.branch.robust_slope(where)))
            why = f"it cannot be followed further: |theta'| = {speed:.3g} there"
        elif min(abs(where - e) for e in edge) > 1e-3 * (edge[1] - edge[0]):
            why = "there the inner maximum ceases to exist"
        raise LandscapeError(
            f"the robust flow from theta = {float(self.task.theta0):g} comes to theta = {where:.4g} at t = "
            f"{reached:.4g}, before the horizon {horizon:g}, and {why}; or take a shorter horizon"
        )

    def _check_steps(self, t: Array) -> None:
        step = self.branch.exact_step(self.theta(t))
        bad = ~(np.isfinite(step) & (step > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise LandscapeError(
                f"at t = {t[first]:.4g} (theta = {float(self.theta(t[first])):.4g}) no step from the data "
                f"point lands on the inner maximum: (x* - x0)/l_x(theta, x0) = {step[first]:.4g}; take a "
                "shorter horizon, or another branch"
            )

    def theta(self, t: Any) -> Array:
        """theta(t) of the robust flow, for numbers or arrays 0 <= t <= T."""
        return np.asarray(self.path(np.asarray(t, dtype=float)), dtype=float)

    def alpha(self, t: Any) -> Array:
        """alpha*(theta(t))."""
        return self.branch.exact_step(self.theta(t))

    def K(self, t: Any) -> Array:
        """K*(t) = tau/alpha*(theta(t)), as a real number."""
        return float(self.task.tau) / self.alpha(t)

    # ---- the schedule

    def _schedule(self) -> None:
        """K*(t), its Taylor series, where it increases, and the cost of the schedule."""
        horizon = float(self.task.horizon)
        t = np.linspace(0, horizon, 21)
        step, path = self.formula("alpha"), self.formula("theta")
        raw = None if step is None or path is None else TAU / step.subs(THETA, path)
        why = "there is no formula for " + ("alpha*(theta)" if step is None else "theta(t)")
        if raw is None:
            self.answers["K"] = Answer("K*(t)", None, "scipy", why)
        else:
            found, by, why = self._ask("K*(t)", questions.tidy, raw)
            self._keep("K", "K*(t)", [raw if found is None else found], by, why, (T, t, self.K(t)))
        self._series()
        grid = np.linspace(0, horizon, _POINTS)
        self.rising = _rising(grid, self.K(grid))
        inner = _integral(self.K, horizon)
        end = float(self.branch.robust(self.theta(horizon)))
        self.parts = {"terminal": end, "inner": inner}
        self.cost = end + float(self.task.gamma) * inner
        self._cost_formula()

    def _series(self) -> None:
        step, speed, order = self.formula("alpha"), self.formula("speed"), self.task.order
        found = None
        if step is not None and speed is not None:
            found, by, why = self._ask("the series", questions.series, step, speed, order, self.task.start)
        if found is None:
            at = self.task.values | {THETA: self.task.theta0, X: sympy.Float(self.point.x, 30)}
            land = self.landscape
            found, by, why = self._ask(
                "the series", questions.implicit_series, land.expression, land.x0, order, at
            )
            by = "sympy (numbers inserted)"
        self.coefficients: list[sympy.Expr] = [TAU * c for c in found or ()]
        self.series_numbers = [float(c.subs(self.task.values)) for c in self.coefficients]
        if not all(map(np.isfinite, self.series_numbers)):
            self.coefficients, self.series_numbers, why = [], [], "its coefficients are not finite"
        # As it is read, lowest power first: sympy would order the terms by itself.
        terms = [self._tidy(c) for c in self.coefficients]
        terms = [sympy.Mul(c, T**n, evaluate=False) if n else c for n, c in enumerate(terms) if c != 0]
        total = sympy.Add(*terms, evaluate=False)
        told = f"to t^{order}" if self.coefficients else why
        self.answers["series"] = Answer(
            "K*(t) near 0", total if self.coefficients else None, by, told, "none"
        )

    def _cost_formula(self) -> None:
        step, speed, path, loss = (self.formula(key) for key in ("alpha", "speed", "theta", "robust"))
        name = "J"
        if step is None or path is None or loss is None:
            self.answers["J"] = Answer(name, None, "scipy", "there is no formula for K*(t)")
            return
        end = loss.subs(THETA, path.subs(T, HORIZON))
        if speed is None:
            spent, by, why = HORIZON / step.subs(THETA, self.task.start), "sympy", ""
        else:
            values = self.task.values | {THETA: self.task.theta0}
            spent, by, why = self._ask(
                name, questions.spent, step, speed, path, self.task.start, HORIZON, values
            )
        found = [] if spent is None else [self._tidy(end) + GAMMA * TAU * spent]
        where = np.array([float(self.task.horizon)])
        values = {k: v for k, v in self.task.values.items() if k is not HORIZON}
        exact_cost = np.array([self.cost])
        for formula in found:
            if self._agrees(formula.subs(values), HORIZON, where, exact_cost):
                self.answers["J"] = Answer(name, formula, by)
                return
        self.answers["J"] = Answer(
            name, None, "scipy", why or f"sympy's {name} does not agree with the numbers"
        )

    def pictures(self, count: int = 4, points: int = 121) -> list[dict[str, Any]]:
        """l(theta, .) at several times of the flow, with an inner trajectory of each: data of a figure.

        The step of a trajectory is half the exact one, so that there is a trajectory to see.
        """
        found = []
        low, high = self._window()
        for t in np.linspace(0, float(self.task.horizon), count):
            theta = float(self.theta(t))
            x = np.linspace(low, high, points)
            steps = [self.landscape.ascent(theta, float(self.alpha(t)) / 2, k) for k in range(7)]
            path = [float(v) for v in steps if np.isfinite(v)]
            found.append(
                {
                    "t": float(t),
                    "theta": theta,
                    "x": x.tolist(),
                    "l": self.landscape("")(theta, x).tolist(),
                    "path": path,
                    "losses": [float(self.landscape("")(theta, v)) for v in path],
                    "maximum": [float(self.branch(theta)), float(self.branch.robust(theta))],
                }
            )
        return found

    def _window(self) -> tuple[float, float]:
        """The part of x that shows the data point and the inner maxima along the flow."""
        x = self.branch(self.theta(np.linspace(0, float(self.task.horizon), 101)))
        low, high = min(self.landscape.point, float(x.min())), max(self.landscape.point, float(x.max()))
        margin = 0.35 * (high - low) or 1.0
        ends = self.landscape.ends
        return max(low - margin, ends[0]), min(high + margin, ends[1])

    def linear(self, t: Any) -> Array:
        """Amata's approximation: the straight line from K*(0) to K*(T)."""
        first, last = self.K(np.array([0.0, float(self.task.horizon)]))
        return np.asarray(first + (last - first) * np.asarray(t, dtype=float) / float(self.task.horizon))

    def series(self, t: Any) -> Array:
        """The Taylor series of K* at 0, to the order asked for."""
        found = np.polynomial.polynomial.polyval(np.asarray(t, dtype=float), self.series_numbers or [np.nan])
        return np.asarray(found, dtype=float)

    def _check_others(self) -> None:
        """Say where another inner maximum is larger than the one that is followed."""
        horizon = float(self.task.horizon)
        for t in np.linspace(0, horizon, 9):
            theta = float(self.theta(t))
            there = [p for p in self.landscape.stationary(theta) if p.kind == "maximum"]
            best = max(there, key=lambda p: p.value, default=None)
            mine = float(self.branch.robust(theta))
            if best is not None and best.value > mine + 1e-9 * max(1.0, abs(mine)):
                self.notes.append(
                    f"at t = {t:.3g} the inner maximum at x = {best.x:.4g} (l = {best.value:.4g}) is larger "
                    f"than the one followed (x = {float(self.branch(theta)):.4g}, l = {mine:.4g}): what "
                    "follows is about the maximum that is followed, not about the largest"
                )
                return


def _real(value: sympy.Expr) -> float | None:
    number = complex(value.evalf())
    return number.real if abs(number.imag) < 1e-9 else None


def _zeros(slope: Callable[[Array], Array], low: float, high: float) -> list[dict[str, Any]]:
    """Stationary points of a loss of theta, by sign changes of its slope: where, and which kind."""
    theta = np.linspace(low, high, 4002)[1:-1]
    y = slope(theta)
    if (y == 0).mean() > 0.5:
        return []  # the loss is flat
    found = [(float(theta[i]), y[i - 1], y[i + 1]) for i in range(1, len(y) - 1) if y[i] == 0]
    for i in np.flatnonzero(y[:-1] * y[1:] < 0):
        root = brentq(lambda v: float(slope(np.array([v]))[0]), theta[i], theta[i + 1], xtol=1e-15)
        if abs(float(slope(np.array([root]))[0])) <= 1e-6 * (abs(y[i]) + abs(y[i + 1]) + 1e-300) + 1e-12:
            found.append((float(root), y[i], y[i + 1]))
    found = [(0.0 if abs(v) < 1e-12 * (high - low) else v, a, b) for v, a, b in found]
    kinds = [("minimum" if a < 0 < b else "maximum" if a > 0 > b else "inflection") for _, a, b in found]
    zeros = [{"theta": v, "kind": k} for (v, _, _), k in zip(found, kinds, strict=True)]
    return sorted(zeros, key=lambda zero: float(zero["theta"]))


def _integral(values: Callable[[Array], Array], horizon: float) -> float:
    """The integral over [0, T] by Gauss's formula of 16 nodes on 64 panels."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    width = horizon / 64
    t = (np.arange(64)[:, None] + (nodes + 1) / 2) * width
    return float((values(t.ravel()).reshape(t.shape) @ weights).sum() * width / 2)


def _rising(t: Array, k: Array) -> list[list[float]]:
    """The intervals on which K* increases, to the resolution of the grid."""
    up = np.diff(k) > 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], up.astype(int), [0]])))
    least = 1e-6 * np.abs(k).max()  # below it, rounding
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [[float(t[a]), float(t[b])] for a, b in pairs if k[b] - k[a] > least]
