"""CPU threads of jobs: chosen where none are given, recorded, and kept where a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import controlat
from controlat.app import placement, settings_file
from controlat.app.runs import environment
from controlat.app.session import begun_threads
from controlat.app.settings import EvaluateSettings, TrainSettings
from controlat.app.tally import Tally
from controlat.app.trainer import load_checkpoint, read_log

FEW: dict[str, Any] = {"epochs": 2, "train_points": 80, "test_points": 20, "progress": False}
SCHEDULE = "pgd:steps=1,alpha=0.1"
EVALUATED = FEW | {"attacks": ["fgsm"], "checks": 0, "full": False}


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(placement.os, "cpu_count", lambda: 2)


def made_with(run: Path) -> tuple[int, str]:
    there = load_checkpoint(run / "last.pt")["environment"]
    return there["threads"], there["threads_chosen"]


def interrupted(run: Path, threads: int | None) -> None:
    """A run that is stopped at the end of its second epoch, which is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("controlat.app.trainer.Tally.next_epoch", _stopping())
        with pytest.raises(KeyboardInterrupt):
            controlat.train(run, schedule=SCHEDULE, threads=threads, **FEW)
    assert len(read_log(run)) == 1


def _stopping() -> Any:
    """`Tally.next_epoch`, but that it stops the process as the second epoch ends."""
    of = Tally.next_epoch

    def next_epoch(tally: Tally, robust: float | None) -> bool:
        if tally.epoch == 1:
            raise KeyboardInterrupt
        return of(tally, robust)

    return next_epoch


def test_a_small_network_gets_one_thread_and_the_record_says_why(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        controlat.train(tmp_path / "run", schedule=SCHEDULE, **FEW)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert made_with(tmp_path / "run") == (1, "a small network: 1.1e+06 operations per batch")


def test_a_resumed_run_keeps_its_threads_and_another_number_is_not_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "kept", threads=2)
    controlat.train(tmp_path / "kept", schedule=SCHEDULE, resume=True, **FEW)
    assert made_with(tmp_path / "kept") == (2, "as the run was begun")
    assert "other bits" not in capsys.readouterr().err
    interrupted(tmp_path / "changed", threads=2)
    controlat.train(tmp_path / "changed", schedule=SCHEDULE, resume=True, threads=1, **FEW)
    assert made_with(tmp_path / "changed") == (1, "given")
    told = "this run was begun with 2 threads; with 1 it ends with other bits"
    assert told in capsys.readouterr().err


def test_an_evaluation_goes_on_with_the_threads_of_the_runs_it_has(tmp_path: Path) -> None:
    controlat.train(tmp_path / "run", schedule=SCHEDULE, threads=2, **FEW)
    result = controlat.evaluate(tmp_path / "again", run=str(tmp_path / "run"), **EVALUATED)
    assert result["environment"]["threads"] == 2
    assert result["reproduced"] is True
    assert begun_threads(tmp_path / "nothing", tmp_path / "again") == 2
    (tmp_path / "again" / "result.json").unlink()
    again = controlat.evaluate(tmp_path / "again", run=str(tmp_path / "run"), **EVALUATED)
    assert (again["environment"]["threads"], again["environment"]["threads_chosen"]) == (
        2,
        "as the run was begun",
    )


@pytest.mark.slow
def test_workers_run_with_the_threads_and_the_precision_of_the_problem(tmp_path: Path) -> None:
    schedules = ["none", SCHEDULE]
    result = controlat.evaluate(
        tmp_path, schedules=schedules, seeds=[0], jobs=2, threads=2, tf32="on", **EVALUATED
    )
    for run in (tmp_path / "runs").iterdir():
        assert made_with(run) == (2, "given")
        there = load_checkpoint(run / "last.pt")["environment"]
        assert there["tf32"] == result["environment"]["tf32"] == {"convolutions": True, "matmul": True}
    assert result["environment"]["jobs"] == 2


# ----------------------------------------------------------------------------------------- precision of a job


def test_the_record_of_a_run_says_what_was_on(tmp_path: Path) -> None:
    controlat.train(tmp_path / "run", schedule=SCHEDULE, tf32="on", **FEW | {"epochs": 1})
    there = load_checkpoint(tmp_path / "run" / "last.pt")["environment"]
    assert there["tf32"] == {"convolutions": True, "matmul": True}
    assert there["cudnn"] == {"enabled": torch.backends.cudnn.enabled, "deterministic": True}
    attacked = controlat.attack(tmp_path / "run", attacks=["fgsm"], checks=0, progress=False)
    assert attacked["environment"]["tf32"] == {"convolutions": False, "matmul": False}
    assert attacked["environment"]["threads_chosen"].startswith("a small network")
    assert environment()["tf32"] == {"convolutions": True, "matmul": False}, "torch's own, outside"


def test_tf32_is_one_of_three_words_and_decides_results_only_where_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tf32 must be one of auto, on, off, got 'yes'"):
        TrainSettings(tf32="yes")
    assert "tf32" not in TrainSettings().to_json(), "runs of before go on"
    assert TrainSettings(tf32="off").to_json()["tf32"] == "off"
    assert settings_file.parse_yaml("tf32: on") == {"tf32": "on"}
    controlat.train(tmp_path / "run", schedule=SCHEDULE, tf32="off", **FEW | {"epochs": 1})
    with pytest.raises(ValueError, match="made with other settings"):
        controlat.train(tmp_path / "run", schedule=SCHEDULE, **FEW | {"epochs": 1})
    assert EvaluateSettings(run=str(tmp_path / "run")).tf32 == "off"
    with pytest.raises(ValueError, match="tf32 on contradicts"):
        EvaluateSettings(run=str(tmp_path / "run"), tf32="on")
