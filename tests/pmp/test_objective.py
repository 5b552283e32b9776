"""J of a controller under a seed, against a training loop by hand and against every other way to it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import systems
import torch
from helpers import flat, mlp, samples, spec, split
from systems import CASES, Case, constant
from torch import nn

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.schedule_text import parse_schedule
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.pmp import AdversarialLoss, Candidates, examine, objective, rollout_cost
from controlat.pmp.objective import evaluations, outcome_at
from controlat.pmp.relaxed import relaxed

TERMINAL = AdversarialLoss(*samples(6, seed=5), Ball(0.1), steps=3)


def driver(model: nn.Module | None = None, method: str = "pgd_at") -> Driver:
    model = mlp() if model is None else model
    return Driver(model, build(method), Ball(0.1), SGDSettings(0.9), seed=3)


def test_j_is_that_of_a_training_loop_by_hand() -> None:
    """Clean training in float64, its order of samples read off the plan; Phi the clean loss."""
    data, model = split(10), mlp()
    s = spec(data, rate=0.2, epochs=3)  # 3 steps for an epoch, the last of 2 samples
    x, y = samples(6, seed=5)
    found = objective(driver(), s, AdversarialLoss(x, y, Ball(0.1), steps=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for epoch in range(3):
        for index in s.order(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
    phi = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert found.phi == pytest.approx(phi, rel=1e-12)
    assert (found.evaluations, found.training_gradients, found.terminal_gradients) == (9.0, 30, 0)
    assert s.price(0.01) == pytest.approx(0.002)
    assert found.objective(s.price(0.01)) == pytest.approx(phi + 0.01 * 0.2 * 9, rel=1e-12)


@pytest.mark.parametrize("schedule", ["pgd:steps=2,alpha=0.05", "step:steps=0:3,at=1,alpha=0.05"])
def test_costates_relaxed_controls_and_the_plain_roll_out_have_one_j(schedule: str) -> None:
    """To the last bit, with a last batch that is smaller and a price that rounds."""
    s = spec(split(10), schedule=schedule, rate=0.1, epochs=2)
    plain = objective(driver(), s, TERMINAL)
    recording = Recording.of(driver(), s)
    criterion = examine(recording, TERMINAL, Candidates.of((0.05,), 2), gamma="0.3")
    assert (criterion.phi, criterion.evaluations) == (plain.phi, plain.evaluations)
    assert criterion.price == s.price(0.3)
    assert criterion.objective == plain.objective(s.price(0.3))
    again = relaxed(recording, {}, 0.5, TERMINAL)
    assert replace(again, seconds=0.0) == replace(plain, seconds=0.0)
    assert evaluations(recording.steps) == plain.evaluations


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_method_ends_where_its_recorded_roll_out_does(case: Case) -> None:
    """Hooks between epochs, carried perturbations and networks put aside included."""
    s = constant(case.control(), epochs=2, held_out=split(8, (1, 4, 4), seed=5))
    phi = AdversarialLoss(*samples(6, (1, 4, 4), seed=9), Ball(0.1), steps=3)
    plain = objective(systems.driver(case), s, phi)
    recording = Recording.of(systems.driver(case), s)
    recorded = outcome_at(recording.driver, phi, evaluations(recording.steps))
    assert (plain.phi, plain.evaluations) == (recorded.phi, recorded.evaluations)
    assert plain.training_gradients == recording.driver.meter.gradients


def test_what_it_took_is_counted_and_bounded_ahead() -> None:
    s, d = spec(split(10), schedule="pgd:steps=2,alpha=0.05", epochs=2), driver()
    told: list[int] = []
    found = objective(d, s, TERMINAL, progress=lambda: told.append(1))
    assert len(told) == 6
    assert found.training_gradients == d.meter.gradients == 2 * 10 * 3 == rollout_cost(s, d.method)
    assert (found.terminal_gradients, found.spent) == (6 * 3, 60 + 18)
    assert found.seconds > 0
    assert objective(d, s, TERMINAL).training_gradients == 60, "of this roll-out alone"


def test_a_method_whose_steps_cost_less_than_declared_is_counted() -> None:
    """FAT stops a sample as soon as it is misclassified."""
    s, d = spec(split(10), epochs=2), driver(method="fat")
    bound = parse_schedule("set:steps=8,alpha=0.05,slack=1", 2).bound(d.method.controls)
    s = RunSpec(s.data, s.batch_size, s.epochs, bound, s.rate)
    found = objective(d, s, TERMINAL)
    assert found.training_gradients == d.meter.gradients < rollout_cost(s, d.method)
    assert 2 * 3 <= found.evaluations < 2 * 3 * 9


class Short(nn.Module):
    """Weights of 16 bits, which one long step takes beyond their largest number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 6e4, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.double() * torch.ones_like(x.flatten(1)[:, :1])


@pytest.mark.parametrize(
    ("epochs", "told"), [(1, "a parameter .* after the step"), (3, "training loss nan.*")]
)
def test_training_that_diverges_names_its_step(epochs: int, told: str) -> None:
    """Also where only the parameters after the last step show it."""
    d = Driver(Short(), build("pgd_at"), Ball(0.1), SGDSettings(0.0))
    with pytest.raises(NonFiniteError, match=rf"{told}.* \(epoch {min(epochs - 1, 1)}, batch 0, "):
        objective(d, spec(split(4), rate=6e4, epochs=epochs), TERMINAL)


class Endless:
    """A user's terminal cost that is not finite."""

    lower = -math.inf

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        return math.inf

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[torch.Tensor]:
        return [torch.zeros_like(p) for p in driver.parameters]

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        return ()


def test_a_terminal_cost_that_is_not_finite_is_no_outcome() -> None:
    with pytest.raises(NonFiniteError, match="the terminal cost is inf"):
        outcome_at(driver(), Endless(), 1.0)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [(0, mlp(), "driver must be"), (1, "pgd", "spec must be"), (2, AdversarialLoss, "terminal is the class")],
)
def test_arguments_of_another_kind_are_named(position: int, value: Any, message: str) -> None:
    given: list[Any] = [driver(), spec(split(4)), TERMINAL]
    given[position] = value
    with pytest.raises((TypeError, ValueError), match=message):
        objective(*given)


def test_the_network_is_left_at_the_end_of_training() -> None:
    d, s = driver(), spec(split(10), epochs=2)
    objective(d, s, TERMINAL)
    assert torch.equal(flat(d.parameters), flat(Recording.of(driver(), s).driver.parameters))
