"""Held-out samples in two parts: one decides during training, Phi alone sees the other. And the J of both."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same

import controlat
from controlat._util.files import read_json, read_json_lines
from controlat.app.checkpoints import load_checkpoint
from controlat.app.experiment import TERMINAL_POINTS, Experiment
from controlat.app.settings import Problem
from controlat.data import Samples, Split, load

FEW: dict[str, Any] = {"train_points": 160, "held_out": 40, "epochs": 3, "lr": 0.2}
FEW |= {"batch_size": 50, "threads": 1, "progress": False}
CAT: dict[str, Any] = {"method": "cat", "schedule": "set:steps=4", "epochs": 8}
CAT |= {"method_options": {"patience": 1, "ready": 0.0}}
EVALUATED: dict[str, Any] = FEW | {"schedules": ["pgd:steps=2,alpha=0.1"], "seeds": [0], "test_points": 20}
EVALUATED |= {"attacks": ["fgsm"], "checks": 0, "probe": 40, "alphas": [0.1], "max_steps": 2, "looks": 1}


def rows(samples: Samples) -> list[bytes]:
    x, y = samples.take(torch.arange(len(samples)))
    return [r.numpy().tobytes() + bytes([int(label)]) for r, label in zip(x, y, strict=True)]


# ------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(("held_out", "phi"), [(40, 20), (41, 20), (2, 1), (600, TERMINAL_POINTS)])
def test_the_parts_are_disjoint_and_together_what_was_held_out(held_out: int, phi: int) -> None:
    e = Experiment.of(Problem(held_out=held_out))
    training, slice_ = load("digits").hold_out(held_out)  # as it was before there were two parts
    assert rows(e.training) == rows(training)
    assert rows(e.held_out) == rows(slice_)
    parts = rows(e.validation), rows(e.phi)
    assert [len(p) for p in parts] == [held_out - phi, phi]
    assert sorted(parts[0] + parts[1]) == sorted(rows(slice_))
    assert not set(parts[0]) & set(parts[1])
    assert e.sizes == {
        "train": 1297 - held_out,
        "held_out": held_out,
        "validation": held_out - phi,
        "phi": phi,
        "test": 500,
    }


def test_each_part_has_the_classes_in_proportion() -> None:
    e = Experiment.of(Problem(held_out=600))
    share = e.held_out.y.bincount() / 600
    for part in (e.validation, e.phi):
        assert (part.y.bincount() - share * len(part)).abs().max() < 1


def test_one_held_out_sample_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"held_out must be at least 2, .* got 1"):
        controlat.train(tmp_path / "out", **FEW | {"held_out": 1})
    assert not list(tmp_path.rglob("*.pt"))


# ------------------------------------------------------------------------------------------ who sees which


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Give one part other labels, whoever asks for it."""
    plain = Experiment._parts.func

    def parts(self: Experiment) -> tuple[Samples, Samples]:
        validation, phi = plain(self)
        changed = {"validation": validation, "phi": phi}
        part = changed[name]
        assert isinstance(part, Split)
        changed[name] = Split(part.x, (part.y + 1) % 10, part.scale)
        return changed["validation"], changed["phi"]

    spoiled = cached_property(parts)
    spoiled.__set_name__(Experiment, "_parts")
    monkeypatch.setattr(Experiment, "_parts", spoiled)


def trained(out: Path, **more: Any) -> dict[str, Any]:
    """Everything of a run but its times."""
    controlat.train(out, **FEW | more)
    lines = read_json_lines(out / "log.jsonl")
    left = {name: load_checkpoint(out / f"{name}.pt") for name in ("best", "last")}
    return {
        "log": [{k: v for k, v in line.items() if "seconds" not in k} for line in lines],
        **{name: {k: c[k] for k in ("model", "optimizer", "memory", "rows")} for name, c in left.items()},
        "best_epoch": left["last"]["tally"]["best_epoch"],
    }


@pytest.mark.parametrize("method", [{}, CAT], ids=["pgd_at", "cat"])
def test_nothing_that_decides_during_training_sees_phis_part(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path / "plain", **method)
    assert {line["validation_points"] for line in plain["log"]} == {20}
    with monkeypatch.context() as patch:
        spoil(patch, "phi")
        assert same(trained(tmp_path / "phi", **method), plain)
    spoil(monkeypatch, "validation")
    other = trained(tmp_path / "validation", **method)
    assert other["log"] != plain["log"], "the other part decides"
    assert same(other["last"]["model"], plain["last"]["model"]) == (not method)


def test_phi_does_not_see_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = controlat.objective("pgd:steps=2,alpha=0.1", **FEW)
    with monkeypatch.context() as patch:
        spoil(patch, "validation")
        other = controlat.objective("pgd:steps=2,alpha=0.1", **FEW)
        assert other | {"seconds": 0} == plain | {"seconds": 0}
    spoil(monkeypatch, "phi")
    assert controlat.objective("pgd:steps=2,alpha=0.1", **FEW)["phi"] > plain["phi"]


