"""Files that runs leave: damage is noticed and named, lost lines come back, other data are told."""

import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mlp, spec, split
from mutations import EVALUATE, TARGETS, TRAIN, Attempts
from torch import Tensor

import controlat
from controlat._util.files import read_json, read_json_lines, write_json
from controlat.app import checkpoints
from controlat.app import settings as config
from controlat.app.checkpoints import load_checkpoint
from controlat.app.trainer import fit
from controlat.attacks.balls import Ball
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.records import (
    CriterionLine,
    LogLine,
    Result,
    checked,
    read_epochs,
    read_record,
)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    return Attempts(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def runs(attempts: Attempts, tmp_path: Path) -> Path:
    """A copy of one run of each kind."""
    shutil.copytree(attempts.made, tmp_path / "runs")
    return tmp_path / "runs"


# ----------------------------------------------------------------------------- the checksum of a checkpoint


def _old(state: dict[str, Any]) -> bytes:
    """A checkpoint as it was before it had a checksum."""
    buffer = io.BytesIO()
    torch.save({k: v for k, v in state.items() if k not in ("log", "data")}, buffer)
    return buffer.getvalue()


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a.pt", {"model": {"w": torch.ones(2)}})
    sound, accepted = (tmp_path / "a.pt").read_bytes(), []
    with pytest.raises(ValueError, match="optimizer is missing"):  # the checksum is right
        load_checkpoint("a.pt", content=sound)
    for bit in range(8 * len(sound)):  # all of them: headers, padding and the checksum itself too
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        try:
            load_checkpoint("a.pt", content=bytes(content))
        except ValueError as error:
            if "damaged" not in str(error):
                accepted.append(bit)
    assert accepted == []


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_flipped_bit_is_told_wherever_a_checkpoint_is_read(runs: Path, name: str) -> None:
    path, draw = runs / "train" / name, random.Random(0)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged or not a checkpoint .its checksum is wrong"):
        controlat.attack(path, attacks=["fgsm"], points=20, checks=0)
    if name == "last.pt":
        with pytest.raises(ValueError, match="its checksum is wrong"):
            controlat.train(runs / "train", resume=True, **TRAIN)


def test_torch_reads_a_checkpoint_with_a_checksum(runs: Path) -> None:
    path = runs / "train" / "last.pt"
    ours, theirs = load_checkpoint(path), torch.load(path, weights_only=True)
    assert path.read_bytes()[-81:-64] == b"controlat sha256 "
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs["model"][name]) for name, t in ours["model"].items())


def test_checkpoints_of_before_are_read_and_damage_to_their_tensors_noticed(runs: Path) -> None:
    path = runs / "train" / "last.pt"
    state, before = load_checkpoint(path), controlat.train(runs / "train", **TRAIN)["epochs"]
    old = _old(state)
    path.write_bytes(old)
    assert torch.equal(load_checkpoint(path)["model"]["1.weight"], state["model"]["1.weight"])
    assert controlat.train(runs / "train", **TRAIN)["epochs"] == before
    weights = state["model"]["1.weight"].numpy().tobytes()
    place = old.index(weights) + len(weights) // 2
    path.write_bytes(old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :])
    with pytest.raises(ValueError, match=r"last\.pt is damaged .*checksum of its record archive/data/"):
        load_checkpoint(path)


