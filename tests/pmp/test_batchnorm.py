"""Running statistics are state: costates and gains with BatchNorm, against one written by hand."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, flat, same, samples, slow
from systems import CASES, FOLLOWED, PLAIN, Case, driver, trained_on
from test_costate import PHI, SETTINGS, SIZE, last_point, planned
from test_relaxed import check, mixing
from test_relaxed import planned as apart
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from controlat._util import rng
from controlat.control.cost import Meter
from controlat.data import Split
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.finite_differences import verify
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.methods import Batch
from controlat.pmp.costate import backward
from controlat.pmp.terminal import AdversarialLoss, Weighted, differentiated


class Frozen(nn.BatchNorm2d):
    """A layer that the user keeps in evaluation mode."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "momentum 0.1": lambda: nn.BatchNorm2d(3),
    "momentum 0.6": lambda: nn.BatchNorm2d(3, momentum=0.6),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "without scale": lambda: nn.BatchNorm2d(3, affine=False),
    "not tracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "frozen": lambda: Frozen(3),
    "instances": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
}
norms = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
FULL = "Nesterov, decay"  # the optimiser with all terms: the others repeat it for each kind of statistics


class Network(nn.Module):
    """The inputs are normalised without parameters, and one layer is used twice."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inputs, self.convolution, self.norm = nn.BatchNorm2d(1, affine=False), nn.Conv2d(1, 3, 3), norm
        self.middle, self.twice, self.out = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return F.softplus(self.norm(self.convolution(self.inputs(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.out(self.twice(torch.tanh(self.twice(self.middle(h)))))  # type: ignore[no-any-return]


def network(
    make: Callable[[], nn.Module] = NORMS["momentum 0.1"], kind: type[Network] = Network
) -> nn.Module:
    """With statistics that are not those of a new layer."""
    with rng.scoped(4, "network"):
        model = kind(make()).double()
        for _ in range(2):
            model(samples(7, SIZE, seed=8)[0])
        for m in model.modules():
            if isinstance(m, Frozen):
                m.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        return model.train()


class Checkpointed(Network):
    """The convolution and its statistics are computed again in the backward pass."""

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=False)  # type: ignore[no-any-return]


class ByHand(nn.Module):
    """A normalisation layer in tensor operations, whose statistics keep their graph."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.frozen, self.m = isinstance(layer, Frozen), layer.momentum
        self.each, self.eps = isinstance(layer, nn.InstanceNorm2d), layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        self.r = (
            None if layer.running_mean is None else (layer.running_mean.clone(), layer.running_var.clone())
        )
        self.seen = int(layer.num_batches_tracked or 0) if self.r else 0

    def forward(self, x: Tensor) -> Tensor:
        others = [d for d in range(x.dim()) if d != 1 and not (self.each and d == 0)]
        n = x[:, 0].numel() / (len(x) if self.each else 1)
        mean = x.mean(others, keepdim=True)
        variance = ((x - mean) ** 2).mean(others, keepdim=True)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if self.r is not None and (self.frozen or not self.training):
            mean, variance = (t.view(shape) for t in self.r)
        elif self.r is not None:
            self.seen += 1
            m = 1 / self.seen if self.m is None else self.m
            unbiased = variance * n / (n - 1)
            now = [t.mean(0, keepdim=True).flatten() for t in (mean, unbiased)]
            self.r = tuple((1 - m) * old + m * new for old, new in zip(self.r, now, strict=True))  # type: ignore[assignment]
        y = (x - mean) / (variance + self.eps) ** 0.5
        for parameter, combine in ((self.weight, torch.mul), (self.bias, torch.add)):
            y = y if parameter is None else combine(y, parameter.view(shape))
        return y


