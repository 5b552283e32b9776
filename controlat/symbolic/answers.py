"""Answers of sympy: asked for under a time limit, and believed only where they agree with the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from controlat.symbolic.landscape import Array, compiled
from controlat.symbolic.limits import NotFound, TimeLimit, limited

__all__ = ["Answer", "agrees", "ask"]

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


def ask(
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    numbers: Mapping[sympy.Symbol, Any],
    seconds: float,
) -> tuple[Any, str, str]:
    """Ask sympy with the parameters as symbols, then with their numbers.

    Args:
        name: what is asked for, in words.
        function: the question (`controlat.symbolic.questions`).
        arguments: its arguments.
        numbers: the values of the landscape's parameters.
        seconds: time limit of each of the two.

    Returns:
        The answer, None without one; by whom; why there is none.
    """
    tries = [("sympy", arguments)]
    if numbers:
        inserted = tuple(a.subs(numbers) if isinstance(a, sympy.Basic) else a for a in arguments)
        tries.append(("sympy (numbers inserted)", inserted))
    why = ""
    for by, given in tries:
        try:
            return limited(function, *given, seconds=seconds), by, ""
        except TimeLimit:
            why = f"sympy had not found {name} after {seconds:g} seconds"
        except NotFound:
            why = f"sympy finds no closed form of {name}"
    return None, "scipy", why


def agrees(formula: sympy.Expr, symbol: sympy.Symbol, at: Array, values: Array) -> bool:
    """Whether a formula in one symbol gives the numbers that are known otherwise, to seven digits."""
    try:
        found = compiled(formula, symbol)(at)
    except (TypeError, ValueError, NameError, AttributeError, OverflowError):
        return False  # a function that numpy does not have, or a value that is not a number
    return bool(np.all(np.abs(found - values) <= 1e-7 * (1e-3 + np.abs(values))))
