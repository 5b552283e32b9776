"""What the driver does with a method's requests: also, add, move, shift, and what is no step at all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import flat, same
from systems import HEAVY, batch, smooth
from torch import Tensor, nn

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.space import Control, ControlSpace
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.methods import (
    Batch,
    Context,
    Rows,
    Update,
    Updates,
)

RATE, U = 0.1, Control()
SGD = SGDSettings(momentum=0.0)
SETTINGS = {
    "plain": SGD,
    "heavy": HEAVY,
    "Nesterov": SGDSettings(momentum=0.8, nesterov=True, weight_decay=1e-2),
}
optimizers = pytest.mark.parametrize("o", SETTINGS.values(), ids=SETTINGS)
Step = Callable[[Context, Batch], Updates]


class Toy:
    """A method from a generator function."""

    controls = ControlSpace({}, cost=lambda u: 1)

    def __init__(self, step: Step) -> None:
        self.step = step

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        return self.step(ctx, batch)


class Bowl(nn.Module):
    """One parameter w of two entries; the loss is 1/2 |w - x|^2, its gradient w - x."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.w - x


def bowl(step: Step, o: SGDSettings = SGD) -> tuple[Driver, Bowl, Batch]:
    model = Bowl()
    x = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    return (
        Driver(model, Toy(step), Ball(0.1), o, channels_last=False),
        model,
        Batch(x, torch.tensor([0]), torch.tensor([0]), 0, 0),
    )


def half(ctx: Context, x: Tensor, weight: float = 1.0) -> Callable[[], Tensor]:
    return lambda: weight * 0.5 * ctx.logits(x).square().sum()


START = torch.tensor([1.0, -2.0], dtype=torch.float64)
X = torch.tensor([0.25, 0.75], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------- add and move


def test_gradients_are_added_until_a_request_moves() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x, 2.0), move=False)
        yield Update(half(ctx, b.x, 3.0), move=False)
        yield Update(half(ctx, b.x, 0.5))

    d, model, b = bowl(step)
    found = d.step(b, U, RATE)
    torch.testing.assert_close(model.w.detach(), START - RATE * 5.5 * (START - X), rtol=1e-14, atol=0)
    assert found.loss == pytest.approx(
        5.5 * 0.5 * (START - X).square().sum().item()
    )  # whose gradient moved it
    assert found.spent.gradients == 3


def test_what_does_not_move_is_taken_at_the_same_parameters() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        before = model.w.detach().clone()
        yield Update(half(ctx, b.x), move=False)
        assert same(model.w.detach(), before)
        yield Update(half(ctx, b.x))
        assert not same(model.w.detach(), before)
        yield Update(half(ctx, b.x))  # starts from nothing again

    d, model, b = bowl(step)
    d.step(b, U, RATE)
    first = START - RATE * 2 * (START - X)
    torch.testing.assert_close(model.w.detach(), first - RATE * (first - X), rtol=1e-14, atol=0)


def test_a_look_neither_counts_for_the_move_nor_for_the_statistics_nor_for_the_loss() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        (g,) = yield Update(half(ctx, b.x, 7.0), also=lambda: (model.w,), add=False, move=False)
        assert same(g, 7 * (START - X))
        assert int(model.calls) == 0
        yield Update(half(ctx, b.x))

    d, model, b = bowl(step)
    found = d.step(b, U, RATE)
    assert same(model.w.detach(), START - RATE * (START - X))
    assert int(model.calls) == 1
    assert found.loss == pytest.approx(0.5 * (START - X).square().sum().item())
    assert found.spent.gradients == 2  # but it costs


def test_a_look_can_move_by_what_was_added_before() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x), move=False)
        yield Update(half(ctx, b.x, 9.0), add=False)

    d, model, b = bowl(step)
    d.step(b, U, RATE)
    assert same(model.w.detach(), START - RATE * (START - X))


@optimizers
def test_the_optimiser_acts_once_for_each_move(o: SGDSettings) -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        for move in (False, True, True):
            yield Update(half(ctx, b.x), move=move)

    d, model, b = bowl(step, o)
    w = nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([w], RATE, o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay)
    for _ in range(3):
        d.step(b, U, RATE)
        for times in (2, 1):
            w.grad = times * (w.detach() - X)
            optimizer.step()
    torch.testing.assert_close(model.w.detach(), w.detach(), rtol=1e-13, atol=0)


def test_names_of_what_is_dropped_are_gathered_from_all_requests() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x), ("a look",), add=False, move=False)
        yield Update(half(ctx, b.x), ("a part",), move=False)
        yield Update(half(ctx, b.x), ("a move",))
        yield Update(half(ctx, b.x), ("a move", "another"))

    d, _, b = bowl(step)
    names = ("a look", "a move", "a part", "another")
    assert pullback(d, b, U, RATE, d.point(b.indices).copy()).dropped == names
    assert d.step(b, U, RATE).dropped == names


