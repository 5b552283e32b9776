"""The smooth model of the Hamiltonian: what it recovers exactly, relaxed steps, price, and noise."""

from typing import Any

import numpy as np
import pytest
from numpy.polynomial.legendre import Legendre

from controlat.control.schedule_text import parse_schedule
from controlat.schedule_search.gain_model import GainModel, sensitivities
from controlat.schedule_search.space import Space

LOW, HIGH, MOST = 0.01, 0.16, 6
GRID = [[alpha, k] for alpha in (0.01, 0.025, 0.063, 0.16) for k in range(1, MOST + 1)] + [[0.0, 0]]
C = np.random.default_rng(0).standard_normal((3, 3, 2))


def h(t: float, alpha: float, steps: float) -> float:
    """The model with coefficients C, term by term."""
    if steps != int(steps):
        below, part = int(steps), steps - int(steps)
        return (1 - part) * h(t, alpha, below) + part * h(t, alpha, below + 1)
    if steps == 0:
        return 0.0
    a = 2 * np.log(alpha / LOW) / np.log(HIGH / LOW) - 1
    f = [np.log(1 + steps), steps]
    p = [Legendre.basis(i) for i in range(3)]
    terms = (
        C[i, j, k] * p[i](2 * t - 1) * p[j](a) * f[k] for i in range(3) for j in range(3) for k in range(2)
    )
    return float(sum(terms))


def surface(own: list[list[float]], noise: float = 0.0, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """The surface of a run of 8 blocks under these controls, two steps of each looked at."""
    rng, blocks = np.random.default_rng(seed), []
    for i in range(8):
        t = (i + 0.5) / 8
        base = np.mean([h(t, *u) for u in own])
        gains = [scale * (h(t, *v) - base) + noise * rng.standard_normal() for v in GRID]
        blocks.append({"t": t, "share": 1 / 8, "own": own, "gains": gains})
    return {"candidates": GRID, "evaluations": [k + 1 for _, k in GRID], "blocks": blocks}


def test_it_recovers_gains_of_its_own_form_and_relaxes_real_steps() -> None:
    model = GainModel.of([surface([[0.05, 2], [0.05, 3]]), surface([[0.1, 0], [0.1, 1]])])
    for t, alpha, steps in [
        (0.1, 0.03, 4),
        (0.7, 0.16, 1),
        (0.93, 0.01, 6),
        (0.4, 0.1, 2.25),
        (0.5, 0.02, 0.5),
    ]:
        predicted = float((model.features(t, alpha, steps) @ model.coefficients)[0])
        assert predicted == pytest.approx(h(t, alpha, steps), abs=1e-4)
    assert (model.features(0.3, 0.16, 6) == model.features(0.3, 0.5, 9)).all()  # as at the border


def test_a_schedule_is_worth_the_sum_over_its_pieces_less_its_price() -> None:
    model = GainModel.of([surface([[0.05, 2]])])
    schedule = parse_schedule("anneal:steps=0:2:4,alpha=0.1:0.02", 8)
    controls = [schedule(t) for t in range(8)]
    gains = [h((t + 0.5) / 8, u["alpha"], u["steps"]) for t, u in enumerate(controls)]
    n = np.mean([u["steps"] + 1 for u in controls])
    for price in (0.0, 0.03, 2.0):
        assert model.value(schedule, price) == pytest.approx(np.mean(gains) - price * n, abs=1e-4)


def test_what_differs_from_run_to_run_is_not_taken_for_a_gain() -> None:
    def spread(noise: float, scale: float) -> float:
        model = GainModel.of([surface([[0.05, 2]], noise, seed, scale) for seed in range(3)])
        return float(np.std([model.features(0.5, v[0], v[1]) @ model.coefficients for v in GRID]))

    assert spread(100.0, 0.0) < 3.0
    assert spread(0.5, 1.0) == pytest.approx(spread(0.0, 1.0), rel=0.3)


def test_effects_are_those_of_the_parameters() -> None:
    late = surface([[0.0, 0]])
    for block in late["blocks"]:
        block["gains"] = [k * block["t"] for _, k in GRID]
    space = Space("step:steps=0~6:0~6,at=4,alpha=0.01~0.16~log,rounding=dither", 8)
    effects = sensitivities(GainModel.of([late]), space, price=0.1)
    # a half of the run, at a mean t of 1/4 and 3/4, and 6 steps
    assert list(effects.values()) == pytest.approx(
        [6 / 2 * (1 / 4 - 0.1), 6 / 2 * (3 / 4 - 0.1), 0], abs=1e-3
    )


def test_no_surface_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one surface"):
        GainModel.of([])
