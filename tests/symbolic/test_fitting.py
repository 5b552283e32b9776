"""A landscape fitted to measurements: numbers that are known come back, and what cannot be fitted says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from controlat.symbolic import Landscape, LandscapeError, Task, fit

T = np.arange(13.0)


def needed(theta0: float, scale: float, amplitude: float, t: Any = T) -> Any:
    """1/alpha* of Amata's landscape along its robust flow, times an amplitude."""
    return amplitude * 2 / (theta0**2 * np.exp(-2 * scale * t) + 1)


@pytest.mark.parametrize("theta0", [0.4, 1.2, -1.2, 2.5])
@pytest.mark.parametrize("scale", [0.05, 0.4])
def test_known_numbers_come_back(theta0: float, scale: float) -> None:
    fitted = fit(Task(theta0=np.sign(theta0)), T, needed(theta0, scale, 3.5).tolist())
    assert fitted.theta0 == pytest.approx(theta0, rel=1e-4)
    assert fitted.scale == pytest.approx(scale, rel=1e-4)
    assert fitted.amplitude == pytest.approx(3.5, rel=1e-4)
    assert fitted.rms < 1e-6
    assert fitted.explained == pytest.approx(1)
    assert fitted.rms_constant > 1e-3


def test_the_task_that_follows_has_the_length_of_the_run() -> None:
    fitted = fit(Task(), T, needed(1.2, 0.3, 3.5).tolist())
    task = fitted.task(Task(), tau=fitted.amplitude)
    assert float(task.theta0) == pytest.approx(1.2, rel=1e-4)
    assert float(task.horizon) == pytest.approx(0.3 * 12, rel=1e-4)
    assert float(task.tau) == pytest.approx(3.5, rel=1e-4)


@pytest.mark.slow
def test_standard_errors_cover_the_truth_under_noise() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(12):
        noisy = needed(1.2, 0.3, 3.5) * np.exp(0.05 * rng.standard_normal(13))
        fitted = fit(Task(), T, noisy.tolist(), since=0)
        assert fitted.errors is not None
        inside += abs(fitted.theta0 - 1.2) < 2 * fitted.errors[0]
        assert fitted.rms == pytest.approx(np.sqrt(np.mean(np.square(fitted.residuals))))
    assert inside >= 9  # 95 % each


def test_the_fit_begins_where_the_measurement_is_lowest() -> None:
    values = needed(1.2, 0.3, 3.5)
    before = np.array([9.0, 6.0, 4.0])
    fitted = fit(Task(), np.arange(16.0), np.concatenate([before, values]).tolist())
    assert fitted.times[0] == 3
    assert fitted.theta0 == pytest.approx(1.2, rel=1e-4)
    assert fit(Task(), T, values.tolist(), since=4).times[0] == 4


def test_missing_measurements_are_left_out() -> None:
    values: list[float | None] = needed(1.2, 0.3, 3.5).tolist()
    values[5] = None
    fitted = fit(Task(), T, values)
    assert 5.0 not in fitted.times
    assert fitted.theta0 == pytest.approx(1.2, rel=1e-4)


def test_another_landscape_with_its_own_range() -> None:
    task = Task(Landscape("theta^4/4 - (x - theta)^2/(theta^2 + 1)"), theta0=1)
    path = 1.5 / np.sqrt(1 + 2 * 1.5**2 * 0.2 * T)
    fitted = fit(task, T, (2 / (path**2 + 1)).tolist())
    assert fitted.theta0 == pytest.approx(1.5, rel=1e-3)
    assert fitted.scale == pytest.approx(0.2, rel=1e-3)


def test_what_the_landscape_cannot_follow_is_said() -> None:
    falling = fit(Task(), T, np.exp(-0.1 * T).tolist(), since=0)
    assert any("a constant fits almost as well" in note for note in falling.notes)
    steep = fit(Task(), T, np.exp(0.5 * T).tolist())
    assert any("changes more than the landscape can" in note for note in steep.notes)
    assert steep.theta0 == pytest.approx(3)


@pytest.mark.parametrize(
    ("values", "options", "told"),
    [
        ([1.0] * 12 + [-1.0], {}, "must be > 0 and finite, got -1 at epoch 12"),
        ([1.0] * 12 + [float("nan")], {}, "must be > 0 and finite, got nan at epoch 12"),
        ([2.0] * 12 + [1.0], {}, "1 measurements from epoch 12 on, which is where it is lowest"),
        ([1.0] * 13, {"since": 10}, "3 measurements from epoch 10 on, as asked for"),
        ([1.0] * 12, {}, "increasing times"),
        ([None] * 13, {}, "0 measurements"),
    ],
)
def test_measurements_that_cannot_be_fitted(values: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fit(Task(), T, values, **options)


def test_a_start_at_rest_has_no_side_to_look_on() -> None:
    with pytest.raises(LandscapeError, match="stationary at theta = 0"):
        fit(Task(theta0=0), T, needed(1, 0.3, 1).tolist())
