"""The maximum principle of the derived schedule, against closed forms on the landscape of Ye et al. (11)."""

import json
import math
import warnings
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from helpers import slow

from controlat.bolza import verification
from controlat.bolza.path import comparisons, derived_path, schedule_path
from controlat.bolza.principle import (
    boundary_problem,
    criterion,
    gamma_limit,
    gamma_range,
    maximise,
    multiplier,
)
from controlat.bolza.problem import Bolza
from controlat.bolza.programming import programme
from controlat.bolza.transcription import transcribe
from controlat.bolza.verification import Verification, verify
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape, LandscapeError
from controlat.symbolic.symbols import THETA

PAPER = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"
LOG = "theta^2/2 - log(1 + (x - theta)^2)"
QUARTIC = "theta^2/2 - (x - theta)^2/2 - (x - theta)^4/4"


@cache
def follow(text: str, theta0: float, x0: float = 0, theta_range: tuple[float, float] = (-3, 3)) -> Branch:
    """The first maximum at theta0, followed."""
    landscape = Landscape(text, x0=x0)
    x = next(p.x for p in landscape.stationary(theta0) if p.kind == "maximum")
    return Branch(landscape, theta0, x, theta_range)


def make(theta0: float = 1.0, tau: float = 10, horizon: float = 1, gamma: float = 0.01) -> Bolza:
    """The problem on (11)."""
    return Bolza(follow(PAPER, theta0), theta0, tau, horizon, gamma)


def exact_cost(theta0: float, tau: float, horizon: float, gamma: float) -> float:
    """J of the derived schedule on (11)."""
    late = math.exp(2 * horizon)
    return theta0**2 / late / 2 + gamma * tau * math.log((theta0**2 + late) / (theta0**2 + 1))


CASES = [(1.0, 10.0, 1.0, 0.01), (-1.0, 10.0, 1.0, 0.01), (2.0, 1.0, 3.0, 0.1), (0.5, 1.0, 3.0, 0.0)]


@pytest.mark.parametrize("case", CASES)
def test_closed_forms(case: tuple[float, float, float, float]) -> None:
    theta0, tau, horizon, gamma = case
    problem = make(*case)
    path = derived_path(problem)
    theta, left = theta0 * np.exp(-path.t), horizon - path.t
    assert path.theta == pytest.approx(theta, abs=1e-9)
    assert path.k == pytest.approx(2 * tau / (theta**2 + 1), rel=1e-8)
    assert path.cost == pytest.approx(exact_cost(*case), rel=1e-9)
    grown = np.exp(2 * left)
    slope = np.exp(-2 * left) - 2 * gamma * tau * (grown - 1) / ((theta**2 + grown) * (theta**2 + 1))
    assert path.p == pytest.approx(-theta * slope, abs=1e-9)


def test_printed_cost() -> None:
    assert derived_path(make()).cost == pytest.approx(0.21105, abs=5e-6)


@pytest.mark.parametrize("case", CASES[:2])
def test_multiplier(case: tuple[float, float, float, float]) -> None:
    path = derived_path(make(*case))
    expected = 4 * case[3] * case[1] / (path.theta**2 + 1) ** 2
    assert multiplier(make(*case), path) == pytest.approx(expected, rel=1e-12)


def test_multiplier_is_infinite_where_k_is_below_1() -> None:
    kept, lost = (multiplier(p, derived_path(p)) for p in (make(2, 1, 1, 0.1), make(2, 1, 3, 0.1)))
    assert kept[0] == math.inf
    assert lost[0] == -math.inf


def test_multiplier_against_differences_of_the_hamiltonian() -> None:
    problem, e = make(), 1e-7
    path, q = derived_path(problem), 1 - e
    at = (path.theta, path.p)
    there = problem.hamiltonian(*at, q, problem.count(path.theta) / q)
    here = problem.hamiltonian(*at, 1.0, problem.count(path.theta))
    slope = (here - there) / (e * problem.branch.exact_step(path.theta))
    assert multiplier(problem, path) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_boundary_value_problem_agrees(case: tuple[float, float, float, float]) -> None:
    solved = boundary_problem(make(*case), derived_path(make(*case)))
    assert solved["success"]
    assert solved["theta_difference"] < 1e-6
    assert solved["p_difference"] < 1e-6


