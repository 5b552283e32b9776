"""The parser of formulas: what it reads, and that it refuses everything else at once."""

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from helpers import slow
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from controlat._util.limits import TimeLimit, within
from controlat.symbolic import formula
from controlat.symbolic.formula import FormulaError, parse
from controlat.symbolic.symbols import FUNCTIONS, THETA, X, exact, parameter_symbols

R = sympy.Rational


def _read(text: str) -> Any:
    """What is read in this process, without limits and before it is differentiated."""
    return formula._Reader(text, {"x": X}).expression()


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
    expression = parse(text)
    assert expression == value
    assert expression.is_Rational


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
    number = float(parse(f"{name}(x)").subs(X, R(3, 10)))
    assert number == pytest.approx(getattr(math, "log" if name == "ln" else name)(0.3), rel=1e-14)
    assert float(parse(f"{name}(0.3)")) == pytest.approx(number, rel=1e-14)


def test_a_long_sum_a_long_product_and_deep_nesting_are_read() -> None:
    assert parse("+".join(["x"] * 150)) == 150 * X
    assert parse("*".join(["x"] * 150)) == X**150
    assert _read("sin(" * 50 + "x" + ")" * 50).count(sympy.sin) == 50


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
        text = draw(_LEAVES)
    elif kind <= 6:
        parts = [draw(_formulas(depth=depth - 1)) for _ in range(2)]
        left, right = [f"({p})" if draw(st.booleans()) else p for p in parts]
        text = _joined(draw, left, draw(st.sampled_from("+-*/")), right)
    elif kind == 7:
        power = draw(st.sampled_from(["2", "3", "-1", "-2", "0.5", "2^-1", "-x^2", "(1-1)"]))
        text = _joined(draw, draw(_formulas(depth=depth - 1)), draw(st.sampled_from(["^", "**"])), power)
    elif kind == 8:
        text = draw(st.sampled_from("-+")) + draw(_formulas(depth=depth - 1))
    else:
        text = f"{draw(st.sampled_from(_SMOOTH))}({draw(_formulas(depth=depth - 1))})"
    return text


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
    number = complex(expression.subs(known).subs({THETA: R(3, 4), X: R(5, 8)}))
    assert number.real == pytest.approx(expected, rel=1e-6)
    assert abs(number.imag) < 1e-9 * abs(expected)


# -------------------------------------------------------------------------------------------- what is refused

