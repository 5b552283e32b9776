"""Transfer attacks against closed forms on linear networks; counts, refusals, surrogates from checkpoints."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Counting, cnn_bn, mlp, same, samples, trace
from torch import Tensor, nn

import controlat
from controlat.app.experiment import Experiment
from controlat.app.settings import Problem
from controlat.attacks.balls import Ball
from controlat.robust_accuracy import Attack, Transfer, protocol, transfer
from controlat.robust_accuracy.protocol import Extras
from controlat.robust_accuracy.robust import measure
from controlat.robust_accuracy.source import Pair
from controlat.robust_accuracy.transfer import same_weights

EPS = 0.05


def linear(seed: int, size: int = 12) -> nn.Sequential:
    """Two classes, a decision in the middle of the box."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(size, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, size, generator=draw))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer)


def difference(model: nn.Sequential) -> Tensor:
    """w of the logit difference z_1 - z_0 = <w, x> + b."""
    weight = model[1].weight.detach()
    found: Tensor = weight[1] - weight[0]
    return found


@pytest.fixture
def points() -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    """A network, a surrogate, and points away from the faces of the box, a tenth with the wrong label."""
    model, surrogate = linear(0), linear(1)
    draw = torch.Generator().manual_seed(2)
    x = EPS + (1 - 2 * EPS) * torch.rand(300, 1, 3, 4, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::10] = 1 - y[::10]
    return model, surrogate, x, y


# ---------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("attack", ["fgsm", "pgd-20", "pgd-20-3"])
def test_linear_networks_are_broken_where_the_surrogates_corner_breaks_them(
    points: tuple[nn.Sequential, nn.Sequential, Tensor, Tensor], attack: str
) -> None:
    model, surrogate, x, y = points
    w, v = difference(model), difference(surrogate)
    sign = 2.0 * y - 1
    with torch.no_grad():
        logits = model(x)
    margin = sign * (logits[:, 1] - logits[:, 0])
    moved = margin - EPS * (w * v.sign()).sum()  # every surrogate's adversarial is x - eps sign sign(v)
    wanted = (margin > 0) & (moved > 0)
    found = transfer(model, surrogate, Pair(x, y), Ball(EPS), attacks=[attack])
    assert found.clean.correct == int((margin > 0).sum()) == 270
    assert torch.equal(found.survived, wanted)
    assert found.robust.correct == int(wanted.sum())
    with torch.no_grad():
        assert found.surrogate.correct == int((surrogate(x).argmax(1) == y).sum())


def test_l2_moves_along_the_surrogates_normal(
    points: tuple[nn.Sequential, nn.Sequential, Tensor, Tensor],
) -> None:
    model, surrogate, x, y = points
    w, v = difference(model), difference(surrogate)
    with torch.no_grad():
        logits = model(x)
    margin = (2.0 * y - 1) * (logits[:, 1] - logits[:, 0])
    wanted = (margin > 0) & (margin - EPS * (w * v).sum() / v.norm() > 0)
    found = transfer(model, surrogate, Pair(x, y), Ball(EPS, "l2"), attacks=["fgsm"])
    assert torch.equal(found.survived, wanted)


def test_an_opposite_surrogate_only_helps(
    points: tuple[nn.Sequential, nn.Sequential, Tensor, Tensor],
) -> None:
    model, _, x, y = points
    opposite = linear(0)
    with torch.no_grad():
        opposite[1].weight.neg_()
    found = transfer(model, opposite, Pair(x, y), Ball(EPS), attacks=["pgd-5"])
    assert found.robust == found.clean


def test_it_breaks_no_more_than_white_box_attacks_and_a_copy_breaks_as_many(
    points: tuple[nn.Sequential, nn.Sequential, Tensor, Tensor],
) -> None:
    model, surrogate, x, y = points
    white = measure(model, Pair(x, y), Ball(EPS), attacks=["fgsm"])
    assert transfer(model, surrogate, Pair(x, y), Ball(EPS), attacks=["fgsm"]).robust.correct > (
        white.robust.correct
    )
    double = linear(0)
    with torch.no_grad():
        double[1].weight.mul_(2.0)
        double[1].bias.mul_(2.0)
    copied = transfer(model, double, Pair(x, y), Ball(EPS), attacks=["fgsm"])
    assert torch.equal(copied.survived, white.survived)