def by_hand(model: nn.Module) -> tuple[nn.Module, list[ByHand]]:
    """A copy with the layers written by hand, and those of them that have statistics."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_children()):
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            setattr(twin, name, ByHand(layer))
    return twin, [m for m in twin.modules() if isinstance(m, ByHand) and m.r is not None]


def run_by_hand(rec: Recording, points: list[Tensor], o: SGDSettings) -> tuple[float, list[Tensor]]:
    """Phi after the whole run from its first state, and its gradient there in theta, v and r."""
    labels = [b.y for e in range(rec.spec.epochs) for b in rec.spec.batches(e)]
    rates = [s.rate for s in rec.steps]
    rec.driver.restore(rec.end)
    x = last_point(rec.driver)
    rec.driver.restore(rec.stored[rec.first])
    twin, layers = by_hand(rec.driver.model)
    names = [name for name, _ in rec.driver.model.named_parameters()]
    theta = [p.detach().clone().requires_grad_() for p in rec.driver.parameters]
    v = [torch.zeros_like(t).requires_grad_() for t in theta] if o.momentum else []
    for layer in layers:
        layer.r = tuple(t.detach().requires_grad_() for t in layer.r or ())  # type: ignore[assignment]
    start = [*theta, *v, *(t for layer in layers for t in layer.r or ())]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(twin, dict(zip(names, theta, strict=True)), (x,)), y)

    for point, y, rate in zip(points, labels, rates, strict=True):
        g = torch.autograd.grad(loss(point, y), theta, create_graph=True)
        g = tuple(a + o.weight_decay * t for a, t in zip(g, theta, strict=True))
        v = [o.momentum * b + a for a, b in zip(g, v, strict=True)] if o.momentum else []
        moved = [a + o.momentum * b for a, b in zip(g, v, strict=True)] if o.nesterov else (v or g)
        theta = [t - rate * m for t, m in zip(theta, moved, strict=True)]
    twin.eval()
    phi = loss(x, PHI.y)
    found = torch.autograd.grad(phi, start, allow_unused=True)
    return phi.item(), [torch.zeros_like(t) if g is None else g for t, g in zip(start, found, strict=True)]


@norms
@pytest.mark.parametrize("name", [name if name == FULL else slow(name) for name in SETTINGS])
def test_costates_are_minus_the_gradient_of_phi_through_training(
    make: Callable[[], nn.Module], name: str
) -> None:
    o, case = SETTINGS[name], PLAIN["pgd_at"]
    d = driver(case, network(make), optimizer=o, channels_last=False)
    rec = Recording.of(d, planned(case.control()), stride=4)
    value, (other, points) = PHI.value(d), (twin := network(make), trained_on(twin))
    list(rollout(driver(case, other, optimizer=o, channels_last=False), rec.spec))
    *_, s = backward(rec, PHI)
    assert s.dropped == ()
    visit = s.visit
    before = pullback(d, visit.batch, visit.control, visit.rate, s.costates[rec.last]).costate
    phi, expected = run_by_hand(rec, points, o)
    assert phi == pytest.approx(value, rel=1e-12)
    mine = [*before.parameters, *before.momentum, *before.statistics]
    assert float((flat(mine) + flat(expected)).norm() / flat(expected).norm()) < 1e-9
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-7, atol=1e-11)


def mixed(case: Case, o: SGDSettings, make: Callable[[], nn.Module] = NORMS["momentum 0.6"]) -> Any:
    """With BatchNorm training curves strongly: a small rate and lambda, and no batch of two samples."""
    d, (x, y) = driver(case, network(make), optimizer=o, channels_last=False), samples(12, SIZE)
    spec = replace(apart(case, rate=0.05), data=Split(0.2 + 0.6 * x, y))
    return mixing(Recording.of(d, spec, stride=4), h=1e-6)


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_derivative_of_the_objective_is_minus_the_sum_of_gains(name: str) -> None:
    check(mixed(CASES[name], SETTINGS["heavy ball, decay"]))


@norms
@pytest.mark.parametrize("name", [slow("plain"), FULL])
def test_so_it_is_for_every_kind_of_statistics(make: Callable[[], nn.Module], name: str) -> None:
    check(mixed(PLAIN["pgd_at"], SETTINGS[name], make))


def test_verify_sees_running_statistics() -> None:
    """Central differences of the step move them too."""
    d = driver(PLAIN["pgd_at"], network(), channels_last=False)
    x, y = samples(6, SIZE)
    b, u = Batch(0.2 + 0.6 * x, y, torch.arange(6), 0, 0), PLAIN["pgd_at"].control()
    assert len(d.point(b.indices).statistics) == 6
    found = verify(d, b, u, 0.1, directions=4)
    assert found.dropped == ()
    assert found.share < 1e-7


@pytest.mark.parametrize("make", [NORMS["momentum 0.6"], NORMS["cumulative"]], ids=["momentum", "cumulative"])
def test_checkpointing_changes_neither_training_nor_costates(make: Callable[[], nn.Module]) -> None:
    """torch alone would move the statistics once more in the backward pass."""
    ends, costates = [], []
    for kind in (Network, Checkpointed):
        d = driver(PLAIN["pgd_at"], network(make, kind), channels_last=False)
        rec = Recording.of(d, planned(PLAIN["pgd_at"].control()), stride=4)
        ends.append(rec.end)
        *_, s = backward(rec, PHI)
        costates.append(s.costates[rec.last])
    assert same(*ends)
    for a, b in zip(*(p.tensors() for p in costates), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------ what is left out


class Own(AdversarialLoss):
    """A user's terminal cost that knows of parameters alone."""

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        return super().gradient(driver, meter)[: len(driver.parameters)]


