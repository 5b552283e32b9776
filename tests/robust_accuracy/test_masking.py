"""The checks for gradient masking: silent on honest networks, and each speaks of what it was built for."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Counting, cnn_bn, same, slow, trace
from torch import Tensor, nn

import controlat
from controlat import pgd
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.control.cost import Meter
from controlat.data import load
from controlat.robust_accuracy import MaskingWarning, protocol
from controlat.robust_accuracy.masking import (
    CHECKS,
    LOSS_STEPS,
    MANY,
    QUERIES,
    check_cost,
)
from controlat.robust_accuracy.masking_result import Masking, masking_warnings
from controlat.robust_accuracy.protocol import Extras
from controlat.robust_accuracy.robust import Robustness, run_attacks
from controlat.robust_accuracy.source import Pair

EPS = 0.1
ZERO, LOSS, FALLS = "input gradient of exactly zero", "the loss does not rise", "the loss falls"
TINY = "whose gradient is lost in rounding"
RESTARTS, BLACK_BOX = "ten more restarts", "random search without gradients"


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load("digits").test.take(torch.arange(300))


def fitted(hidden: int, seed: int) -> nn.Module:
    """A linear network (hidden 0) or one with a hidden layer, after five epochs of PGD-3."""
    train = load("digits").train
    x, y = train.take(torch.arange(len(train)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = [nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)] if hidden else [nn.Linear(64, 10)]
    model = nn.Sequential(nn.Flatten(), *inner)
    draw = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for part in torch.randperm(len(x), generator=draw).split(64):
            adversarial = pgd(model, x[part], y[part], eps=EPS, alpha=EPS / 2, steps=3, generator=draw)
            sgd.zero_grad()
            torch.autograd.backward(cross_entropy(model(adversarial), y[part]).mean())
            sgd.step()
    return model.eval()


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    return fitted(128, 0)


class Masked(nn.Module):
    """An honest network behind something that spoils its gradients."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.before, self.scale = net, before, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.net(self.before(x))
        return out


