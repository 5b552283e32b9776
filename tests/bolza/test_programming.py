"""Dynamic programming over the admissible sets, on the landscape of Ye et al. (11) and others."""

import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import slow

from controlat.bolza.admissible import SETS
from controlat.bolza.path import derived_path
from controlat.bolza.principle import gamma_limit
from controlat.bolza.problem import Bolza
from controlat.bolza.programming import programme, reachable
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape, LandscapeError

PAPER = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"


@cache
def follow(text: str, theta0: float) -> Branch:
    """The first maximum at theta0, followed."""
    landscape = Landscape(text)
    x = next(p.x for p in landscape.stationary(theta0) if p.kind == "maximum")
    return Branch(landscape, theta0, x, (-3, 3))


def make(
    theta0: float = 1.0,
    tau: float = 10,
    horizon: float = 1,
    gamma: float = 0.01,
    text: str = PAPER,
    name: str = "product",
) -> Bolza:
    """A problem on the first maximum at theta0."""
    return Bolza(follow(text, theta0), theta0, tau, horizon, gamma, name)


@pytest.mark.parametrize(
    ("name", "value"), [("product", 0.21105), ("integer", 0.2161), ("free", 0.07767), ("overshoot", 0.01220)]
)
def test_values_of_the_four_sets(name: str, value: float) -> None:
    search = programme(replace(make(), admissible=name))
    assert search.best == pytest.approx(value, abs=1e-4 if name == "integer" else 1e-5)
    assert search.better is (name in ("free", "overshoot"))
    assert search.difference == pytest.approx(search.derived - search.best)


def test_free_steps_have_a_closed_form() -> None:
    # one step of alpha* at every instant: theta = theta0 e^{-t}, K = 1
    search = programme(replace(make(), admissible="free"))
    assert search.best == pytest.approx(math.exp(-2) / 2 + 0.01, abs=1e-6)
    assert set(search.k.tolist()) == {1.0}
    assert search.theta[-1] == pytest.approx(math.exp(-1), abs=1e-3)


def test_larger_sets_are_never_worse() -> None:
    values = {name: programme(replace(make(), admissible=name)).best for name in SETS}
    assert values["overshoot"] < values["free"] < values["product"] < values["integer"]


TABLE = list(itertools.product((1, 10), (0.5, 1.0, 2.0), (1, 3), (0.0, 1e-3, 1e-2, 0.1, 1.0)))
# every failure and its neighbours, and a few of the others
TESTED = [case for case in TABLE if case[:2] == (1, 2.0)] + [slow(*case) for case in TABLE[2:60:7]]


@pytest.mark.parametrize(("tau", "theta0", "horizon", "gamma"), TESTED)
def test_table(tau: float, theta0: float, horizon: float, gamma: float) -> None:
    problem = make(theta0, tau, horizon, gamma)
    search = programme(problem)
    fails = (tau, theta0) == (1, 2.0) and (gamma == 1.0 if horizon == 1 else gamma >= 0.01)
    assert search.better is fails
    assert (gamma > gamma_limit(problem)) is fails
    assert search.derived == pytest.approx(derived_path(problem).cost, rel=1e-6)


def test_the_grid_may_be_refined_without_changing_the_answer() -> None:
    problem = make(2.0, 1, 3, 0.1)
    coarse, fine = programme(problem), programme(problem, nodes=401, steps=160)
    assert fine.difference == pytest.approx(coarse.difference, rel=0.02)
    assert fine.difference == pytest.approx(0.00426, abs=1e-4)


def test_the_best_schedule_really_costs_what_is_said() -> None:
    problem = make(2.0, 1, 3, 0.1)
    search = programme(problem)
    h = problem.horizon / search.about["steps"]
    running = float(np.sum(search.k[1:] + search.k[:-1]) / 2 + (search.k[0] + search.k[-1]) / 2)
    cost = float(problem.branch.robust(search.theta[-1])) + problem.gamma * h * running
    assert cost == pytest.approx(search.best, rel=1e-2)
    assert cost < search.derived


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        ("theta^4/4 - (x - theta)^2*(1 + theta^2)/2", "product", 1e-6),
        ("theta^2/2 + 1 - cosh(x - theta)", "integer", 2e-3),  # K is held over a time step
    ],
)
def test_other_landscapes(text: str, name: str, error: float) -> None:
    problem = make(1.0, 3, 1, 0.01, text, name)
    search = programme(problem)
    assert not search.better
    assert search.derived == pytest.approx(derived_path(problem).cost, rel=error)


def test_reachable_interval_contains_the_robust_flow() -> None:
    low, high, clipped = reachable(make())
    assert low < math.exp(-1)
    assert high > 1
    assert not clipped


def test_a_domain_that_ends_is_said_and_no_control_leaves_it() -> None:
    # from theta = 0.6 on some controls grow towards the non-robust minimum; the branch is cut just above
    landscape = Landscape(PAPER)
    problem = Bolza(Branch(landscape, 0.5, 0.5, (-1.0, 0.505)), 0.5, 1, 1, 0.0)
    search = programme(replace(problem, admissible="free"))
    assert search.about["clipped"]
    assert math.isfinite(search.best)
    assert search.best <= search.derived + search.about["tolerance"]


def test_a_flow_that_must_leave_is_an_error() -> None:
    landscape = Landscape(PAPER)
    problem = Bolza(Branch(landscape, 1.0, 1.0, (0.9, 1.2)), 1.0, 10, 1, 0.01)
    with pytest.raises(LandscapeError, match="leaves"):
        programme(problem)


def test_no_value_is_below_the_price_of_one_step_where_the_domain_cuts_the_grid() -> None:
    """V has a cliff where states are lost, over which a cubic spline swings: J = 0.001 < gamma T here."""
    problem = make(-0.5, 3, 1, 0.01, "(theta - 1)^2/2 - (x - theta)^2*exp(theta)", "free")
    search = programme(problem, nodes=61, steps=40, points=16)
    assert search.about["clipped"]
    assert search.best >= problem.gamma * problem.horizon  # K >= 1 and L >= 0
    assert search.best == pytest.approx(0.01001, abs=1e-3)