# --------------------------------------------------------------------------------- attacks alone and together


def _sent(attacks: list[Any], **options: Any) -> Transfer:
    x, y = samples(150, (1, 4, 4))
    model, surrogate = mlp(16, 12, seed=0), mlp(16, 12, seed=1)
    with torch.no_grad():
        y = model(x).argmax(1)
    return transfer(model, surrogate, Pair(x, y), Ball(0.3), attacks=attacks, **options)


def test_each_attack_is_tried_alone_and_a_robust_sample_survives_all() -> None:
    attacks = [Attack("a", steps=1), Attack("b", steps=4, kappa=50.0), Attack("c", steps=10)]
    together = _sent(attacks)
    alone = [_sent([attack]) for attack in attacks]
    assert list(together.after) == ["a", "b", "c"]
    for attack, one in zip(attacks, alone, strict=True):
        assert together.after[attack.name] == one.after[attack.name] == one.robust
    masks = torch.stack([one.survived for one in alone])
    assert torch.equal(together.survived, masks.all(0))
    assert together.robust.correct <= min(a.correct for a in together.after.values())
    assert together.robust.correct == int(together.survived.sum()) < together.clean.correct == 150


def test_restarts_only_lower_the_accuracy() -> None:
    found = [_sent([Attack("a", steps=1, restarts=restarts)]) for restarts in (1, 3, 10)]
    counts = [one.robust.correct for one in found]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    for less, more in pairwise(found):
        assert bool((less.survived | ~more.survived).all()), "what one restart broke stays broken"


def test_the_same_seed_gives_the_same_result() -> None:
    state = torch.random.get_rng_state()
    one, again, other = (_sent([Attack("a", steps=1)], seed=seed).survived for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------------------------ counts and side effects


def test_every_pass_of_both_networks_is_counted() -> None:
    x, y = samples(50, (1, 4, 4))
    model, surrogate = Counting(mlp(16, 12, seed=0)), Counting(mlp(16, 12, seed=1))
    told: list[tuple[int, str]] = []
    found = transfer(
        model,
        surrogate,
        Pair(x, y),
        Ball(0.1),
        attacks=["fgsm", "pgd-3-2"],
        batch_size=16,
        progress=lambda n, name: told.append((n, name)),
    )
    n = found.clean.correct
    assert 0 < n < 50
    assert model.graph == 0, "no gradient of the network is asked for"
    assert found.spent.gradients == surrogate.graph == n * (1 + 3 * 2)
    assert surrogate.plain == 50
    assert model.plain == 50 + n * 3
    assert found.spent.forwards == model.plain + surrogate.plain
    assert sum(k for k, _ in told) == 3 * n
    assert {name for _, name in told} == {"transfer, fgsm", "transfer, pgd-3-2"}
    bound = Extras(checks=0, surrogate=surrogate).cost(50, 3, ["fgsm", "pgd-3-2"])["transfer"]
    assert (found.spent.gradients, found.spent.forwards) <= (bound.gradients, bound.forwards)


def test_both_networks_are_left_as_they_were() -> None:
    model, surrogate = cnn_bn(0).train(), cnn_bn(1).train()
    x, y = samples(20, (1, 8, 8))
    before = trace(model), trace(surrogate)
    transfer(model, surrogate, Pair(x, y), Ball(0.1), attacks=["pgd-2"])
    assert same((trace(model), trace(surrogate)), before)


def test_the_result_as_plain_data() -> None:
    found = _sent(["fgsm"])
    plain = found.to_json()
    assert plain["points"] == 150
    assert plain["surrogate_clean"]["value"] == found.surrogate.value
    assert plain["after"]["fgsm"] == plain["robust"]


# --------------------------------------------------------------------------------------------------- refusals


def test_the_network_itself_is_no_surrogate() -> None:
    model, copy = mlp(seed=0), mlp(seed=0)
    x, y = samples(10)
    for surrogate in (model, copy):
        with pytest.raises(ValueError, match="weights of the network itself; train it with another seed"):
            transfer(model, surrogate, Pair(x, y), Ball(0.1))
        called: list[str] = []
        with pytest.raises(ValueError, match="weights of the network itself"):
            protocol(
                model,
                Pair(x, y),
                Ball(0.1),
                attacks=["fgsm"],
                extras=Extras(surrogate=surrogate),
                progress=lambda n, name: called.append(name),  # noqa: B023
            )
        assert not called, "before anything is attacked"


def test_networks_are_compared_by_their_weights() -> None:
    assert same_weights(mlp(seed=0), mlp(seed=0))
    assert not same_weights(mlp(seed=0), mlp(seed=1))
    assert not same_weights(mlp(hidden=5), mlp(hidden=6))
    assert not same_weights(nn.Flatten(), nn.Softmax(1)), "two networks without weights are not one"
    assert same_weights(mlp(seed=0), mlp(seed=0).float()), "in whatever precision"


def test_bad_usage() -> None:
    x, y = samples(10)
    with pytest.raises(ValueError, match="given twice"):
        transfer(mlp(seed=0), mlp(seed=1), Pair(x, y), Ball(0.1), attacks=["fgsm", "fgsm"])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\]"):
        transfer(mlp(seed=0), mlp(classes=2), Pair(x, torch.full((10,), 2)), Ball(0.1), attacks=["fgsm"])


