"""The convergence bound: constants against closed forms, where it fails as printed, that it holds mended."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat.bolza.bound import convergence
from controlat.bolza.constants import constants
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape
from controlat.symbolic.symbols import THETA


def branch(
    text: str = "", theta0: float = 1.0, reach: tuple[float, float] = (-3, 3), **parameters: float
) -> Branch:
    landscape = Landscape(text, parameters=parameters) if text else Landscape()
    tops = [point for point in landscape.stationary(theta0) if point.kind == "maximum"]
    return Branch(landscape, theta0, tops[0].x, reach)


@pytest.fixture(scope="module")
def amata() -> Branch:
    return branch()


def saddle(a: float, b: float, c: float, theta0: float) -> Branch:
    # with a < 0 an inner loop that stops short makes theta grow by up to 1.5 a step: a wide branch
    text = f"({a})*theta^2/2 + ({b})*theta*x - ({c})*x^2/2"
    landscape = Landscape(text, x_range=(-1e11, 1e11))
    best = sympy.Rational(str(b)) / sympy.Rational(str(c)) * THETA
    return Branch(landscape, theta0, b * theta0 / c, (-1e9, 1e9), best)


def test_the_constants_of_equation_11(amata):
    k = constants(amata, 1.0, (0, 1), (-2, 2))
    assert k.mu == pytest.approx(1)  # 2/(theta^2+1) at theta = 1
    assert k.drop == pytest.approx(0.5)  # L = theta^2/2
    theta = np.linspace(0, 1, 200001)
    # l_tx = 2/q + 4 theta (x - theta)/q^2 increases with x; -l_tx is largest at x = -2
    q = theta**2 + 1
    ends = [2 / q + 4 * theta * (x - theta) / q**2 for x in (-2.0, 2.0)]
    assert k.l_tx == pytest.approx(np.abs(ends).max(), rel=1e-9)
    t, p = theta[::200], q[::200]
    d = np.linspace(-2, 2, 801)[:, None] - t  # l_tt by hand, with d = x - theta
    l_tt = 1 - 2 / p - 8 * t * d / p**2 + 2 * d**2 / p**2 - 8 * t**2 * d**2 / p**3
    assert k.l_tt == pytest.approx(np.abs(l_tt).max(), rel=1e-5)
    assert k.l_tt >= np.abs(l_tt).max() - 1e-12
    assert k.beta == pytest.approx(k.l_tx**2 / k.mu + k.l_tt)


def test_the_printed_bound_fails_without_noise(amata):
    rows = convergence(amata, 1.0, (1, 10, 100), theta_range=(-1, 1), x_range=(-2, 2)).rows
    assert [round(row["left"], 2) for row in rows] == [1.0, 0.69, 0.12]
    assert all(row["printed"] == 0 and row["printed_holds"] is False for row in rows)
    assert all(row["corrected_holds"] and row["sharper_holds"] and row["enlarged"] == 0 for row in rows)
    assert all(row["standard_error"] == 0 and not row["long_enough"] for row in rows)
    # theta_t = theta_0 (1 - eta)^t
    r = (1 - rows[1]["eta"]) ** 2
    assert rows[1]["left"] == pytest.approx((1 - r**10) / (10 * (1 - r)))


def test_the_range_runs_really_visit(amata):
    rows = convergence(amata, 1.0).rows
    assert [row["T"] for row in rows] == [1, 10, 100, 1000]
    for row in rows:
        assert row["theta_range"] == pytest.approx([0, 1], abs=1e-12)
        assert row["x_range"] == pytest.approx([0, 1], abs=1e-12)
        assert row["printed_holds"] is False
        assert row["corrected_holds"] is True
    assert [round(row["left"], 3) for row in rows[:3]] == [1.0, 0.412, 0.045]


def test_noise_enlarges_the_range_and_long_runs_satisfy_the_printed_bound(amata):
    rows = convergence(amata, 1.0, (1, 10, 100), sigma=(0.1, 1.0), runs=64).rows
    assert any(row["enlarged"] for row in rows)
    for row in rows:
        assert row["sharper_holds"] is True
        assert row["corrected_holds"] is True
        assert row["sharper"] <= row["corrected"] * (1 + 1e-12)
        assert row["long_enough"] == (row["T"] * row["sigma"] ** 2 >= row["beta"] * row["Delta"])
        assert row["printed_holds"] is True or not row["long_enough"]
        ratio = math.sqrt(row["Delta"] / (row["T"] * row["beta"])) / row["sigma"]
        assert row["eta"] == pytest.approx(min(1 / row["beta"], ratio))
    assert not all(row["printed_holds"] for row in rows)


def test_an_inexact_inner_loop(amata):
    row = convergence(amata, 1.0, (10,), alpha=0.5, steps=1).rows[0]
    assert row["delta"] == pytest.approx(
        0.5
    )  # theta (1 - 2 alpha/(theta^2+1)) at theta = 1, where it is largest
    assert row["corrected"] == pytest.approx(2 * row["beta"] * 0.5 / 10 + 2 * (row["L_tx"] * 0.5) ** 2)
    assert row["printed"] == pytest.approx(5 * (row["L_tx"] * 0.5) ** 2)
    assert row["fosc_bound"] == pytest.approx(5 * row["L_tx"] ** 2 * row["fosc"] / row["mu"])
    # mu |xhat - x*|^2 is at most the first-order gap
    assert row["mu"] * row["delta"] ** 2 <= row["fosc"] * (1 + 1e-9)
    plain = convergence(amata, 1.0, (10,), alpha=0.5, steps=0).rows[0]
    assert plain["delta"] == pytest.approx(1)
    assert convergence(amata, 1.0, (10,), delta=0.2).rows[0]["delta"] == pytest.approx(0.2)


def test_the_constants_of_a_quadratic_saddle():
    found = saddle(-0.5, 2.0, 4.0, 1.0)
    k = constants(found, 1.0, (-1, 2), (-3, 3))
    assert (k.l_tt, k.l_tx, k.mu) == pytest.approx((0.5, 2.0, 4.0))
    assert k.drop == pytest.approx(0.25)  # L = (a + b^2/c) theta^2/2
    assert k.beta == pytest.approx(1.5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    a=st.floats(-1, 3),
    b=st.floats(-2, 2),
    c=st.floats(0.3, 4),
    theta0=st.floats(-2, 2),
    sigma=st.sampled_from([0.0, 0.1, 2.0]),
    inner=st.sampled_from([{}, {"delta": 0.3}, {"alpha": 0.1, "steps": 2}, {"alpha": 0.1, "steps": 0}]),
    seed=st.integers(0, 1000),
)
def test_the_corrected_bound_holds_on_strongly_concave_quadratics(a, b, c, theta0, sigma, inner, seed):
    a, b, c, theta0 = (round(value, 2) for value in (a, b, c, theta0))
    if a + b * b / c < 0.05:  # the robust loss has to have a minimum
        a = 0.1
    bound = convergence(saddle(a, b, c, theta0), theta0, (1, 7, 40), sigma, runs=64, seed=seed, **inner)
    assert not bound.reason
    for row in bound.rows:
        assert not row["reason"]
        assert (row["L_tt"], row["L_tx"], row["mu"]) == pytest.approx((abs(a), abs(b), c), rel=1e-9)
        assert row["corrected_holds"] is not False
        assert row["sharper_holds"] is not False
        if row["long_enough"]:
            assert row["printed_holds"] is not False


def test_the_same_seed_gives_the_same_rows(amata):
    first, again, other = (convergence(amata, 1.0, (20,), 1.0, runs=16, seed=s).to_json() for s in (3, 3, 4))
    assert first == again
    assert first["rows"][0]["left"] != other["rows"][0]["left"]
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "reach", "settings", "why"),
    [
        ("theta - (x - theta)^2", (-3, 3), {}, "Delta is infinite or unknown"),
        ("theta^(3/2) - (x - theta)^2", (0, 3), {}, "is infinite or undefined|undefined at theta"),
        ("theta^2/2 + cos(x - theta)", (-3, 3), {}, "not strongly concave"),
        ("theta - x^2", (-3, 3), {"theta_range": (-1, 2)}, "beta = 0"),
        ("theta^2/2 - (x - theta)^2", (-1, 2), {"sigma": 50.0}, "a run leaves theta in"),
        ("theta^2/2 - (x - theta)^2", (-3, 3), {"alpha": 9.0, "steps": 2000}, "diverges"),
    ],
)
def test_where_the_theorem_says_nothing_there_is_a_reason(text, reach, settings, why):
    bound = convergence(branch(text, 1.0, reach), 1.0, (1, 10), **settings)
    said = [bound.reason] if bound.reason else [row["reason"] for row in bound.rows]
    assert all(re.search(why, reason) for reason in said), said
    assert all(row["left"] is None for row in bound.rows)
    json.dumps(bound.to_json(), allow_nan=False)


def test_a_pole_between_the_points_of_the_grid_is_no_constant():
    followed = branch("theta^2/2 - (x - theta)^2 + 1/(theta - 0.123457)^2", 1.0)
    with pytest.raises(ValueError, match=r"unbounded near theta = 0\.12345"):
        constants(followed, 1.0, (0, 1), (0, 1))


def test_at_rest_nothing_happens(amata):
    for row in convergence(amata, 0.0, (5,), (0.0, 1.0)).rows:
        assert (row["left"], row["Delta"], row["printed_holds"], row["corrected_holds"]) == (0, 0, True, True)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"horizons": (0,)}, "horizons must be a whole number"),
        ({"horizons": ()}, "at least one number"),
        ({"horizons": (math.inf,)}, "horizons must be a whole number"),
        ({"sigma": ()}, "sigma must be"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"alpha": 0.5}, "give both"),
        ({"alpha": 0.0, "steps": 1}, "alpha must be positive"),
        ({"alpha": 0.1, "steps": 1, "delta": 0.1}, "leave one out"),
        ({"runs": 1}, "runs must be"),
        ({"seed": -1}, "seed must be"),
        ({"theta_range": (2, 3)}, "theta_range must be"),
        ({"theta_range": (-9, 3)}, "theta_range must be"),
        ({"x_range": (math.nan, 3)}, "x_range must be"),
    ],
)
def test_mistakes_are_refused(amata, settings, why):
    with pytest.raises(ValueError, match=why):
        convergence(amata, 1.0, **settings)


def test_a_start_off_the_branch_and_a_bad_range_of_constants_are_refused(amata):
    with pytest.raises(ValueError, match="theta0 must be"):
        convergence(amata, 7.0)
    cosine = branch("theta^2/2 + cos(x - theta)", 1.0)
    top = float(cosine(1.0))
    with pytest.raises(ValueError, match="not strongly concave"):
        constants(cosine, 1.0, (0, 1), (top - 4, top))
