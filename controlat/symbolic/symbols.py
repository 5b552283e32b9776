"""Symbols of formulas l(theta, x), the functions known in them, and numbers read exactly."""

from __future__ import annotations

import keyword
import numbers
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

import sympy
from sympy import Expr, Rational, Symbol

from controlat._util.checks import number

__all__ = ["ALPHA", "CONSTANTS", "FUNCTIONS", "GAMMA", "HORIZON", "TAU", "THETA", "T", "X", "exact"]
__all__ += ["parameter_symbols", "signed"]

THETA = sympy.Symbol("theta", real=True)
X = sympy.Symbol("x", real=True)
T = sympy.Symbol("t", nonnegative=True)  # time
TAU, GAMMA, HORIZON, ALPHA = (sympy.Symbol(name, positive=True) for name in ("tau", "gamma", "T", "alpha"))
CONSTANTS: Mapping[str, Expr] = MappingProxyType({"pi": sympy.pi})
NAMES: Mapping[str, Expr] = {"theta": THETA, "x": X, **CONSTANTS}
_SAME = "exp sqrt sin cos tan sinh cosh tanh asin acos atan asinh erf"  # called so by sympy and by users
FUNCTIONS: Mapping[str, Callable[[Expr], Expr]] = MappingProxyType(
    {"log": sympy.log, "ln": sympy.log} | {name: getattr(sympy, name) for name in _SAME.split()}
)
HUGE = 10**100  # constants lie in [1/HUGE, HUGE] in magnitude, or are 0

_RESERVED = {"t", "tau", "gamma", "theta_0", "T", "alpha", "K", *NAMES, *FUNCTIONS, *keyword.kwlist}
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,19}", re.ASCII)


def exact(value: object, name: str) -> Rational:
    """Read a number exactly; a float is the decimal number that it is printed as.

    Args:
        value: an int, a float, a fraction, or a text such as ``"8/255"``, ``"0.3"``, ``"1e-3"``.
        name: what the number is, for the error.

    Raises:
        ValueError: it is not a number, not finite, or has more than 100 digits.

    >>> exact(0.1, "a"), exact("8/255", "eps")
    (1/10, 8/255)
    """
    if isinstance(value, str) and len(value) > 100:
        raise ValueError(f"{name} must be a number of at most 100 characters, got {len(value)} of them")
    nearest = number(value, name)
    if isinstance(value, str):
        return Rational(Fraction(value.strip()))
    if isinstance(value, numbers.Rational):
        return Rational(int(value.numerator), int(value.denominator))
    return Rational(Fraction(repr(nearest)))


def parameter_symbols(values: Mapping[str, object]) -> tuple[dict[str, Symbol], dict[Symbol, Rational]]:
    """Symbols for the named parameters of a formula: real, and positive or negative as their values are.

    Args:
        values: value by name, as `exact` reads them.

    Returns:
        The symbol of each name, for `parse`; the value of each symbol, for ``subs``.

    Raises:
        ValueError: a name is not allowed, or a value is no number or of unreasonable size.

    >>> from controlat.symbolic.formula import parse
    >>> symbols, known = parameter_symbols({"a": 0.5})
    >>> parse("a*x^2", symbols), known
    (a*x**2, {a: 1/2})
    """
    symbols, known = {}, {}
    for name, value in values.items():
        if not (isinstance(name, str) and _PARAMETER.fullmatch(name)):
            allowed = "a letter, then up to 19 letters, digits and underscores"
            raise ValueError(f"a parameter's name must be {allowed}, got {name!r}")
        if name in _RESERVED:
            raise ValueError(f"a parameter cannot be called {name}: the name has a meaning; choose another")
        exactly = exact(value, name)
        if exactly and not Rational(1, HUGE) <= abs(exactly) <= HUGE:
            raise ValueError(
                f"{name} must be 0 or between {1 / HUGE:g} and {HUGE:g} in magnitude, got {value!r}"
            )
        symbols[name] = signed(name, exactly)
        known[symbols[name]] = exactly
    return symbols, known


def signed(name: str, value: Rational) -> Symbol:
    """A real symbol with the sign of its value, so that sympy knows which branch of a root is meant."""
    return Symbol(name, **{"positive" if value > 0 else "negative" if value < 0 else "real": True})
