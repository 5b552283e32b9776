"""`cuda_graphs` of the commands: results are the same, and records say what was on (tests/tape.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import same
from tape import tape
from torch import Tensor, nn

import controlat
from controlat.app.settings import AttackSettings, TrainSettings
from controlat.app.trainer import load_checkpoint

FEW: dict[str, Any] = {
    "schedule": "amata:min=1,max=3,tau=0.3",
    "epochs": 2,
    "train_points": 140,
    "held_out": 20,
    "batch_size": 32,
    "threads": 1,
    "progress": False,
}


def environment(run: Path) -> Any:
    return load_checkpoint(run / "last.pt")["environment"]["cuda_graphs"]


def test_a_run_is_the_same_with_graphs_and_goes_on_without(tmp_path: Path) -> None:
    with tape() as backend:
        for mode in ("auto", "off"):
            controlat.train(tmp_path / mode, cuda_graphs=mode, **FEW)
            assert bool(backend.replays) == (mode == "auto")
            backend.replays = 0
        attacked = [
            controlat.attack(
                tmp_path / "auto", cuda_graphs=mode, attacks=["pgd-5-3"], checks=0, points=40, progress=False
            )
            for mode in ("auto", "off")
        ]
    with_graphs, without = (load_checkpoint(tmp_path / mode / "last.pt") for mode in ("auto", "off"))
    assert same(with_graphs["model"], without["model"])
    assert same(with_graphs["optimizer"], without["optimizer"])
    assert (environment(tmp_path / "auto"), environment(tmp_path / "off")) == ("on", "off")
    assert [a["environment"]["cuda_graphs"] for a in attacked] == ["on", "off"]
    assert attacked[0]["after"] == attacked[1]["after"]
    assert "cuda_graphs" not in json.loads((tmp_path / "auto" / "settings.json").read_text())
    assert controlat.train(tmp_path / "auto", **FEW)["finished_before"]


class Branching(nn.Module):
    """Control flow in Python on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x if x.mean() < 0.9 else 1 - x)
        return out


def branching(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Branching()


def test_a_network_that_cannot_be_captured_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tape() as backend:
        controlat.train(tmp_path / "run", model=f"{__name__}:branching", **FEW)
    reason = "Branching: it reads values of tensors in Python (_local_scalar_dense)"
    assert capsys.readouterr().err.count(f"controlat: note: no CUDA graphs for {reason}\n") == 1
    assert environment(tmp_path / "run") == f"off ({reason})"
    assert backend.captures == 0


def test_without_a_cuda_device_there_are_none(tmp_path: Path) -> None:
    controlat.train(tmp_path / "run", **FEW | {"epochs": 1, "device": "cpu"})
    assert environment(tmp_path / "run") == "off (no CUDA device)"


@pytest.mark.parametrize("kind", [TrainSettings, AttackSettings])
def test_other_words_are_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "last.pt").touch()
    more = {"checkpoint": str(tmp_path)} if kind is AttackSettings else {}
    with pytest.raises(ValueError, match="cuda_graphs must be one of auto, off, got 'on'"):
        kind(cuda_graphs="on", **more)
