"""What an evaluation searches: any knobs of the method, through the command, the estimate and the summary."""

from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat.app import cli
from controlat.app.estimate import estimate
from controlat.app.settings import EvaluateSettings

SMALL: dict[str, Any] = {
    "method": "trades",
    "schedules": ["pgd:steps=1,alpha=0.1,beta=6"],
    "knobs": ["alpha", "steps", "beta=1:6"],
    "seeds": [0],
    "epochs": 1,
    "train_points": 120,
    "held_out": 20,
    "test_points": 20,
    "batch_size": 50,
    "probe": 48,
    "alphas": [0.05, 0.1],
    "max_steps": 2,
    "full": False,
    "attacks": ["fgsm"],
    "checks": 0,
    "threads": 1,
    "progress": False,
}


def test_all_of_them_are_scored_counted_as_estimated_and_told(tmp_path: Path) -> None:
    told = estimate(**SMALL)["gradients"]
    result = controlat.evaluate(tmp_path / "out", **SMALL)
    assert result["grid"]["more"] == {"beta": [1, 6]}
    assert result["grid"]["others"] == []
    (line,) = result["schedules"][0]["runs"][0]["criterion"]
    assert line["candidates"] == 2 * (1 + 2 * 2)  # u among them
    assert told["criterion"] == line["gradients"]
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "Searched: K = 0..2, alpha in {0.05, 0.1}, beta in {1, 6}, and the schedule's own control." in text
    assert "K=1 α=0.1 beta=6" in text


def test_knobs_that_are_left_out_are_held() -> None:
    chosen = EvaluateSettings(**SMALL | {"knobs": None})
    assert chosen.knobs is None
    with pytest.raises(ValueError, match="'zeal' is no knob of this method; it has alpha, beta, steps"):
        EvaluateSettings(**SMALL | {"knobs": ["zeal"]})
    with pytest.raises(ValueError, match="knobs must be a list of texts"):
        EvaluateSettings(**SMALL | {"knobs": "beta"})


def test_the_command_takes_a_list_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--out", str(tmp_path / "out"), "--method", "trades", "--knobs", "steps", "betta=1"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "'betta=1' is no knob of this method; did you mean 'beta'?" in capsys.readouterr().err
