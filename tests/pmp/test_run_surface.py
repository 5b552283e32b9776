"""Surfaces along a run are what the maximum principle's own functions give."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import Split
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.pmp import AdversarialLoss, Candidates, examine, objective, run_surface

BALL = Ball(0.1)


def problem(text: str, method: str = "pgd_at") -> tuple[Driver, RunSpec, AdversarialLoss]:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 2, 3, generator=draw, dtype=torch.float64)
    y = torch.arange(24) % 3
    layer = torch.nn.Linear(6, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 6, generator=draw, dtype=torch.float64))
        layer.bias.zero_()
    driver = Driver(torch.nn.Sequential(torch.nn.Flatten(), layer), build(method), BALL)
    spec = RunSpec(Split(x, y), 8, 4, parse_schedule(text, 4), parse_rate(0.2))
    return driver, spec, AdversarialLoss(x, y, BALL, steps=3)


@pytest.mark.parametrize("text", ["pgd:steps=2,alpha=0.05", "anneal:steps=0:2.5,alpha=0.05:0.02"])
def test_they_are_the_gains_of_the_full_criterion_and_training_is_the_same(text: str) -> None:
    plain = objective(*problem(text))
    driver, spec, terminal = problem(text)
    outcome, surface = run_surface.examined(driver, spec, terminal, max_steps=3)
    assert (outcome.phi, outcome.evaluations) == (plain.phi, plain.evaluations)
    assert outcome.spent > 2 * plain.spent

    driver, spec, terminal = problem(text)
    recording, candidates = Recording.of(driver, spec), Candidates.default(0.1, 3, run_surface.STEP_SIZES)
    criterion = examine(recording, terminal, candidates, gamma=0.0, looks=run_surface.LOOKS)
    assert sum(b["share"] for b in surface["blocks"]) == pytest.approx(1)
    assert [b["t"] for b in surface["blocks"]] == [0.125, 0.375, 0.625, 0.875]
    at = [tuple(v) for v in surface["candidates"]]
    assert {(0.0, 0), *((a, k) for a in candidates.values["alpha"] for k in (1, 2, 3))} <= set(at)
    for index, block in enumerate(surface["blocks"]):
        for v, gain in criterion.surface(index)[1:]:
            i = at.index((v["alpha"], v["steps"]))
            assert block["share"] * block["gains"][i] == pytest.approx(gain, rel=1e-5, abs=1e-9)
            assert surface["evaluations"][i] == v["steps"] + 1
        looked = [g.controls[0] for g in criterion.looked if g.epoch == index]
        own = [[u["alpha"] if u["steps"] else 0.0, u["steps"]] for u in looked]
        assert np.array(block["own"]) == pytest.approx(np.array(own), rel=1e-5)


def test_a_part_of_the_epochs_is_looked_back_upon_from_its_end() -> None:
    driver, spec, terminal = problem("pgd:steps=2,alpha=0.05")
    outcome, surface = run_surface.examined(driver, spec, terminal, max_steps=3, until=2)
    plain = objective(*problem("pgd:steps=2,alpha=0.05"), until=2)
    assert (outcome.phi, outcome.evaluations) == (plain.phi, plain.evaluations)
    assert [b["t"] for b in surface["blocks"]] == [0.125, 0.375]


def test_a_costate_that_is_not_finite_leaves_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise NonFiniteError("the costate after step 3 is not finite")

    monkeypatch.setattr(run_surface, "examine", explode)
    outcome, surface = run_surface.examined(*problem("pgd:steps=2,alpha=0.05"), max_steps=3)
    assert outcome.phi == objective(*problem("pgd:steps=2,alpha=0.05")).phi
    assert "step 3" in surface["failed"]


def test_other_knobs_than_alpha_and_steps_are_refused() -> None:
    _, spec, terminal = problem("none")
    driver: Any = SimpleNamespace(method=SimpleNamespace(controls={"alpha": None}))
    with pytest.raises(ValueError, match="the method has no steps"):
        run_surface.examined(driver, spec, terminal, max_steps=3)
