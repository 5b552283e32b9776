"""Terminal costs: values and gradients agree, and nothing of the driver is touched; what a text names."""

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, flat, same, samples, split, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import CASES, constant, driver, passes, smooth
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat.app.experiment import TERMINAL_POINTS, Experiment
from controlat.app.settings import EvaluateSettings
from controlat.attacks.balls import Ball
from controlat.attacks.losses import LOSSES, lead
from controlat.attacks.pgd import ascend
from controlat.control.cost import Meter
from controlat.data import Dataset
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.models.frozen.view import FrozenModel
from controlat.pmp.terminal import (
    AdversarialLoss,
    Terminal,
    Weighted,
    build_terminal,
    described,
    names,
    parse_terminal,
    try_terminal,
)

SIZE, N = (1, 4, 4), 9
LOSS_NAMES = tuple(LOSSES)


def phi(n: int = N, *, norm: str = "linf", **options: Any) -> AdversarialLoss:
    return AdversarialLoss(*samples(n, SIZE, seed=9), Ball(0.1, norm), **{"steps": 3, **options})


def trained(model: nn.Module | None = None) -> Driver:
    """After a few steps of training."""
    d = driver(CASES["pgd_at"], model, channels_last=False)
    for _ in rollout(d, constant(CASES["pgd_at"].control()), until=1):
        pass
    return d


class Noisy(nn.Module):
    """BatchNorm, dropout, and buffers that a forward pass writes into in either mode."""

    def __init__(self) -> None:
        super().__init__()
        with rng.scoped(1, "noisy"):
            first = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Dropout(0.2)
            self.net = nn.Sequential(*first, nn.Flatten(), nn.Linear(48, CLASSES)).double()
        self.register_buffer("calls", torch.zeros(1).double())
        self.register_buffer("hidden", torch.zeros(1).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden += 1
        return self.net(x)


class Size:
    """The user's own: half the squared length of the parameters."""

    lower = 0.0

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        return 0.5 * float(flat(driver.parameters).square().sum())

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        return [p.detach().clone() for p in driver.parameters]

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        return ("nothing much",)


COSTS: dict[str, Terminal] = {
    "adversarial": phi(),
    "margin": phi(loss="margin"),
    "clean": phi(steps=0),
    "clean margin": phi(steps=0, loss="margin"),
    "one small step": phi(steps=1, alpha=0.01, seed=4),
    "weighted": Weighted(((0.7, phi()), (0.3, phi(steps=0)))),
    "nested": Weighted(((2.0, Weighted(((0.5, phi()), (-1.0, phi(loss="margin"))))), (0.1, Size()))),
    "own": Size(),
}
costs = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)


@costs
def test_the_gradient_is_that_of_the_value(cost: Terminal) -> None:
    """Signs do not change between the ends, so that the adversary stays; three random directions."""
    d = trained()
    gradient, theta = cost.gradient(d), [p.detach().clone() for p in d.parameters]
    assert [g.shape for g in gradient] == [p.shape for p in d.parameters]
    assert not any(g.requires_grad for g in gradient)
    for i in range(3):
        draw = rng.generator(i, "direction")
        e = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in theta]
        e = [t / flat(e).norm() for t in e]
        ends = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                torch._foreach_copy_(d.parameters, theta)
                torch._foreach_add_(d.parameters, e, alpha=h)
            ends.append(cost.value(d))
        assert float(flat(gradient) @ flat(e)) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("steps", [0, 3])
