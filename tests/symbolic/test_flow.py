"""The robust flow: blow-up in finite time against closed forms, and what else ends it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from controlat.symbolic import Derivation, Landscape, LandscapeError, Task

WIDE: dict[str, Any] = {"theta_range": (-1e9, 1e9)}
WELL = " - (x - tanh(theta))^2"  # x* = tanh(theta) stays within the range of x


def _slow(u: float) -> float:
    """dt/du of theta' = d/dtheta [theta^2/2 (1 + theta^2)^(1/10)], theta = e^u."""
    v = math.exp(min(u, 300.0))
    return float(1 / ((1 + v * v) ** 0.1 + v * v / 10 * (1 + v * v) ** -0.9))


def derived(text: str, x_range: Any = None, **task: Any) -> Derivation:
    return Derivation(Task(Landscape(text, x_range=x_range), seconds=1e-3, **task))


@pytest.mark.parametrize(
    ("text", "task", "when"),
    [
        ("-theta^4/4" + WELL, {}, 1 / 2),  # theta' = theta^3
        ("-theta^4/4" + WELL, {"horizon": "1/2"}, 1 / 2),
        ("-theta^4/4" + WELL, {"horizon": "1/2"} | WIDE, 1 / 2),
        ("-theta^4/4 - (x - theta)^2", {"horizon": "1/2"}, 1 / 2),  # x* leaves the range of x before
        ("-theta^4/4 - (x - theta)^2", {"horizon": "1/2", "x_range": (-1e9, 1e9)} | WIDE, 1 / 2),
        ("theta^3/3" + WELL, {"theta0": -1}, 1),  # theta' = -theta^2
        ("-exp(theta)" + WELL, {}, math.exp(-1)),
        (  # hardly faster than theta' = theta
            "-theta^2/2*(1 + theta^2)^(1/10)" + WELL,
            {"horizon": 40},
            quad(_slow, 0, np.inf)[0],
        ),
    ],
)
def test_a_flow_that_blows_up_says_when(text: str, task: dict[str, Any], when: float) -> None:
    with pytest.raises(LandscapeError, match=r"blows up .* no theta_range is wide enough") as told:
        derived(text, **task)
    number = float(str(told.value).split("as t comes to ")[1].split(",")[0])
    assert number == pytest.approx(when, rel=2e-5)


def test_before_it_blows_up_a_flow_is_followed() -> None:
    derivation = derived("-theta^4/4" + WELL, horizon="0.495", theta_range=(-20, 20))
    assert float(derivation.theta(0.495)) == pytest.approx(10, rel=1e-8)  # (1 - 2 t)^(-1/2)


@pytest.mark.parametrize(
    ("text", "task", "told"),
    [
        ("-theta^2/2 - (x - theta)^2", {}, f"give a wider one (at the horizon theta is {math.e**3:.4g})"),
        ("-theta^4/4" + WELL, {"horizon": "0.49"}, "give a wider one (at the horizon theta is 7.071)"),
        ("-theta^2*log(theta^2)" + WELL, {}, "give a wider one"),  # as exp(exp(4 t)): large, but finite
        ("-theta^2*log(theta^2)^2" + WELL, {"theta0": 3, "horizon": "0.1"}, "give a wider one"),
        ("log(theta)" + WELL, {}, "has a pole"),
    ],
)
def test_other_ends_are_told_from_it(text: str, task: dict[str, Any], told: str) -> None:
    with pytest.raises(LandscapeError) as error:
        derived(text, **task)
    assert told in str(error.value)
