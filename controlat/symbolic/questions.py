"""What sympy is asked, one question a function: each runs in the child process, under a time limit.

Answers are expressions that the caller checks against numbers before it believes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import sympy
from sympy import Expr, Symbol

from controlat.symbolic.symbols import GAMMA, HORIZON, TAU, THETA, T, X

__all__ = ["cost", "exact_step", "flow", "implicit_series", "minima", "series", "stationary", "tidy"]
__all__ += ["travel_time"]


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
    return formula.replace(
        sympy.log, lambda power: power.exp * sympy.log(power.base) if power.is_Pow else sympy.log(power)
    )


def stationary(landscape: Expr) -> list[Expr]:
    """All real x with l_x(theta, x) = 0, as functions of theta."""
    zeros = sympy.solve(sympy.together(sympy.diff(landscape, X)), X)
    real = [tidy(x) for x in zeros if not x.has(sympy.Piecewise, sympy.RootOf, sympy.I)]
    periods = (0, -2, -1, 1, 2) if landscape.has(sympy.Function) else (0,)  # of which sympy lists one
    return [x + 2 * sympy.pi * k for k in periods for x in real]


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


def _primitive(integrand: Expr, values: Mapping[Symbol, Expr]) -> Expr:
    """An antiderivative in theta, its logarithms real at `values`: log(-y) and log(y) have one derivative."""
    with contextlib.suppress(sympy.PolynomialError):  # roots or exponentials in it: as it stands
        integrand = sympy.apart(sympy.together(integrand), THETA)
    primitive = sympy.integrate(integrand, THETA)
    if primitive.has(sympy.Integral):
        raise ValueError("no closed integral")
    return primitive.replace(sympy.log, lambda y: sympy.log(-y if y.subs(values).is_negative else y))


def travel_time(speed: Expr, values: Mapping[Symbol, Expr]) -> Expr:
    """The integral of 1/theta' over theta: t as a function of theta, up to a constant; real at `values`."""
    return tidy(_primitive(1 / speed, values))


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


def cost(
    loss: Expr, step: Expr, speed: Expr, path: Expr, theta0: Symbol, values: Mapping[Symbol, Expr]
) -> Expr:
    """J = L(theta(T)) + gamma tau int 1/alpha* dt, an integral of 1/(alpha* theta') over theta."""
    end = path.subs(T, HORIZON)
    if speed == 0:
        spent = HORIZON / step.subs(THETA, theta0)
    else:
        primitive = _primitive(1 / (step * speed), values)
        raw = primitive.subs(THETA, end) - primitive.subs(THETA, theta0)
        spent = tidy(sympy.logcombine(sympy.expand_log(raw, force=True), force=True))
    return tidy(loss.subs(THETA, end)) + GAMMA * TAU * spent
