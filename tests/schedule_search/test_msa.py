"""The proposer msa, and gp with costates, before judges whose Hamiltonian is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from controlat.schedule_search.proposers import Proposer, Told, build
from controlat.schedule_search.space import Space
from controlat.schedule_search.trials import Answer

EPOCHS, MOST, PRICE = 6, 8, 0.02
SPACE = Space("anneal:steps=0~8:0~8,alpha=0.01~0.2~log", EPOCHS)
GRID = [[a, k] for a in np.geomspace(0.01, 0.2, 4) for k in range(1, MOST + 1)] + [[0.0, 0]]


def loss(t: float, alpha: float, steps: float) -> float:
    """The density of Phi in a system whose state does not move, so that first order is all there is.

    Its minimum is at log alpha in the middle of the range for every K, and rises in K with t.
    """
    if steps != int(steps):
        part = steps - int(steps)
        return (1 - part) * loss(t, alpha, int(steps)) + part * loss(t, alpha, int(steps) + 1)
    if steps == 0:
        return 0.0
    a = 2 * np.log(alpha / 0.01) / np.log(20) - 1
    return float(-(0.3 + 0.5 * t) * np.log1p(steps) + 0.05 * steps + 0.1 * a * a * np.log1p(steps))


def answer(point: dict[str, float], surface: bool, sign: float, noise: float, rng: Any) -> Answer:
    schedule = SPACE.schedule(point)
    times = [(i, (i + 0.5) / EPOCHS) for i in range(EPOCHS)]
    own = {i: (schedule(i)["alpha"], schedule(i)["steps"]) for i, _ in times}
    phi = float(np.mean([loss(t, *own[i]) for i, t in times])) + noise * rng.standard_normal()
    n = float(np.mean([k + 1 for _, k in own.values()]))
    blocks = []
    for i, t in times if surface else []:
        alpha, k = own[i]
        up = round(20 * (k - int(k)))  # of twenty steps of the epoch that are looked at
        steps = [[alpha, int(k) + 1]] * up + [[alpha, int(k)]] * (20 - up)
        base = np.mean([loss(t, *u) for u in steps])
        gains = [sign * (base - loss(t, *v)) for v in GRID]
        blocks.append({"t": t, "share": 1 / EPOCHS, "own": steps, "gains": gains})
    looked = {"candidates": GRID, "evaluations": [k + 1 for _, k in GRID], "blocks": blocks}
    return Answer(phi, n, 100.0, 0.0, surface=looked if surface else None)


def played(
    proposer: Proposer, rounds: int, *, sign: float = 1.0, noise: float = 0.0, price: float = PRICE
) -> list[tuple[dict[str, Any], Told]]:
    """What was judged, with the fidelity that the proposer wished."""
    rng, history = np.random.default_rng(5), list[tuple[dict[str, Any], Told]]()
    for _ in range(rounds):
        points = proposer.ask(4)
        wished = dict(getattr(proposer, "fidelity", {}))
        told = []
        for p in points:
            seeds, surface = range(wished.get("seeds", 1)), wished.get("surface", False)
            answers = tuple(answer(p, surface, sign, noise, rng) for _ in seeds)
            j = float(np.mean([a.phi + price * a.mean_cost for a in answers if a.phi is not None]))
            told.append(Told(p, j, None, answers))
        proposer.tell(told)
        history += [(wished, t) for t in told]
    return history


def best(history: Sequence[tuple[dict[str, Any], Told]]) -> float:
    return min(float(t.value) for _, t in history if t.value is not None)


def least(price: float = PRICE) -> float:
    """The smallest J over the space, from many points."""
    rng, values = np.random.default_rng(0), list[float]()
    at = np.full(3, 0.5)
    for i in range(900):
        x = rng.random(3) if i < 300 else np.clip(at + 0.05 * rng.standard_normal(3), 0, 1)
        a = answer(SPACE.point(x), False, 1.0, 0.0, rng)
        values.append(float(a.phi or 0) + price * a.mean_cost)
        if values[-1] == min(values):
            at = x
    return min(values)


def test_the_maximiser_of_a_known_hamiltonian_is_reached_in_a_few_asks() -> None:
    dear = played(build("msa", SPACE, 0), 8, price=0.1)
    assert best(dear) == pytest.approx(least(0.1), abs=2e-3)
    history = played(build("msa", SPACE, 0), 8)
    assert best(history) == pytest.approx(least(), abs=2e-3)
    wished = [w for w, _ in history]
    assert wished[:5] == [{}] * 4 + [{"seeds": 3, "surface": True}]
    assert wished[5] == {"seeds": 3}


def test_steps_that_do_not_lower_j_are_not_taken_and_the_next_start_follows() -> None:
    history = played(build("msa", SPACE, 0), 11, sign=-1.0)  # the surface points the wrong way
    incumbents = [t for w, t in history if w.get("surface")]
    starts = sorted(float(t.value or 0) for _, t in history[:4])
    assert [t.value for t in incumbents] == pytest.approx(starts[: len(incumbents)])
    assert len(incumbents) > 1
    start = SPACE.shares(incumbents[0].point)
    first = [np.abs(np.subtract(SPACE.shares(t.point), start)).max() for _, t in history[5:8]]
    assert first[0] > first[1] > first[2]  # the trust region shrinks


def test_noise_is_borne() -> None:
    history = played(build("msa", SPACE, 1), 10, noise=0.02)
    incumbents = [t for w, t in history if w.get("surface")]
    rng = np.random.default_rng(0)
    last = answer(incumbents[-1].point, False, 1.0, 0.0, rng)
    assert float(last.phi or 0) + PRICE * last.mean_cost < least() + 0.05


def test_a_failure_or_a_missing_surface_leads_to_the_next_start() -> None:
    proposer: Any = build("msa", SPACE, 0, {"startup": 2})
    points = proposer.ask(4)
    assert len(points) == 2
    proposer.tell([Told(points[0], 0.5), Told(points[1], None)])
    assert proposer.ask(4) == [SPACE.point(SPACE.shares(points[0]))]
    proposer.tell([Told(points[0], 0.5, None, (Answer(0.4, 1.0, 1.0, 0.0, surface={"failed": "so"}),))])
    assert len(proposer.ask(4)) == 2
    assert proposer.fidelity == {}


@pytest.mark.slow
def test_gp_with_costates_looks_back_on_the_best_and_starts_from_what_they_say() -> None:
    helped = played(build("gp", SPACE, 0, {"startup": 4, "costates": 2}), 4)
    looked = [t.point for w, t in helped if w]
    by_value = sorted((t for w, t in helped[:4]), key=lambda t: float(t.value or 0))
    assert looked == [t.point for t in by_value[:2]]
    plain = played(build("gp", SPACE, 0, {"startup": 4}), 4)
    assert best(helped) - least() < 0.5 * (best(plain) - least())


def test_a_surface_that_misleads_gets_no_weight() -> None:
    proposer: Any = build("gp", SPACE, 0, {"startup": 8, "costates": 1})
    played(proposer, 5, sign=-1.0)
    assert proposer._beta == 0.0


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="radius must be above 0 and at most 1, got 2"):
        build("msa", SPACE, 0, {"radius": 2})
    with pytest.raises(ValueError, match=r"msa compares .* does not set alpha and steps: take tpe"):
        build("msa", Space("set:noise=0.1~1", 4), 0)
    with pytest.raises(ValueError, match="gp with costates compares"):
        build("gp", Space("set:noise=0.1~1", 4), 0, {"costates": 1})