# ------------------------------------------------------------------------------------------------------- also


def test_gradients_in_further_tensors_come_back_from_the_same_pass() -> None:
    seen: list[Any] = []

    def step(ctx: Context, b: Batch) -> Updates:
        one, two = (torch.ones(1, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
        made: list[Tensor] = []

        def loss() -> Tensor:
            made.append(ctx.logits(b.x + 2 * one))  # known only after the loss was called
            return 0.5 * made[0].square().sum()

        reply = yield Update(loss, also=lambda: (one, two, made[0]))
        seen.extend(reply)

    d, model, b = bowl(step)
    found = d.step(b, U, RATE)
    residual = START - X - 2
    assert same(seen[0], -2 * residual[None])
    assert same(seen[1], torch.zeros(1, 2, dtype=torch.float64))  # the loss does not use it
    assert same(seen[2], residual[None])
    assert same(model.w.detach(), START - RATE * residual)
    assert found.spent.gradients == 1


def test_without_further_tensors_the_reply_is_empty() -> None:
    seen: list[Any] = []

    def step(ctx: Context, b: Batch) -> Updates:
        seen.append((yield Update(half(ctx, b.x))))
        seen.append((yield Update(half(ctx, b.x))))

    d, _, b = bowl(step)
    d.step(b, U, RATE)
    assert seen == [[], []]


def test_an_iterator_that_takes_no_reply_will_do() -> None:
    def step(ctx: Context, b: Batch) -> Any:
        return iter([Update(half(ctx, b.x)), Update(half(ctx, b.x))])

    d, model, b = bowl(step)
    d.step(b, U, RATE)
    first = START - RATE * (START - X)
    torch.testing.assert_close(model.w.detach(), first - RATE * (first - X), rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------------ shift


@optimizers
def test_a_shift_holds_while_the_loss_is_taken_and_while_theta_moves(o: SGDSettings) -> None:
    shift = torch.tensor([0.5, 0.25], dtype=torch.float64)

    def step(ctx: Context, b: Batch) -> Updates:
        before = model.w.detach().clone()
        yield Update(half(ctx, b.x), move=False, shift=[2 * shift])
        assert same(model.w.detach(), before)  # its own bits
        yield Update(half(ctx, b.x), shift=[shift])

    d, model, b = bowl(step, o)
    w = nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([w], RATE, o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay)
    for _ in range(3):
        d.step(b, U, RATE)
        w.grad = (w.detach() + 2 * shift - X) + (w.detach() + shift - X)
        with torch.no_grad():
            w += shift
        optimizer.step()  # weight decay sees the shifted parameter
        with torch.no_grad():
            w -= shift
    torch.testing.assert_close(model.w.detach(), w.detach(), rtol=1e-13, atol=0)


def test_scoring_shifts_too() -> None:
    shift = torch.tensor([0.5, 0.25], dtype=torch.float64)

    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x), shift=[shift])
        yield Update(half(ctx, b.x))

    d, model, b = bowl(step)
    (found,) = d.field(b, U, RATE).gradients
    first = START + shift - X
    torch.testing.assert_close(found, first + START - RATE * first - X, rtol=1e-14, atol=0)
    assert same(model.w.detach(), START)


def test_a_shift_is_taken_off_after_an_error() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(lambda: ctx.logits(b.x).sum() * torch.nan, shift=[torch.ones(2).double()])

    d, model, b = bowl(step)
    with pytest.raises(NonFiniteError, match="epoch 0, batch 0"):
        d.step(b, U, RATE)
    assert same(model.w.detach(), START)


@optimizers
def test_a_shift_that_depends_on_theta_is_differentiated(o: SGDSettings) -> None:
    """shift = c (w - x): the step is linear in w and v, and its transpose is known."""

    def step(ctx: Context, b: Batch) -> Updates:
        weights = ctx.weights()
        (g,) = yield Update(half(ctx, b.x), also=lambda: [w for _, w in weights], add=False, move=False)
        yield Update(half(ctx, b.x), shift=[0.3 * g])

    d, _, b = bowl(step, o)
    d.step(b, U, RATE)
    z = d.point(b.indices).copy()
    lam = torch.tensor([0.7, -1.1], dtype=torch.float64)
    nu = torch.tensor([0.2, 0.4], dtype=torch.float64)
    weight = replace(z, parameters=[lam], momentum=[nu] if z.momentum else [])
    found = pullback(d, b, U, RATE, weight).costate
    slope = 1.3 * (1 + o.weight_decay)  # of gradient and decay at w + shift, in w
    inner = -RATE * (o.momentum * lam if o.nesterov else lam) + (nu if z.momentum else 0)
    total = inner - RATE * lam if o.nesterov else inner
    torch.testing.assert_close(found.parameters[0], lam + slope * total, rtol=1e-13, atol=0)
    if z.momentum:
        torch.testing.assert_close(found.momentum[0], o.momentum * inner, rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------------------------- memory, rows


def test_rows_are_kept_for_the_samples_of_the_batch_and_grow_as_needed() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        carried = ctx.rows.get(
            "count", Rows(torch.zeros(len(b.x), 2), torch.zeros(len(b.x), dtype=torch.bool))
        )
        seen.append((carried.values[:, 0].tolist(), carried.seen.tolist()))
        ctx.rows["count"] = Rows(carried.values + 1, torch.ones(len(b.x), dtype=torch.bool))
        yield Update(lambda: ctx.logits(b.x).sum())

    seen: list[Any] = []
    d = Driver(smooth(), Toy(step), Ball(0.1), SGD)
    saved = []
    for indices in ([4, 1], [1, 30], [4, 1, 30], [2]):
        saved.append(d.snapshot())
        d.step(batch(len(indices))._replace(indices=torch.tensor(indices)), U, RATE)
    assert seen == [
        ([0, 0], [False, False]),
        ([1, 0], [True, False]),
        ([1, 2, 1], [True, True, True]),
        ([0], [False]),
    ]
    d.restore(saved[1])  # sample 30 has carried something since then
    seen.clear()
    d.step(batch(3)._replace(indices=torch.tensor([30, 4, 1])), U, RATE)
    assert seen == [([0, 1, 1], [False, True, True])]


def test_a_partial_snapshot_puts_back_the_rows_it_has_and_no_others() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        old = ctx.rows["count"].values if "count" in ctx.rows else torch.zeros(len(b.x), 1)
        ctx.rows["count"] = Rows(old + 1, torch.ones(len(b.x), dtype=torch.bool))
        yield Update(lambda: ctx.logits(b.x).sum())

    d = Driver(smooth(), Toy(step), Ball(0.1), SGD)
    b = batch(4)
    d.step(b, U, RATE)
    part = d.snapshot(torch.tensor([1, 2]))
    d.step(b, U, RATE)
    d.restore(part)
    assert d.rows["count"].values[:4, 0].tolist() == [2, 1, 1, 2]
    d.restore(part)  # stays usable
    assert part.rows["count"].values[:, 0].tolist() == [1, 1]


def test_what_is_carried_is_cut_off_from_what_made_it() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        leaf = ctx.leaf(ctx.memory.get("m", torch.ones(1, 2).double()))
        assert leaf.is_leaf
        yield Update(half(ctx, b.x))
        ctx.memory["m"] = 2 * leaf

    d, _, b = bowl(step)
    for expected in (2, 4):
        d.step(b, U, RATE)
        assert not d.memory["m"].requires_grad
        assert d.memory["m"].tolist() == [[expected, expected]]


# ----------------------------------------------------------------------------------------------------- errors


def test_a_gradient_that_moves_nothing_is_an_error() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x))
        yield Update(half(ctx, b.x), move=False)

    d, _, b = bowl(step)
    for act in (d.step, d.field):
        with pytest.raises(ValueError, match="Toy ends a step with a gradient that moves nothing"):
            act(b, U, RATE)


