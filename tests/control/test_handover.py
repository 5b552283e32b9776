"""K* of a landscape as a schedule of the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import controlat
from controlat.control.handover import hand_over
from controlat.symbolic import Derivation, Task


def rising(t: Any) -> Any:
    return 1 + 2 * np.asarray(t, dtype=float)


def handed(**options: Any) -> Any:
    plain: dict[str, Any] = {"epochs": 4, "k_min": 2, "k_max": 10, "tau": 0.3}
    return hand_over(rising, 4.0, **(plain | options))


def test_the_horizon_is_scaled_to_epochs_and_the_range_to_the_bounds() -> None:
    handover = handed(epochs=8)
    assert handover.real == pytest.approx([1 + i for i in range(8)])  # K* from 1 to 9 over 8 epochs
    assert [handover.schedule(e)["steps"] for e in range(8)] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert handover.mapped == pytest.approx([2 + i for i in range(8)])
    assert not any(handover.clipped)
    assert "stretched to 2..10" in handover.note


def test_alpha_is_tau_of_the_network_over_the_rounded_k() -> None:
    schedule = handed(k_max=3.4).schedule
    for epoch in range(4):
        u = schedule(epoch)
        assert u["alpha"] * u["steps"] == pytest.approx(0.3)


def test_k_stays_real_until_the_schedule_is_called() -> None:
    handover = handed(k_max=3.4)
    assert handover.schedule.to_json()["knobs"]["steps"]["values"] == pytest.approx([2, 2.35, 2.7, 3.05])
    assert [handover.schedule(e)["steps"] for e in range(4)] == [2, 2, 3, 3]


def test_what_is_cut_off_is_reported() -> None:
    handover = handed(mapping="clip", k_min=2, k_max=6)
    assert handover.real == pytest.approx([1, 3, 5, 7])
    assert handover.mapped == pytest.approx([2, 3, 5, 6])
    assert handover.clipped == (True, False, False, True)
    assert "cut off in 2 of 4 pieces" in handover.note
    assert handover.to_json()["clipped"] == [True, False, False, True]


def test_a_constant_k_cannot_be_stretched_and_says_so() -> None:
    handover = hand_over(lambda t: 0 * t + 4, 1.0, epochs=3, k_min=1, k_max=3, tau=0.3)
    assert handover.mapped == (3, 3, 3)
    assert "constant" in handover.note
    assert all(handover.clipped)


def test_time_before_the_landscape_begins_holds_its_first_value() -> None:
    handover = handed(epochs=8, since=0.5)
    assert handover.real == pytest.approx([1, 1, 1, 1, 1, 3, 5, 7])


def test_pieces_may_be_shorter_than_an_epoch(tmp_path: Any) -> None:
    handover = handed(epochs=2, resolution=0.5)
    assert [handover.schedule(t)["steps"] for t in (0, 0.5, 1, 1.5)] == [2, 4, 6, 8]
    handover.schedule.save(tmp_path / "s.json")
    assert controlat.load_schedule(tmp_path / "s.json") == handover.schedule


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mapping": "linear"}, "mapping must be one of affine, clip"),
        ({"k_min": 5, "k_max": 2}, "0 <= k_min <= k_max"),
        ({"k_min": -1}, "0 <= k_min <= k_max"),
        ({"tau": 0}, "tau of the network must be > 0"),
        ({"tau": float("nan")}, "tau of the network must be > 0"),
        ({"epochs": 0}, "epochs must be > 0"),
        ({"resolution": 9}, "resolution in"),
        ({"since": 1}, "share of training"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        handed(**options)


def test_amatas_landscape_over_twelve_epochs() -> None:
    derivation = Derivation(Task())
    schedule = hand_over(derivation.K, 3.0, epochs=12, k_min=1, k_max=10, tau=0.3).schedule
    t = np.arange(12) * 3 / 12
    k = 20 / (np.exp(-2 * t) + 1)
    expected = np.floor(1 + 9 * (k - 10) / (20 / (np.exp(-6) + 1) - 10) + 0.5)
    assert [schedule(e)["steps"] for e in range(12)] == list(expected)
