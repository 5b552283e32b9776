"""What sympy is asked, one question a function: each runs in the child process, under a time limit.

Answers are expressions that the caller checks against numbers before it believes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
from sympy import Expr, Symbol

from controlat.symbolic.formula import THETA, X

__all__ = ["T", "exact_step", "flow", "implicit_series", "minima", "series", "spent", "stationary", "tidy"]
__all__ += ["travel_time", "values"]

T = Symbol("t", nonnegative=True)  # time


def tidy(formula: Expr) -> Expr:
    """The shortest of the usual forms of an expression."""
    simple = sympy.simplify(formula)
    forms = [formula, simple, sympy.together(simple), sympy.factor(formula), sympy.factor(simple)]
    return min(map(_powers_out, forms), key=_effort)


def _effort(form: Expr) -> tuple[int, int]:
    """How much there is to read: operations, and fractions inside."""
    fractions = sum(1 for part in sympy.preorder_traversal(form) if part.is_Rational and not part.is_Integer)
    return int(sympy.count_ops(form)) + 2 * fractions, len(str(form))


def _powers_out(formula: Expr) -> Expr:
    """log(b^p) as p log(b), which is how people write it."""

    def out(power: Expr) -> Expr:
        return power.exp * sympy.log(power.base) if power.is_Pow else sympy.log(power)

    return formula.replace(sympy.log, out)


def _real_logs(primitive: Expr, values: Mapping[Symbol, Expr]) -> Expr:
    """A primitive whose logarithms are real where `values` say: log(-y) and log(y) have one derivative."""

    def real(argument: Expr) -> Expr:
        return sympy.log(-argument if argument.subs(values).is_negative else argument)

    return primitive.replace(sympy.log, real)


def values(formula: Expr, symbol: Symbol, at: Sequence[float]) -> list[float]:
    """A formula in one symbol, evaluated with thirty digits; nan where it is not real."""
    precise = [formula.subs(symbol, sympy.Float(v, 40)).evalf(30) for v in at]
    real = [complex(v) if v.is_number else complex("nan") for v in precise]
    return [v.real if abs(v.imag) <= 1e-12 * (1 + abs(v.real)) else float("nan") for v in real]


def stationary(landscape: Expr) -> list[Expr]:
    """All x with l_x(theta, x) = 0, as functions of theta."""
    zeros = sympy.solve(sympy.together(sympy.diff(landscape, X)), X)
    return [tidy(x) for x in zeros if not x.has(sympy.Piecewise, sympy.RootOf)]


def minima(loss: Expr, numbers: Mapping[Symbol, Expr]) -> list[tuple[Expr, float]]:
    """All real theta with dL/dtheta = 0, and their numbers."""
    zeros = sympy.solve(sympy.together(sympy.diff(loss, THETA)), THETA)
    pairs = [(value, complex(value.subs(numbers).evalf())) for value in zeros]
    return [(tidy(value), n.real) for value, n in pairs if abs(n.imag) <= 1e-9 * (1 + abs(n.real))]


def exact_step(landscape: Expr, x_star: Expr, x0: Expr) -> Expr:
    """alpha*(theta) = (x* - x0)/l_x(theta, x0); -1/l_xx, its limit, where the data point is the maximum."""
    if sympy.simplify(x_star - x0) == 0:
        return tidy(-1 / sympy.diff(landscape, X, 2).subs(X, x_star))
    return tidy((x_star - x0) / sympy.diff(landscape, X).subs(X, x0))


def travel_time(speed: Expr, values: Mapping[Symbol, Expr]) -> Expr:
    """The integral of 1/theta' over theta: t as a function of theta, up to a constant; real at `values`."""
    return tidy(_real_logs(_primitive(1 / speed), values))


def _primitive(integrand: Expr) -> Expr:
    """An antiderivative in theta, in closed form."""
    try:
        parts = sympy.apart(sympy.together(integrand), THETA)
    except sympy.PolynomialError:  # roots or exponentials in it
        parts = integrand
    primitive = sympy.integrate(parts, THETA)
    if primitive.has(sympy.Integral):
        raise ValueError("no closed integral")
    return primitive


def flow(time: Expr, theta0: Symbol) -> list[Expr]:
    """theta(t) by inverting t(theta) - t(theta_0) = t; every branch that sympy finds."""
    equation = sympy.expand_log(time - time.subs(THETA, theta0), force=True) - T
    return [tidy(value) for value in sympy.solve(equation, THETA)]


def series(step: Expr, speed: Expr, order: int, theta0: Expr) -> list[Expr]:
    """Taylor coefficients of 1/alpha*(theta(t)) at t = 0: (theta' d/dtheta)^n (1/alpha*) / n! at theta_0."""
    current, coefficients = 1 / step, []
    for n in range(order + 1):
        coefficients.append(tidy(current.subs(THETA, theta0)) / sympy.factorial(n))
        current = tidy(speed * sympy.diff(current, THETA))
    return coefficients


def implicit_series(
    landscape: Expr, x0: Expr, order: int, at: Mapping[Symbol, Expr], still: bool
) -> list[Expr]:
    """The same where x* has no formula: along the flow x* moves by -l_xtheta/l_xx theta'; numbers at `at`.

    Where the data point is the maximum and stays it (`still`), 1/alpha* is -l_xx, the limit of 0/0.
    """
    slope = sympy.diff(landscape, X)
    speed = -sympy.diff(landscape, THETA)
    drift = -sympy.diff(slope, THETA) / sympy.diff(slope, X) * speed
    current = -sympy.diff(slope, X) if still else slope.subs(X, x0) / (X - x0)
    coefficients = []
    for n in range(order + 1):
        coefficients.append(sympy.Float(current.evalf(subs=dict(at)) / sympy.factorial(n)))
        current = speed * sympy.diff(current, THETA) + drift * sympy.diff(current, X)
    return coefficients


def spent(
    step: Expr, speed: Expr, path: Expr, theta0: Expr, horizon: Symbol, values: Mapping[Symbol, Expr]
) -> Expr:
    """The integral of 1/alpha* over time from 0 to the horizon, as one of 1/(alpha* theta') over theta."""
    primitive = _real_logs(_primitive(1 / (step * speed)), values)
    raw = primitive.subs(THETA, path.subs(T, horizon)) - primitive.subs(THETA, theta0)
    return tidy(sympy.logcombine(sympy.expand_log(raw, force=True), force=True))
