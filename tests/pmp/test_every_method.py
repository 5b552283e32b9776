"""The greedy criterion in the middle of training, for every method, against running it by hand."""

import pytest
import torch
from helpers import flat, same, split
from systems import LONG, Case, constant, driver

from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.rollout import rollout
from controlat.pmp import AdversarialLoss, Candidates, probe_batches
from controlat.pmp.greedy import score

GAMMA, RATE = 0.01, 0.05
every = pytest.mark.parametrize("case", LONG)


@every
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_gap_is_that_of_every_candidate_run_by_hand_and_training_is_not_disturbed(
    case: Case, norm: str
) -> None:
    u = case.control(steps=2)
    p = constant(u, epochs=2)
    d, ball = driver(case, ball=Ball(0.1, norm)), Ball(0.1, norm)
    list(rollout(d, p, until=1))
    saved, grid = d.snapshot(), Candidates.of((0.02, 0.07), 3)
    phi = AdversarialLoss(*split(8, (1, 4, 4), seed=9).take(torch.arange(8)), ball, seed=d.seed)
    probe = probe_batches(p.data.x, p.data.y, 2, epoch=1, indices=torch.arange(10))
    surface = score(d, probe, u, grid, terminal=phi, rate=RATE)
    assert same(d.snapshot(), saved)
    assert u in surface.controls
    assert set(grid.around(d.method, u)) <= set(surface.controls)
    values: dict[str, dict[Control, float]] = {"norm": {}, "costate": {}}
    slope = flat(phi.gradient(d, Meter()))
    for v in surface.controls:
        meter = Meter()
        fields = [flat(d.field(b, v, RATE, meter).gradients) for b in probe]
        mean = (fields[0] + fields[1]) / 2
        price = GAMMA * meter.gradients / sum(len(b.x) for b in probe)
        values["norm"][v] = float(mean @ mean) - price
        values["costate"][v] = float(slope @ mean) - price
    for form, value in values.items():
        gap, best = surface.gap(u, GAMMA, form), max(value.values())
        assert gap.value == pytest.approx(best - value[u], rel=1e-9, abs=1e-12)
        assert value[gap.maximiser] == pytest.approx(best, rel=1e-9)
        assert surface.gap(gap.maximiser, GAMMA, form).value == pytest.approx(0, abs=1e-12)
    expected = list(rollout(d, p, epoch=1))
    d.restore(saved)
    assert same(list(rollout(d, p, epoch=1)), expected)
