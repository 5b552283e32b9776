"""The parser of formulas: what it reads, and that it refuses everything else at once."""

import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from controlat.symbolic import formula
from controlat.symbolic.formula import (
    CONSTANTS,
    FUNCTIONS,
    THETA,
    FormulaError,
    X,
    exact,
    parameter_symbols,
    parse,
)

R = sympy.Rational

# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", R(1, 10)),
        ("0.1+0.2-0.3", R(0)),
        (".5", R(1, 2)),
        ("5.", R(5)),
        ("1.5e-3", R(3, 2000)),
        ("2E+2", R(200)),
        ("1e100", R(10**100)),
        ("1e-100", R(1, 10**100)),
        ("1e50*1e50", R(10**100)),
        ("0", R(0)),
        ("0.000", R(0)),
        ("9" * 40, R(10**40 - 1)),
        ("8/255", R(8, 255)),
        ("1/2/2", R(1, 4)),
        ("1-2-3", R(-4)),
        ("2^3^2", R(512)),
        ("2**3^2", R(512)),
        ("(2^3)^2", R(64)),
        ("-2^2", R(-4)),
        ("(-2)^2", R(4)),
        ("2^-1", R(1, 2)),
        ("2^-1^2", R(1, 2)),
        ("2*-3", R(-6)),
        ("2--3", R(5)),
        ("2-+3", R(-1)),
        ("+-+-2", R(2)),
        ("-2*-2^2", R(8)),
        ("8^(1/3)", R(2)),
        ("sqrt(4)", R(2)),
        ("\t( 1 +\n2 )\r ", R(3)),
        ("0^0", R(1)),
    ],
)
def test_numbers_are_exact_and_operators_bind_as_in_mathematics(text: str, value: Any) -> None:
    found = parse(text)
    assert found == value
    assert found.is_Rational


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-x^2", -(X**2)),
        ("x^-theta^2", X ** (-(THETA**2))),
        ("θ*x", THETA * X),
        ("theta^2/2 - (x - theta)^2/(theta^2 + 1)", THETA**2 / 2 - (X - THETA) ** 2 / (THETA**2 + 1)),
        ("exp(-x^2/2)/sqrt(2*pi)", sympy.exp(-(X**2) / 2) / sympy.sqrt(2 * sympy.pi)),
        ("ln(x)-log(x)", R(0)),
        ("exp(log(theta)^2/(2*0.3^2))", sympy.exp(50 * sympy.log(THETA) ** 2 / 9)),
        ("exp(-5000*x^2)", sympy.exp(-5000 * X**2)),
        ("exp(2*log(1 + 1000*x^2))", (1 + 1000 * X**2) ** 2),
        ("log(1 + exp(-x*theta))", sympy.log(1 + sympy.exp(-X * THETA))),
        ("sqrt(x^2)", sympy.Abs(X)),
        ("cosh(x*theta) + sinh(x)*tanh(x)", sympy.cosh(X * THETA) + sympy.sinh(X) * sympy.tanh(X)),
        ("cosh(log(x))", X / 2 + 1 / (2 * X)),
    ],
)
def test_formulas_become_what_sympy_itself_would_write(text: str, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_known_and_is_the_right_one(name: str) -> None:
    found = float(parse(f"{name}(x)").subs(X, R(3, 10)))
    assert found == pytest.approx(getattr(math, "log" if name == "ln" else name)(0.3), rel=1e-14)
    assert float(parse(f"{name}(0.3)")) == pytest.approx(found, rel=1e-14)


def test_the_names_can_be_others() -> None:
    t = sympy.Symbol("t", real=True)
    assert parse("2*t", names={"t": t}) == 2 * t
    with pytest.raises(FormulaError, match="names are t, pi;"):
        parse("x", names={"t": t})
    assert CONSTANTS["pi"] == sympy.pi


def test_a_long_sum_a_long_product_and_deep_nesting_are_read() -> None:
    assert parse("+".join(["x"] * 150)) == 150 * X
    assert parse("*".join(["x"] * 150)) == X**150
    assert parse("sin(" * 50 + "x" + ")" * 50).count(sympy.sin) == 50


# ---------------------------------------------------------------------------- agreement with Python's numbers

_LEAVES = st.sampled_from(["theta", "x", "a", "1", "2", "3", "0.5", "1.5", "2.5e-1", "12", "pi"])
_SMOOTH = ["exp", "log", "sqrt", "sin", "cos", "tanh", "atan", "erf", "sinh", "asinh", "ln"]


def _joined(draw: st.DrawFn, left: str, sign: str, right: str) -> str:
    spaces = st.sampled_from(["", " ", "  "])
    return f"{left}{draw(spaces)}{sign}{draw(spaces)}{right}"


@st.composite
def _formulas(draw: st.DrawFn, depth: int = 4) -> str:
    """A text that Python can read once ^ is **; parentheses here and there."""
    kind = draw(st.integers(0, 9)) if depth else 0
    if kind <= 1:
        found = draw(_LEAVES)
    elif kind <= 6:
        parts = [draw(_formulas(depth=depth - 1)) for _ in range(2)]
        left, right = [f"({p})" if draw(st.booleans()) else p for p in parts]
        found = _joined(draw, left, draw(st.sampled_from("+-*/")), right)
    elif kind == 7:
        power = draw(st.sampled_from(["2", "3", "-1", "-2", "0.5", "2^-1", "-x^2", "(1-1)"]))
        found = _joined(draw, draw(_formulas(depth=depth - 1)), draw(st.sampled_from(["^", "**"])), power)
    elif kind == 8:
        found = draw(st.sampled_from("-+")) + draw(_formulas(depth=depth - 1))
    else:
        found = f"{draw(st.sampled_from(_SMOOTH))}({draw(_formulas(depth=depth - 1))})"
    return found


def _python(text: str, **values: float) -> float:
    functions = {name: getattr(math, "log" if name == "ln" else name) for name in FUNCTIONS}
    # The text is made above from a list of names and numbers.
    found = eval(text.replace("^", "**"), {"__builtins__": {}, "pi": math.pi, **functions, **values})
    return float(found)


@settings(max_examples=250, deadline=None)
@given(_formulas())
@example("-x^2")
@example("2^-x ^2*3")
@example("x/theta/a - 1 - 2")
def test_values_agree_with_pythons(text: str) -> None:
    symbols, known = parameter_symbols({"a": 1.25})
    at = {"theta": 0.75, "x": 0.625, "a": 1.25}
    try:
        expected = _python(text, **at)
        moved = _python(text, theta=0.75 + 1e-9, x=0.625 - 1e-9, a=1.25 + 1e-9)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        assume(False)
    assume(1e-6 < abs(expected) < 1e6 and abs(moved - expected) < 1e-5 * abs(expected))  # well-conditioned
    try:
        expression = parse(text, symbols)
    except FormulaError:
        assume(False)  # a constant in it is too large, or its functions are nested too deeply
    found = complex(expression.subs(known).subs({THETA: R(3, 4), X: R(5, 8)}))
    assert found.real == pytest.approx(expected, rel=1e-6)
    assert abs(found.imag) < 1e-9 * abs(expected)


# -------------------------------------------------------------------------------------------- what is refused

REFUSED = [
    # not the language of formulas
    ("", 1),
    ("   ", 4),
    ("__import__('os').system('true')", 1),
    ("x.__class__", 2),
    ("().__class__", 2),
    ("x[0]", 2),
    ("lambda x: x", 1),
    ("[x for x in x]", 1),
    ("{x}", 1),
    ("x; x", 2),
    ("x = 1", 3),
    ("x < 1", 3),
    ("x == 1", 3),
    ("x if x else 1", 3),
    ("x and x", 3),
    ("'x'", 1),
    ('"x"', 1),
    ("x!", 2),
    ("factorial(9)", 1),
    ("x % 2", 3),
    ("x // 2", 4),
    ("x & 1", 3),
    ("x @ x", 3),
    ("~x", 1),
    ("x\\n", 2),
    ("x\x00", 2),
    ("x\u00a0", 2),
    ("x # no", 3),
    ("f'{x}'", 1),
    ("eval(x)", 1),
    ("exec(x)", 1),
    ("open(x)", 1),
    ("sympy", 1),
    ("Integer(2)", 1),
    ("I", 1),
    ("E", 1),
    ("oo", 1),
    ("nan", 1),
    ("inf", 1),
    ("zoo", 1),
    ("_", 1),
    ("True", 1),
    ("None", 1),
    ("abs(x)", 1),
    ("gamma(x)", 1),
    ("χ", 1),
    ("x²", 2),
    ("٣", 1),
    ("３", 1),
    ("ｘ", 1),
    ("x − 1", 3),
    ("0x10", 2),
    ("1_000", 2),
    ("1j", 2),
    # malformed
    ("2x", 2),
    ("2 x", 3),
    ("x theta", 3),
    ("x(2)", 2),
    ("(x)(x)", 4),
    ("2(x)", 2),
    ("1.2.3", 4),
    ("1..2", 3),
    (".", 1),
    ("1e", 2),
    ("x +", 4),
    ("* x", 1),
    ("x * / x", 5),
    ("x ***x", 5),
    ("x ^* x", 4),
    ("(x", 1),
    ("((x)", 1),
    ("x)", 2),
    ("()", 2),
    ("sin", 1),
    ("sin x", 1),
    ("sin^2(x)", 1),
    ("sin()", 5),
    ("sin(x, x)", 6),
    ("sin(x", 4),
    # too long, too deep, too many
    ("x" * 2001, 2001),
    ("1" + "+1" * 1000, 2001),
    ("1" + "+1" * 999, 300),
    ("(" * 51 + "x" + ")" * 51, 51),
    ("(" * 1999, 51),
    ("-" * 51 + "x", 51),
    ("x" + "^x" * 51, 102),
    ("sin(" * 51 + "x" + ")" * 51, 204),
    # numbers
    ("9" * 41, 1),
    ("0." + "0" * 41, 1),
    ("1e101", 1),
    ("1e-101", 1),
    ("1e999999999999999999", 1),
    ("99e99", 1),
    ("0.1e-100", 1),
    # constants that are no real numbers, or not of reasonable size
    ("9^9^9^9", 4),
    ("9^9^9", 2),
    ("9**99999", 2),
    ("2^65", 2),
    ("x^65", 2),
    ("x^-65", 2),
    ("x^64^2", 2),
    ("10^(10^10)", 3),
    ("1e60^2", 5),
    ("1e60*1e60", 5),
    ("1e-60/1e60", 6),
    ("x*1e60*1e60", 7),
    ("1e60*x*1e60", 7),
    ("x*2^64*x*2^64*x*2^64*x*2^64*x*2^64*x*2^64", 37),
    ("1/0", 2),
    ("x/0", 2),
    ("x/(x-x)", 2),
    ("0^-1", 2),
    ("1/(0.1+0.2-0.3)", 2),
    ("x/sin(pi)", 2),
    ("tan(pi/2)", 1),
    ("log(0)", 1),
    ("log(-1)", 1),
    ("log(x-x)", 1),
    ("log(sin(pi))", 1),
    ("sqrt(-1)", 1),
    ("sqrt(-4*x^2)", 1),
    ("(-8)^(1/3)", 5),
    ("(x-x-1)^0.5", 8),
    ("asin(2)", 1),
    ("acos(x-x+2)", 1),
    ("exp(exp(exp(9)))", 5),
    ("exp(1e9)", 1),
    ("exp(-1e9)", 1),
    ("x + exp(-1e90)", 5),
    ("1 - erf(30)", 5),
    ("sinh(1000)", 1),
    ("exp((1e-99*64/log(1e-99))^-1)", 1),
    ("1e-90^4", 6),
    ("1e-90*1e-90*1e-90*1e-90", 6),
    ("sqrt(2)*sqrt(3) - sqrt(6) + sin(1)^2 + cos(1)^2", 38),
    ("((1 + 1e-99)^(64/1e99))^x", 13),
    ("((2^(1/61)+3^(1/59))^2-2^(2/61)-2*2^(1/61)*3^(1/59)-3^(2/59))*x", 52),
    ("(x-x+9)^((x-x+9)^(x-x+9))", 8),
    ("sin(exp(1e50*sqrt(2) - 1.41421356237309504880e50))", 5),
    ("sin(1e99*" * 6 + "1" + ")" * 6, 1),
    # powers that sympy would merge
    ("(x^64)^5", 7),
    ("(((x^2+1)^64+1)^4+1)^2", 16),
    ("((2*x)^64)^64", 11),
    ("exp(1e9*log(2*x))", 1),
    ("exp(1)^(1e9*log(2*x))", 7),
    ("exp(1e9*x)^(log(2)/x)", 11),
    ("2^(1e9*x + 1e9)*2^(-1e9*x)", 2),
    ("(2*theta)^(1e9*x)", 10),
    ("(2^(200*x))^(200/x)", 12),
    ("exp(64*log(3*exp(64*log(2*x))))", 1),
    ("exp(200*log(2^(200*x)))", 1),
    ("sinh(7e30*log(9*x))", 1),
    ("exp(1 + sin(1e9*log(2)))", 1),
    ("exp(x + log(1 + 1e9*log(2)*x))", 1),
    ("(theta/12345678901)^(9e9/12345678901234567890)", 20),
    ("sqrt(" * 20 + "x/3" + ")" * 20, 31),
]


@pytest.mark.parametrize(("text", "position"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_is_no_formula_is_refused_at_once_and_with_its_position(text: str, position: int) -> None:
    began = time.process_time()
    with pytest.raises(FormulaError) as caught:
        parse(text)
    assert time.process_time() - began < 1
    message = str(caught.value)
    assert message.startswith("formula: ")
    assert f', at character {position} of "' in message
    assert message.isprintable(), "one line"
    assert len(message) < 400


SLOW = [
    "sqrt(1+" * 49 + "x" + ")" * 49,
    "1/(1+x*" * 49 + "x" + ")" * 49,
    "sin(x+sin(1e99*" * 24 + "1" + "))" * 24,
    "sin(1e99*" * 4 + "sqrt(2)" + ")" * 4,
    "log(1+x*" * 49 + "x" + ")" * 49,
    "*".join(f"(x+{i})" for i in range(75)),
    "+".join(f"sqrt({i})" for i in range(2, 76)),
    "*".join(f"sin({i})" for i in range(1, 75)),
    "(2^(1/3)+3^(1/5)+5^(1/7)+7^(1/11))^64*x",
    "x" + "^x" * 50,
    "2^(200*x)*2^(-200*x)",
    "exp(250*x*log(9e99*x))^(1/x)",
    "log(sinh((1e99-sqrt(x+9e9))^64)*x)",
    "log(cosh((1e99-sqrt(x+9e9))^64)*tanh(log(sinh(x))^64)*x)",
    "erf(cosh(log(log(exp(((x+1e99)^2)^64)))))",
]


@pytest.mark.parametrize("text", SLOW, ids=lambda value: repr(value)[:40])
def test_hostile_formulas_that_are_allowed_take_less_than_a_second(text: str) -> None:
    began = time.process_time()
    parse(text)
    assert time.process_time() - began < 1


def test_high_powers_of_parameters_alone_are_refused() -> None:
    symbols, known = parameter_symbols({"b": -1})
    assert parse("(b - 9)^16 + (x + b)^64", symbols).subs(known).subs(X, 1) == 10**16
    with pytest.raises(FormulaError, match="powers of powers of parameters alone multiply to 16 at most"):
        parse("exp(asin((b - 9e9)^64))", symbols)


def test_errors_say_what_is_allowed_and_what_to_write() -> None:
    symbols, _ = parameter_symbols({"a": 1})
    with pytest.raises(
        FormulaError, match=r"'b' is not a name that is known, at character 7 of \"x \+ a\*b\";"
    ):
        parse("x + a*b", symbols)
    with pytest.raises(FormulaError, match="names are theta, x, pi, a; functions are log, ln, exp, sqrt"):
        parse("b", symbols)
    with pytest.raises(FormulaError, match=r"write 2\*x$"):
        parse("2x")
    with pytest.raises(FormulaError, match=r"write 2\*exp\(...\)$"):
        parse("2exp(x)")
    with pytest.raises(FormulaError, match=r"write x\*\(...\)$"):
        parse("x(2)")
    with pytest.raises(FormulaError, match=r"write sin\(...\)$"):
        parse("sin x")
    with pytest.raises(FormulaError, match=r'of "\.\.\..{60}\.\.\.";'):
        parse("x+" * 40 + "y" + "+x" * 40)
    with pytest.raises(FormulaError, match="it must be a text, got a int"):
        parse(3)  # type: ignore[arg-type]


def test_deep_stacks_of_the_caller_end_in_a_formula_error() -> None:
    def down(levels: int) -> object:
        return down(levels - 1) if levels else parse("sin(" * 40 + "x" + ")" * 40)

    with pytest.raises(FormulaError, match="nested too deeply"):
        down(800)


_HARMLESS = (
    "x theta θ a pi 1 2 0.1 1e99 1e-99 9e9 ( ) ( ) + - * / ^ ** ^ sin( exp( log( sqrt( tan( asin( erf("
)
_HOSTILE = ".__class__ [0] lambda : ; ! % , = eval( open('FILE','w') ' \" \\ _ é"
_SPACED = [" ", "\n", "__import__('os').system('touch FILE')"]
_FRAGMENTS = st.sampled_from([*_HARMLESS.split(), *_HOSTILE.split(), *_SPACED])


def _only_formula_errors(text: str) -> None:
    symbols, _ = parameter_symbols({"a": 2})
    began = time.process_time()
    try:
        parse(text, symbols)
    except FormulaError as error:
        assert ", at character " in str(error)  # noqa: PT017
    assert time.process_time() - began < 1


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_arbitrary_text_raises_formula_errors_only(text: str) -> None:
    _only_formula_errors(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executed")


@settings(max_examples=500, deadline=None)
@given(parts=st.lists(_FRAGMENTS, max_size=30))
def test_fragments_raise_formula_errors_only_and_execute_nothing(parts: list[str], folder: Path) -> None:
    _only_formula_errors("".join(parts).replace("FILE", str(folder / "made")))
    assert not list(folder.iterdir())


@settings(max_examples=150, deadline=None)
@given(_formulas(depth=6))
def test_large_formulas_take_less_than_a_second(text: str) -> None:
    _only_formula_errors(text)


def test_nothing_is_evaluated_by_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("text reached sympy")

    monkeypatch.setattr("sympy.parsing.sympy_parser.parse_expr", forbidden)
    monkeypatch.setattr("builtins.eval", forbidden)
    assert parse("2.5*x^2 + sin(theta)/3") == R(5, 2) * X**2 + sympy.sin(THETA) / 3


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (3, R(3)),
        (0.1, R(1, 10)),
        (1e-3, R(1, 1000)),
        (-0.0, R(0)),
        ("8/255", R(8, 255)),
        (" 1e-3 ", R(1, 1000)),
        ("0.30", R(3, 10)),
        (Fraction(1, 3), R(1, 3)),
        (R(2, 7), R(2, 7)),
        (np.int64(4), R(4)),
        (np.float64(0.1), R(1, 10)),
        (10**30 + 1, R(10**30 + 1)),
    ],
)
def test_numbers_are_read_exactly(value: object, found: Any) -> None:
    assert exact(value, "a") == found
    assert exact(value, "a").is_Rational


@pytest.mark.parametrize(
    "value",
    ["", "x", "1/0", "1e9999999", "nan", math.inf, None, True, [1], "1+1", "os.x", 10**400, "1" * 101],
)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a must be "):
        exact(value, "a")


def test_symbols_of_parameters_have_the_signs_of_their_values() -> None:
    symbols, known = parameter_symbols({"a": "1/3", "b_2": -2, "zero": 0.0})
    assert list(symbols) == ["a", "b_2", "zero"]
    assert symbols["a"].is_positive
    assert symbols["b_2"].is_negative
    assert symbols["zero"].is_real
    assert symbols["zero"].is_positive is None
    assert known == {symbols["a"]: R(1, 3), symbols["b_2"]: R(-2), symbols["zero"]: R(0)}
    assert parse("sqrt(a^2*x^2)*b_2^zero", symbols).subs(known) == sympy.Abs(X) / 3


@pytest.mark.parametrize(
    "name",
    ["theta", "x", "t", "tau", "gamma", "theta_0", "T", "alpha", "K", "pi", "exp", "ln", *FUNCTIONS],
)
def test_names_with_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"a parameter cannot be called {name}: "):
        parameter_symbols({name: 1})


@pytest.mark.parametrize("name", ["", "1a", "_a", "a b", "a-b", "ä", "a" * 21, "a\n", "__class__", "a.b", 3])
def test_names_that_are_no_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="a parameter's name must be a letter, then"):
        parameter_symbols({name: 1})


@pytest.mark.parametrize("value", [1e101, -1e200, "1e-101", 1e-300, 10**101])
def test_values_of_unreasonable_size_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a must be 0 or between 1e-100 and 1e"):
        parameter_symbols({"a": value})


def test_the_limits_are_the_ones_that_are_documented() -> None:
    found = formula.LENGTH, formula.DEPTH, formula.NODES, formula.DIGITS, formula.EXPONENT
    assert found == (2000, 50, 300, 40, 100)
    assert (formula.HUGE, formula.POWER, formula.TOTAL) == (1e100, 64, 256)