@pytest.mark.parametrize("text", [PAPER, "theta^4/4 - (x - theta)^2*(1 + theta^2)/2"])
def test_costate_of_the_feedback_is_minus_the_slope_of_j(text: str) -> None:
    problem, h = Bolza(follow(text, 1.0), 1.0, 3, 1, 0.05), 1e-4
    ahead, behind = (derived_path(replace(problem, theta0=1 + e)).cost for e in (h, -h))
    assert derived_path(problem).p[0] == pytest.approx(-(ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("text", [PAPER, QUARTIC])
def test_costate_of_a_held_k_is_minus_the_slope_of_j(text: str) -> None:
    """alpha = tau/K on a short horizon, over which the whole K does not change."""
    problem, h = Bolza(follow(text, 1.0), 1.0, 4.4, 0.05, 0.05, "integer"), 1e-4
    paths = [derived_path(replace(problem, theta0=1 + e)) for e in (h, -h, 0)]
    assert len({k for path in paths for k in path.k}) == 1
    ahead, behind = (path.cost for path in paths[:2])
    assert paths[2].p[0] == pytest.approx(-(ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["constant at the largest K*", slow("constant at the mean K*"), "linear from K*(T) to K*(0)"]
)
def test_costate_of_a_fixed_schedule_is_minus_the_slope_of_j(name: str) -> None:
    problem, h = Bolza(follow(PAPER, 1.0), 1.0, 4, 1, 0.05), 1e-4
    count = comparisons(problem, derived_path(problem))[name]
    ahead, behind = (schedule_path(replace(problem, theta0=1 + e), name, count).cost for e in (h, -h))
    path = schedule_path(problem, name, count)
    assert path.p[0] == pytest.approx(-(ahead - behind) / (2 * h), rel=2e-5)


def test_costate_of_a_schedule_below_one_step() -> None:
    # K < 1: dF/dtheta is infinite (but integrable) where the schedule reaches the bound
    problem, h = make(2, 1, 3, 0.1), 1e-4
    count = comparisons(problem, derived_path(problem))["constant at the mean K*"]
    ahead, behind = (schedule_path(replace(problem, theta0=2 + e), "mean", count).cost for e in (h, -h))
    path = schedule_path(problem, "mean", count)
    assert 0 < path.raised < 1
    assert path.p[0] == pytest.approx(-(ahead - behind) / (2 * h), rel=1e-3)


def test_the_share_of_the_time_in_which_k_is_raised() -> None:
    problem = make()
    mean, count = next((n, c) for n, c in comparisons(problem, derived_path(problem)).items() if "mean" in n)
    path = schedule_path(problem, mean, count)
    assert 0.3 < path.raised == pytest.approx(np.mean(path.k > count(0.0) * (1 + 1e-9)), abs=0.01)
    assert schedule_path(problem, "far above", lambda t: 100.0 + 0 * t).raised == 0


def test_c_is_zero_for_the_derived_schedule_and_positive_for_others() -> None:
    problem = make()
    derived = derived_path(problem)
    assert criterion(problem, derived).c == 0
    costs = []
    for name, count in comparisons(problem, derived).items():
        path = schedule_path(problem, name, count)
        examined = criterion(problem, path)
        assert (examined.gap >= 0).all()
        assert path.raised < 1
        assert examined.c > 1e-3
        costs.append(path.cost)
    assert min(costs) > derived.cost
    assert len(costs) == 4


def test_the_chord_is_raised_by_the_least_amount() -> None:
    """K* of (11) is concave, so that the chord lies below it; on the other landscape it is convex."""
    problem = make()
    derived = derived_path(problem)
    name = next(n for n in comparisons(problem, derived) if n.startswith("linear from K*(0)"))
    by = float(name.split("raised by ")[1])
    chord = derived.k[0] + (derived.k[-1] - derived.k[0]) * derived.t
    assert by == pytest.approx((derived.k - chord).max(), rel=1e-2)
    assert (chord + by >= derived.k - 1e-12).all()
    convex = Bolza(follow("theta^4/4 - (x - theta)^2*(1 + theta^2)/2", 1.0), 1.0, 3, 1, 0.01)
    assert "linear from K*(0) to K*(T)" in comparisons(convex, derived_path(convex))


def test_a_constant_k_has_nothing_to_be_compared_with() -> None:
    checked = verify(follow("theta^2/2 - (x - 2*theta - 1)^2/2", 1.0, 0.5), 1.0, 3, 1, 0.01)
    assert checked.comparisons == []
    assert any("nothing to compare" in line for line in checked.conclusion)
    assert checked.holds


def test_c_is_positive_above_the_limit_of_gamma() -> None:
    for gamma, holds in ((0.59, True), (0.7, False)):
        problem = make(2, 1, 1, gamma)
        assert (criterion(problem, derived_path(problem)).largest < 1e-9) is holds


@pytest.mark.parametrize("name", ["product", "free", "overshoot"])
def test_maximum_of_h_against_a_dense_search(name: str) -> None:
    problem = replace(make(2, 1, 3, 0.1), admissible=name)
    theta, p = np.array([2.0, 1.0, 0.3]), np.array([0.07, -0.1, -0.3])
    best, _, _ = maximise(problem, theta, p)
    q = np.linspace(0.02, problem.reach, 20001)
    column = theta[:, None]
    k = problem.count(column) / q if name == "product" else np.ones_like(q)
    dense = problem.hamiltonian(column, p[:, None], q, k).max(axis=1)
    assert (best >= dense - 1e-12).all()
    assert best == pytest.approx(dense, abs=1e-6)


@pytest.mark.parametrize(
    ("tau", "horizon", "expected"), [(1, 1, 0.6031), (1, 3, 0.006274), (2, 1, 0.3016), (2, 3, 0.003137)]
)
def test_limits_of_gamma(tau: float, horizon: float, expected: float) -> None:
    # beside K* < 1 the limit is where p changes its sign: gamma tau is the same for both tau
    assert gamma_limit(make(2, tau, horizon)) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(("theta0", "tau"), [(1, 1), (0.5, 1), (2, 3), (2, 10), (-2, 10)])
def test_no_limit_for_large_k(theta0: float, tau: float) -> None:
    assert gamma_range(make(theta0, tau, 3)) == (0, math.inf)
    problem = make(theta0, tau, 3, 1e4)
    assert criterion(problem, derived_path(problem)).largest == 0


def test_at_least_one_step_throughout_is_not_enough() -> None:
    """K* >= 1 makes alpha* a local maximum of H; with theta0 = 2, tau = 2.5 it is not the global one."""
    problem = make(2, 2.5, 3, 1)
    assert derived_path(problem).k.min() >= 1 - 1e-12
    assert gamma_limit(problem) == pytest.approx(0.00683, rel=1e-2)
    # the same by hand, at t = 0 and alpha = 0.95 alpha*
    late = math.exp(6)
    p = 2 * (2 * 2.5 * (late - 1) / ((4 + late) * 5) - 1 / late)
    gap, k = 0.05 ** (1 / 0.95), 1 / 0.95
    moved = 2 * gap * 2 / 5 - 2 * gap**2 * 8 / 25
    assert p * moved - (k - 1) == pytest.approx(0.01239, abs=1e-5)
    assert criterion(problem, derived_path(problem)).largest == pytest.approx(0.01239, abs=1e-5)
    assert transcribe(problem).difference > 1e-4


def test_other_sets_have_other_maximisers() -> None:
    problem = make()
    for name, k in (("free", 1), ("overshoot", 1)):
        there = replace(problem, admissible=name)
        examined = criterion(there, derived_path(there))
        assert examined.c > 0.1
        assert set(examined.k.tolist()) == {k}
    assert examined.q == pytest.approx(np.full(examined.q.shape, 1.9))
    whole = replace(problem, admissible="integer")
    path = derived_path(whole)
    assert criterion(whole, path).c == pytest.approx(0, abs=1e-9)
    switches = -np.log(20 / np.arange(11, 18) - 1) / 2  # where K* = 20/(1 + e^-2t) passes a whole number
    rounded = np.exp(-2) / 2 + 0.01 * np.diff([0, *switches, 1]) @ np.arange(11, 19)
    assert path.cost == pytest.approx(rounded, rel=1e-6)
    assert (path.k >= problem.count(path.theta) * (1 - 1e-6)).all()
    assert derived_path(replace(problem, admissible="free")).cost == pytest.approx(rounded, rel=1e-9)
    with pytest.raises(ValueError, match="product"):
        gamma_range(whole)


def test_a_flow_that_leaves_the_branch_is_an_error() -> None:
    problem = Bolza(follow(PAPER, 1.0, theta_range=(0.8, 1.2)), 1.0, 10, 1, 0.01)
    with pytest.raises(LandscapeError, match="cannot be followed"):
        derived_path(problem)


LANDSCAPES = [
    ("theta^4/4 - (x - theta)^2*(1 + theta^2)/2", 1.0, 0.0),
    slow("theta^2/2 - (x - 2*theta - 1)^2/2", 1.0, 0.5),
    slow("theta^2/2 + 1 - cosh(x - theta)", 1.0, 0.0),
    slow("theta^2/2 - (x - theta)^2/2 - (x - theta)^4/4", 1.2, 0.0),
    (LOG, 0.8, 0.0),
    slow("(theta - 1)^2/2 - (x - theta)^2*exp(theta)", -0.5, 0.0),
]


def plain(value: object) -> None:
    """Only JSON, no long arrays."""
    if isinstance(value, dict):
        for part in value.values():
            plain(part)
    elif isinstance(value, list):
        assert len(value) <= 101
        for part in value:
            plain(part)


def check(found: Verification) -> None:
    """What every verification must fulfil."""
    data = found.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    plain(data)
    assert [row["admissible"] for row in data["sets"]] == ["product", "integer", "free", "overshoot"]
    assert data["derived"]["C"] >= 0
    product = data["sets"][0]
    if data["problem"]["quadratic"]:
        assert product["policy"] == pytest.approx(product["derived_J"], rel=1e-4)
        assert data["boundary"]["p_difference"] < 1e-6
    else:
        assert "is not offered where l is not quadratic in x" in product["error"]
        assert "is not offered where l is not quadratic in x" in " ".join(data["conclusion"])
    for row in data["comparisons"]:
        assert row["C"] >= 0
    for sentence in data["conclusion"]:
        assert "optimal" not in sentence or "optimal given" in sentence
    assert found.holds is (data["better"] is None and data["derived"]["satisfies"])


@pytest.mark.parametrize(("text", "theta0", "x0"), LANDSCAPES)
def test_other_landscapes(text: str, theta0: float, x0: float) -> None:
    checked = verify(follow(text, theta0, x0), theta0, 3, 1, 0.01)
    check(checked)
    assert checked.holds
    assert all(row["J"] >= checked.derived["J"] - 1e-9 for row in checked.comparisons)


def test_a_landscape_whose_later_steps_overshoot() -> None:
    # alpha* is far too long for the steps after the first: 1 + alpha* l_xx = -theta^2 < -1
    checked = verify(follow(LOG, 1.4), 1.4, 3, 1, 0.01)
    check(checked)
    assert checked.holds
    assert checked.problem["admissible"] == "integer"
    assert checked.sets[3]["better_exists"]


def test_real_k_of_a_landscape_that_is_not_quadratic_is_refused() -> None:
    with pytest.raises(LandscapeError, match=r"real K .* is not offered"):
        verify(follow(LOG, 1.4), 1.4, 3, 1, 0.01, "product")


FAR = {"x_range": (-3.5, 4.5)}
HARD: list[tuple[str, dict[str, Any]]] = [
    ("theta^2/2 - x^4 + theta*x^2 - theta*x/10", {"theta0": 2.0}),
    ("theta^2/2 - x^4 + theta*x^2 + theta*x/2", {}),
    ("theta^2/2 - (x - theta)^4", {"formula": True, "tau": 1.0}),
    ("theta^2/2 - (x - theta)^4", {"formula": True, "gamma": 0.0, "tau": 0.1}),
    ("theta^2/2 + sin(x - theta)", {}),
    ("theta^2/2 + sin(x - theta)", {"theta0": -1.0, "x0": -0.5, "tau": 0.3}),
    (LOG, {"theta0": -1.4, "x0": 0.3}),
    ("theta^2/2 - (x - theta)^2*exp(x)", {}),
    ("theta^2/2 - (x - theta)^2*exp(x)", {"tau": 0.1, "gamma": 0.1}),
    ("theta^2/2 - (x - theta)^2/2 - (x - theta)^4*5", {"tau": 0.5}),
    ("theta - (x - 1)^2*exp(theta)", {}),
    ("sqrt(1 + theta^2) - (x - theta)^2*(2 + cos(3*theta))", {}),
    ("theta^2/2 - cosh(3*(x - theta))", FAR | {"tau": 0.01, "gamma": 0.1}),
    ("theta^2/2 - cosh(3*(x - theta))", FAR | {"tau": 10.0}),
    ("theta^2 - theta*x - 2*x^2 - x^4", {"tau": 1.0}),
    ("theta^2/2 - theta*x - 2*x^2", {}),
    ("theta^2/2 + log(2 + x) - x*(1 + theta^2)/2", {"theta0": 0.4, "x_range": (-1.9, 5.0)}),
    ("theta^2/2 - (x - theta)^2/(1 + x)", {"theta0": 0.5, "x_range": (-0.9, 5.0)}),
]


def hard(text: str, theta0: float, x0: float, x_range: Any, formula: bool) -> Branch:
    """A branch, by the formula x* = theta where it is flat."""
    landscape = Landscape(text, x0=x0, x_range=x_range)
    maxima = [p.x for p in landscape.stationary(theta0) if p.kind == "maximum"]
    slope = float(landscape("x")(theta0, x0))
    x = min((v for v in maxima if (v - x0) * slope > 0), key=lambda v: abs(v - x0))
    return Branch(landscape, theta0, x, (-3, 3), formula=THETA if formula else None)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "change"), HARD, ids=[f"{text} {change}" for text, change in HARD])
def test_hard_landscapes_give_finite_numbers_or_reasons(
    text: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not quadratic in x, with folds, ends, flat maxima and poles; on coarse grids; warnings are errors."""
    monkeypatch.setattr(verification, "programme", partial(programme, nodes=61, steps=40, points=16))
    chosen = {"theta0": 1.0, "x0": 0.0, "x_range": None, "formula": False, "tau": 3.0, "gamma": 0.01} | change
    theta0, tau, gamma = (chosen.pop(name) for name in ("theta0", "tau", "gamma"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        branch = hard(text, theta0, **chosen)
        if (text, tau) == ("theta^2/2 - (x - theta)^2*exp(x)", 0.1):
            with pytest.raises(LandscapeError, match="no whole K keeps the ascent"):
                verify(branch, theta0, tau, 0.7, gamma)
            return
        checked = verify(branch, theta0, tau, 0.7, gamma)
        data = checked.to_json()
    json.dumps(data, allow_nan=False)
    numbers = (
        checked.derived[name] for name in ("theta", "p", "K", "alpha", "gap", "J", "C", "largest_violation")
    )
    assert all(np.isfinite(v).all() for v in numbers)
    for row in checked.sets:
        assert row.get("error") or math.isfinite(row["value"] + row["policy"] + row["derived_J"])
    differ = [row for row in checked.comparisons if "error" not in row]
    assert all(math.isfinite(row["C"] + row["J"]) for row in differ)
    assert all(row["error"] for row in checked.comparisons if "error" in row)
    if checked.derived["satisfies"] and gamma > 0:
        assert all(row["C"] > 1e-6 for row in differ)
    assert all(row["raised"] < 1 for row in differ)
    assert checked.conclusion[0].startswith("Given alpha K = tau")
    told = " ".join(checked.conclusion)
    assert "optimal" not in told.replace("not optimal given", "")


def test_a_search_without_an_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise LandscapeError("the grid is lost")

    monkeypatch.setattr(verification, "programme", lost)
    checked = verify(follow(PAPER, 1.0), 1.0, 10, 1, 0.01, transcription=True)
    assert checked.holds  # by direct transcription
    assert "dynamic programming gives no answer (the grid is lost)" in " ".join(checked.conclusion)
    monkeypatch.setattr(verification, "transcribe", lost)
    for transcription in (True, False):
        checked = verify(follow(PAPER, 1.0), 1.0, 10, 1, 0.01, transcription=transcription)
        assert not checked.holds
        assert "was not found out" in " ".join(checked.conclusion)


@pytest.mark.parametrize("transcription", [slow(False), True])
def test_the_failure_on_the_paper_landscape_is_reported_with_something_better(transcription: bool) -> None:
    checked = verify(follow(PAPER, 2.0), 2.0, 1, 3, 0.1, transcription=transcription)
    check(checked)
    assert not checked.holds
    assert (checked.transcription is not None) is transcription
    assert checked.transcription is None or checked.transcription["better"]
    assert checked.sets[0]["better_exists"]
    assert checked.better is not None
    assert checked.better["gain"] == pytest.approx(0.00426, abs=1e-4)
    assert checked.gamma is not None
    assert checked.gamma["high"] == pytest.approx(0.006274, rel=1e-3)


@pytest.mark.parametrize("name", ["integer", "free", slow("overshoot")])
def test_verification_given_other_sets(name: str) -> None:
    checked = verify(follow(PAPER, 1.0), 1.0, 10, 1, 0.01, name)
    assert checked.holds is (name == "integer")
    data = checked.to_json()
    assert data["transcription"] is None
    assert json.dumps(data, allow_nan=False)
    if name != "integer":
        assert data["better"]["by"] == "dynamic programming"
        assert data["better"]["K"] == [1.0] * len(data["better"]["K"])


def test_direct_transcription_of_other_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="for the set 'product' only, got 'free'"):
        verify(follow(PAPER, 1.0), 1.0, 10, 1, 0.01, "free", transcription=True)
