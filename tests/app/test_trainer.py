"""The trainer: killed at any moment and resumed it ends with the same bits; what it logs adds up."""

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Ended, talking
from helpers import same, split
from systems import CASES, constant, driver
from torch import nn

import controlat
from controlat import NonFiniteError, robustness
from controlat._util.files import read_json_lines
from controlat.app import cli
from controlat.app.experiment import Experiment
from controlat.app.placement import place
from controlat.app.settings import TrainSettings
from controlat.app.trainer import fit, load_checkpoint
from controlat.dynamics.recording import Recorder, Recording

# 120 training samples in 4 batches of 32, 32, 32, 24; of 40 held out, 20 are validated on; K = 0, 1, 2.
SMALL: dict[str, Any] = {
    "schedule": "amata:min=0,max=3,tau=0.15",
    "epochs": 3,
    "train_points": 160,
    "held_out": 40,
    "batch_size": 32,
    "threads": 1,
    "progress": False,
}
SECONDS = ("seconds", "total_seconds", "validation_seconds")

# A network that kills its own process at the n-th forward pass of a kind, as the variable KILL says:
# "train 3", "validate 1"; or "write 3": the first large file written after the third training pass kills it;
# or "full 3": from there on the disk is full for large files.
KILLABLE = """
import os, resource, signal
from torch import nn
from controlat.models import build

class Killable(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, {"train": 0, "validate": 0, "attack": 0}

    def forward(self, x):
        kind = "train" if self.training else "validate" if len(x) == 20 else "attack"
        self.seen[kind] += 1
        wanted = os.environ.get("KILL")
        if wanted == f"{kind} {self.seen[kind]}":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "train" and wanted in (f"write {self.seen[kind]}", f"full {self.seen[kind]}"):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            if wanted.startswith("write"):  # the kernel kills where the file grows too long
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        return self.net(x)

def mlp(in_shape, num_classes):
    return Killable(build("mlp", in_shape, num_classes))

def cnn_bn(in_shape, num_classes):
    return Killable(build("cnn_bn", in_shape, num_classes))
"""


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _killed(folder: Path, kill: str, settings: dict[str, Any]) -> Ended:
    """How the command ends where KILL is set."""
    words = ["train", "--out", "killed", "--resume", *_flags(settings)]
    return talking(cli.main, words, cwd=folder, KILL=kill)()


def _without_seconds(log: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in SECONDS} for line in read_json_lines(log)]


