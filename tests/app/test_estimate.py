"""What `estimate` says beside what an evaluation counts, for several terminal costs and attacks."""

from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat.app.estimate import estimate

SMALL: dict[str, Any] = {
    "schedules": ["pgd:steps=2,alpha=0.1"],
    "seeds": [0],
    "epochs": 2,
    "train_points": 180,
    "held_out": 40,
    "test_points": 20,
    "batch_size": 70,
    "probe": 140,
    "alphas": [0.05, 0.1],
    "max_steps": 2,
    "horizons": [1],
    "checks": 0,
    "threads": 1,
    "progress": False,
}
OWN = """
from controlat.pmp import AdversarialLoss

class Own:
    lower = 0.0
    def __init__(self, x, y, ball): self.inner = AdversarialLoss(x, y, ball, steps=3)
    def value(self, driver, meter=None): return self.inner.value(driver, meter)
    def gradient(self, driver, meter=None): return self.inner.gradient(driver, meter)
    def dropped(self, driver): return ()
"""
# Evaluations of one gradient of Phi on its 20 samples: K + 1 each; forward passes are not counted.
CASES = [
    ("adversarial", ["fgsm"], 20 * 21),
    ("clean", ["pgd-5-2"], 20 * 1),
    ("adversarial+0.1*clean", ["pgd:steps=3", "cw-4"], 20 * 22),
    ("estimated:Own", ["fgsm"], 20 * 4),
]


@pytest.mark.parametrize(("terminal", "attacks", "gradient"), CASES)
def test_every_part_of_an_estimate_is_that_of_what_is_run(
    terminal: str, attacks: list[str], gradient: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "estimated.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"terminal": terminal, "attacks": attacks}
    told = estimate(**settings)["gradients"]
    (run,) = controlat.evaluate(tmp_path / "out", **settings)["schedules"][0]["runs"]
    assert told["training"] == run["gradients"] == 2 * 140 * 3
    # Each epoch: u and no attack (3 + 1), two step sizes up to K = 2 (2 * 4), on the probe; Phi's gradient.
    counted = sum(epoch["gradients"] for epoch in run["criterion"])
    assert told["criterion"] == counted == 2 * (140 * (3 + 1 + 2 * 4) + gradient)
    assert told["Phi"] == run["objective"]["gradients"]["Phi"]
    validation = sum(epoch["validation_gradients"] for epoch in run["epochs"])
    assert validation <= told["validation"] == 2 * 20 * 10
    spent = run["evaluation"]["gradients"] + run["evaluation"]["forwards"] / 3
    assert spent <= told["evaluation"]
    full = sum(run["full"]["gradients"].values())
    assert full <= told["full criterion"] <= 3 * full, "a bound"
