"""From a landscape to a schedule: inner maximum, exact step, robust flow, K*(t), its series and its cost.

Every quantity is computed numerically (`Course`), and symbolically where sympy finds it within its time; a
formula is believed only where it agrees with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import sympy

from controlat._util.limits import unhurried
from controlat.symbolic import questions
from controlat.symbolic.answers import Answer, Budget
from controlat.symbolic.branch import Branch, choose
from controlat.symbolic.course import Course
from controlat.symbolic.landscape import Array, LandscapeError
from controlat.symbolic.symbols import ALPHA, HORIZON, TAU, THETA, T, X
from controlat.symbolic.task import Task

__all__ = ["Derivation"]

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
Attempt = tuple[Any, str, str]  # formulas or None, by whom, why there is none
Check = tuple[sympy.Symbol, Array, Array]  # a formula's symbol, where it is looked at, and what it must give


class Derivation(Course):
    """Everything that follows from a `Task`, derived at construction: first the numbers, then the formulas.

    Raises:
        LandscapeError: there is no inner maximum that the ascent reaches, or the robust flow leaves its
            domain before the horizon.

    >>> derived = Derivation(Task(theta0=1, tau=10, horizon=1))
    >>> print(derived.answers["K"].formula, "|", derived.answers["theta"].formula)
    2*tau*exp(2*t)/(theta_0**2 + exp(2*t)) | theta_0*exp(-t)
    >>> round(derived.cost, 4)
    0.211
    """

    @np.errstate(all="ignore")  # what is not finite is named
    def __init__(self, task: Task) -> None:
        land, theta0 = task.landscape, float(task.theta0)
        self.answers: dict[str, Answer] = {}
        self.notes: list[str] = []
        self.budget = Budget(task.seconds, land.values, task.values)
        _check_x(task)
        self.points = land.stationary(theta0)
        self.index, self.point = choose(land, theta0, self.points, task.branch)
        maxima, formula = self._maxima(task), None
        if self.point.flat:  # it is followed by a formula only
            maxima, formula = self._flat(task, maxima)
        super().__init__(task, Branch(land, theta0, self.point.x, task.reach, formula))
        self._at_start = task.values | {THETA: task.theta0}
        with unhurried():  # sympy has its budget
            self._inner(maxima)
            self._flow()
            self._series()
            self._cost()
            self.notes += self.remarks()

    def series(self, t: Any) -> Array:
        """The Taylor series of K* at 0, to the order asked for."""
        t = np.asarray(t, dtype=float)
        return np.asarray(np.polynomial.polynomial.polyval(t, self.series_numbers or [np.nan]))

    # ---- formulas

    def formula(self, key: str) -> sympy.Expr | None:
        """The formula of an answer, None where there is none."""
        return self.answers[key].formula if key in self.answers else None

    def _keep(self, key: str, check: Check, find: Callable[..., Iterable[Attempt]], *needs: str) -> None:
        """Keep the first formula that agrees with the numbers, of those found from the formulas it needs."""
        missing = [need for need in needs if self.formula(need) is None]
        why = f"there is no formula for {NAMES[missing[0]].split(' = ')[0]}" if missing else ""
        for answer, by, told in () if missing else find(*map(self.formula, needs)):
            why = told or f"what sympy finds for {NAMES[key]} is not borne out by the numbers"
            for formula in answer if isinstance(answer, list) else [answer]:
                if formula is not None and self.budget.agrees(formula, *check):
                    self.answers[key] = Answer(NAMES[key], formula, by)
                    return
        self.answers[key] = Answer(NAMES[key], None, "scipy", why)

    def _forms(self, formula: sympy.Expr) -> list[Attempt]:
        """A formula that is known, in its shortest form and as it stands."""
        return [([self.budget.tidy(formula), formula], "sympy", "")]

    def _maxima(self, task: Task) -> Iterator[Attempt]:
        """The zeros of l_x that are the chosen maximum at theta_0."""
        # x* may be 0 up to rounding: compared on the scale of the range of x.
        wide = task.landscape.ends[1] - task.landscape.ends[0]
        check = THETA, np.array([float(task.theta0)]), np.array([self.point.x + wide])
        question = questions.stationary, task.landscape.expression
        for zeros, by, why in self.budget.attempts("the zeros of l_x", *question):
            if mine := [formula for formula in zeros or () if self.budget.agrees(formula + wide, *check)]:
                yield mine, by, "sympy's holds at theta_0, but not along the flow"
            else:
                yield None, by, why or "sympy does not find this one among the real zeros of l_x"

    def _flat(self, task: Task, attempts: Iterator[Attempt]) -> tuple[Iterator[Attempt], sympy.Expr]:
        """The formulas for a flat maximum, and the first of them."""
        every = list(attempts)
        for formulas, _, _ in every:
            if formulas is not None:
                told = "the inner maximum is flat (l_xx = 0 there): ascent near it is slower than geometric"
                self.notes.append(told)
                return iter(every), formulas[0]
        raise LandscapeError(
            f"the inner maximum x = {self.point.x:.6g} at theta = {float(task.theta0):g} is flat "
            f"(l_xx = 0), and {every[-1][2]}"
        )

    def _inner(self, maxima: Iterable[Attempt]) -> None:
        """The inner maximum, both losses and their minima, curvature, contraction, and the exact step."""
        land, at, forms = self.landscape, self.sample(), self._forms
        loss, bent = land.expression, land.derivative("xx")
        self._keep("x", (THETA, at, self.branch(at)), lambda: maxima)
        self._keep("plain", (THETA, at, land("")(at, land.point)), lambda: forms(loss.subs(X, land.x0)))
        self._keep("robust", (THETA, at, self.branch.robust(at)), lambda x: forms(loss.subs(X, x)), "x")
        self._name_minima()
        at = at[np.isfinite(self.branch.exact_step(at))]
        check = THETA, at, land("xx")(at, self.branch(at))
        self._keep("curvature", check, lambda x: forms(bent.subs(X, x)), "x")
        if (curvature := self.formula("curvature")) is not None:
            why = "" if land.quadratic else "near x*: l is not quadratic in x, so that the first steps differ"
            self.answers["rho"] = Answer(NAMES["rho"], 1 + ALPHA * curvature, why=why)

        def step(x: sympy.Expr) -> Iterable[Attempt]:
            return self.budget.attempts(NAMES["alpha"], questions.exact_step, loss, x, land.x0)

        self._keep("alpha", (THETA, at, self.branch.exact_step(at)), step, "x")
        if land.quadratic:
            return
        here, first = land("xx")(at, land.point), float(land("xx")(float(self.task.theta0), land.point))
        if first < 0 and (here < 0).all():
            self._keep("newton", (THETA, at, -1 / here), lambda: forms(-1 / bent.subs(X, land.x0)))
        else:
            why = f"no Newton step: l_xx = {first:.4g} at the data point and theta_0"
            self.answers["newton"] = Answer(NAMES["newton"], None, "", why)

    def _name_minima(self) -> None:
        """Formulas for the stationary points of both losses, where sympy has them."""
        near = 1e-6 * (self.task.reach[1] - self.task.reach[0])
        for key, points in self.minima.items():
            loss, name = self.formula(key), f"the minima of {NAMES[key]}"
            if loss is None or not points:
                continue
            known, _, why = self.budget.first(name, questions.minima, loss, self.task.values)
            for point in points:
                mine = [formula for formula, value in known or () if abs(value - point["theta"]) < near]
                if mine:
                    point |= {"text": str(mine[0]), "latex": sympy.latex(mine[0])}
                elif why:
                    point["why"] = why

    def _flow(self) -> None:
        """The robust flow theta' = -dL/dtheta, theta(t) if it can be inverted, and K*(t)."""
        t = np.linspace(0, self.end, 21)
        if (loss := self.formula("robust")) is not None:
            self.answers["speed"] = Answer(NAMES["speed"], self.budget.tidy(-sympy.diff(loss, THETA)))
        self._keep("theta", (T, t, self.theta(t)), self._path, "robust", "speed")
        self._keep(
            "K",
            (T, t, self.K(t)),
            lambda step, path: self._forms(TAU / step.subs(THETA, path)),
            *("alpha", "theta"),
        )

    def _path(self, _: sympy.Expr, speed: sympy.Expr) -> Iterator[Attempt]:
        """theta(t), by inverting t(theta)."""
        if speed == 0:
            yield self.task.start, "sympy", ""
            return
        time, by, why = self.budget.first("t(theta)", questions.travel_time, speed, self._at_start)
        if time is None:
            yield None, by, why
            return
        self.answers["time"] = Answer(NAMES["time"], time, by)
        yield from self.budget.attempts(NAMES["theta"], questions.flow, time, self.task.start)

    def _series(self) -> None:
        """K* = sum c_n t^n: from the formulas, else by implicit differentiation."""
        land, order = self.landscape, self.task.order
        explicit = questions.series, self.formula("alpha"), self.formula("speed"), order, self.task.start
        at = self._at_start | {X: sympy.Float(self.point.x, 30)}
        implicit = questions.implicit_series, land.expression, land.x0, order, at, self.still()
        self.coefficients: list[sympy.Expr] = []
        self.series_numbers: list[float] = []
        for question, *arguments in (explicit, implicit):
            if any(argument is None for argument in arguments):
                continue
            for coefficients, by, told in self.budget.attempts("the series", question, *arguments):
                why = told or "what sympy finds for the series is not borne out by the numbers"
                if coefficients is not None and self._holds([TAU * c for c in coefficients]):
                    by = by if question is questions.series else "sympy (numbers inserted)"
                    # As it is read, lowest power first: sympy would order the terms by itself.
                    terms = [self.budget.tidy(c) for c in self.coefficients]
                    total = sympy.Add(*(_power(c, n) for n, c in enumerate(terms) if c != 0), evaluate=False)
                    self.answers["series"] = Answer(NAMES["series"], total, by, f"to t^{order}", "none")
                    return
        self.answers["series"] = Answer(NAMES["series"], None, "scipy", why)

    def _cost(self) -> None:
        """J, which takes sympy longest: last."""
        self._keep(
            "J",
            (HORIZON, np.array([self.end]), np.array([self.cost])),
            lambda _, *known: self.budget.attempts(
                "J", questions.cost, *known, self.task.start, self._at_start
            ),
            *("K", "robust", "alpha", "speed", "theta"),
        )

    def _holds(self, coefficients: list[sympy.Expr]) -> bool:
        """Whether the first two coefficients are K*(0) and its slope; they are kept if so."""
        numbers = np.array([complex(c.subs(self.task.values).evalf()) for c in coefficients])
        h = 1e-4 * self.end
        k = self.K(h * np.arange(5))
        slope = float(np.dot([-25, 48, -36, 16, -3], k)) / (12 * h)  # of fourth order
        near = 1e-3 * float(np.abs(k).max()) / self.end
        good = np.isfinite(numbers).all() and np.abs(numbers.imag).max() < 1e-9
        good = good and np.isclose(numbers[0].real, k[0], rtol=1e-6)
        if good and np.isclose(numbers[1].real, slope, rtol=1e-3, atol=near):
            self.coefficients, self.series_numbers = coefficients, numbers.real.tolist()
            return True
        return False


def _power(c: sympy.Expr, n: int) -> sympy.Expr:
    """c t^n with the coefficient first, and its sign in front."""
    if n and c.could_extract_minus_sign():
        return sympy.Mul(-1, _power(-c, n), evaluate=False)
    return sympy.Mul(c, T**n, evaluate=False) if n else c


def _check_x(task: Task) -> None:
    """Refuse what depends on x by no more than rounding, whatever theta."""
    land = task.landscape
    theta, x = np.meshgrid(np.linspace(*task.reach, 41), np.linspace(*land.ends, 41))
    slope, value = (np.nan_to_num(np.abs(land(by)(theta, x)), posinf=0).max(0) for by in ("x", ""))
    if (slope <= 1e-12 * value / (land.ends[1] - land.ends[0])).all():
        raise LandscapeError(f"l = {land.text} does not depend on x: every x is an inner maximum")