class Backward(torch.autograd.Function):
    """The identity, with another backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.change(g, x), None


def with_gradient(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: Backward.apply(x, change)


def checked(
    model: nn.Module, digits: tuple[Tensor, Tensor], *attacks: str, eps: float = EPS, **options: Any
) -> Robustness:
    options = {"checks": CHECKS} | options
    return run_attacks(model, Pair(*digits), Ball(eps), attacks=attacks or ["pgd-20"], **options)


def told(found: Robustness) -> list[str]:
    """Which of the sentences were said."""
    every = (ZERO, TINY, LOSS, FALLS, RESTARTS, BLACK_BOX)
    kinds = [kind for text in found.warnings for kind in every if kind in text]
    assert len(kinds) == len(found.warnings)
    return kinds


# -------------------------------------------------------------------------------------------- honest networks


@pytest.mark.parametrize("hidden", [0, 128])
@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_nothing_is_said_of_honest_networks(digits: tuple[Tensor, Tensor], hidden: int, seed: int) -> None:
    x, y = digits
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaskingWarning)
        found = controlat.robustness(fitted(hidden, seed), x, y, eps=EPS, seed=seed)
    masking = found.masking
    assert found.warnings == ()
    assert (masking.points, masking.survivors, masking.zero_gradients) == (100, 100, 0)
    assert masking.blackbox <= 1
    assert 0.5 < found.robust.value < 0.9
    assert list(masking.losses) == list(LOSS_STEPS)
    assert masking.losses[50] > 1.5 * masking.losses[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_is_said_in_either_norm(honest: nn.Module, digits: tuple[Tensor, Tensor], norm: str) -> None:
    x, y = digits
    eps = 0.05 if norm == "linf" else 0.4
    attacks = ["pgd-20", "cw-30-k50"]
    assert controlat.robustness(honest, x, y, eps=eps, norm=norm, attacks=attacks).warnings == ()


# -------------------------------------------------------------------------------------------- masked networks


def test_saturated_logits_have_zero_gradients(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = checked(Masked(honest, lambda x: x, 1e4), digits, "pgd-20", "cw-30")
    assert found.masking.zero_gradients > 95
    assert told(found)[0] == ZERO
    assert BLACK_BOX not in told(found), "the margin loss of cw is not saturated"
    assert RESTARTS not in told(found)
    blind = checked(Masked(honest, lambda x: x, 1e4), digits, "fgsm", "pgd-20")
    assert {ZERO, BLACK_BOX} <= set(told(blind))
    assert blind.robust.correct > found.robust.correct + 50, "that is what it warns of"


def test_a_softmax_that_rounds_to_one_hot_is_seen(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Logits 6 times as far apart: gradients are there, but that in the label's logit is rounded to 0."""
    scaled = Masked(honest, lambda x: x, 6.0)
    found, both = checked(scaled, digits, "pgd-20"), checked(scaled, digits, "pgd-20", "cw-30")
    x, y = digits
    loss = cross_entropy(scaled(x).double(), y).detach()
    right = ((loss < 2**-23) & found.survived)[scaled(x).argmax(1) == y]
    looked_at = right[torch.arange(100) * len(right) // 100]
    assert found.masking.zero_gradients == 0
    assert found.masking.tiny_gradients == int(looked_at.sum()) > 5
    assert TINY in told(found)
    assert both.masking.tiny_gradients > 5
    assert TINY not in told(both), "the margin does not saturate"


@pytest.mark.parametrize(
    "before",
    [lambda x: (4 * x).round() / 4, lambda x: x.detach() + 0 * x],
    ids=["quantised", "detached"],
)
def test_inputs_without_a_gradient(
    honest: nn.Module, digits: tuple[Tensor, Tensor], before: Callable[[Tensor], Tensor]
) -> None:
    found = checked(Masked(honest, before), digits, eps=0.15)
    assert {ZERO, LOSS, BLACK_BOX} <= set(told(found))
    assert found.masking.zero_gradients == found.masking.points
    assert len(set(found.masking.losses.values())) == 1


def test_a_gradient_that_points_downhill(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = checked(Masked(honest, with_gradient(lambda g, x: -g)), digits)
    assert told(found) == [LOSS, BLACK_BOX]
    assert found.masking.losses[50] < found.masking.losses[1]


def test_a_gradient_that_is_noise(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    noise = with_gradient(lambda g, x: g * torch.sin(1e5 * x))
    found = checked(Masked(honest, noise), digits, eps=0.15)
    assert {LOSS, BLACK_BOX} <= set(told(found))
    assert ZERO not in told(found)


def test_a_gradient_that_sees_a_part_only_is_found_by_random_search(
    honest: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    columns = with_gradient(lambda g, x: g * (torch.arange(8) % 4 == 0))
    found = checked(Masked(honest, columns), digits, "pgd-5-40", eps=0.15)
    assert told(found) == [BLACK_BOX], "the loss rises, and restarts are of no use"
    assert found.masking.blackbox > 20


def test_a_high_frequency_hides_the_way_up(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = checked(Masked(honest, lambda x: x + 0.01 * torch.sin(2000 * x)), digits, eps=0.15)
    assert BLACK_BOX in told(found)
    assert found.masking.zero_gradients == 0


def test_a_weak_evaluation_is_told_to_add_restarts(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = checked(honest, digits, "fgsm", eps=0.12)
    assert told(found) == [RESTARTS]
    (text,) = found.warnings
    assert f"broke {found.masking.restarts} of {found.masking.survivors} points" in text
    assert "add attacks or restarts" in text
    assert told(checked(honest, digits, "fgsm", "pgd-20-10", eps=0.12)) == []


# ------------------------------------------------------------------------------------------------- thresholds


def _said(**changes: Any) -> list[str]:
    rising = torch.tensor([[0.1], [0.5], [0.5]]) * torch.linspace(0.5, 1.5, 100)
    losses, share = changes.pop("losses", rising), changes.pop("share", 1.0)
    return list(masking_warnings(Masking(**({"points": 100, "survivors": 100} | changes)), losses, share))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"zero_gradients": 2}, ZERO),
        ({"share": 1.0, "tiny_gradients": 2}, TINY),
        ({"restarts": 3}, RESTARTS),
        ({"blackbox": 3}, BLACK_BOX),
        ({"survivors": 10, "blackbox": 2}, BLACK_BOX),
        ({"share": 0.1, "restarts": 21}, RESTARTS),
        ({"losses": torch.full((3, 100), 0.7)}, LOSS),
        ({"losses": torch.tensor([[0.7], [0.5], [0.3]]) * torch.linspace(0.5, 1.5, 100)}, LOSS),
        ({"losses": torch.tensor([[0.1], [0.5], [0.4]]) * torch.linspace(0.5, 1.5, 100)}, FALLS),
    ],
)
def test_each_number_has_its_sentence(changes: dict[str, Any], kind: str) -> None:
    (text,) = _said(**changes)
    assert kind in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_gradients": 1},
        {"restarts": 2, "blackbox": 2},
        {"survivors": 1, "restarts": 1, "blackbox": 1},
        {"survivors": 0},
        {"points": 9, "losses": torch.full((3, 9), 0.7)},
        {"losses": torch.tensor([[0.1], [0.5], [0.495]]) * torch.linspace(0.5, 1.5, 100)},
    ],
)
def test_a_little_of_anything_is_no_sign(changes: dict[str, Any]) -> None:
    assert _said(**changes) == []


