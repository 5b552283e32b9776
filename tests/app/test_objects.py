"""The user's own model, data and method as objects: as by name, in every process, and known again."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, slow
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import controlat
from controlat._util.pool import InProcess, Pool, Task
from controlat._util.sending import Common
from controlat.app.checkpoints import load_checkpoint
from controlat.app.cli import main
from controlat.app.experiment import Experiment
from controlat.app.jobs import workers
from controlat.app.search_judge import trained
from controlat.app.settings import Problem, SearchSettings, TrainSettings
from controlat.data import digits
from controlat.methods import build
from controlat.methods.pgd_at import PgdAT
from controlat.schedule_search.trials import Question

TRAIN: dict[str, Any] = {
    "schedule": "pgd:steps=1,alpha=0.1",
    "epochs": 2,
    "train_points": 100,
    "threads": 1,
    "progress": False,
}


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(width, 10))


def named(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    assert (in_shape, num_classes) == ((1, 8, 8), 10)
    return net()


def weights(folder: Path) -> Any:
    return load_checkpoint(folder / "last.pt")["model"]


def initial(seed: int, **settings: Any) -> list[Tensor]:
    model = Experiment.of(Problem(**{"train_points": 100} | settings)).model(seed)
    return [t.detach().clone() for t in model.state_dict().values()]


# ---------------------------------------------------------------------------------------- the same as by name


def test_objects_give_the_bits_of_the_names(tmp_path: Path) -> None:
    data = digits.load()
    pairs = [part.take(torch.arange(len(part))) for part in (data.train, data.test)]
    given: dict[str, dict[str, Any]] = {
        "names": {"model": f"{__name__}:named"},
        "function": {"model": named},
        "local": {"model": lambda: net()},
        "module": {"model": net(), "data": data, "method": build("pgd_at")},
        "pairs": {"model": net(), "data": pairs, "method": PgdAT},
        "torch": {"model": net(), "data": [TensorDataset(*pair) for pair in pairs]},
    }
    few = TRAIN | {"epochs": 1, "eps": 0.15, "lr": "onecycle:lr=0.2"}  # as is usual for the digits
    for name, objects in given.items():
        controlat.train(tmp_path / name, **few | objects)
        assert same(weights(tmp_path / name), weights(tmp_path / "names")), name
    stored = {name: load_checkpoint(tmp_path / name / "last.pt")["settings"] for name in given}
    assert stored["function"] == stored["names"] | {"data_dir": None}
    assert stored["module"]["model"] == stored["pairs"]["model"]
    assert stored["module"]["model"].startswith("object:Sequential-")
    assert stored["module"]["data"].startswith("object:Dataset-")
    assert stored["pairs"]["data"] == stored["torch"]["data"]
    assert stored["pairs"]["method"] == "controlat.methods.pgd_at:PgdAT"


def test_every_seed_begins_at_weights_of_its_own_whatever_the_object_holds() -> None:
    given = net()
    before = [t.clone() for t in given.state_dict().values()]
    first, again, other = initial(0, model=given), initial(0, model=given), initial(1, model=given)
    assert same(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first[:2], other[:2], strict=True))
    assert not torch.equal(first[0], before[0])
    with torch.no_grad():
        for p in given.parameters():
            p.fill_(3.0)
    assert same(initial(0, model=given), first)
    assert all((p == 3.0).all() for p in given.parameters()), "the object itself stays as it is"


class Scaled(nn.Module):
    """Normalisation by a parameter that is not trained and a buffer, before layers that draw themselves."""

    def __init__(self, mean: float, std: float = 0.5) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean), requires_grad=False)
        self.std: Tensor
        self.register_buffer("std", torch.tensor(std))
        self.rest = net()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.rest[3].bias)  # type: ignore[index, arg-type, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.rest((x - self.mean) / self.std)
        return logits


def test_what_is_not_trained_is_kept_and_the_whole_has_the_last_word() -> None:
    model = Experiment.of(Problem(model=Scaled(0.25), train_points=100)).model(0)
    assert isinstance(model, Scaled)
    assert (model.mean, model.std) == (0.25, 0.5)
    assert not model.mean.requires_grad
    assert (model.rest[3].bias == 1).all()  # type: ignore[index, union-attr]
    names = [Problem(model=m).model for m in (Scaled(0.25), Scaled(0.25), Scaled(0.5), Scaled(0.25, 0.25))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# ----------------------------------------------------------------------------------------- in other processes


def test_other_processes_are_sent_the_objects_and_give_the_same_network(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few: dict[str, Any] = {"spaces": ["constant"], "train_points": 100, "eps": 0.15, "progress": False}
    sent = SearchSettings(model=net(), data=digits.load(), method=build("trades"), **few)  # type: ignore[arg-type]
    got: SearchSettings = pickle.loads(pickle.dumps(Common(sent))).value
    assert got == sent
    assert same(initial(3, model=got.model), initial(3, model=sent.model))
    assert got.schedule_of("pgd:steps=1,alpha=0.1")(0)["beta"] == 6, "a control of TRADES"
    with workers(sent, 2, "trainings") as pool:
        assert isinstance(pool, Pool)
    with workers(SearchSettings(model=lambda: net(), **few), 2, "trainings") as pool:  # type: ignore[arg-type]
        assert isinstance(pool, InProcess)
        assert pool.map([Task("1", trained, (Common(sent), Question("none", 0, 1)))])[0].phi > 0
    told = capsys.readouterr().err
    assert re.fullmatch(r"controlat: note: object:lambda-\w{8} cannot be sent .*<lambda>.* the other\n", told)


SEARCH: dict[str, Any] = {
    "spaces": ["constant"],
    "proposer": "random",
    "budget": "1trainings",
    "max_steps": 1,
    "judge_seeds": [0, 1],
    "against": ["none"],
    "attacks": ["fgsm"],
    "epochs": 1,
    "train_points": 100,
    "test_points": 20,
    "jobs": 2,
    "progress": False,
}
EVALUATE: dict[str, Any] = {
    "schedules": ["none", "pgd:steps=1,alpha=0.1"],
    "seeds": [0],
    "epochs": 1,
    "train_points": 100,
    "test_points": 20,
    "attacks": ["fgsm"],
    "checks": 0,
    "full": False,
    "threads": 1,
    "jobs": 2,
    "progress": False,
}


@pytest.mark.slow
def test_a_search_with_objects_in_two_processes_and_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits.load()
    objects = {"model": net(), "data": data, "method": build("pgd_at"), "eps": 0.15, "lr": 0.1}
    two = controlat.search(tmp_path / "two", **SEARCH | objects)
    here = controlat.search(tmp_path / "here", **SEARCH | objects | {"model": lambda: net()})
    told = capsys.readouterr().err
    assert told.startswith("controlat: note: object:lambda-")
    assert told.endswith("trainings are done one after the other\n")
    for there, row in zip(two["rows"], here["rows"], strict=True):
        assert there | {"seconds": 0} == row | {"seconds": 0}
    assert two["settings"]["model"].startswith("object:Sequential-")
    with pytest.raises(
        ValueError, match=r"model: 'object:Sequential-\w+' there, 'object:Sequential-\w+' here"
    ):
        controlat.search(tmp_path / "two", **SEARCH | objects | {"model": net(9)})


class Locked(nn.Sequential):
    """A network that holds what no other process can have."""

    def __init__(self) -> None:
        super().__init__(*net())
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> Locked:
        return Locked()


@pytest.mark.parametrize(
    ("make", "reason"),
    [slow(net, ""), (lambda: lambda: net(), "<lambda>"), slow(Locked, "lock")],
)
def test_what_cannot_be_sent_is_trained_here_and_a_note_says_so(
    tmp_path: Path, make: Callable[[], Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = controlat.evaluate(tmp_path / "out", **EVALUATE | {"model": make()})
    assert result["environment"]["jobs"] == (1 if reason else 2)
    told = capsys.readouterr().err
    assert ("cannot be sent to other processes" in told) == bool(reason)
    assert reason in told


# ----------------------------------------------------------------------------------------------- known again


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of an own network that was stopped after its first epoch."""
    real = controlat.app.trainer.append_json_line  # type: ignore[attr-defined]

    def stop(path: Path, line: dict[str, Any]) -> None:
        if line["epoch"] == 1:
            raise KeyboardInterrupt
        real(path, line)

    monkeypatch.setattr("controlat.app.trainer.append_json_line", stop)
    with pytest.raises(KeyboardInterrupt):
        controlat.train(tmp_path / "run", model=net(), **TRAIN)
    monkeypatch.undo()
    return tmp_path / "run"