def test_the_adversarial_loss_is_a_mean_under_pgd_by_hand(loss: str, steps: int) -> None:
    d, cost = trained(), phi(steps=steps, loss=loss)
    with FrozenModel(d.model, channels_last=False) as view:
        start = rng.generator(cost.seed, "terminal", 0)
        x = ascend(view, cost.x, cost.y, ball=cost.ball, alpha=0.1 / 4, steps=steps, generator=start)
    assert bool(steps) == bool((x - cost.x).abs().max() > 0.05)
    assert steps or same(x, cost.x)
    z = d.model.eval()(x)
    other = torch.where(F.one_hot(cost.y, CLASSES).bool(), -torch.inf, z).amax(1)
    by_hand = F.cross_entropy(z, cost.y) if loss == "cross_entropy" else (other - z[range(N), cost.y]).mean()
    assert cost.value(d) == pytest.approx(by_hand.item(), rel=1e-12)
    expected = torch.autograd.grad(by_hand, d.parameters)
    torch.testing.assert_close(flat(cost.gradient(d)), flat(expected), rtol=1e-10, atol=1e-14)


def test_the_margin_loss_is_negative_where_the_label_wins() -> None:
    d = trained()
    z = d.model.eval()(phi().x).detach()
    right = replace(phi(steps=0, loss="margin"), y=z.argmax(1))
    assert right.value(d) == pytest.approx(float(lead(z, right.y).mean()))
    assert right.value(d) < 0
    assert phi(steps=0, loss="margin").value(d) < phi(loss="margin").value(d)
    with pytest.raises(ValueError, match="loss must be one of cross_entropy, margin, got 'hinge'"):
        phi(loss="hinge")


def test_an_attack_costs_and_more_steps_cost_more() -> None:
    d = trained()
    found = [phi(steps=k, alpha=0.02).value(d) for k in (0, 1, 3, 10)]
    assert found == sorted(found)
    assert found[0] < found[-1]
    assert phi(seed=1).value(d) != phi(seed=2).value(d)


def test_many_samples_are_taken_in_batches_and_the_mean_is_over_all() -> None:
    d, cost = trained(), phi(300, steps=0)
    parts = [replace(cost, x=cost.x[p], y=cost.y[p]) for p in (slice(0, 256), slice(256, 300))]
    mean = sum(len(p.x) * p.value(d) for p in parts) / 300
    assert cost.value(d) == pytest.approx(mean, rel=1e-12)
    whole = sum(len(p.x) * flat(p.gradient(d)) for p in parts) / 300
    torch.testing.assert_close(flat(cost.gradient(d)), whole, rtol=1e-10, atol=1e-14)


def test_a_weighted_sum_is_one() -> None:
    d, parts = trained(), (phi(), phi(steps=0), Size())
    cost = Weighted(tuple(zip((0.6, -0.4, 0.1), parts, strict=True)))
    assert isinstance(cost.parts[0][1], AdversarialLoss)
    values, gradients = [p.value(d) for p in parts], [flat(p.gradient(d)) for p in parts]
    assert cost.value(d) == pytest.approx(0.6 * values[0] - 0.4 * values[1] + 0.1 * values[2], rel=1e-12)
    expected = 0.6 * gradients[0] - 0.4 * gradients[1] + 0.1 * gradients[2]
    torch.testing.assert_close(flat(cost.gradient(d)), expected, rtol=1e-12, atol=1e-15)


def test_lower_bounds_are_below_the_value() -> None:
    d = trained()
    for cost in COSTS.values():
        assert cost.lower <= cost.value(d)
    assert phi().lower == Weighted(((0.5, phi()), (0.5, phi(steps=0)))).lower == 0
    assert phi(loss="margin").lower == Weighted(((1.0, phi()), (0.1, phi(loss="margin")))).lower == -torch.inf
    assert Weighted(((-1.0, phi()),)).lower == -torch.inf  # the cross-entropy has no upper bound
    assert Weighted(((0.0, phi(loss="margin")), (1.0, phi()))).lower == 0
    with pytest.raises(ValueError, match=r"all weights .* are 0"):
        Weighted(((0.0, phi()),))


# -------------------------------------------------------------------------------------- what they leave alone