# ------------------------------------------------------------------------------------ counts and side effects


@pytest.mark.parametrize("checks", [1, 7, 40])
def test_every_pass_is_counted_and_bounded(
    honest: nn.Module, digits: tuple[Tensor, Tensor], checks: int
) -> None:
    counting = Counting(honest)
    found = checked(counting, digits, "fgsm", checks=checks, batch_size=16)
    spent = found.masking.spent
    assert counting.graph == found.spent.gradients + spent.gradients
    assert counting.plain == found.spent.forwards + spent.forwards
    assert found.masking.points == found.masking.survivors == checks
    assert spent.gradients <= checks * check_cost().gradients
    assert spent.forwards <= checks * check_cost().forwards
    broken = found.masking.restarts
    assert spent.gradients >= checks * (1 + LOSS_STEPS[-1]) + (checks - broken) * MANY.cost()


def test_a_point_that_nothing_breaks_costs_exactly_the_bound(honest: nn.Module, digits: Any) -> None:
    found = checked(honest, digits, eps=1e-4, checks=5)
    each = check_cost()
    assert found.masking.spent == Meter(5 * each.gradients, 5 * each.forwards)
    assert each.forwards == QUERIES + 1 + MANY.restarts + len(LOSS_STEPS)


def test_there_may_be_fewer_points_than_checks(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    found = checked(honest, (x[:20], y[:20]), eps=0.2)
    assert found.masking.points == found.clean.correct < CHECKS
    assert found.masking.survivors == found.robust.correct < found.masking.points
    none = checked(honest, (x[:20], (y[:20] + 1) % 10))
    assert (none.masking.points, none.masking.survivors, none.warnings) == (0, 0, ())
    assert none.masking.losses == {}


@pytest.mark.parametrize("options", [{"checks": 0}, {"eps": 0.0}])
def test_no_checks_and_radius_0_do_nothing(
    honest: nn.Module, digits: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    counting = Counting(Masked(honest, lambda x: x.detach() + 0 * x))
    found = checked(counting, digits, "pgd-2", **options)
    assert found.masking == Masking()
    assert counting.graph == found.spent.gradients


def test_the_model_and_the_global_generator_are_left_as_they_were() -> None:
    model = cnn_bn().train()
    model[1].eval()
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(30, 1, 8, 8, generator=draw, dtype=torch.float64)
    before = trace(model)
    with torch.no_grad():
        y = cnn_bn().eval()(x).argmax(1)
    found = run_attacks(model, Pair(x, y), Ball(0.05), attacks=["fgsm"], checks=10)
    assert found.masking.points == 10
    assert same(trace(model), before)


def test_the_same_seed_gives_the_same_result(honest: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    def numbers(seed: int) -> dict[str, Any]:
        found = checked(honest, digits, "fgsm", eps=0.15, checks=40, seed=seed).masking.to_json()
        del found["seconds"]
        return found

    assert numbers(0) == numbers(0) != numbers(1)


def test_robustness_warns_and_the_others_keep_it_in_the_result(
    honest: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    masked = Masked(honest, with_gradient(lambda g, x: -g))
    with pytest.warns(MaskingWarning) as raised:
        found = controlat.robustness(masked, *digits, eps=EPS, attacks=["pgd-20"])
    assert [str(w.message) for w in raised] == list(found.warnings) != []
    assert {w.filename for w in raised} == {__file__}, "they point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = protocol(masked, Pair(*digits), Ball(EPS), attacks=["pgd-20"], extras=Extras())
    assert kept.warnings == found.warnings
    assert kept.to_json()["masking"]["warnings"] == list(found.warnings)
