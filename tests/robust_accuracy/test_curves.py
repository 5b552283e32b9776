"""The sweeps over radius and steps against closed forms and separate runs."""

import warnings
from typing import Any

import pytest
import torch
from helpers import Counting, cnn_bn, mlp, same, samples, trace
from torch import Tensor, nn

from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ascend
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy import Accuracy, Attack, Curves, curves
from controlat.robust_accuracy.curves import POINTS, RADII, STEPS, curves_cost
from controlat.robust_accuracy.protocol import Extras
from controlat.robust_accuracy.robust import run_attacks
from controlat.robust_accuracy.source import Pair, spread


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth network in float64, right on most of its points."""
    model = mlp(16, 20)
    x, _ = samples(90, (1, 4, 4))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 3
    return model, x, y


# ---------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_class_linear_networks_fall_where_the_margin_ends(norm: str) -> None:
    eps, draw = 0.02 if norm == "linf" else 0.05, torch.Generator().manual_seed(5)
    x = 0.2 + 0.6 * torch.rand(200, 1, 3, 4, generator=draw, dtype=torch.float64)
    layer = nn.Linear(12, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 12, generator=draw))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    model = nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[::10] = 1 - y[::10]
    margin = (2.0 * y - 1) * (logits[:, 1] - logits[:, 0])
    w = (layer.weight[1] - layer.weight[0]).detach()
    dual = float(w.abs().sum() if norm == "linf" else w.norm())
    found = curves(model, Pair(x, y), Ball(eps, norm), points=200)
    *inside, grey = found.eps
    assert [radius for radius, _ in inside] == pytest.approx([f * eps for f in RADII])
    for radius, accuracy in inside:
        assert accuracy == Accuracy(int((margin - radius * dual > 0).sum()), 200)
    counts = [a.correct for _, a in found.eps]
    assert counts[0] == 180 > counts[2] > counts[-2]
    assert grey[0] == (0.5 if norm == "linf" else 0.5 * 12**0.5)
    assert grey[1].correct == 0
    for steps, accuracy, _ in found.steps:
        if steps >= (10 if norm == "linf" else 20):  # eight steps reach a corner; a sphere's point takes more
            assert accuracy.correct == int((margin - eps * dual > 0).sum())
    assert found.warnings == ()


def test_radius_0_is_the_clean_accuracy_of_the_points(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = small
    found = curves(model, Pair(x, y), Ball(0.1), points=30)
    chosen = spread(torch.arange(90), 30)
    assert found.eps[0] == (0.0, Accuracy(correct(model, x[chosen], y[chosen]), 30))
    assert found.chance == int(y[chosen].bincount().max()) / 30


def test_k_steps_along_the_path_are_a_run_of_k_steps(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = small
    ball = Ball(0.3)
    found = curves(model, Pair(x, y), ball, points=90, batch_size=50, seed=4)
    assert [steps for steps, _, _ in found.steps] == list(STEPS)
    for steps, accuracy, loss in found.steps:
        right, total = 0, 0.0
        for part in torch.arange(90).split(50):
            start = generator(4, "curves", "steps", int(part[0]))
            with FrozenModel(model) as view:
                reached = ascend(view, x[part], y[part], ball=ball, alpha=0.075, steps=steps, generator=start)
            right += correct(model, reached, y[part])
            with torch.no_grad():
                total += float(cross_entropy(model(reached), y[part]).sum())
        assert accuracy == Accuracy(right, 90)
        assert loss == pytest.approx(total / 90, rel=1e-12)
    losses = [loss for _, _, loss in found.steps]
    assert losses[0] < losses[2] < losses[3]


def test_the_radius_itself_is_pgd_20_alone(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = small
    found = curves(model, Pair(x, y), Ball(0.3), points=90)
    at_eps = dict(found.eps)[0.3]
    alone = run_attacks(model, Pair(x, y), Ball(0.3), attacks=[Attack("pgd-20", steps=20)])
    assert abs(at_eps.correct - alone.robust.correct) <= 3, "but for the random start"
    assert at_eps.correct < found.eps[0][1].correct


@pytest.mark.parametrize(("eps", "radii"), [(0.1, 8), (0.3, 7), (0.4, 6), (0.5, 5), (1.0, 3), (0.0, 2)])
def test_radii_beyond_grey_are_left_out(
    small: tuple[nn.Module, Tensor, Tensor], eps: float, radii: int
) -> None:
    model, x, y = small
    found = [radius for radius, _ in curves(model, Pair(x, y), Ball(eps), points=5).eps]
    assert len(found) == radii
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0.0, 0.5)


# --------------------------------------------------------------------------------------- counts, side effects


def test_the_cost_is_the_bound_to_the_last_pass(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = small
    counting = Counting(model)
    told: list[int] = []
    found = curves(
        counting, Pair(x, y), Ball(0.1), points=40, batch_size=16, progress=lambda n, name: told.append(n)
    )
    each = curves_cost()
    assert found.spent == Meter(40 * each.gradients, 40 * each.forwards)
    assert (counting.graph, counting.plain) == (found.spent.gradients, found.spent.forwards)
    extras = Extras(checks=0, sweeps=True)
    assert extras.cost(40, 3, ["fgsm"])["sweeps"] == found.spent
    assert sum(told) == extras.samples(40, 3, ["fgsm"]) - 40
    assert extras.cost(10_000, 3, ["fgsm"])["sweeps"].gradients == POINTS * each.gradients


def test_nothing_is_left_behind_and_a_seed_is_a_result() -> None:
    model = cnn_bn().train()
    x, y = samples(4, (1, 8, 8))
    before = trace(model)
    one, again, other = (curves(model, Pair(x, y), Ball(0.1), seed=seed) for seed in (0, 0, 1))
    assert same(trace(model), before)
    assert (one.eps, one.steps) == (again.eps, again.steps)
    assert one.steps != other.steps


def test_the_result_as_plain_data(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = small
    found = curves(model, Pair(x, y), Ball(0.1), points=10)
    plain = found.to_json()
    assert [point["eps"] for point in plain["eps"]] == [radius for radius, _ in found.eps]
    assert [point["steps"] for point in plain["steps"]] == list(STEPS)
    assert all(point["points"] == 10 and len(point["interval"]) == 2 for point in plain["eps"])
    assert plain["gradients"] == found.spent.gradients


# ------------------------------------------------------------------------------------------------ the warning


class Flat(nn.Module):
    """Keeps its logits and has no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x * 4).round() / 4 + 0 * x)
        return out


