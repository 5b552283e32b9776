"""The robust-accuracy protocol against closed forms, other tools and its own invariants."""

import math
from collections.abc import Iterator
from functools import partial
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import controlat
from controlat import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy, margin
from controlat.attacks.pgd import path
from controlat.data import load
from controlat.models import build
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy import Accuracy, Attack, parse_attack, wilson

robustness = partial(controlat.robustness, checks=0)  # the checks are the subject of test_masking.py


class Counting(nn.Module):
    """Counts what passes through it: batch sizes with a graph, and without one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.graph: list[int] = []
        self.plain: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        (self.graph if torch.is_grad_enabled() else self.plain).append(len(x))
        self.modes.add(self.training)
        out: Tensor = self.net(x)
        return out


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    test = load("digits").test
    return test.take(torch.arange(300))


@pytest.fixture(scope="module")
def fitted() -> nn.Module:
    """A small network fitted to the digits with FGSM training: about half robust at 0.075."""
    data = load("digits").train
    x, y = data.take(torch.arange(len(data)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("mlp", (1, 8, 8), 10)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(30):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(128):
            adversarial = x[part].clone().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(model(adversarial), y[part]).sum(), adversarial)
            sgd.zero_grad()
            loss = cross_entropy(model((x[part] + 0.1 * g.sign()).clamp(0, 1)), y[part]).mean()
            torch.autograd.backward(loss)
            sgd.step()
    return model.eval()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------- intervals


@given(points=st.integers(1, 20_000), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_ends_of_wilsons_interval_are_the_two_roots_of_the_score_equation(
    points: int, share: float
) -> None:
    p, z = round(share * points) / points, NormalDist().inv_cdf(0.975)
    ends = wilson(round(share * points), points)
    assert ends[0] <= p <= ends[1]
    for end in ends:
        assert (p - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / points, rel=1e-9, abs=1e-15)


def test_wilson_ends_exactly_at_0_and_1() -> None:
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in (*range(1, 100), 2000, 10_000))


@pytest.mark.parametrize(("successes", "points"), [(0, 0), (-1, 10), (11, 10), (0, -5)])
def test_wilson_refuses_impossible_counts(successes: int, points: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {points}"):
        wilson(successes, points)


def test_accuracy_prints_and_stores_its_interval() -> None:
    found = Accuracy(3, 4)
    assert found.value == 0.75
    assert found.to_json() == {
        "correct": 3,
        "points": 4,
        "value": 0.75,
        "interval": pytest.approx(list(wilson(3, 4))),
    }
    assert str(found) == "75.0% [30.1%, 95.4%]"


# -------------------------------------------------------------------------------------------- attack texts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fgsm", {"steps": 1, "random_start": False, "relative": 1.0, "kappa": None, "restarts": 1}),
        ("pgd-20", {"steps": 20, "restarts": 1, "random_start": True, "alpha": None, "kappa": None}),
        ("pgd-50-10", {"steps": 50, "restarts": 10, "relative": 0.25}),
        ("cw-30", {"steps": 30, "kappa": 0.0, "restarts": 1}),
        ("cw-30-k50", {"steps": 30, "kappa": 50.0}),
        ("cw-30-5", {"steps": 30, "restarts": 5, "kappa": 0.0}),
        ("pgd:steps=50,restarts=10,alpha=2/255", {"steps": 50, "restarts": 10, "alpha": 2 / 255}),
        ("cw:steps=30,kappa=50", {"steps": 30, "kappa": 50.0}),
        ("cw:steps=3,kappa=1/2,alpha=0.01,restarts=2", {"kappa": 0.5, "alpha": 0.01, "restarts": 2}),
        ("pgd:steps=4", {"steps": 4, "alpha": None}),
    ],
)
def test_attack_texts(text: str, wanted: dict[str, Any]) -> None:
    found = parse_attack(text)
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.name == text
    assert found.cost() == found.steps * found.restarts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unknown attack ''"),
        ("square", "unknown attack 'square'"),
        ("fgsm-3", "unknown attack 'fgsm-3'"),
        ("fgsm:alpha=0.1", "attack fgsm does not take alpha"),
        ("pgd", "lacks steps"),
        ("pgd-", "steps must be a number"),
        ("pgd-x", "steps must be a number"),
        ("pgd-0", "steps must be a whole number >= 1, got 0"),
        ("pgd-2.5", "steps must be a whole number"),
        ("pgd-20-0", "restarts must be a whole number >= 1, got 0"),
        ("pgd-20-1.5", "restarts must be a whole number"),
        ("pgd-20-k50", "does not take kappa"),
        ("pgd-1-2-3", "unknown attack"),
        ("pgd-20:alpha=1", "unknown attack"),
        ("pgd:steps=20,kappa=1", "does not take kappa"),
        ("pgd:steps=20,steps=3", "steps is given twice"),
        ("pgd:steps", "expected name=value"),
        ("pgd:steps=20,alpha=-1", "alpha must be >= 0"),
        ("pgd:steps=20,alpha=nan", "alpha must be a number"),
        ("pgd:steps=1e400", "finite|number"),
        ("cw-30-k-5", "unknown attack"),
        ("cw-30-kx", "kappa must be a number"),
        ("cw:kappa=50", "lacks steps"),
        ("cw:steps=3,kappa=-1", "kappa must be >= 0"),
        ("pgd-inf", "steps must be"),
    ],
)
def test_malformed_attack_texts_say_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_attack(text)


@given(st.text(alphabet="pgdcwfsmk-:=,.0123456789 /ea", max_size=14))
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_attack_or_a_value_error(text: str) -> None:
    try:
        found = parse_attack(text)
    except ValueError:
        return
    assert found.steps >= 1
    assert found.restarts >= 1
    assert type(found.steps) is type(found.restarts) is int


# ---------------------------------------------------------------------------------------------- invariants

_ATTACKS = st.lists(
    st.sampled_from(["fgsm", "pgd-1", "pgd-5", "pgd-3-2", "cw-4", "cw-4-k50"]),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(attacks=_ATTACKS, eps=st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.3]), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_accuracy_never_rises_along_the_attacks(
    fitted: nn.Module, digits: tuple[Tensor, Tensor], attacks: list[str], eps: float, seed: int
) -> None:
    found = robustness(fitted, *digits, eps=eps, attacks=attacks, seed=seed, batch_size=128)
    left = [found.clean.correct, *(a.correct for a in found.after.values())]
    assert list(found.after) == attacks
    assert left == sorted(left, reverse=True)
    assert found.robust == found.after[attacks[-1]]
    one_less = robustness(fitted, *digits, eps=eps, attacks=attacks[:-1], seed=seed, batch_size=128)
    assert found.robust.correct <= one_less.robust.correct
    assert one_less.after == {name: found.after[name] for name in attacks[:-1]}, "a prefix is a prefix"
    if eps == 0:
        assert found.robust == found.clean


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_never_raise_accuracy(
    fitted: nn.Module, digits: tuple[Tensor, Tensor], norm: str
) -> None:
    eps = 0.06 if norm == "linf" else 0.5
    attacks = [Attack("pgd", steps=2, restarts=r) for r in (1, 2, 5)]
    counts = [robustness(fitted, *digits, eps=eps, norm=norm, attacks=[a]).robust.correct for a in attacks]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1], "restarts find something at two steps"


def test_a_larger_radius_and_more_steps_break_more(fitted: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    by_eps = [
        robustness(fitted, *digits, eps=e, attacks=["pgd-10"]).robust.value for e in (0, 0.05, 0.1, 0.3)
    ]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] > 0.9
    assert by_eps[-1] < 0.1


def test_attacks_without_random_start_leave_the_same_share_in_any_order(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    chosen = [Attack("a", steps=3, random_start=False), Attack("b", steps=5, random_start=False, kappa=0.0)]
    counts = {
        robustness(fitted, *digits, eps=0.08, attacks=order).robust.correct
        for order in (chosen, chosen[::-1])
    }
    assert len(counts) == 1


def test_the_same_seed_gives_the_same_result_and_batches_of_survivors_their_own_starts(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    def counts(seed: int) -> list[int]:
        found = robustness(fitted, *digits, eps=0.08, attacks=["pgd-1", "pgd-2", "pgd-1-3"], seed=seed)
        return [a.correct for a in found.after.values()]

    state = torch.random.get_rng_state()
    assert counts(0) == counts(0)
    assert len({tuple(counts(seed)) for seed in range(4)}) > 1
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator is not used"


# ------------------------------------------------------------------------------------------------ counting


def test_only_survivors_are_attacked_and_every_pass_is_counted(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    model = Counting(fitted)
    found = robustness(model, *digits, eps=0.08, attacks=["pgd-2", "fgsm", "cw-9"], batch_size=64)
    before = [found.clean.correct, *(a.correct for a in found.after.values())]
    assert before[0] > before[1] > before[2], "each attack must break some, or this test says little"
    assert found.spent.gradients == sum(model.graph) == before[0] * 2 + before[1] * 1 + before[2] * 9
    assert found.spent.forwards == sum(model.plain) == 300 + sum(before[:-1])
    assert model.modes == {False}


def test_restarts_are_tried_on_survivors_of_the_earlier_ones(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    model = Counting(fitted)
    found = robustness(model, *digits, eps=0.06, attacks=["pgd-2-4"], batch_size=1000)
    clean, *survivors = model.plain
    assert clean == 300
    assert survivors[0] == found.clean.correct
    assert survivors == sorted(survivors, reverse=True)
    assert survivors[-1] < survivors[0]
    assert found.spent.gradients == 2 * sum(survivors)


def test_when_nothing_survives_the_other_attacks_cost_nothing(digits: tuple[Tensor, Tensor]) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot((digits[1] + 1) % 10, 10).float() + 0 * x.sum()

    found = robustness(Wrong(), *digits, eps=0.1, attacks=["fgsm", "pgd-3-2"], batch_size=300)
    assert (found.clean.value, found.robust.value) == (0.0, 0.0)
    assert [a.value for a in found.after.values()] == [0.0, 0.0]
    assert found.spent.gradients == 0


def test_progress_reports_every_sample_attacked(fitted: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    seen: list[tuple[int, str]] = []
    found = robustness(
        fitted, *digits, eps=0.05, attacks=["fgsm", "pgd-2"], progress=lambda n, name: seen.append((n, name))
    )
    assert sum(n for n, name in seen if name == "fgsm") == found.clean.correct
    assert sum(n for n, name in seen if name == "pgd-2") == found.after["fgsm"].correct


# --------------------------------------------------------------------------------------------- exact answers


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attack", ["fgsm", "pgd-20", "cw-20", "cw-20-k50", "pgd-20-3"])
@pytest.mark.parametrize("eps", [0.01, 0.05, 0.1])
def test_two_class_linear_models_are_broken_exactly_where_the_margin_is_too_small(
    attack: str, eps: float
) -> None:
    draw = torch.Generator().manual_seed(7)
    x = eps + (1 - 2 * eps) * torch.rand(400, 1, 4, 5, generator=draw)
    linear = nn.Linear(20, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, 20, generator=draw))
        linear.bias.copy_(-linear.weight.sum(1) / 2)
    y = linear(x.flatten(1)).argmax(1)
    y[::10] = 1 - y[::10]  # some are misclassified from the start
    logits, sign = linear(x.flatten(1)).detach(), 1 - 2 * y
    clean = sign * (logits[:, 0] - logits[:, 1])
    worst = clean - eps * (linear.weight[0] - linear.weight[1]).abs().sum()
    found = robustness(nn.Sequential(nn.Flatten(), linear), x, y, eps=eps, attacks=[attack])
    assert found.clean.correct == int((clean > 0).sum()) == 360
    assert found.robust.correct == int((worst > 0).sum())
    assert 0 < found.robust.correct < 360


def _ascent(model: nn.Module, x: Tensor, y: Tensor, kappa: float, steps: int) -> list[Tensor]:
    with FrozenModel(model) as view:
        loss = lambda z, labels: margin(z, labels, kappa)  # noqa: E731
        return list(path(view, x, x, y, ball=Ball(0.2), alpha=0.02, steps=steps, loss=loss))


def test_kappa_0_freezes_a_sample_once_misclassified_and_kappa_50_goes_on(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    lazy, eager = _ascent(fitted, x, y, 0.0, 10), _ascent(fitted, x, y, 50.0, 10)
    with torch.no_grad():
        wrong = [fitted(p).argmax(1) != y for p in lazy]
    broken_early = wrong[4]
    assert 30 < int(broken_early.sum()) < 300
    assert torch.equal(lazy[4][broken_early], lazy[9][broken_early]), "frozen"
    assert bool(wrong[9][broken_early].all())
    moved = (eager[4] - eager[9]).flatten(1).abs().amax(1) > 0
    assert float(moved[broken_early].float().mean()) > 0.95
    with torch.no_grad():
        lead = [margin(fitted(p[9]), y, 50.0)[broken_early].mean() for p in (lazy, eager)]
    assert lead[1] > lead[0] + 1, "kappa 50 leads by more"


def test_pgd_20_agrees_with_torchattacks(fitted: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    import torchattacks

    x, y = digits
    eps = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torchattacks.PGD(fitted, eps=eps, alpha=eps / 4, steps=20, random_start=True)(x, y)
    with torch.no_grad():
        wanted = float((fitted(theirs).argmax(1) == y).float().mean())
    ours = robustness(fitted, x, y, eps=eps, attacks=["pgd-20"]).robust.value
    assert 0.05 < wanted < 0.95
    assert abs(ours - wanted) <= 0.01


def test_fgsm_agrees_with_torchattacks_on_every_count(
    fitted: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    import torchattacks

    x, y = digits
    with torch.no_grad():
        clean = fitted(x).argmax(1) == y
    theirs = torchattacks.FGSM(fitted, eps=0.05)(x, y)
    with torch.no_grad():
        wanted = int(((fitted(theirs).argmax(1) == y) & clean).sum())
    assert robustness(fitted, x, y, eps=0.05, attacks=["fgsm"]).robust.correct == wanted


# ------------------------------------------------------------------------------------- nothing is left behind


def test_the_model_is_left_as_it_was(digits: tuple[Tensor, Tensor]) -> None:
    model = build("cnn_bn", (1, 8, 8), 10).train()
    model[1].eval()  # a module of its own mind
    model[0].weight.requires_grad_(False)
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 3.0)
    flags = [m.training for m in model.modules()]
    asks = [p.requires_grad for p in model.parameters()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = digits[0].clone(), digits[1].clone()
    robustness(model, x[:40], y[:40], eps=0.1, attacks=["fgsm", "pgd-2"])
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == asks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert torch.equal(x, digits[0])
    assert not x.requires_grad


class Broken(nn.Module):
    """Logits that are not finite for some inputs, or whose gradient is not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        if self.kind == "gradient":
            return logits + 0 * (x - x.detach()).flatten(1).sum(1, keepdim=True).sqrt()
        return logits / (0.0 if self.kind == "inf" else 1.0) * (math.nan if self.kind == "nan" else 1.0)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_values_that_are_not_finite_are_an_error_not_an_accuracy(
    digits: tuple[Tensor, Tensor], kind: str
) -> None:
    model = Broken(kind).train()
    with pytest.raises(NonFiniteError, match="not finite"):
        robustness(model, *digits, eps=0.1, attacks=["pgd-2"])
    assert model.training, "put back after the error too"


# ------------------------------------------------------------------------------------------------- bad usage


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eps": -0.1}, "eps must be >= 0"),
        ({"eps": "8/0"}, "eps must be a number"),
        ({"eps": math.inf}, "eps must be finite"),
        ({"norm": "l1"}, "norm must be one of linf, l2"),
        ({"attacks": ["fgsm", "fgsm"]}, "given twice"),
        ({"checks": -1}, "checks must be a whole number >= 0, got -1"),
        ({"attacks": ["pgd-20", "aa"]}, "unknown attack 'aa'"),
        ({"x": torch.full((2, 1, 8, 8), 255.0)}, r"x must lie in \[0, 1\], got values in \[255, 255\]"),
        ({"y": torch.zeros(2)}, "y must hold one integer label"),
        ({"y": torch.tensor([0, -1])}, "labels must be >= 0"),
    ],
)
def test_bad_usage_is_a_value_error_with_the_value(changes: dict[str, Any], reason: str) -> None:
    arguments = {"x": torch.rand(2, 1, 8, 8), "y": torch.tensor([0, 1]), "eps": 0.1} | changes
    with pytest.raises(ValueError, match=reason):
        robustness(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), **arguments)