REFUSED = [
    # not the language of formulas
    ("", 1),
    ("   ", 4),
    ("__import__('os').system('true')", 12),
    ("x.__class__", 1),
    ("().__class__", 1),
    ("x[0]", 2),
    ("lambda x: x", 9),
    ("[x for x in x]", 1),
    ("{x}", 1),
    ("x; x", 2),
    ("x = 1", 3),
    ("x < 1", 3),
    ("x == 1", 3),
    ("x if x else 1", 1),
    ("x and x", 1),
    ("'x'", 1),
    ('"x"', 1),
    ("x!", 2),
    ("factorial(9)", 1),
    ("x % 2", 3),
    ("x // 2", 1),
    ("x & 1", 3),
    ("x @ x", 3),
    ("~x", 1),
    ("x\\n", 2),
    ("x\x00", 2),
    ("x\u00a0", 2),
    ("x # no", 3),
    ("f'{x}'", 2),
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
    ("0x10", 1),
    ("1_000", 1),
    ("1j", 1),
    # malformed
    ("2x", 1),
    ("2 x", 3),
    ("x theta", 3),
    ("x(2)", 1),
    ("(x)(x)", 2),
    ("2(x)", 1),
    ("1.2.3", 4),
    ("1..2", 3),
    (".", 1),
    ("1e", 1),
    ("x +", 4),
    ("* x", 1),
    ("x * / x", 5),
    ("x ***x", 5),
    ("x ^* x", 4),
    ("(x", 1),
    ("((x)", 1),
    ("x)", 2),
    ("()", 1),
    ("sin", 1),
    ("sin x", 5),
    ("sin^2(x)", 1),
    ("sin()", 1),
    ("sin(x, x)", 6),
    ("sin(x", 4),
    # too long, too deep, too many
    ("x" * 2001, 2001),
    ("1" + "+1" * 1000, 2001),
    ("1" + "+1" * 999, 1),
    ("(" * 51 + "x" + ")" * 51, 51),
    ("(" * 1999, 51),
    ("-" * 51 + "x", 52),
    ("x" + "^x" * 51, 103),
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
    ("9^9^9^9", 3),
    ("9^9^9", 1),
    ("9**99999", 1),
    ("2^65", 1),
    ("x^65", 1),
    ("x^-65", 1),
    ("x^64^2", 1),
    ("10^(10^10)", 1),
    ("1e60^2", 1),
    ("1e60*1e60", 1),
    ("1e-60/1e60", 1),
    ("x*1e60*1e60", 1),
    ("1e60*x*1e60", 1),
    ("x*2^64*x*2^64*x*2^64*x*2^64*x*2^64*x*2^64", 1),
    ("1/0", 1),
    ("x/0", 1),
    ("x/(x-x)", 1),
    ("0^-1", 1),
    ("1/(0.1+0.2-0.3)", 1),
    ("x/sin(pi)", 1),
    ("tan(pi/2)", 1),
    ("log(0)", 1),
    ("log(-1)", 1),
    ("log(x-x)", 1),
    ("log(sin(pi))", 1),
    ("sqrt(-1)", 1),
    ("sqrt(-4*x^2)", 1),
    ("(-8)^(1/3)", 1),
    ("(x-x-1)^0.5", 1),
    ("asin(2)", 1),
    ("acos(x-x+2)", 1),
    ("exp(exp(exp(9)))", 5),
    ("exp(1e9)", 1),
    ("exp(-1e9)", 1),
    ("x + exp(-1e90)", 5),
    ("1 - erf(30)", 5),
    ("sinh(1000)", 1),
    ("exp((1e-99*64/log(1e-99))^-1)", 1),
    ("1e-90^4", 1),
    ("1e-90*1e-90*1e-90*1e-90", 1),
    ("sqrt(2)*sqrt(3) - sqrt(6) + sin(1)^2 + cos(1)^2", 1),
    ("((1 + 1e-99)^(64/1e99))^x", 2),
    ("((2^(1/61)+3^(1/59))^2-2^(2/61)-2*2^(1/61)*3^(1/59)-3^(2/59))*x", 2),
    ("(x-x+9)^((x-x+9)^(x-x+9))", 1),
    ("sin(exp(1e50*sqrt(2) - 1.41421356237309504880e50))", 5),
    # powers that sympy would merge
    ("(x^64)^5", 1),
    ("(((x^2+1)^64+1)^4+1)^2", 2),
    ("((2*x)^64)^64", 1),
    ("exp(1e9*log(2*x))", 1),
    ("exp(1)^(1e9*log(2*x))", 1),
    ("2^(1e9*x + 1e9)*2^(-1e9*x)", 1),
    ("(2*theta)^(1e9*x)", 1),
    ("(2^(200*x))^(200/x)", 1),
    ("exp(64*log(3*exp(64*log(2*x))))", 1),
    ("exp(200*log(2^(200*x)))", 1),
    ("sinh(7e30*log(9*x))", 1),
    ("exp(1 + sin(1e9*log(2)))", 1),
    ("(theta/12345678901)^(9e9/12345678901234567890)", 1),
    ("sqrt(" * 20 + "x/3" + ")" * 20, 31),
]


