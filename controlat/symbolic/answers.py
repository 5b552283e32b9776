"""Answers of sympy: asked for under a time limit, and believed only where they agree with the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from controlat.symbolic import questions
from controlat.symbolic.landscape import Array, compiled
from controlat.symbolic.limits import NotFound, TimeLimit, limited

__all__ = ["Answer", "agrees", "attempts"]

_LONG = 160  # operations of an expression that nobody wants to read


@dataclass(frozen=True)
class Answer:
    """One derived quantity: its formula where sympy found one, else how it is known.

    Args:
        name: such as ``theta(t)``.
        formula: the expression, or None.
        by: ``sympy``, ``sympy (numbers inserted)`` or ``scipy``.
        why: why there is no formula, or what the formula leaves out.
        order: sympy's order of terms in print; ``none`` keeps that of a series.
    """

    name: str
    formula: sympy.Expr | None
    by: str = "sympy"
    why: str = ""
    order: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Text, LaTeX and a drawing in characters; none of them where the formula is too long to read."""
        found: dict[str, Any] = {"name": self.name, "by": self.by, "why": self.why}
        if self.formula is None:
            return found
        if sympy.count_ops(self.formula) > _LONG:
            return found | {"why": "; ".join(filter(None, [self.why, "found, but too long to print"]))}
        shown, order = self.formula, self.order
        if order == "none" and shown.has(sympy.Float):  # term by term, which keeps their order
            shown = sympy.Add(*(sympy.N(term, 6) for term in sympy.Add.make_args(shown)), evaluate=False)
        drawn = sympy.pretty(shown, use_unicode=True, wrap_line=False, order=order)
        return found | {
            "text": sympy.sstr(shown, order=order),
            "latex": sympy.latex(shown, order=order),
            "drawn": drawn,
        }


def attempts(
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    numbers: Mapping[sympy.Symbol, Any],
    seconds: float,
) -> Iterator[tuple[Any, str, str]]:
    """Ask sympy with the parameters as symbols, then with their numbers.

    Args:
        name: what is asked for, in words.
        function: the question (`controlat.symbolic.questions`).
        arguments: its arguments.
        numbers: the values of the landscape's parameters.
        seconds: time limit of each of the two.

    Yields:
        The answer, None without one; by whom; why there is none.
    """
    tries = [("sympy", arguments)]
    if numbers:
        inserted = tuple(a.subs(numbers) if isinstance(a, sympy.Basic) else a for a in arguments)
        tries.append(("sympy (numbers inserted)", inserted))
    for by, given in tries:
        try:
            yield limited(function, *given, seconds=seconds), by, ""
        except TimeLimit:
            yield None, "scipy", f"sympy had not found {name} after {seconds:g} seconds"
        except NotFound:
            yield None, "scipy", f"sympy finds no closed form of {name}"


def agrees(formula: sympy.Expr, symbol: sympy.Symbol, at: Array, values: Array, seconds: float) -> bool:
    """Whether a formula in one symbol gives the numbers that are known otherwise, to seven digits.

    Where double precision does not bear it out, a few points are looked at with thirty digits: a formula may
    be right and yet cancel.
    """
    try:
        found = compiled(formula, symbol)(at)
    except Exception:  # whatever lambdify or a function that numpy lacks may raise: then not this way
        found = np.full(np.shape(values), np.nan)
    if _close(found, values, values):
        return True
    if not np.isfinite(found).all():
        return False  # undefined, or by way of complex numbers, as Cardano's formula goes
    few = np.unique(np.linspace(0, len(at) - 1, 5).astype(int))
    try:
        exact = limited(questions.values, formula, symbol, at[few].tolist(), seconds=seconds)
    except (TimeLimit, NotFound):
        return False
    return _close(np.array(exact), values[few], values)


def _close(found: Array, wanted: Array, every: Array) -> bool:
    scale = float(np.max(np.abs(every), initial=0.0)) or 1e-3
    with np.errstate(all="ignore"):
        return bool(np.all(np.abs(found - wanted) <= 1e-7 * np.abs(wanted) + 1e-9 * scale))
