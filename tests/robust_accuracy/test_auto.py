"""AutoAttack wrapped here against pyautoattack called directly; counts, warnings, what is left alone."""

import builtins
import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from helpers import same, shorten_autoattack, slow, trace
from torch import Tensor, nn

from controlat._util.errors import NonFiniteError
from controlat.app.settings import AttackSettings, EvaluateSettings
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.data import load
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy import Accuracy, AutoAttacked, autoattack
from controlat.robust_accuracy.auto import auto_cost, require
from controlat.robust_accuracy.robust import run_attacks
from controlat.robust_accuracy.source import Pair, spread


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_autoattack(monkeypatch)


@pytest.fixture(autouse=True)
def silent(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No attack prints or logs anything."""
    with caplog.at_level(logging.DEBUG):
        yield
    assert capsys.readouterr() == ("", "")
    assert not caplog.get_records("call")


class Counting(nn.Module):
    """Counts, in samples, forward passes and those backward passes that go through it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forwards = self.backwards = self.differentiated = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        out: Tensor = self.net(x)
        if x.requires_grad:
            state = {"first": True}

            def count(_: Tensor) -> None:
                self.backwards += len(x)
                self.differentiated += len(x) * state.pop("first", False)

            out.register_hook(count)
        return out


def digits_of(classes: int, n: int) -> tuple[Tensor, Tensor]:
    test = load("digits").test
    x, y = test.take(torch.arange(len(test)))
    chosen = (y < classes).nonzero().squeeze(1)[:n]
    return x[chosen], y[chosen]


def fitted(classes: int) -> nn.Module:
    """A small convolutional network that classifies the first so many digits."""
    train = load("digits").train
    x, y = train.take(torch.arange(len(train)))
    x, y = x[y < classes], y[y < classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    model = nn.Sequential(*layers)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(60):
        part = torch.arange(64 * i, 64 * (i + 1)) % len(x)
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[part]), y[part]))
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def ten() -> nn.Module:
    return fitted(10)


def directly(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> Tensor:
    """Mask of the samples that survive pyautoattack's own evaluation in one call."""
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.CRITICAL)
    with torch.random.fork_rng(devices=[]):
        attack = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=0)
        found, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    logger.setLevel(logging.NOTSET)
    with torch.no_grad():
        return model(found).argmax(1) == y


# --------------------------------------------------------------------------------------- the same as directly


@pytest.mark.slow
def test_the_standard_version_in_full_on_a_few_points(ten: nn.Module) -> None:
    x, y = digits_of(10, 6)
    eps = 0.15
    wanted = directly(ten, x, y, eps, "Linf")
    counting = Counting(ten)
    found = autoattack(counting, Pair(x, y), Ball(eps), points=6)
    assert torch.equal(found.survived, wanted)
    assert 0 < int(wanted.sum()) < found.clean.correct
    assert list(found.after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert found.spent.gradients == counting.backwards <= 6 * auto_cost(10).gradients
    assert found.spent.forwards == counting.forwards - counting.differentiated <= 6 * auto_cost(10).forwards
    assert found.spent.forwards > 5000 * found.robust.correct
    assert found.warnings == ()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), slow("linf", 0.12), ("l2", 0.6)])