@costs
@pytest.mark.parametrize("training", [True, False])
def test_flags_buffers_gradients_and_randomness_are_left_alone(cost: Terminal, training: bool) -> None:
    d = trained(Noisy())
    d.model.train(training)
    d.model.net[3].train(not training)
    d.parameters[0].grad = torch.ones_like(d.parameters[0])
    before, snapshot, counts = trace(d.model), d.snapshot(), d.meter.copy()
    value, gradient = cost.value(d), cost.gradient(d)
    assert same(trace(d.model), before)
    assert same(d.snapshot(), snapshot)
    assert d.meter == counts
    assert cost.value(d) == value
    assert same(cost.gradient(d), gradient)


def test_an_error_leaves_the_driver_alone_too() -> None:
    d = trained(Noisy())
    with torch.no_grad():
        d.parameters[-1].fill_(torch.nan)
    d.model.train()
    before = trace(d.model)
    with pytest.raises(NonFiniteError, match="the terminal cost is not finite"):
        phi(steps=0).value(d)
    with pytest.raises(NonFiniteError, match="gradient of the terminal cost is not finite"):
        phi(steps=0).gradient(d)
    after = trace(d.model)
    assert (after["flags"], after["identity"]) == (before["flags"], before["identity"])
    assert same(after["random"], before["random"])


def test_parameters_that_are_not_trained_have_no_gradient() -> None:
    model = smooth()
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    d = trained(model)
    assert [g.shape for g in phi().gradient(d)] == [p.shape for p in d.parameters]
    assert len(d.parameters) == 4


# ---------------------------------------------------------------------------------------------- names, counts


def test_what_is_left_out_is_named() -> None:
    smooth_steps = "the adversary's (l_2 steps of Phi)"
    plain, noisy = trained(), trained(Noisy())
    assert phi().dropped(plain) == ()
    assert phi(norm="l2").dropped(plain) == (smooth_steps,)
    assert phi(norm="l2", steps=0).dropped(plain) == ()
    assert phi().dropped(noisy) == ()
    assert phi(norm="l2").dropped(noisy) == (smooth_steps,)
    both = Weighted(((1.0, phi(norm="l2")), (1.0, phi()), (0.5, Size())))
    assert both.dropped(noisy) == ("nothing much", smooth_steps)


@pytest.mark.parametrize("steps", [0, 3])
def test_evaluations_are_those_that_the_network_sees(steps: int) -> None:
    d, cost = trained(), phi(steps=steps)
    forwards, backwards = passes(d.model)
    meter = Meter()
    cost.value(d, meter)
    assert meter == Meter(steps * N, N)
    assert (sum(forwards), sum(backwards)) == ((steps + 1) * N, steps * N)
    forwards.clear()
    backwards.clear()
    meter = Meter()
    cost.gradient(d, meter)
    assert meter == Meter((steps + 1) * N)
    assert (sum(forwards), sum(backwards)) == ((steps + 1) * N, (steps + 1) * N)
    meter = Meter()
    Weighted(((0.7, cost), (0.3, phi(steps=0)))).gradient(d, meter)
    assert meter == Meter((steps + 2) * N)


def test_the_users_own_cost_serves_as_any_other() -> None:
    from controlat.pmp.costate import backward

    d = driver(CASES["pgd_at"], channels_last=False)
    rec = Recording.of(d, constant(CASES["pgd_at"].control(), epochs=1))
    last = next(iter(backward(rec, Size())))
    theta = list(rec.end.model.values())
    assert same(last.costates[3].parameters, [-t for t in theta])
    assert last.dropped == ("nothing much",)


# ---------------------------------------------------------------------------------------- what is no terminal