def _wrong(state: dict[str, Any], field: str, value: Any) -> None:
    *names, last = field.split("/")
    inner: Any = state
    for name in names:
        inner = inner[int(name) if isinstance(inner, list) or name.isdecimal() else name]
    inner[last if not last.isdecimal() else int(last)] = value


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("tally/gradients", "many", r"tally\.gradients should be a whole number, got 'many'"),
        ("tally/epoch", 7, r"tally is at epoch 7, batch 0, which this run does not have"),
        ("tally/more", 1, r"tally\.more"),
        ("model/1.weight", torch.full((64, 64), torch.nan), r"1\.weight has values that are not finite"),
        ("model/1.weight", torch.zeros(3), r"weight is float32 \(3,\) there, float32 \(64, 64\) here"),
        ("model/1.bias", torch.zeros(64).double(), r"1\.bias is float64 \(64,\) there, float32 \(64,\) here"),
        ("model/more", torch.zeros(3), r"more is float32 \(3,\) there, missing here"),
        ("optimizer/state/0/momentum_buffer", torch.zeros(2), r"does not fit parameter 0: momentum_buffer"),
        ("optimizer/param_groups/0/momentum", 0.5, r"optimizer momentum is 0\.5 there, 0\.9 here"),
        ("memory", [], r"memory should be an object, got \[\]"),
        (
            "schedule/epochs",
            torch.ones(9, 9),
            r"schedule: epochs and resolution: expected plain numbers, got",
        ),
        ("schedule/epochs", "two", r"schedule: epochs and resolution: expected plain numbers, got 'two'"),
        ("environment/processes", 0, r"environment\.processes should be greater than or equal to 1, got 0"),
        ("log", [], r"log should have the epochs before 2, each once"),
        ("log/0/loss", None, r"log\.0\.loss should be a number, got None"),
    ],
)
def test_a_wrong_value_in_a_checkpoint_is_named(runs: Path, field: str, value: Any, told: str) -> None:
    path = runs / "train" / "last.pt"
    state = load_checkpoint(path)
    _wrong(state, field, value)
    checkpoints.save(path, state)
    with pytest.raises(ValueError, match=rf"last\.pt.*{told}") as e:
        controlat.train(runs / "train", resume=True, **TRAIN)
    assert "\n" not in str(e.value)


