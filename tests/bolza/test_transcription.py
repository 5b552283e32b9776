"""Direct transcription: derivatives of the programme, agreement with the maximum principle where it holds."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import slow
from scipy.integrate import solve_ivp

from controlat.bolza.path import derived_path
from controlat.bolza.problem import Bolza
from controlat.bolza.transcription import _with_slope, cost, transcribe
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
    text: str = PAPER, theta0: float = 1.0, tau: float = 10, horizon: float = 1, gamma: float = 0.01
) -> Bolza:
    """A problem on the first maximum at theta0."""
    return Bolza(follow(text, theta0), theta0, tau, horizon, gamma)


def test_cost_against_an_accurate_solution() -> None:
    problem, q, y = make(tau=3.3), np.array([0.3, 0.9, 0.55, 0.7, 0.4]), np.array([1.0, 0.0])

    def slopes(t: float, y: np.ndarray, now: float) -> list[float]:
        k = float(problem.count(y[0])) / now
        return [float(problem.flow(y[0], now, k)), k]

    for i, now in enumerate(q):
        y = solve_ivp(slopes, (i / 5, (i + 1) / 5), y, args=(now,), rtol=1e-11, atol=1e-13).y[:, -1]
    exact = y[0] ** 2 / 2 + 0.01 * y[1]  # L = theta^2/2
    assert cost(problem, np.repeat(q, 4)) == pytest.approx(exact, rel=1e-6)


def test_slopes_of_the_cost_are_one_sided_at_the_bounds() -> None:
    problem, q, e = make(tau=3.3), np.array([0.3, 0.9, 1.0, 0.02, 0.4]), 1e-5
    value, slope = _with_slope(q, problem)
    assert value == cost(problem, q)
    for i, side in ((0, 1), (1, 1), (4, 1), (2, -1), (3, 1)):
        moved = cost(problem, q + side * e * np.eye(5)[i])
        assert slope[i] == pytest.approx(float(moved - value) / (side * e), rel=2e-3, abs=1e-5)


def test_discretisation_is_of_fourth_order() -> None:
    problem = make()
    exact = derived_path(problem).cost
    errors = [abs(float(cost(problem, np.ones(n))) - exact) for n in (5, 10)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize(
    ("theta0", "tau", "horizon", "gamma"),
    [slow(1, 10, 1, 0.01), slow(0.5, 1, 3, 0.1), (2, 1, 1, 0.1), (-1, 10, 1, 0.01)],
)
def test_nothing_is_better_where_the_principle_holds(
    theta0: float, tau: float, horizon: float, gamma: float
) -> None:
    search = transcribe(make(PAPER, theta0, tau, horizon, gamma))
    assert not search.better
    assert search.about["success"]
    assert search.difference < 1e-9
    assert search.about["deviation"] < 1e-3


def test_a_worse_start_comes_back() -> None:
    problem = make()
    assert cost(problem, np.full(40, 0.5)) > cost(problem, np.ones(40)) + 0.05
    assert transcribe(problem, starts=2).best == pytest.approx(float(cost(problem, np.ones(40))), abs=1e-9)


@pytest.mark.parametrize(("horizon", "gamma"), [slow(1, 1.0), (3, 0.01), (3, 0.1)])
def test_something_is_better_above_the_limit_of_gamma(horizon: float, gamma: float) -> None:
    problem = make(PAPER, 2.0, 1, horizon, gamma)
    search = transcribe(problem, intervals=20, starts=2)
    assert search.better
    assert search.about["deviation"] > 0.01
    assert search.difference > 5e-5
    # the gain is not one of the discretisation: the same controls on a finer mesh keep it
    finer = float(cost(problem, np.repeat(search.q, 4)))
    assert derived_path(problem).cost - finer == pytest.approx(search.difference, rel=0.2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="product"):
        transcribe(replace(make(), admissible="free"))
    with pytest.raises(ValueError, match="intervals must be a whole number"):
        transcribe(make(), intervals=1)


def test_states_that_leave_the_landscape_cost_nothing_finite() -> None:
    branch = Branch(Landscape(PAPER), 1.0, 1.0, (0.8, 1.2))
    problem = Bolza(branch, 1.0, 10, 1, 0.01)
    assert np.isnan(cost(problem, np.ones(10)))
    with pytest.raises(LandscapeError, match="leaves the range"):
        transcribe(problem)


def test_the_gain_is_that_of_the_controls_whatever_the_optimiser_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make(PAPER, 2.0, 1, 3, 0.1)
    best = transcribe(problem).q

    class Stopped:
        """A minimiser that stopped early."""

        x, success = best, False

    monkeypatch.setattr("controlat.bolza.transcription.minimize", lambda *_, **__: Stopped)
    result = transcribe(problem)
    assert not result.about["success"]
    assert result.better
    assert result.best == pytest.approx(float(cost(problem, best)), rel=1e-12)
    Stopped.x = np.full(40, 0.3)
    worse = transcribe(problem)
    assert worse.best == min(worse.derived, float(cost(problem, Stopped.x)))
