"""Terminal costs: values and gradients agree, and nothing of the driver is touched."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, flat, same, samples, trace
from systems import CASES, constant, driver, passes, smooth
from torch import Tensor, nn

from controlat import rng
from controlat.attacks.pgd import ascend
from controlat.balls import Ball
from controlat.dynamics import Driver, rollout
from controlat.losses import LOSSES, lead
from controlat.network import Meter, NonFiniteError, View
from controlat.pmp.terminal import AdversarialLoss, Terminal, Weighted
from controlat.recording import Recording

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
    with View(d.model, channels_last=False) as view:
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
    assert same(Weighted(()).gradient(d), [torch.zeros_like(p) for p in d.parameters])


def test_lower_bounds_are_below_the_value() -> None:
    d = trained()
    for cost in COSTS.values():
        assert cost.lower <= cost.value(d)
    assert phi().lower == Weighted(((0.5, phi()), (0.5, phi(steps=0)))).lower == 0
    assert phi(loss="margin").lower == Weighted(((1.0, phi()), (0.1, phi(loss="margin")))).lower == -torch.inf
    assert Weighted(((-1.0, phi()),)).lower == -torch.inf  # the cross-entropy has no upper bound
    assert Weighted(((0.0, phi(loss="margin")), (1.0, phi()))).lower == 0


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
    running, smooth_steps = "BatchNorm's running statistics (Phi)", "the adversary's (l_2 steps of Phi)"
    plain, noisy = trained(), trained(Noisy())
    assert phi().dropped(plain) == ()
    assert phi(norm="l2").dropped(plain) == (smooth_steps,)
    assert phi(norm="l2", steps=0).dropped(plain) == ()
    assert phi().dropped(noisy) == (running,)
    assert phi(norm="l2").dropped(noisy) == (running, smooth_steps)
    both = Weighted(((1.0, phi(norm="l2")), (1.0, phi()), (0.5, Size())))
    assert both.dropped(noisy) == (running, "nothing much", smooth_steps)
    still = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    assert phi().dropped(driver(CASES["pgd_at"], still.append(nn.Linear(8, CLASSES)).double())) == ()


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
    from controlat.pmp.costate import sweep

    d = driver(CASES["pgd_at"], channels_last=False)
    rec = Recording.of(d, constant(CASES["pgd_at"].control(), epochs=1))
    last = next(iter(sweep(rec, Size())))
    theta = list(rec.end.model.values())
    assert same(last.costates[3].parameters, [-t for t in theta])
    assert last.dropped == ("nothing much",)