def _equal(a: object, b: object) -> bool:
    """Bitwise equality of nested dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _assert_same_end(a: Path, b: Path) -> None:
    assert _without_seconds(a / "log.jsonl") == _without_seconds(b / "log.jsonl")
    for name in ("last.pt", "best.pt"):
        one, other = load_checkpoint(a / name), load_checkpoint(b / name)
        for part in ("model", "optimizer", "memory", "schedule", "settings"):
            assert _equal(one[part], other[part]), (name, part)
        for found in (one, other):
            del found["tally"]["seconds"], found["tally"]["epoch_seconds"]
        assert one["tally"] == other["tally"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small problem."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    controlat.train(out, **SMALL | {"lr": 0.2})
    return out


# ------------------------------------------------------------------------------------ killed and resumed


def _kill_and_resume(folder: Path, model: str, kills: list[tuple[str, float]]) -> None:
    (folder / "killable.py").write_text(KILLABLE)
    settings = SMALL | {"model": f"killable:{model}"}
    controlat.train("undisturbed", **settings)
    for kill, minutes in kills:
        code = _killed(folder, kill, settings | {"checkpoint_minutes": minutes}).code
        assert code == -(signal.SIGXFSZ if kill.startswith("write") else signal.SIGKILL), kill
    controlat.train("killed", resume=True, **settings)
    _assert_same_end(folder / "undisturbed", folder / "killed")


def test_mlp_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kills = [
        ("train 1", 1e-9),  # before any checkpoint
        ("train 3", 1e-9),  # right after a checkpoint within epoch 0
        ("write 1", 1e-9),  # in the middle of writing the next one
        ("validate 1", 1e-9),  # in the validation of epoch 0
        ("write 1", 1e-9),  # while best.pt is written, when the log has its line already
        ("train 4", 10.0),  # in epoch 1, with checkpoints at ends of epochs only
    ]
    _kill_and_resume(tmp_path, "mlp", kills)


def test_cnn_with_batch_norm_and_dropout_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _kill_and_resume(tmp_path, "cnn_bn", [("train 3", 1e-9), ("write 2", 1e-9), ("validate 2", 10.0)])


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "killable.py").write_text(KILLABLE)
    done = _killed(tmp_path, "full 6", SMALL | {"model": "killable:mlp"})  # in epoch 1
    assert done.code == 2
    assert done.error.count("\n") == 1
    assert "File too large" in done.error
    assert load_checkpoint(tmp_path / "killed" / "last.pt")["tally"]["epoch"] == 1
    assert not list((tmp_path / "killed").glob(".*.tmp"))


# -------------------------------------------------------------------------------------- damaged run files


def _copy_of(run: Path, to: Path) -> Path:
    to.mkdir()
    for file in run.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_named_in_one_line(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = _copy_of(fitted, tmp_path / "run")
    good = (run / "last.pt").read_bytes()
    damaged = {
        "truncated": good[: len(good) // 2],
        "garbage": bytes(range(256)) * 100,
        "empty": b"",
        "text": b"not a checkpoint\n",
    }
    if damage == "other":
        torch.save({"model": torch.zeros(2)}, run / "last.pt")
    else:
        (run / "last.pt").write_bytes(damaged[damage])
    settings = SMALL | {"lr": 0.2}
    with pytest.raises(ValueError, match=r"run/last\.pt is (damaged or )?not a checkpoint"):
        controlat.train(run, resume=True, **settings)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--out", str(run), "--resume", *_flags(settings)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert str(run / "last.pt") in error
    assert "weights_only" not in error, "no advice to unpickle code"


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker, file = tmp_path / "executed", tmp_path / "last.pt"
    bomb = {"format": "controlat checkpoint", "version": 1, "model": _Malicious(marker)}
    if zipped:
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"last\.pt is damaged or not a checkpoint"):
        load_checkpoint(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))  # it would have worked
    assert marker.exists()


def test_a_checkpoint_of_another_version_says_which_is_read(fitted: Path, tmp_path: Path) -> None:
    found = load_checkpoint(fitted / "last.pt")
    torch.save(found | {"version": 9}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match=r"new\.pt has checkpoint version 9; this release reads 1"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize("tail", ['{"epoch": 3, "contr', '{"epoch": 3}\n', '{"epoch": 3}\n{"ep'])
def test_lines_that_a_crash_left_beyond_the_checkpoint_are_dropped(
    fitted: Path, tmp_path: Path, tail: str
) -> None:
    run = _copy_of(fitted, tmp_path / "run")
    good = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(good + tail)
    controlat.train(run, resume=True, **SMALL | {"lr": 0.2})
    assert (run / "log.jsonl").read_text() == good


# --------------------------------------------------------------------------------------------- divergence


def _all_finite(checkpoint: Path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in load_checkpoint(checkpoint)["model"].values())


def test_divergence_names_the_place_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = SMALL | {"lr": "multistep:lr=0.05,at=1,factor=1e9"}  # epoch 0 goes well
    with pytest.raises(NonFiniteError) as stopped:
        controlat.train(tmp_path / "run", **settings)
    message = str(stopped.value)
    assert "epoch 1, batch" in message
    assert "Control(alpha=0.15, steps=1)" in message
    assert str(tmp_path / "run" / "last.pt") in message
    assert load_checkpoint(tmp_path / "run" / "last.pt")["tally"]["epoch"] == 1
    assert _all_finite(tmp_path / "run" / "last.pt")
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == 1


HUGE = "multistep:lr=1,at=1e-9,factor={:g}"  # from the first step on; lr itself has a range


@pytest.mark.parametrize("rate", ["1e6", HUGE.format(1e30)])
def test_no_checkpoint_of_a_diverging_run_holds_parameters_that_are_not_finite(
    tmp_path: Path, rate: str
) -> None:
    with pytest.raises(NonFiniteError, match="epoch 0, batch"):
        controlat.train(tmp_path / "run", **SMALL | {"lr": rate, "checkpoint_minutes": 1e-9})
    assert not (tmp_path / "run" / "last.pt").exists() or _all_finite(tmp_path / "run" / "last.pt")


STEEP = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return 1000 * self.linear(x.flatten(1))

def net(in_shape, num_classes):
    return Net()
"""