def test_a_run_goes_on_with_the_same_object_only(begun: Path, tmp_path: Path) -> None:
    for other in (net(9), named, nn.Sequential(*net(), nn.Identity())):
        with pytest.raises(
            ValueError, match="was given as an object by a Python program: give the same from"
        ):
            controlat.train(begun, resume=True, model=other, **TRAIN)
    controlat.train(begun, resume=True, model=net(), **TRAIN)
    controlat.train(tmp_path / "whole", model=net(), **TRAIN)
    assert same(weights(begun), weights(tmp_path / "whole"))


@pytest.mark.parametrize("words", [[], ["--model", "object:Sequential-0a1b2c3d"]])
def test_a_command_says_that_a_run_has_an_object_of_a_program(
    begun: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--epochs", "2", "--train-points", "100", "--threads", "1", "--schedule", TRAIN["schedule"]]
    with pytest.raises(SystemExit):
        main(["train", "--out", str(begun), "--resume", *few, *words])
    assert "given as an object by a Python program: give the same from there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--out", str(begun.parent / "new"), "--model", "object:Sequential-0a1b2c3d", *few])
    assert "was an object in a Python program and is in no file" in capsys.readouterr().err


def test_a_finished_run_is_evaluated_and_attacked_with_its_objects(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"model": lambda: net(), "data": digits.load(), "method": build("trades")}
    settings = {"eps": 0.15, "epochs": 1, "test_points": 20}
    controlat.train(tmp_path / "run", **TRAIN | settings | objects)
    few = {k: EVALUATE[k] for k in ("attacks", "checks", "full", "threads", "progress")}
    controlat.train(tmp_path / "another", seed=1, **TRAIN | settings | objects)
    other = {"surrogate": str(tmp_path / "another" / "last.pt")}
    result = controlat.evaluate(tmp_path / "out", run=str(tmp_path / "run"), **few | other | objects)
    assert result["reproduced"]
    assert result["schedules"][0]["runs"][0]["evaluation"]["transfer"]["points"] == 20
    del objects["method"]
    attacked = controlat.attack(tmp_path / "run", attacks=["fgsm"], checks=0, progress=False, **objects)
    assert attacked["clean"]["points"] == 20
    with pytest.raises(ValueError, match=r"model is object:Sequential-\w+, but .* is of object:lambda-\w+"):
        controlat.attack(tmp_path / "run", **objects | {"model": net()})
    with pytest.raises(ValueError, match="was an object in a Python program"):
        controlat.attack(tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"object:Trades-\w+' was an object in a Python program"):
        controlat.evaluate(tmp_path / "other", run=str(tmp_path / "run"), **few)