X, Y = samples(4, SIZE)
OUTSIDE, NOT_A_NUMBER = X + 1, X.clone().fill_(torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[:0], "y": Y[:0]}, "x must be a batch .* that is not empty"),
        ({"x": OUTSIDE}, r"x must lie in \[0, 1\], got values in .*: normalisation belongs inside the model"),
        ({"x": -X - 0.1}, r"x must lie in \[0, 1\]"),
        ({"x": NOT_A_NUMBER}, r"x must lie in \[0, 1\], got values in \[nan, nan\]"),
        ({"x": X / 0}, r"x must lie in \[0, 1\]"),
        ({"x": (255 * X).byte()}, "divide pixels by 255 first"),
        ({"x": X.numpy()}, "x must be a torch.Tensor, got ndarray"),
        ({"y": Y[:3]}, r"one integer label per sample, shape \(4,\) .*got torch.int64 \(3,\)"),
        ({"y": Y.double()}, r"y must hold one integer label per sample, .* got torch.float64"),
        ({"y": F.one_hot(Y)}, "y must hold one integer label per sample"),
        ({"y": Y - 5}, "labels must be >= 0, got -5"),
        ({"steps": -1}, r"steps must be a whole number >= 0 \(0 for the clean loss\), got -1"),
        ({"steps": 2.5}, "steps must be a whole number >= 0 .*, got 2.5"),
        ({"steps": math.nan}, "steps must be finite"),
        ({"alpha": 0.0}, "alpha must be > 0, got 0; leave it out for eps/4"),
        ({"alpha": -0.1}, "alpha must be > 0, got -0.1"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": "big"}, "alpha must be a number such as"),
    ],
)
def test_what_an_adversarial_loss_cannot_be_of_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialLoss(**{"x": X, "y": Y, "ball": Ball(0.1), **changes})


def test_numbers_may_be_texts_and_whole_floats() -> None:
    assert phi(alpha="2/255").alpha == 2 / 255
    assert phi(steps=3.0).steps == 3
    assert phi(steps=3.0, alpha="1/40").value(trained()) == phi(steps=3, alpha=1 / 40).value(trained())


class Bare(SimpleNamespace):
    """Anything."""


def bare(**changes: Any) -> Bare:
    """A terminal cost that lacks what is None."""
    return Bare(**{"lower": 0, "value": min, "gradient": min, "dropped": min, **changes})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"needs at least one \(weight, terminal cost\), got none"),
        (((math.nan, Size()),), "a weight must be finite, got nan"),
        (((1.0, Size()), (-math.inf, Size())), "a weight must be finite, got -inf"),
        ((("much", Size()),), "a weight must be a number such as .*, got 'much'"),
        (((1.0, 3),), "a part of a weighted sum is a int without value, gradient, dropped, lower"),
        (((1.0, Size),), "a part of a weighted sum is the class Size; it must be an object of it"),
        (((1.0, bare(gradient=None)),), r"is a Bare without gradient; see controlat.pmp.Terminal"),
        (((1.0, bare(lower=math.nan)),), r"without lower \(a number, -inf for none\)"),
        (((1.0, bare(lower=lambda: 0)),), "without lower"),
    ],
)
def test_what_cannot_be_summed_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weighted(parts)


class Broken(Size):
    """Finite nowhere."""

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        return math.nan

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        return [torch.full_like(p, math.inf) for p in driver.parameters]


BROKEN: list[Any] = [((1.0, Broken()),), ((1.0, Size()), (0.5, Broken())), ((1e308, Size()),)]


@pytest.mark.parametrize("parts", BROKEN)
def test_a_sum_that_is_not_finite_is_reported(parts: Any) -> None:
    d, cost = trained(), Weighted(parts)
    with torch.no_grad():
        d.parameters[0].fill_(1e5)
    with pytest.raises(NonFiniteError, match="the terminal cost is not finite"):
        cost.value(d)
    with pytest.raises(NonFiniteError, match="gradient of the terminal cost is not finite"):
        cost.gradient(d)


# --------------------------------------------------------------------------------------------------- in words


