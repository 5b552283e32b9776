"""Closed forms of landscapes, symbolic against numeric answers, and landscapes that have no answer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy
from helpers import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from controlat.bolza import verify
from controlat.symbolic import AMATA, Derivation, Landscape, LandscapeError, Task
from controlat.symbolic.symbols import GAMMA, HORIZON, TAU, THETA, T

THETA0 = Task().start
A = sympy.Symbol("a", positive=True)


def derived(
    text: str = AMATA, x0: Any = 0, x_range: Any = None, parameters: Any = None, **task: Any
) -> Derivation:
    return Derivation(Task(Landscape(text, x0, parameters or {}, x_range), **task))


@pytest.fixture(scope="module")
def amata() -> Derivation:
    return derived()


def same(found: sympy.Expr | None, expected: sympy.Expr) -> bool:
    assert found is not None
    return bool(sympy.simplify(sympy.expand_log(found - expected, force=True)) == 0)


# ---- Amata's equations (11) and (12)


def test_equation_11_gives_both_sides_of_equation_12(amata: Derivation) -> None:
    assert amata.formula("x") == THETA
    assert same(amata.formula("alpha"), (THETA**2 + 1) / 2)
    assert same(amata.formula("curvature"), -2 / (THETA**2 + 1))
    assert same(amata.formula("theta"), THETA0 * sympy.exp(-T))
    assert same(amata.formula("K"), 2 * TAU / (THETA0**2 * sympy.exp(-2 * T) + 1))
    first, second = 2 * TAU / (THETA0**2 + 1), 4 * THETA0**2 * TAU / (THETA0**2 + 1) ** 2
    assert same(amata.coefficients[0], first)
    assert same(amata.coefficients[1], second)
    assert all(answer.by == "sympy" for answer in amata.answers.values())


def test_equation_11_has_the_minima_of_the_paper(amata: Derivation) -> None:
    plain = [zero for zero in amata.minima["plain"] if zero["kind"] == "minimum"]
    root = sympy.sqrt(sympy.sqrt(2) - 1)
    assert [zero["text"] for zero in plain] == [str(-root), str(root)]
    assert [zero["theta"] for zero in plain] == pytest.approx([-float(root), float(root)], abs=1e-12)
    assert [zero["kind"] for zero in amata.minima["plain"]] == ["minimum", "maximum", "minimum"]
    assert amata.minima["robust"] == [{"theta": 0.0, "kind": "minimum", "text": "0", "latex": "0"}]


def test_the_cost_of_equation_12(amata: Derivation) -> None:
    expected = THETA0**2 * sympy.exp(-2 * HORIZON) / 2 + GAMMA * TAU * sympy.log(
        (THETA0**2 + sympy.exp(2 * HORIZON)) / (THETA0**2 + 1)
    )
    assert same(amata.formula("J"), expected)
    assert round(derived(horizon=1).cost, 4) == 0.211
    at = {THETA0: 1, HORIZON: 3, TAU: 10, GAMMA: sympy.Rational(1, 100)}
    assert amata.cost == pytest.approx(float(expected.subs(at)), rel=1e-12)


def test_the_steps_of_equation_12_rise_throughout(amata: Derivation) -> None:
    assert amata.rising == [[0.0, 3.0]]
    assert amata.K(0.0) == pytest.approx(10)
    assert amata.K(3.0) == pytest.approx(20 / (np.exp(-6) + 1))
    t = np.array([0.0, 1.5, 3.0])
    assert amata.linear(t)[[0, 2]] == pytest.approx(amata.K(t)[[0, 2]])
    assert amata.series(1e-3) == pytest.approx(amata.K(1e-3), rel=1e-8)


# ---- other landscapes, solved by hand

e = sympy.exp(-T)
HAND: dict[str, dict[str, Any]] = {
    "another outer term": {
        "of": {"text": "theta^4/4 - (x - theta)^2/(theta^2 + 1)"},
        "alpha": (THETA**2 + 1) / 2,
        "theta": THETA0 / sympy.sqrt(1 + 2 * T * THETA0**2),
        "K": 2 * TAU * (1 + 2 * T * THETA0**2) / (1 + (1 + 2 * T) * THETA0**2),
    },
    "a curvature that falls": {
        "of": {"text": "theta^2/2 - (1 + theta^2)*(x - theta)^2"},
        "alpha": 1 / (2 * (1 + THETA**2)),
        "theta": THETA0 * e,
        "K": 2 * TAU * (1 + THETA0**2 * e**2),
        "rising": [],
    },
    "a shifted and scaled maximiser, data point 1": {
        "of": {"text": "theta^2/2 - (x - 2*theta - 1)^2/(1 + theta^4)", "x0": 1},
        "x": 2 * THETA + 1,
        "alpha": (1 + THETA**4) / 2,
        "K": 2 * TAU / (1 + THETA0**4 * e**4),
    },
    "a minimum elsewhere": {
        "of": {"text": "(theta - 2)^2 - (x + theta)^2*(3 + theta)/4", "theta0": "5/2"},
        "x": -THETA,
        "alpha": 2 / (3 + THETA),
        "theta": 2 + (THETA0 - 2) * sympy.exp(-2 * T),
        "K": TAU * (5 + (THETA0 - 2) * sympy.exp(-2 * T)) / 2,
    },
    "a parameter": {
        "of": {"text": "a*theta^2/2 - (x - a*theta)^2/(theta^2 + a)", "parameters": {"a": "3/2"}},
        "x": A * THETA,
        "alpha": (THETA**2 + A) / 2,
        "theta": THETA0 * sympy.exp(-A * T),
        "K": 2 * TAU / (A + THETA0**2 * sympy.exp(-2 * A * T)),
    },
    "not quadratic, Newton's step differs": {
        "of": {"text": "theta^2/2 + 1 - cosh(x - theta)"},
        "alpha": THETA / sympy.sinh(THETA),
        "newton": 1 / sympy.cosh(THETA),
        "K": TAU * sympy.sinh(THETA0 * e) / (THETA0 * e),
        "rising": [],
    },
    "a quartic": {
        "of": {"text": "theta^2/2 - (x - theta)^2/2 - (x - theta)^4/4"},
        "alpha": 1 / (1 + THETA**2),
        "newton": 1 / (1 + 3 * THETA**2),
        "K": TAU * (1 + THETA0**2 * e**2),
    },
    "flat to third order": {
        "of": {"text": "theta^2/2 - (x - theta)^4"},
        "alpha": 1 / (4 * THETA**2),
        "K": 4 * TAU * THETA0**2 * e**2,
    },
    "a periodic one": {
        "of": {"text": "theta^2/2 + sin(x - theta)"},
        "x": THETA + sympy.pi / 2,
        "alpha": (THETA + sympy.pi / 2) / sympy.cos(THETA),
    },
    "a robust loss linear in theta": {
        "of": {"text": "theta - (x - 1)^2*exp(theta)", "theta_range": (-5, 3)},
        "x": sympy.Integer(1),
        "alpha": sympy.exp(-THETA) / 2,
        "theta": THETA0 - T,
        "K": 2 * TAU * sympy.exp(THETA0 - T),
    },
}


LONG = ("a parameter", "a minimum elsewhere", "a periodic one", "a robust loss linear in theta")


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in HAND])
def test_closed_forms(name: str) -> None:
    case = dict(HAND[name])
    derivation = derived(**case.pop("of"))
    if "rising" in case:
        assert derivation.rising == case.pop("rising")
    for key, expected in case.items():
        assert same(derivation.formula(key), expected), (key, derivation.formula(key))


def test_a_negative_theta_0_mirrors_a_positive_one() -> None:
    left, right = derived(theta0=-1), derived(theta0=1)
    t = np.linspace(0, 3, 7)
    assert left.theta(t) == pytest.approx(-right.theta(t))
    assert left.K(t) == pytest.approx(right.K(t))
    assert left.cost == pytest.approx(right.cost)
    assert left.formula("J") is not None


def test_at_rest_nothing_moves_and_the_exact_step_is_a_limit() -> None:
    derivation = derived(theta0=0)  # the data point is the inner maximum: (x* - x0)/l_x is 0/0
    assert derivation.alpha(1.0) == pytest.approx(0.5)
    assert derivation.rising == []
    assert derivation.cost == pytest.approx(0.01 * 10 * 2 * 3)


# ---- random landscapes, quadratic in x: symbolic against numeric

whole = st.integers(-3, 3)
positive = st.fractions(Fraction(1, 2), 3, max_denominator=3)


@st.composite
def quadratics(draw: st.DrawFn) -> dict[str, Any]:
    """l = a (theta - m)^2/2 + b theta - (p + q theta^2)^s (x - c theta - d)^2."""
    names = {
        "a": positive,
        "m": whole,
        "p": positive,
        "q": positive,
        "c": st.sampled_from([-2, -1, 1, 2]),
        "d": whole,
    }
    numbers: dict[str, Any] = {name: draw(kind) for name, kind in names.items()}
    return numbers | {"s": draw(st.sampled_from([-1, 1])), "theta0": draw(positive), "x0": draw(whole)}


def written(n: dict[str, Any]) -> str:
    bent = f"(({n['p']}) + ({n['q']})*theta^2)^({n['s']})"
    return f"({n['a']})*(theta - ({n['m']}))^2/2 - {bent}*(x - ({n['c']})*theta - ({n['d']}))^2"


@pytest.mark.slow
@given(quadratics())
@settings(max_examples=5, deadline=None)
def test_random_quadratics_agree_with_plain_numerics(n: dict[str, Any]) -> None:
    far = 2 * max(abs(float(n["theta0"])), abs(n["m"])) + 1
    derivation = derived(
        written(n),
        n["x0"],
        x_range=(-40, 40),
        theta0=str(n["theta0"]),
        tau=2,
        horizon=1,
        theta_range=(-far, far),
    )
    a, m, p, q, s = (float(n[key]) for key in "ampqs")
    flow = solve_ivp(
        lambda t, y: -a * (y - m), (0, 1), [float(n["theta0"])], rtol=1e-11, atol=1e-12, dense_output=True
    )
    assert flow.sol is not None
    t = np.linspace(0, 1, 9)
    theta = flow.sol(t)[0]
    steps = 2 * 2 * (p + q * theta**2) ** s
    assert derivation.theta(t) == pytest.approx(theta, rel=1e-8, abs=1e-9)
    assert derivation.K(t) == pytest.approx(steps, rel=1e-7)
    assert derivation.landscape.quadratic
    for key in ("x", "alpha", "theta", "K", "robust"):
        assert derivation.answers[key].by == "sympy", key
    values = derivation.task.values
    formula = derivation.formula("K")
    assert formula is not None
    shown = [float(formula.subs(values).subs(T, sympy.Float(v, 30))) for v in t]
    assert shown == pytest.approx(list(steps), rel=1e-7)
    spent = quad(lambda v: 4 * (p + q * flow.sol(v)[0] ** 2) ** s, 0, 1)[0]
    assert derivation.parts["inner"] == pytest.approx(spent, rel=1e-6)
    assert derivation.cost == pytest.approx(a * (theta[-1] - m) ** 2 / 2 + 0.01 * spent, rel=1e-6)
    h = 1e-4
    assert derivation.series(h) == pytest.approx(float(derivation.K(h)), rel=1e-8, abs=1e-8)


# ---- without closed forms


def test_a_cubic_is_solved_numerically_and_says_so() -> None:
    derivation = derived("theta^2/2 - x^4 + theta*x^2 - theta*x/10", theta0=2)
    assert derivation.formula("x") is None
    assert "scipy" in derivation.answers["K"].by
    assert derivation.answers["x"].why
    for t in (0.0, 1.0, 3.0):
        theta = float(derivation.theta(t))
        x = min(
            np.roots([-4, 0, 2 * theta, -theta / 10]).real
        )  # the lower well, where the ascent from 0 goes
        assert derivation.alpha(t) == pytest.approx(x / (-theta / 10), rel=1e-9)
    # The series comes from implicit differentiation, and is the derivative of K*.
    h = 1e-4
    slope = (float(derivation.K(h)) - float(derivation.K(0.0))) / h
    assert derivation.series_numbers[1] == pytest.approx(slope, rel=1e-3)
    assert derivation.series_numbers[0] == pytest.approx(float(derivation.K(0.0)), rel=1e-9)


def test_a_time_limit_leaves_numbers_and_says_why() -> None:
    derivation = derived(seconds=1e-3)
    assert derivation.formula("x") is None
    assert derivation.answers["x"].why == "sympy did not find the zeros of l_x within its time"
    assert "the zeros of l_x" in derivation.budget.late
    assert derivation.cost == pytest.approx(derived().cost, rel=1e-9)


# ---- places where numerics go wrong


def test_up_to_a_fold_the_numbers_stay_right() -> None:
    """-x^3/3 + theta x: x* = sqrt(theta) with infinite slope at 0, theta = (1 - t/2)^2, gone at t = 2."""
    derivation = derived("-x^3/3 + theta*x", x_range=(-1, 3), horizon="1.99")
    t = np.linspace(0, 1.99, 9)
    assert derivation.theta(t) == pytest.approx((1 - t / 2) ** 2, rel=1e-9)
    assert derivation.K(t) == pytest.approx(10 * (1 - t / 2), rel=1e-9)
    assert derivation.formula("alpha") == 1 / sympy.sqrt(THETA)
    with pytest.raises(
        LandscapeError, match=r"at t = 2, before the horizon 3. There the inner maximum ceases"
    ):
        derived("-x^3/3 + theta*x", x_range=(-1, 3))


@pytest.mark.parametrize("factor", ["1e-12", slow("1e6")])
def test_scaling_the_loss_scales_time_and_steps(factor: str) -> None:
    c = float(factor)
    derivation = derived(f"{factor}*({AMATA})", horizon=3 / c)
    t = np.linspace(0, 3, 5)
    assert derivation.K(t / c) == pytest.approx(c * 20 / (np.exp(-2 * t) + 1), rel=1e-8)
    assert all(note.startswith("K* < 1") for note in derivation.notes)
    assert [zero["kind"] for zero in derivation.minima["plain"]] == ["minimum", "maximum", "minimum"]


def test_a_large_constant_changes_nothing() -> None:
    derivation = derived("1e10 + theta^2/2 - (x - theta)^2")
    assert derivation.notes == []
    assert derivation.K(1.0) == pytest.approx(20)


@pytest.mark.parametrize(
    "text",
    [
        "theta^2/2 - exp((x - theta)^2)",
        slow("theta^2/2 - cosh(3*(x - theta))"),
        slow("theta^2/2 - (x - theta)^64 - (x - theta)^2"),
        "theta^2/2 + sqrt(4 - (x - theta)^2)",
    ],
)
def test_steep_and_bounded_landscapes_have_their_maximum(text: str) -> None:
    derivation = derived(text)
    assert derivation.formula("x") == THETA
    assert derivation.theta(3.0) == pytest.approx(np.exp(-3))


def test_a_data_point_that_is_the_maximum_has_the_limit_as_its_step() -> None:
    derivation = derived("theta^2/2 - x^2*(theta^2 + 1)")
    assert same(derivation.formula("alpha"), 1 / (2 * (THETA**2 + 1)))
    assert derivation.series_numbers == pytest.approx([40, -40, 40])


def test_a_parameter_that_is_zero_is_no_division_by_zero() -> None:
    derivation = derived("theta^2/2 - (x - theta)^2 + a*x^4", parameters={"a": 0})
    assert derivation.K(1.0) == pytest.approx(20)
    assert derivation.formula("K") is not None


def test_a_constant_loss_has_no_list_of_minima() -> None:
    derivation = derived("-(x - theta)^2")
    assert derivation.minima["robust"] == []
    assert derivation.cost == pytest.approx(0.01 * 20 * 3)


@pytest.mark.slow
def test_a_long_horizon_ends() -> None:
    derivation = derived(horizon="1e5", seconds=2)
    assert derivation.cost == pytest.approx(0.01 * 20 * 1e5, rel=1e-3)


# ---- several inner maxima

WELLS = "theta^2/2 - (x^2 - 1)^2*(1 + theta^2) + x/4*(2 - theta)"


def test_branches_are_kept_apart() -> None:
    left, right = (derived(WELLS, x0=x0, branch=b) for x0, b in (("-1/2", 1), ("1/2", 0)))
    kinds = [point.kind for point in right.points]
    assert kinds == ["maximum", "minimum", "maximum"]
    assert left.point.x < 0 < right.point.x
    assert left.point.value < right.point.value
    assert any("than at the inner maximum that is followed" in note for note in left.notes)
    assert right.notes == []


def test_the_ascent_must_reach_the_maximum_that_is_followed() -> None:
    with pytest.raises(
        LandscapeError, match=r"climbs to x = -0\.9\d+ .* branch 1 follows the one that it reaches"
    ):
        derived(WELLS, x0="-1/2")


# ---- no answer


@pytest.mark.parametrize(
    ("text", "task", "told"),
    [
        ("theta^2/2 + x^2", {}, r"l\(1, x\) has no inner maximum .*minimum at 0"),
        ("theta + x", {}, r"has no inner maximum .*no stationary point"),
        ("x^3 - 3*x + theta", {}, r"is larger at x = 10 "),
        ("theta^2 + 0*x", {}, "does not depend on x"),
        (
            "-theta^4 - (x - theta)^2",
            {},
            r"blows up in finite time: .* as t comes to 0\.125, not after the horizon 3",
        ),
        ("theta^2/2 - sqrt((x - theta)^2)", {}, "has a kink"),
        ("theta^2/2 + 0.01/(x - 0.5)^2 - (x - 2*theta)^2", {}, r"is larger at x = 0\.5 \(inf\)"),
        ("-theta^2/2 - (x - 5*theta)^2", {"theta0": "1/2"}, r"leaves x_range: give a wider one"),
        ("theta^2/2 + log(x) - x*theta", {}, r"l\(1, x0\) is undefined at the data point 0"),
        ("log(theta) - (x - theta)^2", {}, r"at t = 0\.5, before the horizon 3.*shorter horizon"),
        ("theta - (x - 1)^2*theta", {}, r"ceases to exist"),
        ("theta^2/2 - (x - theta)^2/(theta - 1/2)", {}, r"comes to theta = 0\.5 at t = 0\.6931.*has a pole"),
        ("tan(theta) - (x - theta)^2", {}, r"comes to theta = -1\.571 at .*has a pole"),
        ("x^x^x^x^x^x", {}, r"has no inner maximum"),
        ("theta^2/2 - (x^2 - 1)^2", {}, r"l_x\(1, x0\) = 0 at the data point 0, which is no maximum"),
        ("theta^2/2 - (x - theta)^2 - (x - theta)^4*exp(x)", {"branch": 3}, "branch must be from 0 to 0"),
    ],
)
def test_landscapes_without_an_answer_say_why(text: str, task: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        derived(text, **task)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"tau": 0}, "tau must be > 0"),
        ({"horizon": -1}, "horizon must be > 0"),
        ({"gamma": "-0.1"}, "gamma must be >= 0"),
        ({"order": 0}, "order must be a whole number from 1 to 12"),
        ({"theta_range": (2, 3)}, "theta_range must be an interval around theta0"),
        ({"theta0": "one"}, "theta0 must be a number"),
        ({"seconds": 0}, "seconds must be > 0"),
    ],
)
def test_bad_tasks_are_refused(task: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Task(**task)


def test_bad_landscapes_are_refused() -> None:
    with pytest.raises(ValueError, match="x_range must be an interval around the data point 5"):
        Landscape(AMATA, x0=5, x_range=(-1, 1))
    with pytest.raises(ValueError, match="b = 1 was given, but the formula has no such name"):
        Landscape(AMATA, parameters={"b": 1})


# ---- random landscapes: what the checks say agrees with itself


@pytest.mark.slow
@given(quadratics())
@settings(max_examples=4, deadline=None)
def test_random_quadratics_are_checked_consistently(n: dict[str, Any]) -> None:
    far = 2 * max(abs(float(n["theta0"])), abs(n["m"])) + 1
    task = Task(
        Landscape(written(n), n["x0"], {}, (-40, 40)),
        theta0=str(n["theta0"]),
        tau=4,
        horizon=1,
        theta_range=(-far, far),
        seconds=1e-3,  # the numbers alone
    )
    derivation = Derivation(task)
    checked = verify(derivation.branch, float(task.theta0), 4.0, 1.0, 0.01)
    assert checked.derived["J"] == pytest.approx(derivation.cost, rel=1e-7)
    assert checked.derived["C"] >= 0
    assert checked.boundary is not None
    assert checked.boundary["success"]
    assert checked.boundary["theta_difference"] < 1e-6
    assert checked.holds == (checked.derived["satisfies"] and checked.better is None)
    if checked.derived["satisfies"]:  # then nothing else finds a better one, and all others are worse
        assert checked.better is None
        assert all(
            row["C"] > 0 and row["J"] > checked.derived["J"] for row in checked.comparisons if "C" in row
        )
    else:
        assert checked.derived["C"] > 0
