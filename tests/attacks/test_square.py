"""The random search against closed forms and pyautoattack's Square, and what it must respect."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from controlat.attacks.balls import Ball
from controlat.attacks.losses import margin
from controlat.attacks.square import square
from controlat.control.cost import Meter
from controlat.data import load
from controlat.models.frozen.view import FrozenModel


class Counting(nn.Module):
    """Keeps the batch sizes that pass through."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled(), "no gradient is asked for"
        self.sizes.append(len(x))
        out: Tensor = self.net(x)
        return out


def conv_net() -> nn.Sequential:
    convolutions = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10))


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Tensor, Tensor]:
    """A convolutional network that classifies the digits, and points that it classifies correctly."""
    train = load("digits").train
    x, y = train.take(torch.arange(len(train)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = conv_net()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(150):
        part = torch.arange(64 * i, 64 * (i + 1)) % len(x)
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[part]), y[part]))
        optimiser.step()
    test_x, test_y = load("digits").test.take(torch.arange(120))
    with torch.no_grad():
        right = model(test_x).argmax(1) == test_y
    assert int(right.sum()) > 100
    return model.eval(), test_x[right], test_y[right]


def attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    queries: int,
    seed: int = 0,
    meter: Meter | None = None,
) -> Tensor:
    with FrozenModel(model, meter=meter) as view:
        return square(view, x, y, ball=ball, queries=queries, generator=torch.Generator().manual_seed(seed))


def lead(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return -margin(model(x), y)


# ---------------------------------------------------------------------------------------------- the two sets


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0.001, 1.0),
    shape=st.sampled_from([(1, 3, 3), (3, 4, 2), (2, 1, 5), (7,), (2, 3)]),
    queries=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_is_found_lies_in_the_ball_and_in_the_box(
    norm: str, eps: float, shape: tuple[int, ...], queries: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(5, *shape, generator=draw, dtype=torch.float64)
    x[0], x[1] = 0.0, 1.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).double()
    y = torch.randint(3, (5,), generator=draw)
    before, ball = x.clone(), Ball(eps, norm)
    found = attacked(model, x, y, ball, queries, seed)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert torch.equal(x, before)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(ball.distance(found, x).max()) <= eps * (1 + 1e-12)


def test_radius_0_returns_the_points(fitted: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = fitted
    assert torch.equal(attacked(model, x, y, Ball(0.0), 5), x)


# ------------------------------------------------------------------------------------------------ the search


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_lead_never_rises_with_more_queries(fitted: tuple[nn.Module, Tensor, Tensor], norm: str) -> None:
    model, x, y = fitted
    ball = Ball(0.1 if norm == "linf" else 0.7, norm)
    leads = [lead(model, attacked(model, x[:1], y[:1], ball, queries), y[:1]) for queries in (1, 5, 40, 200)]
    assert all(bool((b <= a + 1e-6).all()) for a, b in pairwise(leads))
    several = [lead(model, attacked(model, x, y, ball, queries), y) for queries in (1, 30, 200)]
    means = [float(found.mean()) for found in several]
    assert means[0] > means[1] > means[2]


def test_the_same_seed_finds_the_same_and_the_global_generator_is_not_used(
    fitted: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = fitted
    state = torch.random.get_rng_state()
    one, again, other = (attacked(model, x, y, Ball(0.1), 40, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_broken_samples_cost_no_more_queries(fitted: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = fitted
    counting, meter = Counting(model), Meter()
    found = attacked(counting, x, y, Ball(0.2), 60, meter=meter)
    assert counting.sizes[0] == len(x)
    assert counting.sizes == sorted(counting.sizes, reverse=True)
    assert counting.sizes[-1] < 0.6 * len(x), "many are broken on the way, or this test says little"
    standing = int((lead(model, found, y) > 0).sum())
    assert standing <= counting.sizes[-1]
    assert (meter.gradients, meter.forwards) == (0, sum(counting.sizes))
    assert len(counting.sizes) <= 60


def test_a_network_that_errs_everywhere_is_asked_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 1.0]))
    counting = Counting(model)
    attacked(counting, torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64), Ball(0.1), 50)
    assert counting.sizes == [6]


# ---------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 2), (6,)])
def test_linear_models_lose_what_the_dual_norm_says_and_never_more(norm: str, shape: tuple[int, ...]) -> None:
    draw, eps = torch.Generator().manual_seed(3), 0.1
    x = eps + (1 - 2 * eps) * torch.rand(40, *shape, generator=draw, dtype=torch.float64)
    size = x[0].numel()
    linear = nn.Linear(size, 2).double()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, size, generator=draw))
        linear.bias.copy_(torch.tensor([5.0, 0.0]) - linear.weight.sum(1) / 2)  # nothing is ever broken
    model, y = nn.Sequential(nn.Flatten(), linear), torch.zeros(40, dtype=torch.int64)
    w = (linear.weight[0] - linear.weight[1]).detach()
    clean = lead(model, x, y)
    worst = clean - eps * (w.abs().sum() if norm == "linf" else w.norm())
    assert float(worst.min()) > 0
    found = lead(model, attacked(model, x, y, Ball(eps, norm), 1500), y)
    assert bool((found >= worst - 1e-12).all())
    reached = (clean - found) / (clean - worst)
    if norm == "linf":
        assert float(reached.min()) > 1 - 1e-9, "every corner of a tiny cube is found"
    else:
        assert float(reached.mean()) > 0.75


# ----------------------------------------------------------------------------------------- an independent one


@pytest.mark.parametrize("eps", [0.1, 0.15])
def test_it_breaks_as_many_as_pyautoattacks_square(
    fitted: tuple[nn.Module, Tensor, Tensor], eps: float
) -> None:
    from pyautoattack.square import SquareAttack

    model, x, y = fitted
    with torch.random.fork_rng(devices=[]):
        theirs = SquareAttack(
            model, norm="Linf", n_queries=150, eps=eps, p_init=0.8, seed=0, resc_schedule=False, device="cpu"
        ).perturb(x, y)
    with torch.no_grad():
        wanted = float((model(theirs).argmax(1) != y).float().mean())
        ours = float((model(attacked(model, x, y, Ball(eps), 150)).argmax(1) != y).float().mean())
    assert 0.05 < wanted < 0.95
    assert abs(ours - wanted) < 0.15
