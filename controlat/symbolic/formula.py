"""Formulas l(theta, x): a parser that knows a short list of things and refuses everything else.

A formula comes from a configuration or a command line, so it is never given to `eval`, nor to `sympify` and
`parse_expr`, which call it. Tokens become a tree by precedence climbing (Pratt 1973), and the tree becomes a
sympy expression from the leaves up. sympy computes at once what it can: 9^9^9^9 would fill the memory, and
1/0 is an object of its own. Every operation is therefore checked before sympy sees it: constants are
evaluated in floating point first, and exponents are bounded, because sympy multiplies out integer powers.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import sympy

from controlat._util.checks import number

__all__ = ["CONSTANTS", "FUNCTIONS", "THETA", "FormulaError", "X", "exact", "parameter_symbols", "parse"]

THETA = sympy.Symbol("theta", real=True)
X = sympy.Symbol("x", real=True)
NAMES: Mapping[str, sympy.Symbol] = MappingProxyType({"theta": THETA, "θ": THETA, "x": X})
CONSTANTS: Mapping[str, sympy.Expr] = MappingProxyType({"pi": sympy.pi})

_SAME = "exp sqrt sin cos tan sinh cosh tanh asin acos atan asinh erf"  # called so by sympy and by math
FUNCTIONS: Mapping[str, Callable[[sympy.Expr], sympy.Expr]] = MappingProxyType(
    {"log": sympy.log, "ln": sympy.log} | {name: getattr(sympy, name) for name in _SAME.split()}
)
_FLOAT: Mapping[str, Callable[..., Any]] = {
    "log": math.log,
    "ln": math.log,
    **{name: getattr(math, name) for name in _SAME.split()},
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": lambda a, b: a**b,
    "negative": lambda a: -a,
}

# Where sympy does not know that y is real, it expands y to find out whether sinh(y) is positive: for hours.
_HYPERBOLIC: Mapping[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "sinh": lambda up, down: (up - down) / 2,
    "cosh": lambda up, down: (up + down) / 2,
    "tanh": lambda up, down: (up - down) / (up + down),
}

LENGTH, DEPTH, NODES = 2000, 50, 300  # characters of a formula; levels of nesting; numbers, names, operations
DIGITS, EXPONENT = 40, 100  # of a number as it is written
HUGE = 1e100  # constants lie in [1/HUGE, HUGE] in magnitude, or are 0
POWER, TOTAL = 64, 256  # a constant exponent; the product of such along powers of powers
SIGNED = 16  # that product for parameters: sympy isolates all roots of a polynomial to find its sign
ROOT = 10_000  # denominator of a constant exponent: for 3^(-1/n) sympy computes 3^(n - 1)
LEVELS = 5  # functions within functions of a constant: what cancels there, sympy computes again and again

_RESERVED = frozenset(
    {"theta", "x", "t", "tau", "gamma", "theta_0", "T", "alpha", "K", *CONSTANTS, *FUNCTIONS}
)
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,19}", re.ASCII)
_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_θ][A-Za-z0-9_θ]*)"
    r"|(?P<sign>\*\*|[-+*/^()])"
)
_BINDS = {"+": 10, "-": 10, "*": 20, "/": 20, "negative": 30, "^": 40}


class FormulaError(ValueError):
    """A formula that is refused; the message says where and why."""


def parse(
    text: str,
    parameters: Mapping[str, sympy.Symbol] | None = None,
    names: Mapping[str, sympy.Symbol] = NAMES,
) -> sympy.Expr:
    """Read a formula such as ``theta^2/2 - (x - theta)^2/(theta^2 + 1)``.

    Numbers are exact: 0.1 is 1/10. ``^`` and ``**`` are the same, bind to the right and before a minus sign:
    -x^2 is -(x^2). Products are written with ``*``.

    Args:
        text: the formula.
        parameters: further names, such as those of `parameter_symbols`.
        names: the names of the variables.

    Returns:
        The expression, as sympy writes it after its automatic simplifications.

    Raises:
        FormulaError: the text is no formula of the known names, or it is too long, or holds a constant that
            is not a real number of reasonable size; the message names the position, counted from 1.

    >>> parse("x - 0.1*θ^2")
    -theta**2/10 + x
    >>> parse("2x")
    Traceback (most recent call last):
    controlat.symbolic.formula.FormulaError: formula: expected an operator before 'x', at character 2 of "2x";
    for a product write 2*x
    """
    known = {**names, **CONSTANTS, **(parameters or {})}
    try:
        tree = _Parser(text, known).whole()
        return _Builder(text, known).build(tree).expression
    except RecursionError:
        raise _refused(text, 0, "it is nested too deeply") from None


def _refused(text: str, at: int, what: str, cure: str = "") -> FormulaError:
    """The error that names a position, with what stands around it, on one line."""
    low, high = max(0, at - 30), at + 30
    shown = "".join(c if c.isprintable() else " " for c in text[low:high])
    shown = "..." * (low > 0) + shown + "..." * (high < len(text))
    return FormulaError(
        f'formula: {what}, at character {at + 1} of "{shown}"' + (f"; {cure}" if cure else "")
    )


# --------------------------------------------------------------------------------------------- text to a tree


class _Token(NamedTuple):
    kind: str  # number, name, sign, end, or odd
    text: str
    at: int


class _Node(NamedTuple):
    kind: str  # number, name, negative, an operator, or a function
    at: int
    text: str
    parts: tuple[_Node, ...] = ()


def _tokens(text: str) -> list[_Token]:
    """The numbers, names and signs of a formula, and an end; or up to the first odd character."""
    if not isinstance(text, str):
        raise FormulaError(f"formula: it must be a text, got a {type(text).__name__}")
    if len(text) > LENGTH:
        raise _refused(text, LENGTH, f"it has {len(text)} characters", f"at most {LENGTH} are read")
    found: list[_Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return [*found, _Token("odd", text[at], at)]
        if match.lastgroup != "space":
            found.append(_Token(str(match.lastgroup), match.group(), at))
        at = match.end()
    return [*found, _Token("end", "", len(text))]


class _Parser:
    """Precedence climbing over the tokens."""

    def __init__(self, text: str, known: Mapping[str, object]) -> None:
        self._text, self._known = text, known
        self._tokens = _tokens(text)
        self._next = self._depth = self._nodes = 0

    def whole(self) -> _Node:
        """The tree of the whole formula."""
        found = self._expression(0)
        token = self._tokens[self._next]
        if token.kind != "end":  # what else ends an expression is a closing parenthesis
            raise _refused(self._text, token.at, "there is a ')' without its '('")
        return found

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _peek(self) -> _Token:
        """The next token, unless no formula can have it."""
        token = self._tokens[self._next]
        if token.kind == "odd":
            allowed = "numbers, names, + - * / ^ and parentheses are"
            raise _refused(self._text, token.at, f"{token.text!r} is not understood", allowed)
        return token

    def _node(self, kind: str, token: _Token, *parts: _Node) -> _Node:
        self._nodes += 1
        if self._nodes > NODES:
            cure = f"at most {NODES} numbers, names and operations are read"
            raise _refused(self._text, token.at, "it has too many parts", cure)
        return _Node(kind, token.at, token.text, parts)

    def _nested(self, token: _Token, binds: int) -> _Node:
        """An expression one level further down."""
        self._depth += 1
        if self._depth > DEPTH:
            raise _refused(self._text, token.at, f"it is nested more than {DEPTH} levels deep")
        found = self._expression(binds)
        self._depth -= 1
        return found

    def _expression(self, binds: int) -> _Node:
        """What follows, up to the first operator that does not bind more strongly than `binds`."""
        left = self._operand()
        while True:
            token = self._peek()
            if token.kind == "end" or token.text == ")":
                return left
            kind = {"**": "^"}.get(token.text, token.text)
            if token.kind != "sign" or kind == "(":
                raise self._missing_operator(token)
            if _BINDS[kind] <= binds:
                return left
            self._take()
            if kind == "^":  # its right side takes further powers in
                left = self._node(kind, token, left, self._nested(token, _BINDS["^"] - 1))
            else:
                left = self._node(kind, token, left, self._expression(_BINDS[kind]))

    def _operand(self) -> _Node:
        """A number, a name, a call, or something signed or in parentheses."""
        self._peek()
        token = self._take()
        if token.kind == "number":
            return self._node("number", token)
        if token.kind == "name":
            return self._name(token)
        if token.text == "(":
            return self._closed(token)
        if token.text == "-":
            return self._node("negative", token, self._nested(token, _BINDS["negative"]))
        if token.text == "+":
            return self._nested(token, _BINDS["negative"])
        what = f"before {token.text!r}" if token.text else "before the end"
        raise _refused(self._text, token.at, f"expected a number, a name or '(' {what}")

    def _closed(self, opening: _Token) -> _Node:
        """What stands in parentheses, the first of which has been taken."""
        found = self._nested(opening, 0)
        if self._take().text != ")":
            raise _refused(self._text, opening.at, "this '(' has no ')'")
        return found

    def _name(self, token: _Token) -> _Node:
        name, called = token.text, self._tokens[self._next].text == "("
        if name in FUNCTIONS:
            if not called:
                raise _refused(self._text, token.at, f"{name} is a function", f"write {name}(...)")
            return self._node(name, token, self._closed(self._take()))
        if name not in self._known:
            shown = name if len(name) <= 30 else f"{name[:30]}..."
            listed = ", ".join(n for n in self._known if n.isascii())
            cure = f"names are {listed}; functions are {', '.join(FUNCTIONS)}"
            raise _refused(self._text, token.at, f"{shown!r} is not a name that is known", cure)
        if called:
            cure = f"for a product write {name}*(...)"
            raise _refused(self._text, self._tokens[self._next].at, f"{name} is not a function", cure)
        return self._node("name", token)

    def _missing_operator(self, token: _Token) -> FormulaError:
        before = self._tokens[self._next - 1]
        after = f"{token.text}(...)" if token.text in FUNCTIONS else token.text
        cure = f"for a product write {before.text}*{after}" if len(before.text + after) < 40 else ""
        shown = token.text if len(token.text) <= 30 else f"{token.text[:30]}..."
        return _refused(self._text, token.at, f"expected an operator before {shown!r}", cure)


# --------------------------------------------------------------------------------------- a tree to expression


class _Built(NamedTuple):
    """A part of the formula."""

    expression: sympy.Expr
    value: float | None = None  # of a constant
    total: float = 1.0  # how high its powers go
    levels: int = 0  # functions within functions in an irrational constant


class _Builder:
    """From the leaves up; every constant is evaluated in floating point before sympy computes it."""

    def __init__(self, text: str, known: Mapping[str, sympy.Expr]) -> None:
        self._text, self._known = text, known

    def build(self, node: _Node) -> _Built:
        """The expression of a tree, all of whose operations are harmless."""
        if node.kind == "number":
            return self._number(node)
        if node.kind == "name":
            symbol = self._known[node.text]
            return _Built(symbol, float(symbol) if symbol.is_number else None)
        parts = [self.build(part) for part in node.parts]
        self._check_value(node, parts)
        total = self._total(node, parts)
        self._check_merging(node, [part.expression for part in parts])
        expression = self._apply(node, [part.expression for part in parts])
        self._check(node, expression)
        constant = not expression.free_symbols  # also x - x
        levels = self._levels(node, parts, constant and not expression.is_Rational)
        value = self._constant(node, expression) if constant else None
        return _Built(expression, value, total, 0 if expression.is_Rational else levels)

    def _number(self, node: _Node) -> _Built:
        mantissa, _, exponent = node.text.lower().partition("e")
        if len(mantissa.replace(".", "")) > DIGITS:
            raise _refused(self._text, node.at, f"a number has at most {DIGITS} digits")
        if abs(int(exponent or 0)) > EXPONENT:
            raise _refused(self._text, node.at, f"the exponent of a number is at most {EXPONENT}")
        found = Fraction(node.text)
        self._in_range(node, float(found))
        return _Built(sympy.Rational(found.numerator, found.denominator), float(found))

    def _check_value(self, node: _Node, parts: list[_Built]) -> None:
        """Refuse an operation of constants whose result, in floating point, is out of range."""
        values = [part.value for part in parts]
        if None in values:
            return
        try:
            found = _FLOAT[node.kind](*values)
        except OverflowError:
            found = math.inf
        except (ValueError, ZeroDivisionError):
            found = math.nan
        first = values[: 2 if node.kind == "*" else 1]
        underflow = found == 0 and (node.kind == "exp" or (node.kind in "*/^" and 0 not in first))
        self._in_range(node, math.inf if underflow else found)

    def _in_range(self, node: _Node, value: float | complex) -> None:
        if isinstance(value, complex) or math.isnan(value):
            raise _refused(self._text, node.at, f"{node.text!r} gives no real number here")
        slack = 1 + 1e-9  # 1e50*1e50 is not quite 1e100
        if value and not 1 / (HUGE * slack) <= abs(value) <= HUGE * slack:
            cure = f"constants are 0 or between {1 / HUGE:g} and {HUGE:g} in magnitude"
            raise _refused(self._text, node.at, f"{node.text!r} gives a constant that is out of range", cure)

    def _total(self, node: _Node, parts: list[_Built]) -> float:
        """The product of the constant exponents along powers of powers."""
        found = max(part.total for part in parts)
        if node.kind != "^" or parts[1].value is None:
            return found
        exponent = abs(parts[1].value)
        if exponent > POWER:
            what = f"the exponent is {parts[1].value:g}"
            raise _refused(self._text, node.at, what, f"a constant exponent is at most {POWER} in magnitude")
        found = max(parts[0].total * max(1.0, exponent), found)
        symbols = parts[0].expression.free_symbols
        signed = symbols and all(symbol.is_positive or symbol.is_negative for symbol in symbols)
        if found > (limit := SIGNED if signed else TOTAL):
            of = " of parameters alone" if signed else ""
            cure = f"the exponents of powers of powers{of} multiply to {limit} at most"
            raise _refused(self._text, node.at, f"the exponents multiply to {found:g}", cure)
        return found

    def _apply(self, node: _Node, parts: list[sympy.Expr]) -> sympy.Expr:
        """One operation in sympy."""
        try:
            if _through_exp(node.kind, parts):
                return _HYPERBOLIC[node.kind](sympy.exp(parts[0]), sympy.exp(-parts[0]))
            if node.kind in FUNCTIONS:
                return FUNCTIONS[node.kind](parts[0])
            return -parts[0] if node.kind == "negative" else _FLOAT[node.kind](*parts)
        except RecursionError:
            raise
        except Exception as error:  # such as a number that is too long to be printed
            raise _refused(self._text, node.at, f"sympy fails here ({type(error).__name__})") from None

    def _check_merging(self, node: _Node, parts: list[sympy.Expr]) -> None:
        """Refuse large numbers in an exponent that sympy could turn into an integer power of a number.

        exp(n log(2 x)) becomes 2^n x^n at once, and 2^(n x + n) 2^(-n x) becomes 2^n: no single constant is
        large there, but the integer is. exp(n x) is harmless, since e^n stays what it is.
        """
        if node.kind == "^" and not parts[1].free_symbols:
            self._check_root(node, parts[1])
        called = node.kind == "exp" or _through_exp(node.kind, parts)
        if not called and (node.kind != "^" or not parts[-1].free_symbols):
            return
        natural = called or parts[0] == sympy.E or isinstance(parts[0], sympy.exp)
        if natural and not any(part.has(sympy.log) for part in parts):
            return
        nested = natural or any(power.exp.free_symbols for power in parts[0].atoms(sympy.Pow))
        found = math.prod(_sizes(parts if nested else parts[-1:]))
        if found > TOTAL:
            cure = f"beside a variable, the numbers in an exponent multiply to {TOTAL} at most"
            raise _refused(self._text, node.at, f"the numbers in this exponent multiply to {found:g}", cure)

    def _check(self, node: _Node, expression: sympy.Expr) -> None:
        """Refuse what is no real number after all, and numbers that have grown."""
        if expression.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.I):
            self._in_range(node, math.nan)
        for power in expression.atoms(sympy.Pow):
            self._check_root(node, power.exp)
        for rational in expression.atoms(sympy.Rational):
            above, below = rational.p.bit_length(), rational.q.bit_length()
            if above + below > 2000 > 4 * abs(above - below):  # it has grown, but its size is an ordinary one
                raise _refused(self._text, node.at, f"{node.text!r} gives a number of too many digits")
            self._in_range(node, rational.p / rational.q if abs(above - below) < 1000 else math.inf)

    def _check_root(self, node: _Node, exponent: sympy.Expr) -> None:
        if exponent.is_Rational and exponent.q > ROOT:
            cure = f"the denominator of an exponent is at most {ROOT}"
            raise _refused(self._text, node.at, "an exponent has too many digits", cure)

    def _levels(self, node: _Node, parts: list[_Built], irrational: bool) -> int:
        """How deep the functions of an irrational constant are nested."""
        found = max(part.levels for part in parts)
        found += irrational and (node.kind in FUNCTIONS or node.kind == "^")
        if found > LEVELS:
            cure = f"at most {LEVELS} are computed; write the number instead"
            raise _refused(self._text, node.at, "too many functions of functions of a constant", cure)
        return found

    def _constant(self, node: _Node, expression: sympy.Expr) -> float:
        """The value of an expression without symbols, to all digits: floating point can have cancelled."""
        try:
            found = expression.evalf()
            value = float(found)
        except (TypeError, ValueError, OverflowError):
            found, value = None, math.nan
        self._in_range(node, math.inf if found and not value else value)
        whole = round(value) if abs(value) < 1e3 else 0
        if not expression.is_Rational and (not value or (whole and abs(value - whole) < 1e-12)):
            # To prove such an equality, sympy computes minimal polynomials, which can take hours.
            raise _refused(self._text, node.at, f"a constant equals {whole} to all digits", f"write {whole}")
        return value


def _through_exp(kind: str, parts: list[sympy.Expr]) -> bool:
    """Whether a hyperbolic function is written with exp."""
    return kind in _HYPERBOLIC and not parts[0].is_extended_real


def _sizes(parts: Iterable[sympy.Expr]) -> Iterator[float]:
    """The numbers that could end in an exponent, those below 1 inverted; an ordinary logarithm has none."""
    for part in parts:
        walk = sympy.preorder_traversal(part)
        for inner in walk:
            if isinstance(inner, sympy.log):
                powers = inner.atoms(sympy.Pow, sympy.exp)
                nested = len(inner.atoms(sympy.log)) > 1  # exp combines n log(2) into log(2^n) at any depth
                if not nested and not any(power.exp.free_symbols for power in powers):
                    walk.skip()
            elif inner.is_Rational and inner:
                size = abs(float(inner))
                yield max(size, 1 / size)


# ------------------------------------------------------------------------------------------------- parameters


def exact(value: object, name: str) -> sympy.Rational:
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
        found = Fraction(value.strip())
    elif isinstance(value, numbers.Rational):
        found = Fraction(int(value.numerator), int(value.denominator))
    else:
        found = Fraction(repr(nearest))
    return sympy.Rational(found.numerator, found.denominator)


def parameter_symbols(
    values: Mapping[str, object],
) -> tuple[dict[str, sympy.Symbol], dict[sympy.Symbol, sympy.Rational]]:
    """Symbols for the named parameters of a formula: real, and positive or negative as their values are.

    Args:
        values: value by name, as `exact` reads them.

    Returns:
        The symbol of each name, for `parse`; the value of each symbol, for ``subs``.

    Raises:
        ValueError: a name is not allowed, or a value is no number or of unreasonable size.

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
        found = exact(value, name)
        if found and not 1 / HUGE <= abs(float(found)) <= HUGE:
            raise ValueError(
                f"{name} must be 0 or between {1 / HUGE:g} and {HUGE:g} in magnitude, got {value!r}"
            )
        sign = "positive" if found > 0 else "negative" if found < 0 else "real"
        symbols[name] = sympy.Symbol(name, **{sign: True})
        known[symbols[name]] = found
    return symbols, known