def test_a_step_that_makes_parameters_infinite_is_noticed_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steep.py").write_text(STEEP)
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"model": "steep:net", "lr": HUGE.format(3e38), "checkpoint_minutes": 1e-9}
    with pytest.raises(NonFiniteError, match=r"a parameter is not finite .*epoch 0, batch 0, Control"):
        controlat.train("run", **settings)
    assert not Path("run/last.pt").exists()


def test_divergence_on_the_command_line_is_one_line_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--out", str(tmp_path / "run"), *_flags(SMALL | {"lr": HUGE.format(1e9)})]
    assert cli.main(arguments) == 1
    output, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "epoch 0, batch" in error
    assert "no checkpoint was written yet" in error
    assert "Traceback" not in output + error


# ------------------------------------------------------------------------------------------ what is logged


def test_every_log_line_has_its_fields_and_they_add_up(fitted: Path) -> None:
    log = read_json_lines(fitted / "log.jsonl")
    fields = {
        "epoch",
        "control",
        "controls",
        "lr",
        "loss",
        "gradients",
        "seconds",
        "total_gradients",
        "total_seconds",
    }
    fields |= {
        "layers",
        "carried",
        "dropped",
        "stopped",
        "clean",
        "robust",
        "total_evaluations",
        "validation_points",
        "validation_gradients",
        "validation_seconds",
    }
    assert [line["epoch"] for line in log] == [0, 1, 2]
    for i, line in enumerate(log):
        assert set(line) == fields
        assert line["total_gradients"] == sum(one["gradients"] for one in log[: i + 1])
        assert line["total_seconds"] == pytest.approx(sum(one["seconds"] for one in log[: i + 1]))
        assert line["lr"] == pytest.approx(0.2)
        assert line["dropped"] == []
        assert 0 <= line["robust"] <= line["clean"] <= 1
        assert line["total_evaluations"] == 4 * sum(range(1, i + 2))  # steps of n = 1, 2, 3
        assert line["validation_points"] == 20
        assert line["validation_gradients"] <= 10 * 20
    assert log[-1]["loss"] < log[0]["loss"]


def test_counted_evaluations_are_n_of_u_times_samples(fitted: Path) -> None:
    log = read_json_lines(fitted / "log.jsonl")
    assert [line["control"]["steps"] for line in log] == [0, 1, 2]
    assert [line["gradients"] for line in log] == [1 * 120, 2 * 120, 3 * 120]
    assert load_checkpoint(fitted / "last.pt")["tally"]["gradients"] == 720


def _network(run: Path, name: str) -> tuple[nn.Module, dict[str, Any]]:
    found = load_checkpoint(run / name)
    model = Experiment.of(TrainSettings(**SMALL)).model(0)
    model.load_state_dict(found["model"])
    return model, found


def test_best_is_the_epoch_of_the_best_held_out_pgd_10_accuracy(tmp_path: Path) -> None:
    settings = SMALL | {"lr": "multistep:lr=0.1,at=5,factor=60", "epochs": 6, "train_points": 800}
    controlat.train(tmp_path / "run", **settings)
    log = read_json_lines(tmp_path / "run" / "log.jsonl")
    robust = [line["robust"] for line in log]
    assert 0 < max(robust) > robust[-1], "the last epochs must be worse, or this test says nothing"
    model, found = _network(tmp_path / "run", "best.pt")
    best = robust.index(max(robust))
    assert found["tally"]["best_epoch"] == best == found["tally"]["epoch"] - 1
    assert found["tally"]["best"] == robust[best]
    validation = Experiment.of(TrainSettings(**settings)).validation
    again = robustness(model, *validation.take(torch.arange(20)), eps=0.15, attacks=["pgd-10"])
    assert (again.clean.value, again.robust.value) == (log[best]["clean"], robust[best])


def test_the_checkpoint_holds_settings_schedule_and_environment(fitted: Path) -> None:
    found = load_checkpoint(fitted / "last.pt")
    assert found["schedule"] == json.loads((fitted / "schedule.json").read_text())
    assert found["settings"]["lr"] == 0.2
    assert found["settings"]["seed"] == 0
    assert found["environment"]["torch"] == str(torch.__version__)
    assert found["optimizer"]["state"][0]["momentum_buffer"].abs().sum() > 0


