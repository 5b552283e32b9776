"""Steps are taken, and taken again, as in training; all analysis runs in float32, without TF32."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from controlat import Ball, Split, parse_schedule
from controlat._util.precision import TF32, tf32, tf32_state
from controlat.control import Control, parse_rate
from controlat.dynamics import Driver, Recording, RunSpec, SGDSettings
from controlat.dynamics.adjoint import pullback
from controlat.methods import build
from controlat.pmp import (
    AdversarialLoss,
    Candidates,
    examine,
    outcome_at,
    probe_batches,
    relaxed,
    score,
    trust,
)
from controlat.robust_accuracy import robustness

ON, OFF = TF32(convolutions=True, matmul=True), TF32(convolutions=False, matmul=False)
TRAINING, ANALYSIS = (ON, torch.bfloat16), (OFF, torch.float32)
BALL = Ball(0.05)


class Watched(nn.Module):
    """A small network that keeps the precision of each pass, apart for the passes of training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        self.stepping = False
        self.seen: dict[bool, set[tuple[TF32, torch.dtype]]] = {True: set(), False: set()}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        self.seen[self.stepping].add((tf32_state(), logits.dtype))
        return logits


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """The network, in a process whose user has TF32 on."""
    torch.manual_seed(0)
    net, step = Watched(), Driver.step

    def watched(driver: Driver, *given: object) -> object:
        net.stepping = True
        try:
            return step(driver, *given)  # type: ignore[arg-type]
        finally:
            net.stepping = False

    monkeypatch.setattr(Driver, "step", watched)
    with tf32(True):
        yield net


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(24, 1, 4, 4, generator=generator), torch.arange(24) % 3


def driver_and_spec(net: Watched) -> tuple[Driver, RunSpec]:
    driver = Driver(net, build("pgd_at"), BALL, autocast=torch.bfloat16)
    schedule = parse_schedule("pgd:steps=2,alpha=0.02", 2)
    return driver, RunSpec(Split(*samples()), 8, 2, schedule, parse_rate(0.1))


def test_the_full_criterion_looks_in_float32_at_a_run_in_bf16_and_tf32(net: Watched) -> None:
    driver, spec = driver_and_spec(net)
    terminal = AdversarialLoss(*samples(), BALL, steps=2)
    recording = Recording.of(driver, spec, stride=4)  # the others are taken again
    candidates = Candidates.read(None, driver.method.controls, eps=BALL.eps, max_steps=2)
    criterion = examine(recording, terminal, candidates, gamma=0.0)
    assert trust(recording, criterion, terminal).outcomes
    outcome_at(driver, terminal, 0.0)
    assert net.seen == {True: {TRAINING}, False: {ANALYSIS}}
    assert driver.autocast == torch.bfloat16
    assert tf32_state() == ON
    assert "rounding to bfloat16" in criterion.dropped


def test_the_momentum_left_at_the_end_of_a_window_is_weighed_in_float32(net: Watched) -> None:
    _, spec = driver_and_spec(net)
    driver = Driver(net, build("pgd_at"), BALL, SGDSettings(momentum=0.9), autocast=torch.bfloat16)
    recording = Recording.of(driver, spec, last=3)
    relaxed(recording, {0: Control(alpha=0, steps=0)}, 0.5, AdversarialLoss(*samples(), BALL, steps=2))
    assert net.seen == {True: {TRAINING}, False: {ANALYSIS}}


def test_costates_and_scores_are_those_of_the_step_in_float32(net: Watched) -> None:
    driver, spec = driver_and_spec(net)
    plain = Driver(net, build("pgd_at"), BALL)
    batch, p = next(spec.batches(0)), driver.point(torch.arange(8)).copy()
    pulled = [pullback(d, batch, spec.control(batch), 0.1, p).costate for d in (driver, plain)]
    for ours, exact in zip(pulled[0].parameters, pulled[1].parameters, strict=True):
        assert torch.equal(ours, exact)
    assert net.seen[False] == {ANALYSIS}


def test_the_greedy_criterion_and_robust_accuracy_run_without_tf32(net: Watched) -> None:
    driver, spec = Driver(net, build("pgd_at"), BALL), driver_and_spec(net)[1]
    candidates = Candidates.read(None, driver.method.controls, eps=BALL.eps, max_steps=2)
    control, terminal = spec.control(next(spec.batches(0))), AdversarialLoss(*samples(), BALL)
    score(driver, probe_batches(*samples(), 4), control, candidates, terminal=terminal)
    assert net.seen[False] == {ANALYSIS}
    net.seen[False].clear()
    robustness(net, *samples(), eps=0.05, attacks=["fgsm", "pgd-2"], checks=8)
    assert net.seen[False] == {ANALYSIS}
