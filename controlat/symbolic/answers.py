"""Answers of sympy: asked for under a time limit, and believed only where they agree with the numbers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
from sympy.printing.pretty.pretty_symbology import pretty_symbol

from controlat._util.limits import LATE, NotFound, TimeLimit, limited, within
from controlat.symbolic import questions
from controlat.symbolic.landscape import Array, compiled

__all__ = ["Answer", "Budget"]

_TIDY = 5.0  # seconds for a shorter form of what is known already
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
        """Text, LaTeX and the equation in characters; none of them where the formula is too long to read."""
        plain: dict[str, Any] = {"name": self.name, "by": self.by, "why": self.why}
        shown, order = self.formula, self.order
        if shown is None:
            return plain
        if sympy.count_ops(shown) > _LONG:
            return plain | {"why": "; ".join(filter(None, [self.why, "found, but too long to print"]))}
        if order == "none" and shown.has(sympy.Float):  # term by term, which keeps their order
            shown = sympy.Add(*(sympy.N(term, 6) for term in sympy.Add.make_args(shown)), evaluate=False)
        left = sympy.Symbol(re.sub(r"[A-Za-z]\w*", lambda match: pretty_symbol(match[0]), self.name))
        equation = sympy.Eq(left, shown, evaluate=False)
        drawn = sympy.pretty(equation, use_unicode=True, wrap_line=False, order=order)
        texts = {"text": sympy.sstr(shown, order=order), "latex": sympy.latex(shown, order=order)}
        return plain | texts | {"drawn": drawn}


@dataclass
class Budget:
    """Time for sympy: a question gets half of what is left of it, so that others get some if it hangs.

    Args:
        seconds: in all, from now on.
        parameters: the values of the landscape's parameters.
        values: the values of all symbols but theta, x and t.
        late: what was not answered for lack of time, in words.
    """

    seconds: float
    parameters: Mapping[sympy.Symbol, Any]
    values: Mapping[sympy.Symbol, Any]
    late: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def _ask(self, name: str, function: Callable[..., Any], *arguments: Any, most: float = np.inf) -> Any:
        """The answer of `limited`; what was too late is noted under its name, if it has one."""
        left = (self.seconds - (time.monotonic() - self._began)) / 2
        try:
            if left <= 0:
                raise TimeLimit(LATE)
            with within(2 * left):  # the start of a child process counts, too
                return limited(function, *arguments, seconds=min(left, most))
        except TimeLimit:
            if name and name not in self.late:
                self.late.append(name)
            raise

    def attempts(
        self, name: str, function: Callable[..., Any], *arguments: Any
    ) -> Iterator[tuple[Any, str, str]]:
        """Ask sympy with the parameters as symbols, then with their numbers.

        Args:
            name: what is asked for, in words.
            function: the question (`controlat.symbolic.questions`).
            arguments: its arguments.

        Yields:
            The answer, None without one; by whom; why there is none.
        """
        tries = [("sympy", arguments)]
        if self.parameters:
            inserted = (a.subs(self.parameters) if isinstance(a, sympy.Basic) else a for a in arguments)
            tries.append(("sympy (numbers inserted)", tuple(inserted)))
        for by, given in tries:
            try:
                yield self._ask(name, function, *given), by, ""
            except TimeLimit:
                yield None, "scipy", f"sympy did not find {name} within its time"
            except NotFound:
                yield None, "scipy", f"sympy finds no closed form of {name}"

    def first(self, name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str, str]:
        """The first of the `attempts` with an answer, else the last."""
        tried = (None, "scipy", "")
        for tried in self.attempts(name, function, *arguments):
            if tried[0] is not None:
                break
        return tried

    def tidy(self, formula: sympy.Expr) -> sympy.Expr:
        """The shortest form that is found in a few seconds, else the one that is given."""
        try:
            return self._ask("", questions.tidy, formula, most=_TIDY)
        except (TimeLimit, NotFound):
            return formula

    def agrees(self, formula: sympy.Expr, symbol: sympy.Symbol, at: Array, wanted: Array) -> bool:
        """Whether a formula in one symbol gives the numbers that are known otherwise, to seven digits."""
        try:
            given = compiled(formula.subs(self.values), symbol)(at)
        except Exception:  # whatever lambdify or a function that numpy lacks may raise: then not this way
            return False
        scale = float(np.max(np.abs(wanted), initial=0.0)) or 1e-3
        with np.errstate(all="ignore"):
            return np.allclose(given, wanted, rtol=1e-7, atol=1e-9 * scale)