# -------------------------------------------------------------------------------------------- lost lines


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("gone", [False, True])
def test_lines_of_the_log_that_were_lost_come_back_from_the_checkpoint(
    runs: Path, lost: tuple[int, ...], gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    log = runs / "train" / "log.jsonl"
    sound = log.read_bytes()
    log.write_bytes(b"".join(line for i, line in enumerate(sound.splitlines(True)) if i not in lost))
    if gone:
        log.unlink()
    told = r"has \d of 2 epochs; finish it with --resume \(epoch \d is not in log\.jsonl\)"
    with pytest.raises(ValueError, match=told):
        config.EvaluateSettings(run=str(runs / "train"))
    with pytest.raises(ValueError, match="go on with --resume"):
        controlat.train(runs / "train", **TRAIN)
    found = controlat.train(runs / "train", resume=True, **TRAIN)
    assert log.read_bytes() == sound
    assert found["epochs"] == [*map(json.loads, sound.splitlines())]
    assert "written again from last.pt" in capsys.readouterr().err
    config.EvaluateSettings(run=str(runs / "train"))


def test_a_log_that_says_other_than_the_checkpoint_is_refused(runs: Path) -> None:
    log = runs / "train" / "log.jsonl"
    log.write_text(log.read_text().replace('"gradients": 1', '"gradients": 2', 1))
    with pytest.raises(ValueError, match=r"log\.jsonl: epoch 0 is not as last\.pt has it; delete the file"):
        controlat.train(runs / "train", resume=True, **TRAIN)
    log.unlink()
    assert len(controlat.train(runs / "train", resume=True, **TRAIN)["epochs"]) == 2


def test_a_lost_line_that_no_copy_has_is_named(runs: Path) -> None:
    path, log = runs / "train" / "last.pt", runs / "train" / "log.jsonl"
    path.write_bytes(_old(load_checkpoint(path)))
    log.write_bytes(log.read_bytes().splitlines(True)[1])
    with pytest.raises(ValueError, match=r"log\.jsonl lacks epoch 0; last\.pt has no copy"):
        controlat.train(runs / "train", resume=True, **TRAIN)


def test_epochs_whose_surface_was_lost_are_scored_again(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = read_json(runs / "eval" / "result.json")
    (runs / "eval" / "result.json").unlink()
    one, two = sorted((runs / "eval" / "runs").iterdir())
    surfaces = [read_json_lines(run / "criterion.jsonl") for run in (one, two)]
    (one / "criterion.jsonl").write_text("")
    (two / "criterion.jsonl").write_text(json.dumps(surfaces[1][1]) + "\n")
    found = controlat.evaluate(runs / "eval", **EVALUATE)
    told = capsys.readouterr().err
    assert "lacked epoch 0, 1; trained again" in told
    assert "lacked epoch 0; trained again" in told
    assert "did not end with the same bits" not in told
    for a, b in zip(found["schedules"], sound["schedules"], strict=True):
        assert a["summary"]["criterion"] == b["summary"]["criterion"]
    for run, before in zip((one, two), surfaces, strict=True):
        again = read_json_lines(run / "criterion.jsonl")
        assert [line["epoch"] for line in again] == [0, 1]
        assert [line["surface"] for line in again] == [line["surface"] for line in before]


@pytest.mark.parametrize("order", [(0, 0, 1), (1, 0), (0, 1, 1)])
def test_epochs_that_come_twice_or_out_of_order_are_named(runs: Path, order: tuple[int, ...]) -> None:
    path = runs / "train" / "log.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(ValueError, match=r"log\.jsonl, line \d: epoch \d comes after epoch \d"):
        read_epochs(path, LogLine)


def test_a_line_is_on_the_disk_before_the_checkpoint_that_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, sync, rename = [], os.fsync, os.replace

    def fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        events.append(f"{name} on the disk" if "last.pt" not in name else "checkpoint on the disk")
        sync(handle)

    def replace(old: str, new: Path) -> None:
        events.append(f"{new.name} renamed")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    controlat.train(tmp_path / "run", **TRAIN | {"epochs": 1})
    wanted = ["log.jsonl on the disk", "checkpoint on the disk", "last.pt renamed", "run on the disk"]
    places = [max(i for i, event in enumerate(events) if event == what) for what in wanted]
    assert places == sorted(places)


# ----------------------------------------------------------------------------------------------- other data


@dataclass(frozen=True)
class Pictures:
    """Samples that are decoded as needed: what tells them from others may be no more than times of files."""

    inner: Any
    mark: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def fingerprint(self) -> str:
        return self.mark


def _driver() -> Driver:
    return Driver(mlp(), build("pgd_at", {}), Ball(0.1), SGDSettings(0.9), 0)


def _interrupted(out: Path, made: RunSpec, held_out: Any) -> None:
    def stop(epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(_driver(), made, out, held_out=held_out, at_epoch=stop, progress=False)


def test_data_that_changed_between_kill_and_resume_are_refused(tmp_path: Path) -> None:
    data, held_out = split(12), split(6, seed=1)
    _interrupted(tmp_path, spec(data), held_out)
    x: Tensor = data.x.clone()
    x[3, 0, 1, 1] += 2**-40 if x[3, 0, 1, 1] < 0.5 else -(2**-40)
    for changed in (replace(data, x=x), replace(data, y=data.y.flip(0)), data.subset(torch.arange(11))):
        with pytest.raises(ValueError, match=r"training samples are not those that .*last\.pt was made with"):
            fit(_driver(), spec(changed), tmp_path, held_out=held_out, progress=False)
    with pytest.raises(ValueError, match="held-out samples are not those"):
        fit(_driver(), spec(data), tmp_path, held_out=split(6, seed=2), progress=False)
    assert fit(_driver(), spec(data), tmp_path, held_out=held_out, progress=False).epoch == 2


def test_pictures_that_may_have_been_copied_are_told_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, held_out = split(12), split(6, seed=1)
    _interrupted(tmp_path, spec(Pictures(data, "old times")), held_out)
    assert fit(_driver(), spec(Pictures(data, "new")), tmp_path, held_out=held_out, progress=False).epoch == 2
    assert "training samples are not those that" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ wrong shapes


@pytest.mark.parametrize(
    ("file", "field", "value", "told"),
    [
        ("train/settings.json", "eps", [], r"settings\.json: eps should be a text or a number, got \[\]"),
        ("train/settings.json", "eps", -1, r"settings\.json: eps must be >= 0, got -1"),
        ("train/settings.json", "epochs", "2", r"settings\.json: epochs should be a whole number, got '2'"),
        ("train/settings.json", "batch_size", 10**29, r"settings\.json: batch_size should be less than"),
        ("train/settings.json", "seed", True, r"settings\.json: seed should be a whole number, got True"),
    ],
)
def test_a_wrong_field_of_the_settings_is_named(
    runs: Path, file: str, field: str, value: Any, told: str
) -> None:
    write_json(runs / file, read_json(runs / file) | {field: value})
    with pytest.raises(ValueError, match=told):
        config.EvaluateSettings(run=str(runs / "train"))


def test_fields_and_shapes_that_do_not_fit_are_named(runs: Path) -> None:
    run = sorted((runs / "eval" / "runs").iterdir())[0]
    line = read_json_lines(run / "criterion.jsonl")[0]
    surface = line["surface"]
    for change, told in (
        ({"gram": surface["gram"][1:]}, r"surface: \d+ controls, but gram has \d+ rows"),
        (
            {"gram": [row[:1] for row in surface["gram"]]},
            "surface: 4 batches: every row of gram has 10",
        ),
        ({"scale": float("nan")}, "surface.scale should be a finite number, got nan"),
        ({"controls": [{"steps": "1"}]}, "surface.controls.0.steps should be a number, got '1'"),
    ):
        with pytest.raises(ValueError, match=told):
            checked(line | {"surface": surface | change}, CriterionLine, "criterion.jsonl, line 1")
    result = read_json(runs / "eval" / "result.json")
    run_ = result["schedules"][0]["runs"][0]
    run_["evaluation"]["robust"]["value"] += 0.05
    write_json(runs / "eval" / "result.json", result)
    with pytest.raises(
        ValueError, match=r"result\.json: schedules\.0\.runs\.0\.evaluation\.robust: value is"
    ):
        read_record(runs / "eval" / "result.json", Result)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "[" * 100_000, "1" * 5000, '{"epoch": 1e999}'])
@pytest.mark.parametrize("file", ["train/settings.json", "train/log.jsonl", "eval/result.json"])
def test_json_of_another_shape_is_refused_in_one_sentence(runs: Path, file: str, text: str) -> None:
    (runs / file).write_text(text + "\n")
    target = next(t for t in TARGETS if t.file == file)
    with pytest.raises(
        ValueError, match=rf"{re.escape(file.partition('/')[2])}.*(should be|not valid JSON)"
    ) as e:
        target.read(runs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("i", range(3 * len(TARGETS)))
def test_a_damaged_file_never_ends_in_a_traceback(attempts: Attempts, i: int) -> None:
    outcome, told = attempts(TARGETS[i % len(TARGETS)], random.Random(i))
    assert outcome in ("refused", "same", "other"), told


# ----------------------------------------------------------------------------------------- no regular files


@pytest.fixture(params=["pipe", "/dev/zero", "huge"])
def odd(request: pytest.FixtureRequest) -> Iterator[Any]:
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        else:
            path.symlink_to(request.param)

    return put


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.file}-{t.read.__name__}")
def test_pipes_devices_and_huge_files_are_refused_at_once(runs: Path, odd: Any, target: Any) -> None:
    for name in target.without:
        (runs / name).unlink()
    odd(runs / target.file)
    with pytest.raises(ValueError, match=r"is a named pipe|is a device|but at most \S+ are read"):
        target.read(runs)


def test_a_lock_that_is_a_pipe_does_not_hang(runs: Path) -> None:
    (runs / "train" / ".lock").unlink()
    os.mkfifo(runs / "train" / ".lock")
    assert controlat.train(runs / "train", **TRAIN)["finished_before"]
