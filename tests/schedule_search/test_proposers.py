"""Proposers: the contract that all of them keep, and what those that learn are worth on a noisy bowl."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from controlat.schedule_search.proposers import Told, build, names
from controlat.schedule_search.space import Space

SPACE = Space("step:steps=0~8:0~4~whole,at=6,alpha=0.01~0.3~log,rounding=dither", 12)
KNOWN = importlib.util.find_spec("sklearn") is not None
NAMES = [
    pytest.param(n, marks=pytest.mark.skipif(n == "gp" and not KNOWN, reason="scikit-learn is missing"))
    for n in names()
]


def value(point: dict[str, float], noise: float, rng: np.random.Generator) -> float:
    """A bowl around 0.3 in the unit cube, with noise."""
    return float(np.square(np.subtract(SPACE.shares(point), 0.3)).sum() + noise * rng.standard_normal())


def played(name: str, rounds: int, count: int = 4, noise: float = 0.02, seed: int = 0) -> list[Any]:
    """All points that a proposer asks for, told a noisy bowl with a failure in it."""
    proposer, rng, asked = build(name, SPACE, seed), np.random.default_rng(1), list[Any]()
    for _ in range(rounds):
        points = proposer.ask(count)
        told = [Told(p, None if p["alpha"] > 0.29 else value(p, noise, rng)) for p in points]
        proposer.tell(told)
        asked += points
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_points_are_in_the_space_and_follow_from_seed_and_history(name: str) -> None:
    points = played(name, 6)
    assert points
    assert points == played(name, 6)
    assert points != played(name, 6, seed=1)
    for p in points:
        assert all(par.low <= p[par.name] <= par.high for par in SPACE.parameters)
        assert SPACE.point(SPACE.shares(p)) == pytest.approx(p, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in NAMES if p.values[0] in ("tpe", "gp")])
def test_those_that_learn_come_closer_than_random_points(name: str) -> None:
    def mean(points: Sequence[Any]) -> float:
        return float(np.mean([value(p, 0.0, np.random.default_rng(0)) for p in points[-16:]]))

    assert mean(played(name, 24)) < 0.6 * mean(played("random", 24))


def test_a_grid_ends_and_has_every_point_once() -> None:
    points = [p for p in played("grid", 20) if p]
    assert len(points) == 27 == len({tuple(p.values()) for p in points})


def test_what_is_no_proposer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes|its options: startup"):
        build("tpe", SPACE, 0, {"start": 3})
    with pytest.raises(ValueError, match="must have ask"):
        build("operator:is_", SPACE, 0)