@pytest.mark.parametrize(("text", "position"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_is_no_formula_is_refused_with_its_position(text: str, position: int) -> None:
    with pytest.raises(FormulaError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith("formula: ")
    assert f', at character {position} of "' in message
    assert message.isprintable(), "one line"
    assert len(message) < 400


READ = [
    "sqrt(1+" * 49 + "x" + ")" * 49,
    "1/(1+x*" * 49 + "x" + ")" * 49,
    "sin(x+sin(1e99*" * 24 + "1" + "))" * 24,
    "sin(1e99*" * 6 + "sqrt(2)" + ")" * 6,
    "log(1+x*" * 49 + "x" + ")" * 49,
    "*".join(f"(x+{i})" for i in range(75)),
    "+".join(f"sqrt({i})" for i in range(2, 76)),
    "*".join(f"sin({i})" for i in range(1, 75)),
    "(2^(1/3)+3^(1/5)+5^(1/7)+7^(1/11))^64*x",
    "x" + "^x" * 50,
    "2^(200*x)*2^(-200*x)",
    "exp(250*x*log(9e99*x))^(1/x)",
    "exp(x + log(1 + 1e9*log(2)*x))",
    "log(sinh((1e99-sqrt(x+9e9))^64)*x)",
    "log(cosh((1e99-sqrt(x+9e9))^64)*tanh(log(sinh(x))^64)*x)",
    "erf(cosh(log(log(exp(((x+1e99)^2)^64)))))",
]


@pytest.mark.parametrize("text", READ, ids=lambda value: repr(value)[:40])
def test_hostile_formulas_that_are_allowed_are_read_without_a_limit(text: str) -> None:
    assert isinstance(_read(text), sympy.Expr)


@pytest.mark.parametrize("text", ["exp(1e9*x)^(log(2)/x)", slow("2^a*x^2"), slow("2^a*x"), "2^a"])
def test_what_takes_too_long_is_refused_also_with_the_numbers_of_parameters(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, "SECONDS", 1)
    symbols, known = parameter_symbols({"a": 9e99})
    with pytest.raises(FormulaError, match="sympy does not come to an end with it in 1 seconds; write it in"):
        parse(text, symbols, known)


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(FormulaError, match=r"sympy fails on it .RecursionError.*; write it in simpler terms"):
        parse("1/(1+x*" * 49 + "x" + ")" * 49)


def test_a_deadline_of_the_caller_is_no_fault_of_the_formula() -> None:
    with within(1e-9), pytest.raises(TimeLimit):
        parse("x^2")


def test_errors_say_what_is_allowed_and_what_to_write() -> None:
    symbols, _ = parameter_symbols({"a": 1})
    names = "names are theta, x, pi, a; functions are log, ln, exp, sqrt"
    with pytest.raises(
        FormulaError, match=rf"'b' is not a name that is known, at character 7 of .*; {names}"
    ):
        parse("x + a*b", symbols)
    for text in ("2x", "2exp(x)", "sin x", "x theta", "(x"):
        with pytest.raises(FormulaError, match=r'of ".*"; a product is written 2\*x, a function sin\(x\), a'):
            parse(text)
    with pytest.raises(FormulaError, match=r"'x' is not a function, .*; for a product write \*"):
        parse("x(2)")
    with pytest.raises(
        FormulaError, match=r"'θ\^65' has the exponent 65, at character 5 of .* at most 64 in"
    ):
        parse("θ^2+θ^65")
    with pytest.raises(FormulaError, match=r"'sin' is a function, .*; write sin\(...\)$"):
        parse("sin")
    with pytest.raises(FormulaError, match=r'of "\.\.\..{60}\.\.\.";'):
        parse("x+" * 40 + "y" + "+x" * 40)
    with pytest.raises(FormulaError, match="it must be a text, got a int"):
        parse(3)  # type: ignore[arg-type]


_HARMLESS = (
    "x theta θ a pi 1 2 0.1 1e99 1e-99 9e9 ( ) ( ) + - * / ^ ** ^ sin( exp( log( sqrt( tan( asin( erf("
)
_HOSTILE = ".__class__ [0] lambda : ; ! % , = eval( open('FILE','w') ' \" \\ _ é"
_SPACED = [" ", "\n", "__import__('os').system('touch FILE')"]
_FRAGMENTS = st.sampled_from([*_HARMLESS.split(), *_HOSTILE.split(), *_SPACED])


def _only_formula_errors(text: str) -> None:
    symbols, known = parameter_symbols({"a": 2})
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(FormulaError):
        patch.setattr(formula, "SECONDS", 3)
        parse(text, symbols, known)


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
def test_large_formulas_are_read_or_refused(text: str) -> None:
    _only_formula_errors(text)


def test_nothing_is_evaluated_by_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("text reached sympy")

    monkeypatch.setattr("sympy.parsing.sympy_parser.parse_expr", forbidden)
    monkeypatch.setattr("builtins.eval", forbidden)
    assert formula.read("2.5*x^2 + sin(theta)/3", {}, {}) == R(5, 2) * X**2 + sympy.sin(THETA) / 3


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
    ["theta", "x", "t", "tau", "gamma", "theta_0", "T", "alpha", "K", "pi", "lambda", "is", *FUNCTIONS],
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
    assert (formula.HUGE, formula.POWER, formula.TOTAL) == (10**100, 64, 256)