def test_few_steps_break_the_same_points(ten: nn.Module, norm: str, eps: float) -> None:
    x, y = digits_of(10, 60)
    wanted = directly(ten, x, y, eps, {"linf": "Linf", "l2": "L2"}[norm])
    found = autoattack(ten, Pair(x, y), Ball(eps, norm), points=60)
    assert torch.equal(found.survived, wanted)
    assert 5 < int(wanted.sum()) < 50
    left = [found.clean.correct, *(a.correct for a in found.after.values())]
    assert left == sorted(left, reverse=True)
    assert found.robust.correct == left[-1] == int(found.survived.sum()) < left[0]
    assert torch.equal(found.positions, torch.arange(60))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (5, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_few_classes(classes: int, wanted: list[str]) -> None:
    x, y = digits_of(classes, 20)
    model, eps = fitted(classes), 0.25
    counting = Counting(model)
    found = autoattack(counting, Pair(x, y), Ball(eps), points=20)
    assert list(found.after) == wanted
    assert found.warnings == (), "the plan has seen to the number of classes"
    assert found.robust.correct < found.clean.correct
    assert found.spent.gradients == counting.backwards
    bound = auto_cost(classes)
    assert found.spent.gradients <= 20 * bound.gradients
    assert found.spent.forwards <= 20 * bound.forwards
    pgd = run_attacks(model, Pair(x, y), Ball(eps), attacks=["fgsm"])
    assert found.robust.correct <= pgd.robust.correct


# ------------------------------------------------------------------------------------ counts and side effects


def test_logits_with_a_graph_count_each_pass_once(ten: nn.Module) -> None:
    x, _ = digits_of(10, 7)
    with FrozenModel(ten) as view:
        with torch.no_grad():
            plain = view.logits(x)
        assert view.meter == Meter(0, 7)
        assert not view.logits(x).requires_grad, "nobody asks for a gradient"
        assert view.meter == Meter(0, 14)
        asked = x.clone().requires_grad_()
        found = view.logits(asked)
        assert view.meter == Meter(0, 21)
        torch.autograd.grad(found.sum(), asked, retain_graph=True)
        assert view.meter == Meter(7, 14), "forward and backward together are one gradient evaluation"
        (gradient,) = torch.autograd.grad(found.sum(), asked)
        assert view.meter == Meter(14, 14)
        assert torch.equal(gradient, view.gradient(view.prepare(x), lambda logits: logits.sum(1)))
    assert torch.equal(plain, found.detach())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [slow(1), 3, 64])
def test_the_bound_is_met_by_samples_that_survive_everything(classes: int, batch_size: int) -> None:
    x, y = digits_of(classes, 4)
    counting = Counting(fitted(classes))
    seen: list[tuple[int, str]] = []
    found = autoattack(
        counting,
        Pair(x, y),
        Ball(1e-4),
        points=4,
        batch_size=batch_size,
        progress=lambda n, name: seen.append((n, name)),
    )
    assert found.robust.correct == found.clean.correct == 4
    bound = auto_cost(classes)
    assert found.spent.gradients == counting.backwards == 4 * bound.gradients
    assert found.spent.forwards == counting.forwards - counting.differentiated
    assert 0.95 * 4 * bound.forwards <= found.spent.forwards <= 4 * bound.forwards
    assert sum(n for n, _ in seen) == 4 * len(found.after)


@pytest.mark.usefixtures("short")
def test_batches_are_attacked_in_turn_and_broken_samples_rest(ten: nn.Module) -> None:
    x, y = digits_of(10, 40)
    seen: dict[str, int] = {}
    found = autoattack(
        ten,
        Pair(x, y),
        Ball(0.07),
        points=40,
        batch_size=16,
        progress=lambda n, name: seen.update({name: seen.get(name, 0) + n}),
    )
    assert seen == dict.fromkeys(found.after, 40)
    assert 0 < found.robust.correct < found.clean.correct


@pytest.mark.usefixtures("short")
def test_points_are_spread_over_the_test_set(ten: nn.Module) -> None:
    x, y = digits_of(10, 100)
    found = autoattack(ten, Pair(x, y), Ball(0.05), points=12)
    assert torch.equal(found.positions, spread(torch.arange(100), 12))
    assert found.clean.points == len(found.survived) == 12
    alone = autoattack(ten, Pair(x[found.positions], y[found.positions]), Ball(0.05), points=500)
    assert torch.equal(alone.survived, found.survived)
    assert found.to_json()["points"] == 12


