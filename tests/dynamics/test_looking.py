"""Finiteness is looked at every few steps: waits per step, the step that is named, what is not given out."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mlp, same
from systems import CASES, batch, constant, driver, long
from torch import Tensor, nn
from waits import waited

from controlat._util.errors import NonFiniteError
from controlat._util.watch import Watch
from controlat.app.trainer import fit
from controlat.attacks.pgd import pgd
from controlat.control.space import Control
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.step import Step
from controlat.dynamics.window import window_steps
from controlat.methods.pgd_at import PgdAT
from controlat.models.frozen.view import FrozenModel

# Methods whose control flow depends on values: which samples go on.
DECIDES = {"fat", "dynamic"}
# Numbers that are on the CPU with a GPU too: positions of samples, and the step size of each part of a batch.
ON_CPU = {"atta": 1, "atta reset": 1, "cat": 3, "cat basic": 1, "cat curriculum": 1}
U = Control(alpha=0.05, steps=1)


class Breaking(nn.Module):
    """A network whose logits become NaN in one of its passes in training mode, and stay so."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.network, self.left = mlp(16), after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        return self.network(x) * (torch.nan if self.left < 0 else 1)


def breaking(after: int, **options: Any) -> Any:
    return driver(PgdAT(), Breaking(after).double(), channels_last=False, **options)


def test_waits_are_counted() -> None:
    t = torch.ones(3)
    with waited() as waits:
        float(t[0]), bool((t > 0).all()), t.tolist(), t[t > 0], torch.equal(t, t)
    assert len(waits) == 5


@pytest.mark.parametrize("name", long(name for name, case in CASES.items() if case.name not in DECIDES))
def test_a_step_does_not_wait_for_the_device_but_in_the_look_at_every_nth(name: str) -> None:
    case = CASES[name]
    d = driver(case, look_every=3, channels_last=False)
    for step in range(6):
        b = batch(number=step)
        with waited() as waits:
            d.step(b, case.control(), 0.1)
        assert len(waits) == ON_CPU.get(name, 0) + (step % 3 == 2), (step, waits)


@pytest.mark.parametrize("name", ["pgd_at", "free", "yopo", "trades"])
def test_looking_later_changes_no_bits(name: str) -> None:
    ends = []
    for every in (0, 4):
        d = driver(CASES[name], look_every=every)
        steps = list(rollout(d, constant(CASES[name].control())))
        assert all(isinstance(step.value, float) == (every == 0) for step in steps)
        ends.append((d.snapshot(), [step.loss for step in steps], [step.spent for step in steps]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize("every", [0, 1, 2, 5])
def test_the_step_of_a_failure_is_named_however_much_later_it_is_noticed(every: int) -> None:
    taken: list[Step] = []
    with pytest.raises(NonFiniteError, match=r"training loss nan, .*\(epoch 0, batch 2, Control\(alpha=0.05"):
        taken.extend(rollout(breaking(2, look_every=every), constant(U, 32)))
    assert len(taken) == {0: 2, 1: 2, 2: 3, 5: 4}[every]


def test_a_state_is_not_given_out_before_it_was_looked_at() -> None:
    uses = {
        "snapshot": lambda d: d.snapshot(),
        "point": lambda d: d.point(torch.arange(6)),
        "restore": lambda d: d.restore(start),
        "end_epoch": lambda d: d.end_epoch(constant(U), 0),
        "fingerprint": lambda d: d.fingerprint(),
    }
    for use in uses.values():
        d = breaking(1, look_every=100)
        start = d.snapshot()
        for number in range(3):
            d.step(batch(number=number), U, 0.1)
        with pytest.raises(NonFiniteError, match="epoch 0, batch 1"):
            use(d)


def test_a_recording_of_a_diverging_window_fails() -> None:
    with pytest.raises(NonFiniteError, match="epoch 0, batch 2"):
        Recording.of(breaking(2, look_every=100), constant(U, 32), last=5, stride=8)
    with pytest.raises(NonFiniteError, match="epoch 0, batch 2"):  # before the network is used
        list(window_steps(breaking(2, look_every=100), constant(U, 32), 0, 5))


def test_a_closed_loop_decides_on_looked_at_states_only() -> None:
    decided: list[int] = []

    class Loop:
        def control(self, now: Any, z: Any) -> Control:
            decided.append(now.batch)
            return U

    with pytest.raises(NonFiniteError, match="epoch 0, batch 1"):
        list(rollout(breaking(1, look_every=100), constant(U, 32, controller=Loop())))
    assert decided == [0, 1]


@pytest.mark.parametrize("minutes", [10.0, 1e-9])
def test_no_checkpoint_is_written_from_a_state_that_was_not_looked_at(tmp_path: Path, minutes: float) -> None:
    d = breaking(11, look_every=100)  # 8 steps an epoch
    with pytest.raises(NonFiniteError, match=r"epoch 1, batch 3, Control.*the last good checkpoint is"):
        fit(d, constant(U, 32), tmp_path, checkpoint_minutes=minutes, progress=False)
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["tally"]["epoch"] == 1
    assert kept["tally"]["batch"] == (0 if minutes == 10 else 3)
    assert (kept["tally"]["loss"] > 0) == (minutes < 10)  # the losses of the steps so far
    assert all(bool(torch.isfinite(t).all()) for t in kept["model"].values())
    assert not (tmp_path / "best.pt").exists()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_the_log_has_the_same_losses_when_they_are_read_late(tmp_path: Path) -> None:
    logs = []
    for every in (0, 3):
        fit(driver(PgdAT(), look_every=every), constant(U), tmp_path / str(every), progress=False)
        text = (tmp_path / str(every) / "log.jsonl").read_text()
        logs.append(re.findall(r'"loss": [^,]+', text))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3


class Swallows(torch.autograd.Function):
    """Signs: finite logits, with an input gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.nan


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.nan_to_num(Swallows.apply(x - 0.5), 1.0))


def test_an_attack_that_fails_is_found_though_the_network_hides_it() -> None:
    x, y = batch()[:2]
    with pytest.raises(NonFiniteError, match="with respect to the input"):
        pgd(Binary().double(), x, y, eps=0.1, alpha=0.1, steps=1)
    d = driver(PgdAT(), Binary().double(), look_every=2, channels_last=False)
    d.step(batch(), U, 0.1)
    with pytest.raises(NonFiniteError, match=r"with respect to the input .* \(epoch 0, batch 0, Control"):
        d.step(batch(number=1), U, 0.1)


def test_logits_that_are_not_finite_are_noted_too() -> None:
    watch = Watch(every=2)
    with FrozenModel(Breaking(0).double(), "train", watch=watch) as view:
        logits = view(batch().x)
    assert logits.isnan().all()
    with pytest.raises(NonFiniteError, match="logits that are not finite"):
        watch.look()
    watch.look()  # told once
