"""Direct transcription: derivatives of the programme, agreement with the maximum principle where it holds."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from controlat.symbolic.bolza import Bolza
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import Landscape
from controlat.symbolic.principle import derived_path
from controlat.symbolic.transcription import _Programme, midpoint_cost, transcribe

PAPER = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"


@cache
def follow(text: str, theta0: float) -> Branch:
    """The first maximum at theta0, followed."""
    landscape = Landscape(text)
    x = next(p.x for p in landscape.stationary(theta0) if p.kind == "maximum")
    return Branch(landscape, theta0, x, (-3, 3))


def make(
    text: str = PAPER, theta0: float = 1.0, tau: float = 10, horizon: float = 1, gamma: float = 0.01
) -> Bolza:
    """A problem on the first maximum at theta0."""
    return Bolza(follow(text, theta0), theta0, tau, horizon, gamma)


@pytest.mark.parametrize("text", [PAPER, "theta^2/2 + 1 - cosh(x - theta)"])
def test_derivatives_of_the_programme(text: str) -> None:
    programme = _Programme(make(text, tau=3.3), 5)
    z = programme.run(np.array([0.3, 0.9, 0.55, 0.7, 0.4]))
    z = z + 0.01 * np.arange(10) / 10
    e = 1e-6
    for i, unit in enumerate(np.eye(10)):
        cost = (programme.cost(z + e * unit) - programme.cost(z - e * unit)) / (2 * e)
        assert programme.cost_slope(z)[i] == pytest.approx(cost, rel=1e-6, abs=1e-8)
        defects = (programme.defects(z + e * unit) - programme.defects(z - e * unit)) / (2 * e)
        assert programme.jacobian(z)[:, i] == pytest.approx(defects, rel=1e-5, abs=1e-6)


def test_running_the_controls_meets_the_dynamics() -> None:
    programme = _Programme(make(), 20)
    z = programme.run(np.linspace(0.2, 1, 20))
    assert np.abs(programme.defects(z)).max() < 1e-13


def test_discretisation_is_of_second_order() -> None:
    problem = make()
    exact = derived_path(problem).cost
    errors = [abs(midpoint_cost(problem, np.ones(n)) - exact) for n in (20, 40)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("theta0", "tau", "horizon", "gamma"),
    [(1, 10, 1, 0.01), (0.5, 1, 3, 0.1), (2, 1, 1, 0.1), (-1, 10, 1, 0.01)],
)
def test_nothing_is_better_where_the_principle_holds(
    theta0: float, tau: float, horizon: float, gamma: float
) -> None:
    found = transcribe(make(PAPER, theta0, tau, horizon, gamma))
    assert not found.better
    assert found.success
    assert found.difference < 1e-9
    assert found.deviation < 1e-3


def test_an_even_worse_start_comes_back() -> None:
    problem = make()
    programme = _Programme(problem, 40)
    assert midpoint_cost(problem, np.full(40, 0.5)) > midpoint_cost(problem, np.ones(40)) + 0.05
    found = transcribe(problem, starts=2)
    assert found.found == pytest.approx(programme.cost(programme.run(np.ones(40))), abs=1e-9)


@pytest.mark.parametrize(("horizon", "gamma"), [(1, 1.0), (3, 0.01), (3, 0.1)])
def test_something_is_better_above_the_limit_of_gamma(horizon: float, gamma: float) -> None:
    problem = make(PAPER, 2.0, 1, horizon, gamma)
    found = transcribe(problem)
    assert found.better
    assert found.deviation > 0.01
    assert found.difference > 5e-5
    # the gain is not one of the discretisation: the same controls on a finer mesh keep it
    finer = midpoint_cost(problem, np.repeat(found.q, 4))
    assert derived_path(problem).cost - finer == pytest.approx(found.difference, rel=0.2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="product"):
        transcribe(replace(make(), admissible="free"))
    with pytest.raises(ValueError, match="at least 2 intervals"):
        transcribe(make(), intervals=1)


def test_controls_that_overshoot_cost_infinitely_much_or_are_replaced() -> None:
    # log: steps just below alpha* pass x* later
    problem = make("theta^2/2 - log(1 + (x - theta)^2)", theta0=1.4, tau=3)
    q = np.full(20, 0.9)
    assert midpoint_cost(problem, q) == math.inf
    programme = _Programme(problem, 20)
    z = programme.roll_out(q)
    assert programme.admits(z).all()
    assert programme.cost(z) == pytest.approx(midpoint_cost(problem, np.ones(20)))


def test_the_gain_is_that_of_the_controls_whatever_the_optimiser_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make(PAPER, 2.0, 1, 3, 0.1)
    best = transcribe(problem).q

    class Stopped:
        """A minimiser that stopped early, with states that violate the dynamics."""

        x, success = np.concatenate([np.zeros(40), best]), False

    monkeypatch.setattr("controlat.symbolic.transcription.minimize", lambda *_, **__: Stopped)
    found = transcribe(problem)
    assert not found.success
    assert found.better
    assert found.found == pytest.approx(midpoint_cost(problem, best), rel=1e-12)
    Stopped.x = np.concatenate(
        [np.zeros(40), np.full(40, 0.3)]
    )  # J of the violated states would be far lower
    worse = transcribe(problem)
    assert worse.found >= found.found
    assert worse.found == min(worse.derived, midpoint_cost(problem, np.full(40, 0.3)))