def test_a_terminal_cost_says_what_it_is() -> None:
    attack = "PGD-3, eps = 0.1 (linf), alpha = eps/4, one random start"
    adversarial = f"adversarial cross-entropy on 9 held-out points, {attack}"
    assert described(phi()) == adversarial
    assert described(phi(steps=0)) == "clean cross-entropy on 9 held-out points"
    assert described(phi(steps=0, loss="margin")) == "clean margin on 9 held-out points"
    margin = "adversarial margin on 9 held-out points, PGD-3 on cross-entropy, eps = 0.1 (l2), alpha = 0.02, "
    assert described(phi(loss="margin", norm="l2", alpha=0.02)) == f"{margin}one random start"
    assert described(Size()) == "Size"
    clean = "clean cross-entropy on 9 held-out points"
    both = Weighted(((1.0, phi()), (-0.1, phi(steps=0)), (2.0, Size())))
    assert described(both) == f"1 * ({adversarial}) + -0.1 * ({clean}) + 2 * (Size)"


# ---------------------------------------------------------------------------------------------------- by name

NAMES = st.sampled_from([*names(), "math:sqrt", "collections.abc:Mapping.get"])
WEIGHTS = st.floats(0, 1e300, allow_subnormal=False)
SPACE = st.sampled_from(["", " ", "  "])


@st.composite
def sums(draw: st.DrawFn) -> tuple[str, list[tuple[float, str]]]:
    """A text, and what it means."""
    text, parts = "", []
    for i in range(draw(st.integers(1, 4))):
        name, sign = draw(NAMES), draw(st.sampled_from(["+", "-"] if i else ["", "-", "+"]))
        weight = draw(st.none() | WEIGHTS)
        factor = "" if weight is None else f"{weight!r}{draw(SPACE)}*{draw(SPACE)}"
        text += draw(SPACE) + sign + draw(SPACE) + factor + name + draw(SPACE)
        size = 1.0 if weight is None else weight
        parts.append((-size if sign == "-" else size, name))
    return text, parts


@given(sums())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_sum_is_read_as_it_was_written(case: tuple[str, list[tuple[float, str]]]) -> None:
    text, parts = case
    assert parse_terminal(text) == tuple(parts)


