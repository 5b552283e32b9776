"""Training on a GPU: the same bits twice, after an interruption too; bf16; what is not finite is named."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flat, same, samples, split
from systems import PLAIN, Case, constant, driver

import controlat
from controlat import NonFiniteError
from controlat._util import rng
from controlat.app.placement import deterministic, place
from controlat.app.trainer import load_checkpoint
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import parse_rate
from controlat.control.space import Control
from controlat.data import Split
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import rollout
from controlat.methods import Batch, build
from controlat.models import build as build_model

FEW: dict[str, Any] = {
    "model": "cnn_bn",
    "augment": "crop-flip:pad=1",
    "schedule": "amata:min=1,max=3,tau=0.3",
    "lr": 0.05,
    "epochs": 2,
    "train_points": 140,
    "held_out": 20,
    "batch_size": 32,
    "progress": False,
}
STATE = ("model", "optimizer", "memory", "rows", "kept", "stopped", "controller", "schedule")
SHAPE = (1, 8, 8)


def state(run: Path) -> dict[str, Any]:
    """The state that a run ended with."""
    saved = load_checkpoint(run / "last.pt")
    return {name: saved[name] for name in STATE if name in saved}


def system(device: str, case: Case, **options: Any) -> tuple[Driver, Batch]:
    """A convolutional network with BatchNorm and dropout in float32, and a batch, on the device."""
    with rng.scoped(0, "network"):
        model = build_model("cnn_bn", SHAPE, 3)
    made = driver(case, place(model.train(), device, in_shape=SHAPE), **options)
    made.memory |= {name: t.to(device) for name, t in case.own.memory.items()}
    data = images(device)
    return made, Batch(data.x, data.y, torch.arange(16, device=device), 0, 0)


def images(device: str) -> Split:
    """16 images in float32 on the device."""
    x, y = samples(16, SHAPE)
    return Split(x.float(), y).to(device)


# -------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_training_twice_ends_with_the_same_bits(controlat_device: str, tmp_path: Path, bf16: bool) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    results = [controlat.train(run, device=controlat_device, bf16=bf16, **FEW) for run in runs]
    assert same(state(runs[0]), state(runs[1]))
    assert [[e["loss"] for e in r["epochs"]] for r in results[:1]] == [
        [e["loss"] for e in r["epochs"]] for r in results[1:]
    ]
    assert load_checkpoint(runs[0] / "last.pt")["environment"]["device"] == controlat_device


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_interrupted_and_resumed_training_ends_with_the_same_bits(
    controlat_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    settings = FEW | {"device": controlat_device, "bf16": bf16, "checkpoint_minutes": 1e-9}
    controlat.train(tmp_path / "whole", **settings)
    steps, step = 0, Driver.step

    def interrupted(self: Driver, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:  # in the middle of the second epoch, of four batches
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            controlat.train(tmp_path / "parts", **settings)
    tally = load_checkpoint(tmp_path / "parts" / "last.pt")["tally"]
    assert (tally["epoch"], tally["batch"]) == (1, 2)
    controlat.train(tmp_path / "parts", resume=True, **settings)
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_of_every_method_moves_the_parameters_and_repeats_itself(
    controlat_device: str, name: str
) -> None:
    case, ends = PLAIN[name], []
    for _ in range(2):
        made, batch = system(controlat_device, case)
        before = flat(made.parameters)
        with deterministic():
            steps = [
                made.step(batch._replace(number=i), case.control(alpha=0.05, steps=2), 0.05) for i in range(2)
            ]
        assert all(torch.isfinite(torch.tensor([s.loss for s in steps])))
        assert all(p.device.type == torch.device(controlat_device).type for p in made.parameters)
        assert not torch.equal(flat(made.parameters), before)
        ends.append(made.snapshot())
    assert same(*ends)


def test_a_run_in_float64_is_that_of_the_cpu(controlat_device: str) -> None:
    """Without random starts nothing depends on the device but rounding, here 1e-16."""
    ends = []
    for device in ("cpu", controlat_device):
        made = driver(build("pgd_at", {"random_start": False}))
        made = driver(made.method, made.model.to(device))
        run = constant(Control(alpha=0.03, steps=4), data=split(10, (1, 4, 4)).to(device))
        with deterministic():
            losses = [step.loss for step in rollout(made, run)]
        ends.append((flat(made.parameters).cpu(), torch.tensor(losses)))
    for here, there in zip(*ends, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------- mixed precision


def test_bf16_keeps_parameters_in_float32_and_steps_nearly_as_float32_does(controlat_device: str) -> None:
    moves = []
    for autocast in (None, torch.bfloat16):
        made, batch = system(controlat_device, PLAIN["pgd_at"], autocast=autocast)
        before = flat(made.parameters)
        with deterministic():
            made.step(batch, Control(alpha=0.0, steps=0), 0.05)  # without an attack, whose signs would differ
        assert {p.dtype for p in made.parameters} == {torch.float32}
        assert {v.dtype for v in made.momentum} == {torch.float32}
        moves.append(flat(made.parameters) - before)
    exact, mixed = moves
    assert not torch.equal(exact, mixed)
    assert float(torch.nn.functional.cosine_similarity(exact, mixed, dim=0)) > 0.99


# ---------------------------------------------------------------------------------------------- failures


def named(device: str, factor: float) -> str:
    """The message of a run whose learning rate is multiplied in epoch 1, when something is not finite."""
    made, _ = system(device, PLAIN["pgd_at"])
    rate = parse_rate(f"multistep:lr=0.05,at=1,factor={factor:g}")
    run = replace(constant(Control(alpha=0.05, steps=2), data=images(device)), rate=rate)
    with deterministic(), pytest.raises(NonFiniteError) as stopped:
        for _ in rollout(made, run):
            pass
    return str(stopped.value)


def test_what_is_not_finite_is_named_with_epoch_batch_and_control(controlat_device: str) -> None:
    message = named(controlat_device, 1e36)
    where = r"epoch (\d+), batch (\d+), (Control\(.*?\))"
    told, expected = re.search(where, message), re.search(where, named("cpu", 1e36))
    assert told is not None, message
    assert expected is not None
    assert told.groups() == expected.groups()
    assert told[1] == "1"


# ------------------------------------------------------------------------------------------------ memory


def test_steps_hold_on_to_no_memory(controlat_device: str) -> None:
    if controlat_device != "cuda":
        pytest.skip("torch counts the tensors of a CUDA device only")
    made, batch = system(controlat_device, PLAIN["pgd_at"])
    held = []
    for i in range(12):
        with deterministic():
            made.step(batch._replace(number=i), Control(alpha=0.05, steps=1 + i % 3), 0.05)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[4]


def test_evaluations_are_those_of_the_cpu(controlat_device: str) -> None:
    """Without a random start the accuracy after FGSM is a matter of the network alone."""
    with rng.scoped(0, "network"):
        model = build_model("cnn_bn", SHAPE, 3).double().eval()
    x, y = split(64, SHAPE).take(torch.arange(64))
    attacked = []
    for device in ("cpu", controlat_device):
        there = model.to(device), x.to(device), y.to(device)
        x_adv = controlat.fgsm(*there, eps=0.1)
        attacked.append((x_adv.cpu(), model(x_adv).argmax(1).cpu()))
    torch.testing.assert_close(attacked[0][0], attacked[1][0], rtol=0, atol=1e-12)
    assert torch.equal(attacked[0][1], attacked[1][1])
    assert Ball(0.1).distance(attacked[1][0], x).max() <= 0.1 + 1e-12