def test_moving_without_a_gradient_is_an_error() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x), add=False)

    d, model, b = bowl(step)
    for act in (d.step, d.field):
        with pytest.raises(ValueError, match="Toy moves theta without a gradient"):
            act(b, U, RATE)
    assert same(model.w.detach(), START)


@pytest.mark.parametrize("looks", [0, 1])
def test_a_look_alone_is_no_step(looks: int) -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        for _ in range(looks):
            yield Update(half(ctx, b.x), add=False, move=False)

    d, _, b = bowl(step)
    with pytest.raises(ValueError, match="Toy ends a step without moving theta"):
        d.step(b, U, RATE)


def test_a_gradient_that_was_asked_for_must_be_finite() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        point = torch.zeros(1, 2, dtype=torch.float64).requires_grad_()
        yield Update(lambda: ctx.logits(b.x).sum() + point.sqrt().sum(), also=lambda: (point,))

    d, _, b = bowl(step)
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf) \(epoch 0, batch 0"):
        d.step(b, U, RATE)


def test_an_error_in_a_method_leaves_training_and_scoring_usable() -> None:
    def step(ctx: Context, b: Batch) -> Updates:
        yield Update(half(ctx, b.x), add=False, move=False)
        raise RuntimeError("on purpose")

    d, model, b = bowl(step)
    model.eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        d.field(b, U, RATE)
    assert not model.training
    assert same(flat(d.parameters), START)
    assert int(model.calls) == 0