# ---------------------------------------------------------------------------------- surrogates of checkpoints

FEW: dict[str, Any] = {"epochs": 1, "train_points": 100, "threads": 1, "progress": False}
OWN = """
import torch
import controlat

def data(root=None):
    x, y = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 4
    return controlat.Dataset("own", controlat.Split(x[:50], y[:50]), controlat.Split(x[50:], y[50:]), 4)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("surrogate") / "run"
    controlat.train(out, schedule="none", seed=7, model="cnn_bn", **FEW)
    return out / "last.pt"


def test_a_checkpoint_gives_its_network(checkpoint: Path) -> None:
    experiment = Experiment.of(Problem(model="mlp", test_points=10))
    assert experiment.surrogate(None) is None
    found = experiment.surrogate(str(checkpoint))
    assert found is not None
    stored = torch.load(checkpoint, weights_only=True)["model"]
    state = found.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_a_surrogate_for_other_data_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.of(Problem(data="own_data:data", eps=0.1, lr=0.1))
    with pytest.raises(ValueError, match="was trained on digits, not on own_data:data"):
        experiment.surrogate(str(checkpoint))


def test_a_damaged_or_missing_surrogate_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    experiment = Experiment.of(Problem(test_points=10))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"damaged\.pt is damaged or not a checkpoint"):
        experiment.surrogate(str(damaged))
    with pytest.raises(ValueError, match="no such checkpoint"):
        experiment.surrogate(str(tmp_path / "none.pt"))


def test_weights_that_do_not_fit_the_data_are_refused(checkpoint: Path) -> None:
    experiment = Experiment.of(Problem(test_points=10))
    narrow = dataclasses.replace(experiment.data, num_classes=11)
    with pytest.raises(ValueError, match=r"do not fit cnn_bn for inputs \(1, 8, 8\) and 11 classes"):
        dataclasses.replace(experiment, data=narrow).surrogate(str(checkpoint))


def test_a_bad_surrogate_stops_an_evaluation_before_it_trains(tmp_path: Path) -> None:
    settings = FEW | {"schedules": ["none"], "seeds": [0], "attacks": ["fgsm"], "test_points": 20}
    with pytest.raises(ValueError, match="no such checkpoint"):
        controlat.evaluate(tmp_path / "out", surrogate=str(tmp_path / "none.pt"), **settings)
    assert not list(tmp_path.rglob("*.pt"))
