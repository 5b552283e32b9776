"""A linear network of two classes, whose worst inputs are known: every method finds them if it tries hard."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from systems import Case, driver, trained_on
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.methods import Batch, names

EPS, SEED, N, PIXELS = 0.1, 3, 12, 16
FAR = 1e9  # a step so long that its direction alone is left, from wherever in the l_2 ball it starts


class Reach(NamedTuple):
    """With which options and knobs a method reaches the worst input, and what the network sees on the way.

    Args:
        options: of the method.
        knobs: its control.
        seen: for every pass that trains it: the ``"worst"`` input, the ``"clean"`` one, or ``"start"``, one
            that nothing has moved yet.
        loss: weights of these passes in the loss that is reported; left out where the loss is another one.
        norms: in which balls.
        anew: whether every pass of a step is at one network, and from no other samples' perturbation.
    """

    options: dict[str, Any]
    knobs: dict[str, float]
    seen: tuple[str, ...] = ("worst",)
    loss: tuple[float, ...] | None = (1.0,)
    norms: tuple[str, ...] = ("linf", "l2")
    anew: bool = True


def lengths(steps: int, **knobs: float) -> tuple[dict[str, float], dict[str, float]]:
    """Controls of `steps` steps that cross the l_inf ball, K alpha = 2 eps, and of steps without end."""
    return {"steps": steps, "alpha": 2 * EPS / steps, **knobs}, {"steps": 2, "alpha": FAR, **knobs}


def both(
    options: dict[str, Any], found: tuple[dict[str, float], dict[str, float]], *rest: Any
) -> tuple[Reach, ...]:
    return tuple(Reach(options, u, *rest, norms=(n,)) for u, n in zip(found, ("linf", "l2"), strict=True))


FROM_X = {"random_start": False}
NEAR = {"steps": 4, "alpha": EPS / 4}
LINF = ("linf",)
REACHES: dict[str, tuple[Reach, ...]] = {
    "atta": (
        *both({}, lengths(5)),
        *both({"init": "uniform"}, lengths(5)),
        Reach({"loss_scale": 0.25}, lengths(5)[0], loss=(0.25,), norms=LINF),
    ),
    "awp": (
        *both({}, lengths(5, radius=0.0)),
        Reach(FROM_X, NEAR | {"radius": 0.0}),
        *both({}, lengths(5), ("worst", "worst"), None),
    ),
    "cat": (
        Reach({"curriculum": False, "mixing": False}, {"steps": 1}, norms=LINF),
        Reach({"curriculum": False, "mixing": False}, {"steps": 7}, norms=LINF),
    ),
    "dynamic": (
        *both({}, lengths(5, fosc=0.0)),
        Reach({"gap": "box"}, lengths(5, fosc=0.0)[0], norms=LINF),
        Reach(FROM_X, NEAR | {"fosc": 0.0}),
    ),
    "fast": (
        Reach({}, {"alpha": 2 * EPS}, norms=LINF),
        Reach({}, {"alpha": FAR}, norms=("l2",)),
        Reach({}, {"alpha": EPS, "start": 0.0}),
        Reach({}, {"alpha": 2 * EPS, "start": 0.5, "random": 0.0}, norms=LINF),
        Reach({"init": "zero"}, {"alpha": EPS}),
        Reach({"init": "previous"}, {"alpha": EPS}, anew=False),
    ),
    "fat": (
        *both({"omega": 0.0}, lengths(5, slack=5)),
        *both({"omega": 0.0, "start": "gaussian"}, lengths(5, slack=5)),
    ),
    "free": (
        Reach({}, {"alpha": EPS, "steps": 4}, ("clean", *["worst"] * 3), (0.25,) * 4, anew=False),
        Reach({}, {"alpha": 2 * EPS, "steps": 2}, ("clean", "worst"), (0.5, 0.5), anew=False),
    ),
    "nfgsm": (Reach({}, {"alpha": EPS, "noise": 0.0}),),
    "pgd_at": (
        *both({}, lengths(1)),
        *both({}, lengths(5)),
        Reach(FROM_X, {"steps": 1, "alpha": EPS}),
        Reach(FROM_X, NEAR),
        *both({"clean_weight": 0.5}, lengths(5), ("worst", "clean"), (1.0, 0.5)),
    ),
    "trades": (),  # it ascends another loss: see below
    "yopo": (
        Reach(
            {"first_layer_grad": "direct"},
            lengths(3, inner=3)[0],
            ("start", "worst", "worst"),
            (1 / 3,) * 3,
            LINF,
        ),
        Reach(
            {"first_layer_grad": "direct", "gradients": "sum"},
            {"alpha": FAR, "steps": 3, "inner": 2},
            ("start", "worst", "worst"),
            (1.0,) * 3,
        ),
        Reach(
            {},
            {"alpha": FAR, "steps": 3, "inner": 2},
            ("start", "worst", "worst", "worst", "worst", "worst"),
            (1 / 3, 0.0) * 3,
        ),
        Reach(
            {"first_layer_grad": "direct"},
            {"alpha": EPS / 2, "steps": 6, "inner": 1},
            ("start", *["on the way"] * 3, "worst", "worst"),
            None,
            LINF,
        ),
    ),
}
CASES = [
    pytest.param(Case(name, reach.options, reach.knobs), reach, norm, id=f"{name}-{i}-{norm}")
    for name, reaches in REACHES.items()
    for i, reach in enumerate(reaches)
    for norm in reach.norms
]
every = pytest.mark.parametrize(("case", "reach", "norm"), CASES)
ANEW = [p for p in CASES if {"worst", "clean"} >= set(p.values[1].seen) and p.values[1].anew]
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def linear() -> nn.Module:
    """logits = W x + b, of an order of 1 for pixels in [0, 1]."""
    with rng.scoped(0, "linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).double()


def given(seed: int = 0) -> Batch:
    """Samples of both classes, far from black and white."""
    draw = rng.generator(seed, "samples")
    x = 0.3 + 0.4 * torch.rand((N, 1, 4, 4), generator=draw, dtype=torch.float64)
    return Batch(x, torch.arange(N) % 2, torch.arange(N), 0, 0)


def sign(y: Tensor) -> Tensor:
    """1 for class 1, -1 for class 0."""
    return 2 * y.double() - 1


class Truth:
    """The margins z_y - z_other of a linear network, and where they are least in a ball."""

    def __init__(self, model: nn.Module, norm: str) -> None:
        self.w, self.b = (p.detach().clone() for p in model[1].parameters())  # type: ignore[index]
        self.norm = norm
        line = (self.w[1] - self.w[0]).view(1, 1, 4, 4)
        self.unit = line.sign() if norm == "linf" else line / line.norm()
        self.gain = EPS * float(line.abs().sum() if norm == "linf" else line.norm())

    def difference(self, x: Tensor) -> Tensor:
        """z_1 - z_0."""
        return x.flatten(1) @ (self.w[1] - self.w[0]) + self.b[1] - self.b[0]

    def margin(self, b: Batch) -> Tensor:
        return sign(b.y) * self.difference(b.x)

    def worst(self, b: Batch) -> Tensor:
        """x - eps sign or unit vector of the gradient of the margin."""
        return b.x - EPS * sign(b.y).view(-1, 1, 1, 1) * self.unit

    def losses(self, b: Batch) -> dict[str, float]:
        """Mean of log(1 + exp(-margin)), of clean inputs and of the worst ones."""
        margin = self.margin(b)
        return {
            "clean": float(F.softplus(-margin).mean()),
            "worst": float(F.softplus(self.gain - margin).mean()),
        }


def still(case: Case, norm: str, seed: int = SEED) -> tuple[Driver, Truth]:
    d = driver(case, linear(), Ball(EPS, norm), SGDSettings(momentum=0.0), seed)
    return d, Truth(d.model, norm)


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).abs().max() < 1e-9)


def test_every_method_of_the_folder_is_in_the_table() -> None:
    assert set(REACHES) == set(names())
    assert [name for name, reaches in REACHES.items() if not reaches] == ["trades"]


@norms
def test_no_point_of_the_ball_is_worse_than_the_closed_form(norm: str) -> None:
    b, truth, ball = given(), Truth(linear(), norm), Ball(EPS, norm)
    assert close(truth.margin(b._replace(x=truth.worst(b))), truth.margin(b) - truth.gain)
    assert ball.distance(truth.worst(b), b.x).tolist() == pytest.approx([EPS] * N)
    assert 0 < float(truth.worst(b).min()) < float(truth.worst(b).max()) < 1
    for seed in range(50):
        inside = b._replace(x=ball.start(b.x, rng.generator(seed)))
        assert bool((truth.margin(inside) > truth.margin(b) - truth.gain).all())
    losses = truth.losses(b)
    assert losses["worst"] == pytest.approx(F.cross_entropy(linear()(truth.worst(b)), b.y).item(), rel=1e-12)
    assert losses["worst"] > losses["clean"] + 0.02


@every
def test_a_method_that_tries_hard_trains_on_the_worst_inputs(case: Case, reach: Reach, norm: str) -> None:
    for seed in range(3):
        d, truth = still(case, norm, seed)
        b = given(seed)
        found = {"worst": truth.worst(b), "clean": b.x}
        seen = trained_on(d.model)
        step = d.step(b, case.control(), 0.0)
        assert len(seen) == len(reach.seen)
        for x, expected in zip(seen, reach.seen, strict=True):
            if expected in found:
                assert close(x, found[expected]), expected
            else:
                assert not close(x, found["worst"])
                assert float(d.ball.distance(x, b.x).max()) <= EPS + 1e-12
        if reach.loss is not None:
            losses = truth.losses(b) | {"start": cross_entropy(d.model, seen[0], b.y)}
            total = sum(w * losses[name] for w, name in zip(reach.loss, reach.seen, strict=True))
            assert step.loss == pytest.approx(total, rel=1e-9)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


@pytest.mark.parametrize(("case", "reach", "norm"), ANEW)
def test_with_a_small_rate_every_step_finds_the_worst_inputs_of_the_present_network(
    case: Case, reach: Reach, norm: str
) -> None:
    d, _ = still(case, norm)
    for i in range(3):
        b, truth = given(i)._replace(number=i), Truth(d.model, norm)
        seen = trained_on(d.model)
        d.step(b, case.control(), 1e-3)
        d.model._forward_pre_hooks.clear()
        found = {"worst": truth.worst(b), "clean": b.x}
        assert all(close(x, found[name]) for x, name in zip(seen, reach.seen, strict=True))
        assert not torch.equal(truth.w, d.model[1].weight)  # type: ignore[index]


def test_the_robust_gradient_is_that_of_the_closed_form() -> None:
    """By the envelope theorem: of log(1 + exp(gain(w) - margin(w))), written in the weights."""
    for norm in ("linf", "l2"):
        b, model = given(), linear()
        w, bias = model[1].parameters()  # type: ignore[index]
        difference = b.x.flatten(1) @ (w[1] - w[0]) + bias[1] - bias[0]
        size = (w[1] - w[0]).abs().sum() if norm == "linf" else (w[1] - w[0]).norm()
        loss = F.softplus(EPS * size - sign(b.y) * difference).mean()
        expected = torch.autograd.grad(loss, [w, bias])
        for case, reach, ball in (p.values for p in CASES):
            if ball == norm and reach.seen == ("worst",) and reach.loss == (1.0,):
                d, _ = still(case, norm)
                found = d.field(b, case.control()).gradients
                assert all(map(close, found, expected)), case


@norms
def test_free_goes_from_one_worst_corner_to_that_of_the_next_sample_in_its_place(norm: str) -> None:
    case = Case("free", {}, {"alpha": 2 * EPS if norm == "linf" else FAR, "steps": 2})
    d, truth = still(case, norm)
    first, second = given(0), given(1)._replace(number=1)
    second = second._replace(y=1 - second.y)
    seen = trained_on(d.model)
    d.step(first, case.control(), 0.0)
    d.step(second, case.control(), 0.0)
    left = truth.worst(first) - first.x
    expected = [first.x, truth.worst(first), second.x + left, truth.worst(second)]
    assert all(map(close, seen, expected))


def test_atta_walks_to_the_worst_corner_over_the_epochs() -> None:
    case = Case("atta", {"init": "uniform"}, {"alpha": EPS / 2, "steps": 1})
    d, truth = still(case, "linf")
    seen, b = trained_on(d.model), given()
    for epoch in range(5):
        d.step(b._replace(epoch=epoch), case.control(), 0.0)
    assert [close(x, truth.worst(b)) for x in seen] == [False] * 3 + [True] * 2


def test_dynamic_stops_when_it_has_arrived() -> None:
    """At the corner the condition is 0, up to rounding, and no step is spent on it."""
    case = Case("dynamic", {}, {"alpha": 2 * EPS, "steps": 50, "fosc": 1e-12})
    d, truth = still(case, "linf")
    seen, b = trained_on(d.model), given()
    step = d.step(b, case.control(), 0.0)
    assert close(seen[0], truth.worst(b))
    assert step.spent.gradients == 3 * N  # a step, a look, and the update


@norms
@pytest.mark.parametrize("k", [1, 4, 10])
def test_cat_comes_near_the_closed_form_for_l2_and_reaches_it_for_linf(norm: str, k: int) -> None:
    case = Case("cat", {"curriculum": False, "mixing": False}, {"steps": k})
    d, truth = still(case, norm)
    b = given()
    losses, found = truth.losses(b), d.step(b, case.control(), 0.0).loss
    assert losses["clean"] < found <= losses["worst"] + 1e-12
    assert (losses["worst"] - found) / (losses["worst"] - losses["clean"]) < (0.2 if norm == "l2" else 1e-9)


@norms
def test_cat_with_mixing_attacks_all_but_its_first_part(norm: str) -> None:
    case = Case("cat", {"curriculum": False}, {"steps": 3})
    d, truth = still(case, norm)
    seen, b = trained_on(d.model), given()
    d.step(b, case.control(), 0.0)
    assert close(seen[0][:3], b.x[:3])
    assert close(seen[0][3:], truth.worst(b)[3:]) == (norm == "linf")


@norms
@pytest.mark.parametrize("separate", [False, True])
def test_trades_goes_to_the_corner_on_the_side_where_its_noise_put_it(norm: str, separate: bool) -> None:
    """The divergence of two classes grows to both sides of the clean input, along one line."""
    beta, (crossing, far) = 2.5, lengths(5)
    knobs = (crossing if norm == "linf" else far) | {"beta": beta}
    case = Case("trades", {"separate_clean": separate}, knobs)
    d, truth = still(case, norm)
    seen, b = trained_on(d.model), given()
    noise = torch.empty_like(b.x).normal_(generator=rng.generator(SEED, 0, 0, "start"))
    side = (truth.difference(b.x + noise) - truth.difference(b.x)).sign()
    step = d.step(b, case.control(), 0.0)
    assert set(side.tolist()) == {-1.0, 1.0}
    clean, moved = seen[0], seen[1]
    assert close(clean, b.x)
    assert close(moved, b.x + EPS * side.view(-1, 1, 1, 1) * truth.unit)
    s = truth.difference(b.x)
    p, q = torch.sigmoid(s), torch.sigmoid(s + side * truth.gain)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert step.loss == pytest.approx(truth.losses(b)["clean"] + beta * float(kl.mean()), rel=1e-8)
