"""Analysis on a GPU: costates and criterion are those of the CPU, and the commands run to their end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flat, shorten_autoattack, split
from systems import constant, driver

import controlat
from controlat._util.files import read_json
from controlat.app.placement import deterministic
from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.pmp import AdversarialLoss, Candidates, backward, probe_batches, score

SHAPE = (1, 4, 4)
FEW: dict[str, Any] = {
    "epochs": 2,
    "train_points": 200,
    "test_points": 40,
    "held_out": 40,
    "batch_size": 32,
    "progress": False,
}


def system(device: str) -> tuple[Driver, RunSpec, AdversarialLoss]:
    """PGD without a random start on a smooth network in float64: the device decides the rounding alone."""
    method = build("pgd_at", {"random_start": False})
    made = driver(method, driver(method).model.to(device))
    run = constant(Control(alpha=0.03, steps=3), data=split(10, SHAPE).to(device))
    x, y = split(8, SHAPE, seed=9).take(torch.arange(8))
    return made, run, AdversarialLoss(x.to(device), y.to(device), Ball(0.1), steps=0)


def test_costates_are_those_of_the_cpu(controlat_device: str) -> None:
    costates = []
    for device in ("cpu", controlat_device):
        made, run, phi = system(device)
        with deterministic():
            recording = Recording.of(made, run)
            steps = len(recording.steps)
            costates.append(
                [flat(step.costates[steps].parameters).cpu() for step in backward(recording, phi)]
            )
    assert len(costates[0]) == len(costates[1]) == 9
    for here, there in zip(*costates, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-9)


def test_the_criterion_is_that_of_the_cpu(controlat_device: str) -> None:
    surfaces, u = [], Control(alpha=0.03, steps=1)
    for device in ("cpu", controlat_device):
        made, run, phi = system(device)
        x, y = run.data.take(torch.arange(10, device=device))
        batches = probe_batches(x, y, 2, indices=torch.arange(10, device=device))
        with deterministic():
            surfaces.append(score(made, batches, u, Candidates.of((0.02, 0.07), 3), terminal=phi))
    assert surfaces[0].controls == surfaces[1].controls
    for form in ("norm", "costate"):
        gaps = [surface.gap(u, 0.01, form) for surface in surfaces]
        assert gaps[0].maximiser == gaps[1].maximiser
        assert gaps[0].value == pytest.approx(gaps[1].value, rel=1e-8)
        assert gaps[0].jackknife == pytest.approx(gaps[1].jackknife, rel=1e-8)


def test_evaluate_end_to_end(controlat_device: str, tmp_path: Path) -> None:
    settings = FEW | {"schedules": ["amata:min=1,max=2,tau=0.3"], "seeds": [0], "probe": 32}
    settings |= {
        "model": "cnn_bn",
        "attacks": ["fgsm", "pgd-5"],
        "checks": 10,
        "looks": 1,
        "train_points": 104,
    }
    result = controlat.evaluate(tmp_path / "out", device=controlat_device, alphas=[0.1, 0.3], **settings)
    assert result["environment"]["device"] == controlat_device
    for schedule in result["schedules"]:
        summary = schedule["summary"]
        assert summary["criterion"]["norm"]["mean"] >= 0
        assert 0 <= summary["robust"]["mean"] <= summary["clean"]["mean"] <= 1
        assert summary["full"]["same"] is True  # rolled out again, it ended with the same bits
    assert read_json(tmp_path / "out" / "result.json") == result
    again = controlat.evaluate(tmp_path / "out", device=controlat_device, alphas=[0.1, 0.3], **settings)
    assert again == result


def test_a_trained_network_is_attacked_and_calibrates_a_derivation(
    controlat_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, few = tmp_path / "run", {"test_points": 40, "progress": False}
    controlat.train(run, device=controlat_device, schedule="amata:min=1,max=10,tau=0.3", seed=3, **few)
    shorten_autoattack(monkeypatch)
    attacked = controlat.attack(run, device=controlat_device, attacks=["pgd-5", "cw-5"], autoattack=16)
    assert attacked["environment"]["device"] == controlat_device
    assert 0 <= attacked["robust"]["value"] <= attacked["clean"]["value"]
    assert attacked["autoattack"]["robust"]["points"] == 16
    derived = controlat.derive(
        calibrate=str(run), since=0, device=controlat_device, checks=False, progress=False
    )
    assert derived.fit is not None
    assert derived.result["calibration"]["measured"]["same"] is True  # trained again, to the same bits
    assert derived.schedule.epochs == 12