def test_a_terminal_cost_without_statistics_is_named() -> None:
    d = driver(PLAIN["pgd_at"], network(), channels_last=False)
    rec = Recording.of(d, planned(PLAIN["pgd_at"].control()))
    own = Own(PHI.x, PHI.y, PHI.ball)
    for phi in (own, Weighted(((1.0, PHI), (0.5, own)))):
        assert next(iter(backward(rec, phi))).dropped == ("BatchNorm's running statistics (Phi)",)
    plain = driver(PLAIN["pgd_at"], channels_last=False)
    assert len(own.gradient(plain)) == len(plain.parameters) == len(PHI.gradient(plain))
    both = Weighted(((1.0, PHI), (0.5, replace(PHI, steps=0))))
    expected = flat(PHI.gradient(d)) + 0.5 * flat(replace(PHI, steps=0).gradient(d))
    torch.testing.assert_close(flat(both.gradient(d)), expected)


class Averaging(nn.Module):
    """The user's own running mean, of which nobody knows how it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Shrinking(nn.BatchNorm1d):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "names"), [(Averaging(), ["mean"]), (Shrinking(16), ["running_mean", "running_var"])]
)
def test_buffers_that_a_forward_pass_writes_to_otherwise_are_named(
    layer: nn.Module, names: list[str]
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), layer, nn.Linear(16, CLASSES)).double()
    d = driver(PLAIN["pgd_at"], model, channels_last=False)
    rec = Recording.of(d, planned(PLAIN["pgd_at"].control()))
    *_, last = backward(rec, PHI)
    assert last.dropped == tuple(f"the buffer 2.{name}, which forward passes write to" for name in names)


def test_the_gradient_in_running_statistics_is_that_of_differences() -> None:
    d = driver(PLAIN["pgd_at"], network(), channels_last=False)
    d.model.eval()
    x, y = samples(6, SIZE)

    def loss() -> Tensor:
        return F.cross_entropy(d.model(x), y)

    found = differentiated(d, loss)
    assert len(found) == len(d.parameters) + 6
    for r, g in zip(d.statistics, found[len(d.parameters) :], strict=True):
        direction = torch.randn(r.shape, generator=rng.generator(0, "r"), dtype=r.dtype)
        ends = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                r.add_(direction, alpha=h)
                ends.append(loss().item())
                r.add_(direction, alpha=-h)
        assert float((g * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
