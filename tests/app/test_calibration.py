"""The inner problem of a run over its epochs: exact where its answer is known, and no trace in training."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import controlat
from controlat._util.files import read_json, write_json
from controlat.app import calibration
from controlat.app.calibration import calibration as calibrated

KEPT = "calibration.json"
FEW: dict[str, Any] = {"train_points": 200, "test_points": 40, "threads": 1, "progress": False}
MEASURES = {"convergence", "curvature", "secant", "slope", "after_one"}

OWN = """
from controlat.methods.pgd_at import PgdAT
from torch import nn

class Enough(PgdAT):
    def end_epoch(self, epoch, u):
        if epoch.epoch == 1:
            epoch.stop("enough")

def noisy(in_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    controlat.train(folder, epochs=3, schedule="amata:min=1,max=4,tau=0.3", seed=2, **FEW)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's."""
    (tmp_path / "calibrated_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def _measured(run: Path, **options: Any) -> dict[str, Any]:
    """Measured anew: what an earlier call left is deleted."""
    (run / KEPT).unlink(missing_ok=True)
    return calibrated(run, **({"probe": 64, "progress": False} | options))


# ------------------------------------------------------------------------------------------ known answers


# --------------------------------------------------------------------------------------------- of a run


def test_a_run_is_measured_at_every_epoch_and_ends_with_its_own_bits(run: Path) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != KEPT}
    found = _measured(run)
    assert found["same"] is True
    assert found["warning"] is None
    assert found["times"] == [0, 1, 2, 3]
    assert found["epochs"] == 3
    assert set(found["measures"]) == MEASURES
    for m in found["measures"].values():
        assert len(m["values"]) == len(m["marks"]) == 4
        assert all(math.isfinite(v) for v in m["values"])
    assert [len(row) for row in found["losses"]] == [21] * 4
    assert all(v > 0 for v in found["measures"]["convergence"]["values"])
    assert all(v >= 1 / 0.15 for v in found["measures"]["curvature"]["values"])
    assert (found["seed"], found["probe"], found["mode"], found["steps"]) == (2, 64, "eval", 20)
    assert (found["eps"], found["alpha"], found["budget"]) == pytest.approx((0.15, 0.015, 0.3))
    assert found["schedule"] == "amata:min=1,max=4,tau=0.3"
    trained = [json.loads(line)["gradients"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert found["training_gradients"] == sum(trained)
    assert found["gradients"] >= 4 * 64 * 21
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert read_json(run / KEPT) == found
    after = {p.name: p.read_bytes() for p in run.iterdir() if p.name != KEPT}
    assert after == before, "nothing else is written"


def test_the_same_numbers_twice_and_the_last_is_that_of_the_trained_network(run: Path) -> None:
    first, second = _measured(run), _measured(run)
    for found in (first, second):
        del found["seconds"], found["training_seconds"]
    assert first == second
    other = _measured(run, probe=63)
    assert other["probe"] == 63
    assert other["losses"] != first["losses"]


def test_losses_at_the_start_are_those_of_the_untrained_network(run: Path) -> None:
    found = _measured(run, probe=10_000, steps=10)
    assert found["probe"] == 180, "all there are"
    assert found["losses"][0][0] == pytest.approx(math.log(10), rel=0.1)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert found["losses"][3][0] < log[2]["loss"] * 1.2
    assert [len(row) for row in found["losses"]] == [11] * 4


@pytest.mark.usefixtures("own")
def test_batch_norm_and_dropout_behave_as_in_the_attacks_of_the_method(tmp_path: Path) -> None:
    """Measuring in training mode moves neither running statistics nor random numbers."""
    options = {"model": "calibrated_own:noisy", "schedule": "pgd:steps=2,alpha=0.1", "epochs": 2}
    controlat.train(tmp_path / "run", method_options={"attack_mode": "train"}, **options, **FEW)
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is True
    assert found["mode"] == "train"


@pytest.mark.usefixtures("own")
def test_a_run_that_its_method_ended_is_measured_up_to_there(tmp_path: Path) -> None:
    options = {"method": "calibrated_own:Enough", "schedule": "fgsm:alpha=0.15", "epochs": 5}
    controlat.train(tmp_path / "run", **options, **FEW)
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is True
    assert found["times"] == [0, 1, 2]
    assert found["epochs"] == 2


def test_a_measurement_is_kept_under_everything_that_decides_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "run", list[Any]()
    shutil.copytree(run, folder)
    options: dict[str, Any] = {"probe": 64, "steps": 10, "threads": 1, "progress": False}
    (folder / KEPT).unlink(missing_ok=True)
    whole = calibrated(folder, **options)
    (folder / KEPT).unlink()

    def counted(*given: Any) -> dict[str, Any]:
        made.append(given)
        return whole | {"number": len(made)}

    monkeypatch.setattr(calibration, "_measured", counted)

    def number() -> int:
        return int(calibrated(folder, **options)["number"])

    assert [number(), number()] == [1, 1]
    for other in ({"probe": 63}, {"steps": 11}, {"threads": 2}):
        assert [calibrated(folder, **options | other)["number"], number()] == [len(made) - 1, len(made)]
    for name, value in (("_VERSION", 0), ("BUDGET", 3.0), ("SHARE", 0.9)):
        with monkeypatch.context() as there:
            there.setattr(calibration, name, value)
            assert number() == len(made)
        assert number() == len(made)
    before = len(made)
    settings = read_json(folder / "settings.json")
    write_json(folder / "settings.json", settings | {"train_points": settings["train_points"] - 1})
    assert number() == len(made) == before + 1  # other data
    stored = torch.load(folder / "last.pt", weights_only=True)
    next(iter(stored["model"].values()))[0, 0] += 1e-6
    torch.save(stored, folder / "last.pt")
    assert number() == len(made) == before + 2  # another network
    (folder / "calibration.json").write_text("[1, 2")
    assert [number(), number()] == [before + 3, before + 3]  # a damaged one is made again


def test_other_bits_are_told_with_what_differs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    next(iter(stored["model"].values()))[0, 0] += 1e-6
    torch.save(stored, tmp_path / "run" / "last.pt")
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is False
    assert "the environments agree" in found["warning"]
    stored["environment"] |= {"torch": "1.0", "threads": 10_000}
    torch.save(stored, tmp_path / "run" / "last.pt")
    found = _measured(tmp_path / "run", steps=10, threads=1)
    assert "torch 1.0 there" in found["warning"]
    assert "threads 10000 there, 1 here" in found["warning"]


def test_what_is_no_finished_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the directory of a controlat train: it has no settings"):
        calibrated(tmp_path)
    write_json(tmp_path / "evaluated" / "settings.json", {"command": "evaluate"})
    with pytest.raises(ValueError, match="is not the directory of a controlat train"):
        calibrated(tmp_path / "evaluated")
    for name in ("cut", "behind", "none", "elsewhere"):
        shutil.copytree(run, tmp_path / name)
    lines = (run / "log.jsonl").read_text().splitlines(True)
    (tmp_path / "cut" / "log.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="has 2 of 3 epochs; finish it with --resume"):
        calibrated(tmp_path / "cut")
    stored = torch.load(run / "last.pt", weights_only=True)
    stored["tally"]["epoch"] = 2
    torch.save(stored, tmp_path / "behind" / "last.pt")
    with pytest.raises(ValueError, match="has a checkpoint of 2 of 3 epochs; finish it with --resume"):
        calibrated(tmp_path / "behind")
    (tmp_path / "none" / "last.pt").unlink()
    with pytest.raises(ValueError, match="no such checkpoint"):
        calibrated(tmp_path / "none")
    settings = read_json(run / "settings.json") | {"data": "mnist"}
    write_json(tmp_path / "elsewhere" / "settings.json", settings)
    with pytest.raises(ValueError, match="mnist"):
        calibrated(tmp_path / "elsewhere", data_dir=str(tmp_path / "empty"))


@pytest.mark.parametrize(("name", "value"), [("probe", 1), ("steps", 9), ("threads", 0), ("device", "tpu9")])
def test_numbers_out_of_range_are_refused_before_anything_is_trained(
    run: Path, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        calibrated(run, **{name: value})