@pytest.mark.usefixtures("short")
def test_nothing_is_left_behind(ten: nn.Module) -> None:
    x, y = digits_of(10, 10)
    model = nn.Sequential(nn.BatchNorm2d(1), ten).train()
    next(model.parameters()).requires_grad_(False)
    before, inputs, calls = trace(model), x.clone(), 0

    def tracer(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1

    earlier, handlers = sys.gettrace(), list(logging.getLogger().handlers)
    sys.settrace(tracer)
    try:
        one = autoattack(model, Pair(x, y), Ball(0.05), points=10, seed=3)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(earlier)
    again = autoattack(model, Pair(x, y), Ball(0.05), points=10, seed=3)
    assert calls > 0
    assert torch.equal(one.survived, again.survived)
    assert one.spent == again.spent
    assert same(trace(model), before)
    assert torch.equal(x, inputs)
    assert logging.getLogger().handlers == handlers
    assert not logging.getLogger("auto-attack").handlers


@pytest.mark.usefixtures("short")
def test_radius_0_breaks_nothing(ten: nn.Module) -> None:
    x, y = digits_of(10, 10)
    found = autoattack(ten, Pair(x, y), Ball(0.0), points=10)
    assert found.robust == found.clean


@pytest.mark.usefixtures("short")
def test_where_all_are_wrong_there_is_nothing_to_attack(ten: nn.Module) -> None:
    x, _ = digits_of(10, 8)
    with torch.no_grad():
        wrong = (ten(x).argmax(1) + 1) % 10
    found = autoattack(ten, Pair(x, wrong), Ball(0.1), points=8)
    assert (found.clean.correct, found.robust.correct, found.spent.gradients) == (0, 0, 0)


@pytest.mark.usefixtures("short")
def test_a_network_in_float64_is_attacked_too(ten: nn.Module) -> None:
    x, y = digits_of(10, 40)
    double = copy.deepcopy(ten).double()
    found = autoattack(double, Pair(x.double(), y), Ball(0.1), points=40)
    assert found.clean == autoattack(ten, Pair(x, y), Ball(0.1), points=40).clean
    assert found.robust.correct < found.clean.correct


# ----------------------------------------------------------------------------------------------- its warnings


class Changed(nn.Module):
    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        if self.kind == "random":
            return logits + 0.1 * torch.randn_like(logits)
        if self.kind == "probabilities":
            return logits.softmax(1)
        return self.net(x.detach() + 0 * x)  # no gradient


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("random", "it seems to be a randomized defense"),
        ("probabilities", "the output is a probability distribution"),
        ("detached", "points with zero gradient"),
    ],
)
def test_its_warnings_are_in_the_result_once(ten: nn.Module, kind: str, reason: str) -> None:
    x, y = digits_of(10, 12)
    found = autoattack(Changed(ten, kind), Pair(x, y), Ball(0.02), points=12, batch_size=5)
    assert len([text for text in found.warnings if reason in text]) == 1
    assert not any("flags_doc" in text or text.endswith(".") for text in found.warnings)
    assert found.to_json()["warnings"] == list(found.warnings)


@pytest.mark.usefixtures("short")
def test_what_square_alone_breaks_is_a_warning(ten: nn.Module) -> None:
    x, y = digits_of(10, 40)
    found = autoattack(Changed(ten, "detached"), Pair(x, y), Ball(0.2), points=40)
    white, square = (found.after[name].correct for name in ("fab-t", "square"))
    assert square < white
    assert any(f"Square broke {white - square} of {white} points" in text for text in found.warnings)


# --------------------------------------------------------------------------------------------------- refusals


def test_without_pyautoattack_settings_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "pyautoattack":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for refused in (
        require,
        lambda: EvaluateSettings(autoattack=5),
        lambda: AttackSettings("last.pt", autoattack=5),
    ):
        with pytest.raises(ValueError, match=r"pip install 'controlat\[autoattack\]', or leave out"):
            refused()
    EvaluateSettings(autoattack=0)


def test_inputs_that_are_no_images_are_refused() -> None:
    x, y = torch.rand(5, 8), torch.arange(5) % 2
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\), got inputs \(1, 8\)"):
        autoattack(nn.Linear(8, 2), Pair(x, y), Ball(0.1), points=3)


def test_logits_that_are_not_finite_are_an_error(ten: nn.Module) -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = ten(x) / 0
            return out

    x, y = digits_of(10, 3)
    with pytest.raises(NonFiniteError):
        autoattack(Infinite(), Pair(x, y), Ball(0.1), points=3)


def test_the_result_as_plain_data() -> None:
    some = Accuracy(3, 4)
    found = AutoAttacked(some, {"apgd-ce": some}, some, auto_cost(10), 1.5)
    plain = found.to_json()
    assert plain["after"]["apgd-ce"]["value"] == 0.75
    assert plain["gradients"] == auto_cost(10).gradients == 101 + 9 * 101 + 9 * 100