@given(st.text("+-*/. :0123456789eaclnEmrgi", max_size=12))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_other_text_is_refused_and_nothing_else_happens(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert {name for _, name in parse_terminal(text)} <= {"clean", "margin"}


def test_fractions_are_exact() -> None:
    assert parse_terminal("1/3*clean+2e-3*margin-.5*adversarial") == (
        (1 / 3, "clean"),
        (0.002, "margin"),
        (-0.5, "adversarial"),
    )


CHOICES = "choose from: adversarial, clean, margin, or give your own as package.module:factory"
BAD_TEXTS = [
    ("", "terminal '' cannot be read from '' on; it must be a name or a sum of them with weights in front"),
    ("adverserial", f"unknown terminal cost 'adverserial'; did you mean 'adversarial'? {CHOICES}"),
    ("adversarial+0.1*cleen", f"unknown terminal cost 'cleen'; did you mean 'clean'? {CHOICES}"),
    ("adversarial+", "cannot be read from '+' on"),
    ("adversarial 0.1*clean", "cannot be read from '0.1*clean' on"),
    ("adversarial*0.1", "'*0.1' on; it must be a name or a sum of them with weights in front, such as"),
    ("0.1", "cannot be read from '0.1' on"),
    ("0.1clean", "cannot be read from '0.1clean' on"),
    ("0.1**clean", "cannot be read"),
    ("clean++margin", "cannot be read from '++margin' on"),
    ("2*(clean+margin)", "cannot be read"),
    ("1.2.3*clean", "a weight of terminal '1.2.3*clean' must be a number"),
    ("1/0*clean", "must be a number such as"),
    ("1e999*clean", "must be a number such as"),
    ("nan*clean", "unknown terminal cost 'nan'"),
    ("__import__('os')", "unknown terminal cost '__import__'"),
    ("nosuch_module:phi", "cannot import module 'nosuch_module' for attribute 'phi'"),
    ("math:nosuch", "module 'math' has no attribute 'nosuch'"),
    ("math:pi", "terminal 'math:pi' is a float; it must be a function or class to call"),
    ("math:", "must read 'package.module:attribute'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_what_is_no_sum_of_known_costs_is_refused_before_anything_begins(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_terminal(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluateSettings(terminal=text)


def test_what_is_no_text_is_no_terminal() -> None:
    three: Any = 3
    with pytest.raises(ValueError, match=r"must be a text such as adversarial\+0\.1\*clean, got a int"):
        parse_terminal(three)
    with pytest.raises(ValueError, match="terminal must be a text, got 3"):
        EvaluateSettings(terminal=three)


def made(text: str) -> Terminal:
    return build_terminal(text, *samples(N, SIZE, seed=9), Ball(0.1), 4)


def test_names_make_the_losses_that_they_name() -> None:
    d, usual = trained(), {"steps": 20, "seed": 4}
    expected = {
        "adversarial": phi(**usual),
        "margin": phi(**usual, loss="margin"),
        "clean": phi(**usual | {"steps": 0}),
    }
    assert set(expected) == set(names())
    for name, cost in expected.items():
        assert described(made(name)) == described(cost)
        assert made(name).value(d) == cost.value(d)
        assert same(made(name).gradient(d), cost.gradient(d))
    z = d.model.eval()(phi().x)
    assert made("clean").value(d) == pytest.approx(F.cross_entropy(z, phi().y).item(), rel=1e-12)
    assert isinstance(made("1*clean"), AdversarialLoss)


def test_a_sum_by_name_is_the_weighted_sum() -> None:
    d, cost = trained(), made("adversarial + 1/10*clean - 2*margin")
    weights, parts = (1.0, 0.1, -2.0), [made(name) for name in ("adversarial", "clean", "margin")]
    assert isinstance(cost, Weighted)
    assert [weight for weight, _ in cost.parts] == list(weights)
    values = [w * p.value(d) for w, p in zip(weights, parts, strict=True)]
    assert cost.value(d) == pytest.approx(sum(values), rel=1e-14)
    gradients = [w * flat(p.gradient(d)) for w, p in zip(weights, parts, strict=True)]
    torch.testing.assert_close(flat(cost.gradient(d)), sum(gradients), rtol=1e-12, atol=1e-15)
    assert isinstance(made("-1*clean"), Weighted)
    assert made("-clean").value(d) == -made("clean").value(d)


OWN = """
from dataclasses import dataclass
from controlat.pmp import AdversarialLoss

@dataclass
class Size:
    factor: float = 1.0
    lower = 0.0
    def value(self, driver, meter=None):
        return self.factor * sum(float(p.detach().square().sum()) for p in driver.parameters)
    def gradient(self, driver, meter=None):
        return [2 * self.factor * p.detach() for p in driver.parameters]
    def dropped(self, driver):
        return ()

@dataclass
class Counted(Size):
    x: object = None
    def describe(self):
        return f"{len(self.x)} points"

def weak(x, y, ball, seed):
    return AdversarialLoss(x, y, ball, steps=1, seed=seed)

def every(**given):
    return weak(**given)

def nothing():
    pass

def kind():
    return Size

def greedy(x, colour):
    return Size()

def failing(x):
    raise KeyError("mine")

class Half:
    lower = 0.0
    def value(self, driver, meter=None):
        return 0.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """The name of something in the user's own module, which lies in the current directory."""
    module = "own_terminal_costs_of_a_test"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield lambda name: f"{module}:{name}"
    sys.modules.pop(module, None)


def test_the_users_own_factory_is_called_with_what_it_takes(own: Callable[[str], str]) -> None:
    d = trained()
    size = 2 * Size().value(d)
    assert made(own("Size")).value(d) == pytest.approx(size, rel=1e-12)
    assert described(made(own("Counted"))) == "9 points"
    for name in ("weak", "every"):
        assert made(own(name)).value(d) == phi(steps=1, seed=4).value(d)
    both = made(f"clean+1e-3*{own('Size')}")
    assert both.value(d) == pytest.approx(phi(steps=0).value(d) + 1e-3 * size, rel=1e-12)
    assert described(both) == "1 * (clean cross-entropy on 9 held-out points) + 0.001 * (Size)"
    assert EvaluateSettings(terminal=f"clean+1e-3*{own('Size')}").terminal.endswith(":Size")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returns is a NoneType without value, gradient, dropped, lower"),
        ("kind", "returns is the class Size; it must be an object of it"),
        ("Half", "returns is a Half without gradient, dropped; see controlat.pmp.Terminal"),
        ("greedy", "missing a required argument: 'colour'; it is offered: x, y, ball, seed"),
    ],
)
def test_a_factory_of_the_user_that_makes_no_terminal_is_refused(
    own: Callable[[str], str], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(own(name))


def test_an_error_inside_the_users_factory_is_its_own(own: Callable[[str], str]) -> None:
    with pytest.raises(KeyError, match="mine") as found:
        made(own("failing"))
    assert "while calling the factory" in found.value.__notes__[0]


# ----------------------------------------------------------------------------------------------- in a setting


def experiment(n: int) -> Experiment:
    held_out, other = split(n, SIZE), split(4, SIZE)
    problem = EvaluateSettings(eps=0.1)
    return Experiment(
        problem, torch.device("cpu"), Dataset("own", other, other, CLASSES), other, held_out, other
    )


@pytest.mark.parametrize(("n", "points"), [(5, 2), (2 * TERMINAL_POINTS + 44, TERMINAL_POINTS)])
def test_a_setting_makes_it_of_its_part_of_the_held_out_samples(n: int, points: int) -> None:
    cost, x = experiment(n).terminal(3), experiment(n).phi.take(torch.arange(points))[0]
    assert isinstance(cost, AdversarialLoss)
    assert (cost.steps, cost.alpha, cost.seed, cost.ball) == (20, None, 3, Ball(0.1))
    assert len(cost.x) == points
    assert torch.equal(cost.x, x)
    d = trained()
    other = experiment(n).terminal(3, "adversarial+0.5*clean")
    expected = cost.value(d) + 0.5 * replace(cost, steps=0).value(d)
    assert other.value(d) == pytest.approx(expected, rel=1e-12)


def test_the_terminal_cost_is_a_setting_that_decides_the_results() -> None:
    assert EvaluateSettings().terminal == EvaluateSettings().to_json()["terminal"] == "adversarial"
    chosen = EvaluateSettings(terminal="margin + 0.1*clean")
    assert chosen.to_json()["terminal"] == "margin + 0.1*clean"


class Base:
    """A user's terminal cost that is right; the others are each wrong in one thing."""

    lower = 0.0

    def value(self, driver: Driver, meter: Meter | None = None) -> Any:
        return float(sum(p.detach().square().sum() for p in driver.parameters))

    def gradient(self, driver: Driver, meter: Meter | None = None) -> Any:
        return [2 * p.detach() for p in driver.parameters]

    def dropped(self, driver: Driver) -> Any:
        return ()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"value": lambda self, driver, meter=None: torch.ones(4)}, "must return a number"),
    "nan": ({"value": lambda self, driver, meter=None: math.nan}, "has the value nan"),
    "below": ({"lower": 1e9}, "least its lower bound 1e"),
    "shapes": ({"gradient": lambda self, driver, meter=None: [torch.ones(4)]}, r"got \[\(4,\)\]"),
    "infinite": (
        {"gradient": lambda self, driver, meter=None: [math.inf * p for p in driver.parameters]},
        "gradient of terminal mine is not finite",
    ),
    "letters": ({"dropped": lambda self, driver: "something"}, "must return a tuple of texts"),
    "writes": (
        {"dropped": lambda self, driver: (driver.parameters[0].data.add_(1), ())[1]},
        "changes the network",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_of_a_users_terminal_show_before_training(name: str) -> None:
    d = driver(CASES["pgd_at"])
    try_terminal(Base(), d, "mine")
    changed, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        try_terminal(type(name, (Base,), changed)(), d, "mine")
