"""Training and evaluating networks of the user's own factory through the commands."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import Flattening, LowRank
from helpers import same
from torch import Tensor, nn

from controlat import attack, evaluate, train
from controlat.data import load
from controlat.models.frozen.layout import LayoutWarning
from controlat.models.frozen.view import FrozenModel

FEW: dict[str, Any] = {
    "train_points": 80,
    "test_points": 30,
    "held_out": 20,
    "batch_size": 32,
    "epochs": 2,
    "progress": False,
    "threads": 1,
}


def flattening(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    net = Flattening()
    net.out = nn.Linear(4 * in_shape[1] * in_shape[2], num_classes)
    return net


def low_rank(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), LowRank(64, 16), nn.ReLU(), LowRank(16, num_classes)).eval()


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "last.pt", weights_only=True)["model"]
    return found


def test_a_network_that_needs_nchw_is_trained_with_either_setting(tmp_path: Path) -> None:
    found = {}
    for nhwc in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", LayoutWarning)
            train(
                tmp_path / f"{nhwc}",
                model=f"{__name__}:flattening",
                schedule="pgd:alpha=0.05,steps=2",
                channels_last=nhwc,
                **FEW,
            )
        assert len(told) == nhwc
        found[nhwc] = weights(tmp_path / f"{nhwc}")
    assert same(found[True], found[False])


@pytest.mark.slow
def test_the_layout_is_that_of_the_settings_in_everything_that_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    made = FrozenModel.__init__

    def spied(self: FrozenModel, *arguments: Any, **options: Any) -> None:
        asked.append(options.get("channels_last", True))
        made(self, *arguments, **options)

    monkeypatch.setattr(FrozenModel, "__init__", spied)
    out = tmp_path / "out"
    few = {**FEW, "epochs": 1, "model": "cnn_bn", "attacks": ["fgsm"], "checks": 2, "probe": 16}
    few |= {"alphas": [0.1], "max_steps": 1, "train_points": 40, "test_points": 10, "held_out": 8}
    evaluate(out, schedules=["fgsm:alpha=0.1"], gamma=0.01, channels_last=False, **few)
    run = next((out / "runs").iterdir())
    attack(run / "last.pt", attacks=["fgsm"], checks=5, progress=False)
    assert len(asked) > 10
    assert not any(asked)


def test_layers_that_merge_in_eval_mode_are_trained_and_evaluated_as_they_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, model=f"{__name__}:low_rank", schedule="pgd:alpha=0.05,steps=2", **{**FEW, "epochs": 1})
    first = weights(run)
    train(tmp_path / "on", model=f"{__name__}:low_rank", schedule="pgd:alpha=0.05,steps=2", **FEW)
    for name in ("1.weight", "3.weight"):  # not trained, and stored as they are in training mode
        assert same(weights(tmp_path / "on")[name], first[name])
    for name in ("1.a", "1.b", "3.a", "3.b"):
        assert not torch.equal(weights(tmp_path / "on")[name], first[name])
    found = attack(run / "last.pt", attacks=["fgsm"], checks=0, progress=False)
    net = low_rank(10).train()
    net.load_state_dict(first)
    x, y = load("digits").limited(80, 30).test.take(torch.arange(30))
    with torch.no_grad():
        right = int((net(x).argmax(1) == y).sum())
    assert found["clean"]["correct"] == right