def test_a_network_without_gradients_is_found_out_at_grey(small: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, x, _ = small
    flat = Flat(nn.Sequential(nn.Flatten(), nn.Linear(16, 3).double()))
    with torch.no_grad():
        flat.net[1].weight.zero_()
        flat.net[1].weight[0, 0] = flat.net[1].weight[1, 1] = flat.net[1].weight[2, 2] = 50.0
        x = 0.1 * x
        x.flatten(1)[torch.arange(90), torch.arange(90) % 3] = 1.0
    y = torch.arange(90) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = curves(flat, Pair(x, y), Ball(0.1))
    (text,) = found.warnings
    last = found.eps[-1][1]
    assert last.value > 0.6
    assert text == (
        f"accuracy under PGD is still {last.value:.0%} at eps 0.5, where every image can be made grey: "
        "the attack fails"
    )
    assert curves(flat.net, Pair(x, y), Ball(0.1)).warnings == ()


def _curves(correct_: int, points: int, chance: float) -> Curves:
    last = (0.5, Accuracy(correct_, points))
    return Curves((last,), (), chance, Meter(), 0.0)


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [((0, 100, 0.1), False), ((15, 100, 0.1), False), ((30, 100, 0.1), True), ((3, 5, 0.4), False)],
)
def test_the_warning_needs_more_than_chance(arguments: Any, warned: bool) -> None:
    assert bool(_curves(*arguments).warnings) == warned