# -------------------------------------------------------------------------------------------------- mistakes


class Undrawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.rest = net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.rest(x)
        return logits


ONE = net()
X, Y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": Undrawn()}, r"no reset_parameters for scale: .*; give a class or function that makes it"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(10))},
            "no reset_parameters for 1.weight",
        ),
        ({"model": lambda: ONE}, "model lambda makes one and the same network again and again"),
        ({"model": lambda: nn.Linear(3, 10)}, "fails on images of shape"),
        ({"model": lambda shape, n: net()}, "it is offered: in_shape, num_classes"),
        ({"model": 3}, "model must be a name, an nn.Module, or what makes one .*, got 3"),
        ({"model": None}, "model must be a name, .*, got None"),
        ({"data": X}, "data must be a name, a controlat.Dataset, or .*got a Tensor of shape"),
        ({"data": [(X, Y), X]}, "data, test: must be a pair .x, y. of tensors, or a data set with a length"),
        ({"data": [(X * 255, Y), (X, Y)]}, r"data, train: x / scale must lie in \[0, 1\]"),
        ({"data": [(X, Y.float()), (X, Y)]}, "data, train: y must be int64 .*convert it with y.long"),
        ({"data": [[("a", 1)], (X, Y)]}, "data, train: its samples must be .x, y., x a tensor"),
        ({"data": [(X, Y), (X, Y)]}, "eps is missing: give the radius for object:Dataset-"),
        ({"data": [(X, Y), (X, Y)], "eps": 0.1, "data_options": {"size": 3}}, None),
        ({"method": 3}, "method 3 must have `updates` and a ControlSpace `controls`"),
        ({"method": build("pgd_at"), "method_options": {"random_start": False}}, "random_start"),
    ],
)
def test_anything_else_is_an_error_of_one_sentence(given: dict[str, Any], told: str | None) -> None:
    with pytest.raises(ValueError, match=told or "accepts no keyword 'size'") as caught:
        Experiment.of(TrainSettings(**given))
    assert "\n" not in str(caught.value)


def test_labels_and_pixels_of_other_types_are_read() -> None:
    x = (torch.rand(6, 1, 8, 8) * 255).byte()
    y = torch.tensor([0, 1, 2] * 2, dtype=torch.int32)
    experiment = Experiment.of(Problem(data=[(x.numpy(), y.numpy())] * 2, eps=0.1))  # type: ignore[arg-type]
    data = experiment.data
    assert data.num_classes == 3
    assert same(data.test.take(torch.arange(6)), (x.float() / 255, y.long()))
