"""From a landscape to a schedule: inner maximum, exact step, robust flow, K*(t), its series and its cost.

Every quantity is computed numerically, and symbolically where sympy finds it within its time; a formula is
believed only where it agrees with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import sympy
from scipy.integrate import fixed_quad

from controlat.symbolic import questions
from controlat.symbolic.answers import Answer, Budget, agrees, attempts
from controlat.symbolic.branch import Branch, choose, higher
from controlat.symbolic.flow import integrate
from controlat.symbolic.formula import THETA, X
from controlat.symbolic.landscape import Array, LandscapeError, roots
from controlat.symbolic.limits import unhurried
from controlat.symbolic.task import (
    ALPHA,
    GAMMA,
    HORIZON,
    TAU,
    Task,
)

__all__ = ["Derivation"]

T = questions.T
_POINTS = 2001  # of [0, T], where turning points of K* are looked for
NAMES = {
    "x": "x*(theta)",
    "robust": "L(theta) = l(theta, x*)",
    "plain": "l(theta, x0)",
    "curvature": "l_xx(theta, x*)",
    "rho": "rho",
    "alpha": "alpha*(theta)",
    "newton": "Newton step -1/l_xx(theta, x0)",
    "speed": "theta' = -dL/dtheta",
    "time": "t(theta) - t(theta_0) = t with t(theta)",
    "theta": "theta(t)",
    "K": "K*(t)",
    "series": "K*(t) near 0",
    "J": "J",
}
Check = tuple[sympy.Symbol, Array, Array]  # a formula's symbol, where it is looked at, and what it must give


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

    @np.errstate(all="ignore")  # what is not finite is named
    def __init__(self, task: Task) -> None:
        self.task, self.landscape = task, task.landscape
        self.answers: dict[str, Answer] = {}
        self.notes: list[str] = []
        self.budget = Budget(task.seconds)
        theta0 = float(task.theta0)
        self._check_x()
        self.points = self.landscape.stationary(theta0)
        chosen = choose(self.landscape, theta0, self.points, task.branch)
        self.index, self.point = chosen
        mine, why = self._formulas() if self.point.flat else ([], "")
        self._branch(mine, why)
        with unhurried():  # the numbers that follow are quick, and sympy has its budget
            self._maximum(*((mine, why) if self.point.flat else self._formulas()))
            self._losses()
            self._steps()
            self._flow()
            self._schedule()
            self._check_others()
            self._remark()

    def _check_x(self) -> None:
        """Refuse what depends on x by no more than rounding."""
        land, task = self.landscape, self.task
        theta, x = np.meshgrid(np.linspace(*task.reach, 41), np.linspace(*land.ends, 41))
        slope, value = (np.nan_to_num(np.abs(land(by)(theta, x)), posinf=0).max() for by in ("x", ""))
        if slope <= 1e-12 * value / (land.ends[1] - land.ends[0]):
            raise LandscapeError(f"l = {land.text} does not depend on x: every x is an inner maximum")

    # ---- asking sympy

    def _attempts(self, name: str, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        return attempts(name, function, *arguments, numbers=self.landscape.values, budget=self.budget)

    def _ask(self, name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str, str]:
        """The first answer that there is, by whom, and why there is none."""
        told: tuple[Any, str, str] = (None, "scipy", "")
        for told in self._attempts(name, function, *arguments):
            if told[0] is not None:
                break
        return told

    def _tidy(self, found: sympy.Expr) -> sympy.Expr:
        """The shortest form that is found within the time limit, else the one that is given."""
        shorter = self._ask("a shorter form", questions.tidy, found)[0]
        return found if shorter is None else shorter

    def _agrees(self, formula: sympy.Expr, symbol: sympy.Symbol, at: Array, values: Array) -> bool:
        return agrees(formula.subs(self.task.values), symbol, at, values, self.budget)

    def _find(
        self, key: str, check: Check, function: Callable[..., Any], *arguments: Any, given: str = "x*(theta)"
    ) -> None:
        """Keep the first answer of sympy's that agrees with the numbers: check = (symbol, where, values).

        An argument that is None is a formula that there is not: what it is one for is `given`.
        """
        name, why = NAMES[key], f"there is no formula for {given}"
        known = all(argument is not None for argument in arguments)
        for found, by, told in self._attempts(name, function, *arguments) if known else ():
            why = told or f"what sympy finds for {name} is not borne out by the numbers"
            for formula in found if isinstance(found, list) else [found]:
                if formula is not None and self._agrees(formula, *check):
                    self.answers[key] = Answer(name, formula, by)
                    return
        if known and function is questions.tidy and self._agrees(arguments[0], *check):
            self.answers[key] = Answer(name, arguments[0])  # as it stands: a shorter form was not found
        else:
            self._without(key, why)

    def _without(self, key: str, why: str) -> None:
        self.answers[key] = Answer(NAMES[key], None, "scipy", why)

    def formula(self, key: str) -> sympy.Expr | None:
        """The formula of an answer, None where there is none."""
        return self.answers[key].formula if key in self.answers else None

    @property
    def _sample(self) -> Array:
        """Values of theta at which formulas are compared with numbers: what the flow visits.

        Off the round ones, where 0/0 lurks; a little wider where the flow stands still.
        """
        visited = self.theta(np.linspace(0, float(self.task.horizon), 101))
        low, high = float(visited.min()), float(visited.max())
        margin = max(0.0, 1e-3 * (self.branch.domain[1] - self.branch.domain[0]) - (high - low))
        low -= min(margin, (low - self.branch.domain[0]) / 2)
        high += min(margin, (self.branch.domain[1] - high) / 2)
        return np.asarray(low + (high - low) * (np.arange(40) + 0.6180339887) / 40.5)

    # ---- the inner problem

    def _formulas(self) -> tuple[list[tuple[sympy.Expr, str]], str]:
        """Zeros of l_x that are the chosen maximum at theta_0, by whom, and why there is none."""
        why, mine = "", list[tuple[sympy.Expr, str]]()
        every = self._attempts("the zeros of l_x", questions.stationary, self.landscape.expression)
        for found, by, told in every:
            why = told or "sympy does not find this one among the real zeros of l_x"
            mine += [(formula, by) for formula in self._mine(found or [])]
            if mine:
                break
        return mine, why

    def _branch(self, mine: Sequence[tuple[sympy.Expr, str]], why: str) -> None:
        """Follow the chosen maximum as far as it goes, by a formula if it is flat, and along the flow."""
        theta0 = float(self.task.theta0)
        where = self.landscape, theta0, self.point.x, self.task.reach
        if not self.point.flat:
            self.branch = Branch(*where)
        elif mine:
            self.branch = Branch(*where, formula=mine[0][0])
            told = "the inner maximum is flat (l_xx = 0 there): ascent near it is slower than geometric"
            self.notes.append(told)
        else:
            raise LandscapeError(
                f"the inner maximum x = {self.point.x:.6g} at theta = {theta0:g} is flat (l_xx = 0), and "
                f"{why}"
            )
        self.path = integrate(self.branch, theta0, float(self.task.horizon))
        self._check_steps(np.linspace(0, float(self.task.horizon), 201))

    def _maximum(self, mine: Sequence[tuple[sympy.Expr, str]], why: str) -> None:
        """Keep the first formula for x*(theta) that holds along the flow."""
        at = self._sample
        for formula, by in mine:
            if self._agrees(formula, THETA, at, self.branch(at)):
                self.answers["x"] = Answer(NAMES["x"], formula, by)
                return
        self._without("x", "sympy's holds at theta_0, but not along the flow" if mine else why)

    def _mine(self, formulas: Sequence[sympy.Expr]) -> list[sympy.Expr]:
        """Those zeros of l_x that are the chosen maximum at theta_0."""
        every = [f for f in formulas if not f.has(sympy.I)]
        if self.landscape.expression.has(sympy.Function):  # of a periodic l sympy lists one period
            every += [f + 2 * sympy.pi * k for f in every for k in (-2, -1, 1, 2)]
        start = np.array([float(self.task.theta0)])
        # x* may be 0 up to rounding: compared on the scale of the range of x.
        wide = self.landscape.ends[1] - self.landscape.ends[0]
        point = np.array([self.point.x])
        return [f for f in every if self._agrees(f + wide, THETA, start, point + wide)]

    def _losses(self) -> None:
        """Robust and non-robust loss and their stationary points in theta."""
        land, at = self.landscape, self._sample
        plain = land.expression.subs(X, land.x0)
        check = THETA, at, land("")(at, np.full_like(at, land.point))
        self._find("plain", check, questions.tidy, plain)
        robust = None if self.formula("x") is None else land.expression.subs(X, self.formula("x"))
        self._find("robust", (THETA, at, self.branch.robust(at)), questions.tidy, robust)
        reach, slope = self.task.reach, land("t")
        grid = np.linspace(*reach, 41)[:, None], np.linspace(*self._window(), 41)[None, :]
        known = np.abs(land("")(*grid))
        scale = float(np.max(np.where(np.isfinite(known), known, 0.0))) / (reach[1] - reach[0])
        self.minima = {
            "plain": zeros(lambda v: slope(v, np.full_like(v, land.point)), *reach, scale),
            "robust": zeros(self.branch.robust_slope, *self.branch.domain, scale),
        }
        for key in ("plain", "robust"):
            self._name_zeros(key, 1e-6 * (reach[1] - reach[0]))

    def _name_zeros(self, key: str, near: float) -> None:
        """Formulas for the stationary points of a loss, where sympy has them."""
        loss = self.formula(key)
        if loss is None or not self.minima[key]:
            return
        name = f"the minima of {self.answers[key].name}"
        found, _, why = self._ask(name, questions.minima, loss, self.task.values)
        for zero in self.minima[key]:
            mine = [f for f, v in found or () if abs(v - zero["theta"]) < near]
            if mine:
                zero |= {"text": str(mine[0]), "latex": sympy.latex(mine[0])}
            elif why:
                zero["why"] = why

    def _steps(self) -> None:
        """Curvature, contraction, exact step, and the Newton step at the data point."""
        land, x, at = self.landscape, self.formula("x"), self._sample
        at = at[np.isfinite(self.branch.exact_step(at))]
        bent = None if x is None else land.derivative("xx").subs(X, x)
        self._find("curvature", (THETA, at, land("xx")(at, self.branch(at))), questions.tidy, bent)
        curvature = self.formula("curvature")
        if curvature is not None:
            near = "near x*: l is not quadratic in x, so that the first steps differ"
            self.answers["rho"] = Answer(
                NAMES["rho"], 1 + ALPHA * curvature, why="" if land.quadratic else near
            )
        check = THETA, at, self.branch.exact_step(at)
        self._find("alpha", check, questions.exact_step, land.expression, x, land.x0)
        if not land.quadratic:
            self._newton_step(at)

    def _newton_step(self, at: Array) -> None:
        land = self.landscape
        bent = land("xx")(at, np.full_like(at, land.point))
        start = float(land("xx")(float(self.task.theta0), land.point))
        if not (start < 0 and (bent < 0).all()):
            why = f"no Newton step: l_xx = {start:.4g} at the data point and theta_0"
            self.answers["newton"] = Answer(NAMES["newton"], None, "", why)
            return
        newton = -1 / land.derivative("xx").subs(X, land.x0)
        self._find("newton", (THETA, at, -1 / bent), questions.tidy, newton)

    # ---- the flow

    def _flow(self) -> None:
        """The robust flow theta' = -dL/dtheta, and t -> theta(t) in closed form if it can be inverted."""
        t = np.linspace(0, float(self.task.horizon), 21)
        loss, start = self.formula("robust"), self.task.start
        if loss is None:
            self._without("theta", "there is no formula for L(theta)")
            return
        speed = self._tidy(-sympy.diff(loss, THETA))
        self.answers["speed"] = Answer(NAMES["speed"], speed)
        if speed == 0:
            self.answers["theta"] = Answer(NAMES["theta"], start)
            return
        values = self.task.values | {THETA: self.task.theta0}
        time, by, why = self._ask("t(theta)", questions.travel_time, speed, values)
        if time is None:
            self._without("theta", why)
            return
        self.answers["time"] = Answer(NAMES["time"], time, by)
        self._find("theta", (T, t, self.theta(t)), questions.flow, time, start)

    def _check_steps(self, t: Array) -> None:
        step = self.branch.exact_step(self.theta(t))
        bad = ~(np.isfinite(step) & (step > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise LandscapeError(
                f"at t = {t[first]:.4g} (theta = {float(self.theta(t[first])):.4g}) no step from the data "
                f"point lands on the inner maximum: (x* - x0)/l_x(theta, x0) = {step[first]:.4g}; take "
                + ("a shorter horizon, or " if first else "")
                + "another branch or data point"
            )

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

    # ---- the schedule

    def _schedule(self) -> None:
        """K*(t), its Taylor series, where it increases, and the cost of the schedule."""
        horizon = float(self.task.horizon)
        t = np.linspace(0, horizon, 21)
        step, path = self.formula("alpha"), self.formula("theta")
        raw = None if step is None or path is None else TAU / step.subs(THETA, path)
        given = NAMES["alpha" if step is None else "theta"]
        self._find("K", (T, t, self.K(t)), questions.tidy, raw, given=given)
        self._series()
        grid = np.linspace(0, horizon, _POINTS)
        self.rising = _rising(grid, self.K(grid))
        inner = float(fixed_quad(self.K, 0, horizon, n=400)[0])
        end = float(self.branch.robust(self.theta(horizon)))
        self.parts = {"terminal": end, "inner": inner}
        self.cost = end + float(self.task.gamma) * inner
        self._cost_formula()

    def _series(self) -> None:
        """K* = sum c_n t^n: from the formulas, else by implicit differentiation."""
        step, speed, order = self.formula("alpha"), self.formula("speed"), self.task.order
        found, by, why = None, "scipy", ""
        if step is not None and speed is not None:
            found, by, why = self._ask("the series", questions.series, step, speed, order, self.task.start)
        if not self._take(found):
            land = self.landscape
            at = self.task.values | {THETA: self.task.theta0, X: sympy.Float(self.point.x, 30)}
            visited = self.branch(self.theta(np.linspace(0, float(self.task.horizon), 21)))
            still = bool((np.abs(visited - land.point) < 1e-9).all())
            found, _, why = self._ask(
                "the series", questions.implicit_series, land.expression, land.x0, order, at, still
            )
            by = "sympy (numbers inserted)"
            if not self._take(found):
                told = why or "what sympy finds for the series is not borne out by the numbers"
                self._without("series", told)
                return
        # As it is read, lowest power first: sympy would order the terms by itself.
        terms = [self._tidy(c) for c in self.coefficients]
        terms = [_power(c, n) for n, c in enumerate(terms) if c != 0]
        total = sympy.Add(*terms, evaluate=False)
        self.answers["series"] = Answer(NAMES["series"], total, by, f"to t^{order}", "none")

    def _take(self, found: Sequence[sympy.Expr] | None) -> bool:
        """Keep coefficients whose first two agree with K*(0) and its slope; whether they do."""
        self.coefficients = [TAU * c for c in found or ()]
        numbers = [complex(c.subs(self.task.values).evalf()) for c in self.coefficients]
        self.series_numbers = [n.real for n in numbers]
        if numbers and np.isfinite(numbers).all() and max(abs(n.imag) for n in numbers) < 1e-9:
            h = 1e-4 * float(self.task.horizon)
            k = self.K(h * np.arange(5))
            slope = float(np.dot([-25, 48, -36, 16, -3], k)) / (12 * h)  # of fourth order
            scale = float(np.abs(k).max()) / float(self.task.horizon)
            if np.isclose(self.series_numbers[0], k[0], rtol=1e-6) and np.isclose(
                self.series_numbers[1], slope, rtol=1e-3, atol=1e-3 * scale
            ):
                return True
        self.coefficients, self.series_numbers = [], []
        return False

    def _cost_formula(self) -> None:
        step, speed, path, loss = (self.formula(key) for key in ("alpha", "speed", "theta", "robust"))
        if step is None or path is None or loss is None:
            self._without("J", "there is no formula for K*(t)")
            return
        end = loss.subs(THETA, path.subs(T, HORIZON))
        if speed is None or speed == 0:
            spent, by, why = HORIZON / step.subs(THETA, self.task.start), "sympy", ""
        else:
            values = self.task.values | {THETA: self.task.theta0}
            spent, by, why = self._ask(
                "J", questions.spent, step, speed, path, self.task.start, HORIZON, values
            )
        if spent is not None:
            cost, why = (
                self._tidy(end) + GAMMA * TAU * spent,
                "what sympy finds for J is not borne out by the numbers",
            )
            if self._agrees(cost, HORIZON, np.array([float(self.task.horizon)]), np.array([self.cost])):
                self.answers["J"] = Answer(NAMES["J"], cost, by)
                return
        self._without("J", why)

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

    def _remark(self) -> None:
        """What a reader might take for more than it is."""
        t = np.linspace(0, float(self.task.horizon), _POINTS)
        k = self.K(t)
        if (k < 1).any():
            self.notes.append(
                f"K* < 1 during {np.mean(k < 1):.0%} of the time: less than one step of alpha*, which is "
                "taken to reach x* at that share of a step's price; the set of whole K has no such control"
            )
        if (np.abs(self.branch(self.theta(t)) - self.landscape.point) < 1e-9).all():
            self.notes.append("the data point is the inner maximum throughout: there is nothing to attack")

    def _check_others(self) -> None:
        """Say where l is larger elsewhere than at the inner maximum that is followed."""
        for t in np.linspace(0, float(self.task.horizon), 33):
            theta = float(self.theta(t))
            mine = float(self.branch.robust(theta))
            above = higher(self.landscape, theta, mine)
            if above is not None:
                self.notes.append(
                    f"at t = {t:.3g} l is larger at x = {above[0]:.4g} (l = {above[1]:.4g}) than at the "
                    f"inner maximum that is followed (x = {float(self.branch(theta)):.4g}, l = {mine:.4g}): "
                    "what follows is about the maximum that is followed, not about the largest"
                )
                return


def _power(c: sympy.Expr, n: int) -> sympy.Expr:
    """c t^n with the coefficient first, and its sign in front."""
    if n == 0:
        return c
    if c.could_extract_minus_sign():
        return sympy.Mul(-1, _power(-c, n), evaluate=False)
    return sympy.Mul(c, T**n, evaluate=False)


def zeros(slope: Callable[[Array], Array], low: float, high: float, scale: float) -> list[dict[str, Any]]:
    """Stationary points of a loss of theta, by sign changes of its slope; none where the loss is constant.

    Args:
        slope: dL/dtheta, for arrays.
        low: begin of the range of theta.
        high: its end.
        scale: size of slopes below whose 1e-12th part they are rounding.
    """
    theta = np.linspace(low, high, 4002)[1:-1]
    if not (np.abs(slope(theta)) > 1e-12 * scale).any():
        return []
    return [
        {
            "theta": 0.0 if abs(v) < 1e-12 * (high - low) else v,
            "kind": "minimum" if before < 0 < after else "maximum" if before > 0 > after else "inflection",
        }
        for v, before, after in roots(slope, theta)
    ]


def _rising(t: Array, k: Array) -> list[list[float]]:
    """The intervals on which K* increases, to the resolution of the grid and of 1e-10 of its size.

    Where K* has saturated it neither rises nor falls to that precision; an interval goes on over such parts.
    """
    steps = np.diff(k)
    sign = np.where(np.abs(steps) <= 1e-10 * np.abs(k).max(), 0, np.sign(steps))
    moving = np.flatnonzero(sign)
    if not len(moving):
        return []
    last = moving[np.clip(np.searchsorted(moving, np.arange(len(sign)), side="right") - 1, 0, None)]
    up = (sign[last] > 0).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], up, [0]])))
    return [[float(t[a]), float(t[b])] for a, b in zip(edges[::2], edges[1::2], strict=True)]