# ------------------------------------------------------------------------------------------------- one J


def test_evaluate_the_full_criterion_and_objective_report_one_j(tmp_path: Path) -> None:
    """To the last bit; steps of 120 samples in batches of 50, so that n of the last batch counts in full."""
    full = controlat.evaluate(tmp_path / "full", gamma=0.04, **EVALUATED)
    without = controlat.evaluate(tmp_path / "without", gamma=0.04, full=False, **EVALUATED)
    alone = controlat.objective("pgd:steps=2,alpha=0.1", **FEW)
    (run,), (other,) = (r["schedules"][0]["runs"] for r in (full, without))
    for found in (run["objective"], other["objective"]):
        assert found | {"seconds": 0, "terminal": alone["terminal"]} == alone | {"seconds": 0}
    j, phi = alone["J"], alone["phi"]
    assert run["full"]["calibration"]["objective"] == j == phi + alone["price"] * alone["evaluations"]
    assert (run["full"]["phi"], run["full"]["evaluations"]) == (phi, alone["evaluations"])
    assert alone["evaluations"] == 3 * 3 * 3 == run["epochs"][-1]["total_evaluations"]
    assert alone["gradients"] == {"training": run["gradients"], "Phi": 20 * 20}
    assert full["terminal"] == alone["terminal"]
    assert "on 20 held-out points" in alone["terminal"]
    for result in (full, without):
        assert result["schedules"][0]["summary"]["objective"]["mean"] == j
    for name in ("full", "without"):
        text = (tmp_path / name / "summary.md").read_text()
        heads, _, row = ([c.strip() for c in line.split("|")] for line in text.splitlines()[2:5])
        assert (heads[2], row[2]) == ("J", f"{j:.3g}")
        assert "40 held-out (20 for validation, 20 for Phi)" in text


def test_objective_takes_texts_files_and_schedules_alike(tmp_path: Path) -> None:
    text = "amata:min=0,max=2,tau=0.2"
    schedule = controlat.parse_schedule(text, 3)
    schedule.save(tmp_path / "mine.json")
    given = (text, tmp_path / "mine.json", schedule)
    values = [controlat.objective(s, seed=4, gamma=0.01, terminal="clean", **FEW)["J"] for s in given]
    assert values == values[:1] * 3
    assert controlat.objective(text, seed=5, gamma=0.01, terminal="clean", **FEW)["J"] != values[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": 3}, "schedule must be a short text, JSON file or controller: .*, got 3"),
        ({"seed": -1}, "seed must be a whole number >= 0"),
        ({"gamma": -1}, "gamma must be >= 0"),
        ({"epoch": 3}, "objective has no setting epoch; did you mean 'epochs'\\?"),
        ({"terminal": "advers"}, "unknown terminal cost 'advers'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controlat.objective(**{"schedule": "none"} | FEW | given)


# ------------------------------------------------------------------------------------- runs of before

RELEASE = Path(__file__).parents[1] / "records" / "release_0_1"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of release 0.1, which validated on all held-out samples and took Phi on some of them."""
    shutil.copytree(RELEASE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "settings.json").read_text())
    del stored["command"]
    for name in ("schedule", "schedules"):
        if name in stored:
            texts = stored[name] if name == "schedules" else [stored[name]]
            texts = [schedule["text"] for schedule in texts]
            stored[name] = texts if name == "schedules" else texts[0]
    return stored | {"progress": False, "threads": 1}


def test_an_unfinished_training_of_before_goes_on_with_all_of_them(before: Path) -> None:
    controlat.train("interrupted", resume=True, **given(before / "interrupted"))
    line = read_json_lines(before / "interrupted" / "log.jsonl")[-1]
    held_out = Experiment.of(Problem(**{"train_points": 64, "model": "tiny:build"})).held_out
    assert line["validation_points"] == len(held_out)
    assert line["total_evaluations"] is None, "nobody counted the first epoch"
    assert "held_out_parts" not in read_json(before / "interrupted" / "settings.json")


def test_an_unfinished_evaluation_of_before_goes_on_with_the_phi_that_it_had(before: Path) -> None:
    (before / "evaluated" / "result.json").unlink()
    found = controlat.evaluate("evaluated", **given(before / "evaluated"))
    assert found["sizes"].keys() == {"train", "held_out", "test"}
    for schedule in found["schedules"]:
        for run in schedule["runs"]:
            full = read_json(before / "evaluated" / "runs" / run["directory"] / "full.json")
            assert run["objective"]["J"] == pytest.approx(full["calibration"]["objective"], rel=1e-4)