def test_tensorboard_files_hold_the_numbers_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    controlat.train(tmp_path / "run", **SMALL | {"tensorboard": True})
    log = read_json_lines(tmp_path / "run" / "log.jsonl")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {k for k, v in log[0].items() if isinstance(v, (int, float))} - {"epoch"}
    assert set(events.Tags()["scalars"]) == names | {"control/alpha", "control/steps"}
    for name, wanted in (("loss", [line["loss"] for line in log]), ("control/steps", [0, 1, 2])):
        found = events.Scalars(name)
        assert [event.step for event in found] == [0, 1, 2]
        assert [event.value for event in found] == pytest.approx(wanted)


def test_training_without_tensorboard_writes_no_event_files(fitted: Path) -> None:
    assert {p.name for p in fitted.iterdir()} == {
        ".lock",
        "best.pt",
        "last.pt",
        "log.jsonl",
        "schedule.json",
        "settings.json",
    }


# ------------------------------------------------------------------------------- precision, layout, flags


def _losses(out: Path, **changes: Any) -> list[float]:
    return [line["loss"] for line in controlat.train(out, **SMALL | changes)["epochs"]]


def test_both_memory_layouts_train_alike(tmp_path: Path) -> None:
    # Without dropout, whose masks depend on the layout.
    (tmp_path / "layouts.py").write_text(
        "from torch import nn\n"
        "def net(in_shape, num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),\n"
        "                         nn.Flatten(), nn.Linear(72, num_classes))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        fast, plain = (
            _losses(tmp_path / f"{flag}", model="layouts:net", channels_last=flag) for flag in (True, False)
        )
    assert fast == pytest.approx(plain, rel=1e-3)
    assert fast[-1] < fast[0]


def test_the_cnn_with_dropout_trains_alike_in_both_layouts(tmp_path: Path) -> None:
    fast, plain = (
        _losses(tmp_path / f"{flag}", model="cnn_bn", lr=0.05, channels_last=flag) for flag in (True, False)
    )
    assert fast == pytest.approx(plain, rel=0.03), "but for the masks of dropout"
    assert fast[-1] < fast[0]
    model = place(nn.Sequential(nn.Conv2d(1, 4, 3)), "cpu", nhwc=True)
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_bf16_trains_and_evaluates_in_full_precision(tmp_path: Path) -> None:
    half = _losses(tmp_path / "half", bf16=True, lr=0.2)
    full = _losses(tmp_path / "full", bf16=False, lr=0.2)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)
    state = load_checkpoint(tmp_path / "half" / "last.pt")["model"]
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_fit_without_held_out_data_logs_no_accuracy_and_keeps_no_best(tmp_path: Path) -> None:
    settings = TrainSettings(**SMALL | {"epochs": 1})
    experiment = Experiment.of(settings)
    spec = experiment.spec(settings.schedule_of(settings.schedule), seed=0)
    tally = fit(experiment.driver(0), spec, tmp_path / "run", progress=False)
    (line,) = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert (line["clean"], line["robust"], line["validation_gradients"]) == (None, None, 0)
    assert (tally.best, tally.best_epoch) == (-1.0, -1)
    assert not (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("name", ["atta", "free", "cat curriculum"])
def test_what_is_recorded_in_training_is_the_recording_of_a_roll_out(name: str, tmp_path: Path) -> None:
    """Also with rows of samples, networks that are put back, and a stride that no epoch is a multiple of."""
    spec = constant(CASES[name].control(), held_out=split(8, (1, 4, 4), seed=5))
    ours, theirs = (driver(CASES[name]) for _ in range(2))
    recorder = Recorder.of(ours, spec, stride=2)
    tally = fit(ours, spec, tmp_path, progress=False, recorder=recorder)
    found, wanted = recorder.recording(), Recording.of(theirs, spec, stride=2)
    assert tally.epoch == 3
    for part in ("first", "last", "stride", "finer", "stored", "steps", "events", "end"):
        assert same(getattr(found, part), getattr(wanted, part)), part
