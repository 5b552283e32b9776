"""Files that release 0.1 wrote, of one small network: they load, and what was begun with them goes on.

Written by that release's own commands on the bundled digits (64 training points, one thread); the two
interrupted runs end after one of two epochs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import controlat
from controlat import report
from controlat.app.checkpoints import load_checkpoint
from controlat.app.runs import claimed
from controlat.app.settings import DeriveSettings, EvaluateSettings, settings_from
from controlat.app.trainer import read_log
from controlat.records import Evaluation, Full, read_record

FILES = Path(__file__).parent / "release_0_1"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, beside the module that their settings name."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(folder: Path) -> dict[str, Any]:
    """What a run was begun with, as arguments of `controlat.train`."""
    stored = json.loads((folder / "settings.json").read_text())
    text = stored["schedule"]["text"]
    return {k: v for k, v in stored.items() if k != "command"} | {
        "schedule": text,
        "progress": False,
        "threads": 1,
    }


@pytest.mark.parametrize(("begun", "whole"), [("interrupted", "train"), ("interrupted_atta", "atta")])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(files: Path, begun: str, whole: str) -> None:
    found = controlat.train(files / begun, resume=True, **given(files / begun))
    assert len(found["epochs"]) == 2
    assert found["epochs"][1]["controls"] == [[0, found["epochs"][1]["control"]]], "from the first batch on"
    ours, theirs = (load_checkpoint(files / run / "last.pt") for run in (begun, whole))
    for name, t in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], t, rtol=1e-5, atol=1e-6)  # other machines round
    logs = [read_log(files / run) for run in (begun, whole)]
    for mine, before in zip(*logs, strict=True):
        for name in ("epoch", "control", "gradients", "total_gradients", "lr"):
            assert mine[name] == before[name], name


def test_a_finished_run_is_known_and_attacked(files: Path) -> None:
    assert controlat.train(files / "train", **given(files / "train"))["finished_before"]
    before = read_record(files / "attacked.json", Evaluation)
    found = controlat.attack(files / "train", progress=False)
    for name in ("clean", "robust"):
        correct = found[name]["correct"], found[name]["points"]
        assert correct == (before[name]["correct"], before[name]["points"])
        assert found[name]["interval"] == pytest.approx(before[name]["interval"], rel=1e-12)


def test_a_finished_run_is_evaluated(files: Path) -> None:
    chosen = EvaluateSettings(run=str(files / "train"))
    assert chosen.epochs == 2
    assert dict(chosen.schedule_of(chosen.schedules[0])(1.0)) == {"alpha": 0.15, "steps": 2}


def test_results_and_their_parts_are_read_and_shown(files: Path) -> None:
    result = report.read(files / "evaluated" / "result.json")
    assert "amata:tau=0.3,min=1,max=3" in report.summary(result)
    report.write(result, files / "again")
    assert (files / "again" / "criterion.png").stat().st_size > 1000
    (run,) = (files / "evaluated" / "runs").iterdir()
    assert read_record(run / "full.json", Full)
    assert read_record(run / "evaluation.json", Evaluation)


def test_schedules_are_loaded_and_trained_under(files: Path) -> None:
    schedule = controlat.load_schedule(files / "train" / "schedule.json")
    assert [dict(schedule(t)) for t in (0, 1)] == [{"alpha": 0.3, "steps": 1}, {"alpha": 0.15, "steps": 2}]
    derived = files / "derived" / "schedule.json"
    few: dict[str, Any] = {"epochs": 1, "train_points": 64, "progress": False, "model": "tiny:build"}
    found = controlat.train(files / "new", schedule=str(derived), **few)
    assert found["epochs"][0]["control"] == dict(controlat.load_schedule(derived)(0.0))


def test_a_derivation_goes_on_in_its_directory(files: Path) -> None:
    """The setting `transcription` is newer than the file; switched on, it is another setting."""
    plain, other = (
        {"command": "derive"} | settings_from(DeriveSettings, options, "derive").to_json()
        for options in ({}, {"transcription": True})
    )
    with claimed(files / "derived", plain) as known:
        assert known
    with pytest.raises(ValueError, match="transcription"), claimed(files / "derived", other):
        pass
