"""The control problem of a landscape: inner ascent with real K, its derivatives, sets, refusals."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat.bolza.admissible import SETS, chosen_set
from controlat.bolza.problem import Bolza
from controlat.bolza.search import candidates, whole_cap
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape, LandscapeError

FORMULAS = {
    "paper": "theta^2/2 - (x - theta)^2/(theta^2 + 1)",
    "other curvature": "theta^4/4 - (x - theta)^2*(1 + theta^2)/2",
    "cosh": "theta^2/2 + 1 - cosh(x - theta)",
    "quartic": "theta^2/2 - (x - theta)^2/2 - (x - theta)^4/4",
    "log": "theta^2/2 - log(1 + (x - theta)^2)",
}


@cache
def follow(text: str, theta0: float, x0: float) -> Branch:
    """The first maximum at theta0, followed."""
    landscape = Landscape(text, x0=x0)
    x = next(p.x for p in landscape.stationary(theta0) if p.kind == "maximum")
    return Branch(landscape, theta0, x, (-3, 3))


def make(text: str, theta0: float = 1.0, x0: float = 0, **settings: object) -> Bolza:
    """A problem on the first maximum at theta0."""
    branch = follow(text, theta0, x0)
    values = {"tau": 10.0, "horizon": 1.0, "gamma": 0.01} | settings
    values.setdefault("admissible", "product" if branch.landscape.quadratic else "free")
    return Bolza(branch, theta0, **values)


@pytest.mark.parametrize("text", FORMULAS.values(), ids=FORMULAS)
def test_the_exact_step_gives_the_robust_flow_for_every_real_k(text: str) -> None:
    problem = make(text)
    theta = np.array([-1.2, 0.3, 1.0, 1.6])
    for k in (0.01, 0.4, 1.0, 2.5, 20.0):
        assert np.array_equal(problem.ascend(theta, 1.0, k).x, problem.branch(theta))
        assert problem.flow(theta, 1.0, k) == pytest.approx(-problem.branch.robust_slope(theta), abs=1e-14)


@pytest.mark.parametrize("text", FORMULAS.values(), ids=FORMULAS)
def test_whole_steps_are_those_of_the_ascent(text: str) -> None:
    problem = make(text)
    theta = np.array([-1.2, 0.3, 1.0, 1.3])
    for k in range(6):
        expected = problem.landscape.ascent(theta, 0.37 * problem.branch.exact_step(theta), k)
        assert problem.ascend(theta, 0.37, k).x == pytest.approx(expected, abs=1e-13)


def test_an_ascent_that_overshoots_is_not_in_the_set() -> None:
    # log: 1 + alpha* l_xx(x*) = -theta^2, so that the step after one just below alpha* passes x*
    problem = make(FORMULAS["log"])
    theta = np.array([0.5, 1.0, 1.4])
    assert problem.admits(theta, 0.9, 1).all()
    assert not problem.admits(theta, 0.9, [4, 3, 2]).any()
    assert (problem.hamiltonian(theta, -theta, 0.95, 10) == -math.inf).all()
    assert problem.admits(theta, 1.0, 1000).all()
    assert problem.ascend(theta, 0.95, 10).x == pytest.approx(theta, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "name"),
    [(text, name) for text in FORMULAS.values() for name in ("integer", "free")]
    + [(FORMULAS[name], "product") for name in ("paper", "other curvature")],
)
def test_every_admitted_ascent_stays_between_the_data_point_and_the_maximum(text: str, name: str) -> None:
    problem = make(text, x0=0.2, tau=3.3, admissible=name)
    theta = np.array([-1.5, 0.1, 0.8, 1.7])[:, None]
    q, k = candidates(problem, theta[:, 0], points=20)
    good = problem.admits(theta, q, k)
    assert good.any(axis=1).all()
    at, alpha, star = theta + 0 * q, q * problem.branch.exact_step(theta), problem.branch(theta)
    low, high = np.minimum(0.2, star) - 1e-9, np.maximum(0.2, star) + 1e-9
    x = np.full(at.shape, 0.2)
    for n in range(1, 40):
        x = np.where(q == 1, star, x + alpha * problem.landscape("x")(at, x))
        inside = (x >= low) & (x <= high)
        assert inside[good & (np.ceil(k) >= n)].all()
    if problem.landscape.quadratic:
        assert good.all()


def test_overshooting_steps_stay_in_the_range_of_x() -> None:
    problem = make(FORMULAS["quartic"], admissible="overshoot")
    theta = np.array([0.5, 2.5])
    assert problem.admits(theta, 1.4, 1).all()
    thrown = make("theta^2/2 - (x - theta)^2*exp(x)", admissible="overshoot")
    assert thrown.admits(1.0, 1.9, [1, 2]).tolist() == [True, False]
    narrow = Landscape(FORMULAS["paper"], x_range=(-1, 1.5))
    problem = Bolza(Branch(narrow, 1.0, 1.0, (0.5, 1.4)), 1.0, 10, 1, 0.01, "overshoot")
    assert problem.admits(np.array([1.0, 1.0]), np.array([1.4, 1.6]), 1).tolist() == [True, False]


def test_the_policy_of_whole_k_is_the_first_that_does_not_overshoot() -> None:
    problem = make(FORMULAS["log"], admissible="integer")
    theta = np.array([0.3, 1.0, 1.4])
    q, k = problem.policy(theta)
    assert (k > np.ceil(problem.count(theta))).any()
    assert problem.admits(theta, q, k).all()
    before = np.maximum(k - 1, 1)
    passed = problem.admits(theta, problem.count(theta) / before, before)
    assert not passed[k > np.ceil(problem.count(theta))].any()


def test_numbers_that_are_not_finite_do_not_pass() -> None:
    for problem in (make(FORMULAS["quartic"]), make(FORMULAS["paper"])):
        for q, k in ((math.nan, 2.0), (0.5, math.nan)):
            assert not problem.admits(1.0, q, k)
    assert not make(FORMULAS["quartic"]).admits(1.0, 0.5, math.inf)


def test_real_k_of_a_quadratic_landscape_is_a_power() -> None:
    problem = make(FORMULAS["paper"])
    theta, q, k = 1.3, 0.3, 4.7
    assert float(problem.ascend(theta, q, k).x) == pytest.approx(theta * (1 - 0.7**4.7), rel=1e-13)


@pytest.mark.parametrize("name", ["cosh", "quartic", "log"])
def test_real_k_is_not_offered_where_the_landscape_is_not_quadratic(name: str) -> None:
    assert not make(FORMULAS[name]).admits(1.0, 0.4, 2.5)
    assert chosen_set(make(FORMULAS[name]).landscape) == "integer"
    with pytest.raises(LandscapeError, match=r"real K .* is not offered .* one of integer, free, overshoot"):
        make(FORMULAS[name], admissible="product")


@pytest.mark.parametrize("text", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("k", [0.4, 1.0, 2.0, 3.7])  # of others than quadratic ones whole K alone
def test_flow_slope_against_differences_at_fixed_alpha(text: str, k: float) -> None:
    problem = make(text)
    k = k if problem.landscape.quadratic else math.ceil(k)
    theta, h = np.array([-1.1, 0.5, 1.0, 1.7])[:, None], 1e-5
    q, step = np.array([0.1, 0.5, 0.9]), problem.branch.exact_step
    alpha = q * step(theta)
    ahead, behind = (problem.flow(theta + e, alpha / step(theta + e), k) for e in (h, -h))
    assert problem.flow_slope(theta, q, k) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("text", FORMULAS.values(), ids=FORMULAS)
def test_slopes_along_the_bound_against_differences(text: str) -> None:
    problem, h = make(text, x0=0.2), 1e-5
    theta = np.array([-1.1, 0.2, 0.2003, 0.5, 1.7])  # 0.2: the data point is the maximum, 0/0 in alpha*
    if problem.landscape.quadratic:
        count = (problem.count(theta + h) - problem.count(theta - h)) / (2 * h)
        assert problem.count_slope(theta) == pytest.approx(count, rel=1e-6, abs=1e-6)
    flow = -(problem.branch.robust_slope(theta + h) - problem.branch.robust_slope(theta - h)) / (2 * h)
    assert problem.robust_flow_slope(theta) == pytest.approx(flow, rel=1e-7)


@given(q=st.floats(0.02, 0.999), theta=st.floats(0.05, 2.5), tau=st.floats(0.1, 30))
@settings(max_examples=60, deadline=None)
def test_a_smaller_step_with_the_same_product_never_arrives(q: float, theta: float, tau: float) -> None:
    problem = make(FORMULAS["paper"], tau=tau)
    x = float(problem.ascend(theta, q, float(problem.count(theta)) / q).x)
    assert 0 < x <= theta


@pytest.mark.parametrize("name", SETS)
def test_candidates_belong_to_their_set_and_contain_the_exact_step(name: str) -> None:
    problem = make(FORMULAS["paper"], admissible=name, tau=3.3)
    theta = np.array([-1.5, 0.1, 0.8])
    q, k = candidates(problem, theta)
    assert q.shape == k.shape
    assert len(q) == 3
    assert q.min() > 0
    assert q.max() <= problem.reach + 1e-12
    if SETS[name].whole:
        assert np.array_equal(k, np.round(k))
        assert k.min() >= 1
    if SETS[name].tied:
        assert q * problem.branch.exact_step(theta)[:, None] * k == pytest.approx(np.full(q.shape, 3.3))
    if name != "integer":
        assert (q == 1).any(axis=1).all()


def test_the_policy_is_rounded_up_where_k_is_whole() -> None:
    theta = np.array([0.0, 1.0, 2.0])  # K* = 20, 10, 4
    for name in SETS:
        q, k = make(FORMULAS["paper"], admissible=name, tau=10.0).policy(theta)
        assert k == pytest.approx([20, 10, 4])
        assert q == pytest.approx([1, 1, 1])
    q, k = make(FORMULAS["paper"], admissible="integer", tau=10.5).policy(theta)
    assert k.tolist() == [21, 11, 5]
    assert q == pytest.approx([1, 10.5 / 11, 4.2 / 5])


def test_how_many_whole_k_are_tried() -> None:
    assert whole_cap(make(FORMULAS["paper"], admissible="free")) == 5
    assert whole_cap(make(FORMULAS["cosh"], admissible="free")) == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tau": 0.0}, "tau must be > 0"),
        ({"horizon": -1.0}, "horizon must be > 0"),
        ({"gamma": -0.1}, "must be >= 0"),
        ({"gamma": math.nan}, "must be finite"),
        ({"tau": math.inf}, "finite"),
        ({"admissible": "any"}, "must be one of product, integer, free, overshoot"),
        ({"overshoot": 2.0}, "between 1 and 2"),
    ],
)
def test_mistakes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(FORMULAS["paper"], **change)


def test_theta0_outside_the_branch_is_refused() -> None:
    branch = make(FORMULAS["paper"]).branch
    with pytest.raises(ValueError, match="outside"):
        Bolza(branch, 4.0, 1.0, 1.0, 0.1)


def test_a_maximum_that_no_uphill_step_reaches_is_refused() -> None:
    # cos has maxima at 0 and 2 pi (from x0 = 1 the second lies downhill)
    landscape = Landscape("theta^2/2 + cos(x - theta)", x0=1, x_range=(-2, 8))
    far = max(p.x for p in landscape.stationary(0.1) if p.kind == "maximum")
    with pytest.raises(LandscapeError, match="uphill"):
        Bolza(Branch(landscape, 0.1, far, (-0.5, 0.5)), 0.1, 1.0, 1.0, 0.1, "free")


def test_an_ascent_that_leaves_the_numbers_is_no_candidate() -> None:
    problem = make(FORMULAS["quartic"], admissible="overshoot")
    values = problem.hamiltonian(np.array([2.5]), np.array([-1.0]), np.array([1.9]), np.array([50.0]))
    assert values.tolist() == [-math.inf] or np.isfinite(values).all()
    assert not np.isnan(values).any()
