"""Formulas l(theta, x): read from Python's syntax tree, of which a short list of nodes is allowed.

A formula comes from a configuration or a command line, so it is never given to `eval`, nor to `sympify` and
`parse_expr`, which call it. It is read in the child process of `controlat._util.limits`: sympy computes at
once what it can, and a short text can ask for any amount of time and memory. Numbers and exponents are
bounded besides, because what is read here is differentiated and evaluated later, in this process.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import accumulate

import sympy
from sympy import Expr, Rational, Symbol

from controlat._util.limits import NotFound, TimeLimit, check, limited
from controlat.symbolic.symbols import FUNCTIONS, HUGE, NAMES, THETA, X

__all__ = ["FormulaError", "parse"]

_POWERS = (sympy.exp, sympy.sinh, sympy.cosh, sympy.tanh)  # functions that sympy may turn into powers
_OPERATIONS: Mapping[type, Callable[..., Expr]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.USub: operator.neg, ast.UAdd: operator.pos},
}

SECONDS = 30.0  # for sympy to read a formula and to differentiate it twice
LENGTH, DEPTH, NODES = 2000, 50, 300  # characters of a formula; levels of nesting; numbers, names, operations
DIGITS, EXPONENT = 40, 100  # of a number as it is written
POWER, TOTAL = 64, 256  # a constant exponent; the product of such along powers of powers
ROOT = 10_000  # denominator of a constant exponent: for 3^(-1/n) sympy computes 3^(n - 1)
_ODD = re.compile(r"[^A-Za-z0-9_θ.+\-*/^() \t\r\n]")
_NUMBER = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:[eE]([+-]?[0-9]+))?")
_ALLOWED = "numbers, names, + - * / ^ and parentheses are"
_PYTHON = {"^": "**", "θ": "theta", "\t": " ", "\r": " ", "\n": " "}


class FormulaError(ValueError):
    """A formula that is refused; the message says where and why."""


def parse(
    text: str,
    parameters: Mapping[str, Symbol] | None = None,
    values: Mapping[Symbol, Rational] | None = None,
) -> Expr:
    """Read a formula such as ``theta^2/2 - (x - theta)^2/(theta^2 + 1)``.

    Numbers are exact: 0.1 is 1/10. ``^`` and ``**`` are the same, bind to the right and before a minus sign:
    -x^2 is -(x^2). Products are written with ``*``.

    Args:
        text: the formula.
        parameters: further names, such as those of `parameter_symbols`.
        values: their values: with them inserted, too, the formula must be harmless.

    Raises:
        FormulaError: the text is no formula of the known names, it is too long, it holds a constant that is
            not a real number of reasonable size, or sympy does not come to an end with it; the message names
            the position, counted from 1.
        TimeLimit: the deadline of `controlat._util.limits.within` has passed.

    >>> parse("x - 0.1*θ^2")
    -theta**2/10 + x
    >>> parse("sin x")
    Traceback (most recent call last):
    controlat.symbolic.formula.FormulaError: formula: invalid syntax, at character 5 of "sin x"; a product is
    written 2*x, a function sin(x), a power x^2
    """
    try:
        expression = limited(read, text, dict(parameters or {}), dict(values or {}), seconds=SECONDS)
    except (TimeLimit, NotFound) as error:
        check()
        late = f"does not come to an end with it in {SECONDS:g} seconds"
        why = late if isinstance(error, TimeLimit) else f"fails on it ({error})"
        raise FormulaError(f"formula: sympy {why}; write it in simpler terms") from None
    if isinstance(expression, str):
        raise FormulaError(expression)
    return expression


def read(text: str, parameters: Mapping[str, Symbol], values: Mapping[Symbol, Rational]) -> Expr | str:
    """What `parse` asks the child process: the expression, or why there is none."""
    try:
        expression = _Reader(text, {**NAMES, **parameters}).expression()
    except FormulaError as error:
        return str(error)
    slopes = [sympy.diff(expression, symbol) for symbol in (THETA, X)]
    bends = [sympy.diff(slope, symbol) for slope in slopes for symbol in (THETA, X)]
    for known in (expression, *slopes, *bends):  # what a landscape will do: if it hangs, then here
        known.subs(values)
    return expression


class _Reader:
    """From the text to a syntax tree, and from its leaves up to an expression."""

    def __init__(self, text: str, known: Mapping[str, Expr]) -> None:
        if not isinstance(text, str):
            raise FormulaError(f"formula: it must be a text, got a {type(text).__name__}")
        self.text, self.known = text, known
        begin = len(text) - len(text.lstrip())
        self.source = "".join(_PYTHON.get(c, c) for c in text[begin:])
        # Where each character of the source, and its end, stands in the text.
        self.origin = [i for i, c in enumerate(text) for _ in _PYTHON.get(c, c) if i >= begin] + [len(text)]

    def refused(self, at: int, what: str, cure: str = "") -> FormulaError:
        """The error that names a position, with what stands around it, on one line."""
        low, high = max(0, at - 30), at + 30
        shown = "".join(c if c.isprintable() else " " for c in self.text[low:high])
        shown = "..." * (low > 0) + shown + "..." * (high < len(self.text))
        return FormulaError(f'formula: {what}, at character {at + 1} of "{shown}"' + f"; {cure}" * bool(cure))

    def wrong(self, node: ast.expr, what: str, cure: str = "") -> FormulaError:
        """The error that names a part of the formula."""
        assert node.end_col_offset is not None
        begin, end = self.origin[node.col_offset], self.origin[node.end_col_offset - 1] + 1
        part = self.text[begin:end] if end - begin <= 30 else f"{self.text[begin : begin + 27]}..."
        return self.refused(begin, f"{part!r} {what}", cure)

    def expression(self) -> Expr:
        """The expression of the whole text."""
        text, levels = self.text, accumulate((c == "(") - (c == ")") for c in self.text)
        if len(text) > LENGTH:
            raise self.refused(LENGTH, f"it has {len(text)} characters", f"at most {LENGTH} are read")
        if odd := _ODD.search(text):
            raise self.refused(odd.start(), f"{odd[0]!r} is not understood", _ALLOWED)
        if (at := next((i for i, level in enumerate(levels) if level > DEPTH), None)) is not None:
            raise self.refused(at, f"it is nested more than {DEPTH} levels deep")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd numbers, which are refused
                tree = ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            at = self.origin[error.offset - 1] if error.offset else len(self.text)  # 0 stands for the end
            cure = "a product is written 2*x, a function sin(x), a power x^2"
            raise self.refused(at, error.msg, cure) from None
        if sum(isinstance(node, ast.expr) for node in ast.walk(tree)) > NODES:
            cure = f"at most {NODES} numbers, names and operations are read"
            raise self.refused(0, "it has too many parts", cure)
        return self.build(tree, 0)

    def build(self, node: ast.expr, depth: int) -> Expr:
        """The expression of a part, all of whose operations are harmless.

        Powers and signs nest to their right; elsewhere the parentheses were counted.
        """
        if depth > DEPTH:
            raise self.wrong(node, f"is nested more than {DEPTH} levels deep")
        match node:
            case ast.Constant():
                built = self.number(node)
            case ast.Name(id=name) if name in self.known:
                built = self.known[name]
            case ast.BinOp(op=ast.Pow(), left=left, right=right):
                built = self.power(node, self.build(left, depth), self.build(right, depth + 1))
            case ast.BinOp(op=sign, left=left, right=right) if type(sign) in _OPERATIONS:
                built = _OPERATIONS[type(sign)](self.build(left, depth), self.build(right, depth))
            case ast.UnaryOp(op=sign, operand=part) if type(sign) in _OPERATIONS:
                built = _OPERATIONS[type(sign)](self.build(part, depth + 1))
            case ast.Call(func=ast.Name(id=name), args=[part], keywords=[]) if name in FUNCTIONS:
                built = self.function(node, FUNCTIONS[name], self.build(part, depth))
            case _:
                raise self.refused_part(node)
        self.check(node, built)
        return built

    def refused_part(self, node: ast.expr) -> FormulaError:
        """Why a part is none of those that `build` knows."""
        functions = f"functions are {', '.join(FUNCTIONS)}"
        match node:
            case ast.Name(id=name) if name in FUNCTIONS:
                return self.wrong(node, "is a function", f"write {name}(...)")
            case ast.Name():
                cure = f"names are {', '.join(self.known)}; {functions}"
                return self.wrong(node, "is not a name that is known", cure)
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
                return self.wrong(node, "must be a function of one expression", f"write {name}(...)")
            case ast.Call(func=function):
                return self.wrong(function, "is not a function", f"for a product write *; {functions}")
        return self.wrong(node, "is not understood", _ALLOWED)

    def number(self, node: ast.Constant) -> Expr:
        written = _NUMBER.fullmatch(self.source[node.col_offset : node.end_col_offset])
        if written is None:
            raise self.wrong(node, "is not a number", "write numbers such as 2, 0.5 or 1e-3")
        if len(written[1].replace(".", "")) > DIGITS:
            raise self.wrong(node, "is too long", f"a number has at most {DIGITS} digits")
        if abs(int(written[2] or 0)) > EXPONENT:
            raise self.wrong(node, "is out of range", f"the exponent of a number is at most {EXPONENT}")
        return Rational(Fraction(written[0]))

    def power(self, node: ast.expr, base: Expr, exponent: Expr) -> Expr:
        if not exponent.free_symbols and abs(size := exponent.evalf()) > POWER:
            cure = f"a constant exponent is at most {POWER} in magnitude"
            raise self.wrong(node, f"has the exponent {float(size):g}", cure)
        self.check_exponent(node, exponent)
        return base**exponent

    def function(self, node: ast.expr, function: Callable[..., Expr], argument: Expr) -> Expr:
        if function in _POWERS and argument.has(sympy.log):  # exp(n log(2 x)) becomes 2^n x^n at once
            self.check_exponent(node, argument.replace(sympy.log, lambda _: X))
        if function in _POWERS[1:] and not argument.is_extended_real:
            # sympy would expand it to find out its sign: for hours
            return function(argument, evaluate=False).rewrite(sympy.exp)
        return function(argument)

    def check_exponent(self, node: ast.expr, exponent: Expr) -> None:
        """Refuse large numbers in an exponent: sympy could come to an integer power of a number with them."""
        for value in exponent.atoms(Rational):
            if abs(value) > TOTAL or value.q > ROOT:
                cure = f"numbers there are at most {TOTAL} in magnitude, their denominators at most {ROOT}"
                raise self.wrong(node, f"has {_short(value)} in an exponent", cure)

    def check(self, node: ast.expr, expression: Expr) -> None:
        """Refuse what is no real number after all, and numbers and powers that have grown."""
        if expression.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.I):
            raise self.wrong(node, "is no real number")
        for value in expression.atoms(Rational):
            self.check_size(node, value)
        for power in expression.atoms(sympy.Pow):
            self.check_exponent(node, power.exp)
        if (degree := _degree(expression)) > TOTAL:
            cure = f"the exponents of powers of powers multiply to {TOTAL} at most"
            raise self.wrong(node, f"has exponents that multiply to {degree:g}", cure)
        if not expression.free_symbols and not expression.is_Rational:
            self.check_constant(node, expression.evalf())

    def check_size(self, node: ast.expr, value: Expr) -> None:
        if value.is_Rational and max(value.p.bit_length(), value.q.bit_length()) > 2000:
            raise self.wrong(node, "gives a number of too many digits")
        if value and not Rational(1, HUGE) <= abs(value) <= HUGE:
            cure = f"constants are 0 or between {1 / HUGE:g} and {HUGE:g} in magnitude"
            raise self.wrong(node, "gives a constant that is out of range", cure)

    def check_constant(self, node: ast.expr, value: Expr) -> None:
        """The value of an irrational constant: to prove that one is rational, sympy can take hours."""
        if not value.is_Float:
            raise self.wrong(node, "is no real number")
        self.check_size(node, value)
        whole = round(float(value)) if abs(value) < 1000 else 0
        if not value or (whole and abs(value - whole) < 1e-12):
            raise self.wrong(node, f"is a constant that equals {whole} to all digits", f"write {whole}")


def _short(value: Rational) -> str:
    return f"{float(value):g}" if abs(value) < HUGE else "a number of many digits"


def _degree(expression: Expr) -> float:
    """The product of the constant exponents along powers of powers."""
    inner = max(map(_degree, expression.args), default=1.0)
    own = abs(float(expression.exp)) if expression.is_Pow and not expression.exp.free_symbols else 1.0
    return inner * max(1.0, own)
