"""Gradients of a sweep that are computed together, against those computed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from helpers import SHAPE, cnn_bn, mlp, same, samples
from torch import nn

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics import fields, stacked
from controlat.dynamics.driver import Driver, Field
from controlat.dynamics.stacked import Together, is_small
from controlat.methods import Batch, Context, Update
from controlat.methods.pgd_at import PgdAT

U = Control(alpha=0.06, steps=4)


def probe(count: int = 3, size: int = 5, shape: tuple[int, ...] = (1, 2, 2)) -> list[Batch]:
    x, y = samples(count * size, shape)
    parts = torch.arange(count * size).split(size)
    return [Batch(x[p], y[p], p, 1, -1 - i) for i, p in enumerate(parts)]


def swept(driver: Driver, batches: Sequence[Batch], u: Control = U) -> tuple[list[list[Field]], int]:
    """The fields, and the gradient evaluations that were counted."""
    meter = Meter()
    return list(driver.fields(batches, u, meter=meter)), meter.gradients


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[Field]], int]]:
    """`swept`, one gradient after the other."""

    def computed(*arguments: Any) -> tuple[list[list[Field]], int]:
        with monkeypatch.context() as patch:
            patch.setattr(fields.Together, "of", lambda *_: None)
            return swept(*arguments)

    return computed


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_together_and_alone_agree(alone: Any, norm: str, mode: str, clean_weight: float) -> None:
    method = PgdAT(attack_mode=mode, clean_weight=clean_weight)
    driver, batches = Driver(mlp(), method, Ball(0.3, norm), seed=3), probe()
    (together, cost), (one_by_one, its_cost) = swept(driver, batches), alone(driver, batches)
    assert cost == its_cost == 15 * (4 + 4 * (1 + (clean_weight > 0)))
    assert [[f.control for f in row] for row in together] == [[f.control for f in row] for row in one_by_one]
    for a, b in zip(chain(*together), chain(*one_by_one), strict=True):
        torch.testing.assert_close(a.gradients, b.gradients, rtol=1e-10, atol=1e-14)
        assert a.statistics == b.statistics == []


def test_in_groups_of_gradients_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, batches = Driver(mlp(), PgdAT(), Ball(0.3)), probe()
    at_once, _ = swept(driver, batches)
    monkeypatch.setattr(stacked, "_LIMIT", 2 * 3 * sum(p.numel() for p in driver.parameters))
    in_groups, _ = swept(driver, batches)
    for a, b in zip(chain(*at_once), chain(*in_groups), strict=True):
        assert a.control == b.control
        torch.testing.assert_close(a.gradients, b.gradients, rtol=1e-12, atol=1e-15)


def test_one_ascent_of_all_batches_and_one_pass_for_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *w: passes.append(len(x)) or linear(x, *w))
    driver, batches = Driver(mlp(), PgdAT(), Ball(0.3)), probe()
    layers = sum(isinstance(m, nn.Linear) for m in driver.model.modules())
    together = Together.of(driver, batches, U, 0.0, Meter())
    assert together is not None
    assert passes == [15] * 4 * layers  # 3 batches of 5, 4 steps
    passes.clear()
    assert len(list(together.gradients())) == 4
    assert len(passes) == layers


class Hooked(nn.Sequential):
    """A module of a user."""


def with_a_hook() -> nn.Module:
    model = mlp()
    model[-1].register_forward_hook(lambda *_: None)
    return model


LEFT_OUT: dict[str, Callable[[], nn.Module]] = {
    "convolutions and running statistics": cnn_bn,
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).double(),
    "a user's module": lambda: Hooked(nn.Flatten(), nn.Linear(4, 3)).double(),
    "a hook": with_a_hook,
}


@pytest.mark.parametrize("build", LEFT_OUT.values(), ids=LEFT_OUT)
def test_other_networks_are_left_out(alone: Any, build: Callable[[], nn.Module]) -> None:
    batches = probe(shape=SHAPE if build is cnn_bn else (1, 2, 2))
    driver = Driver(build(), PgdAT(), Ball(0.3))
    assert not is_small(driver)
    assert same(swept(driver, batches), alone(driver, batches))


def test_memory_of_a_method_and_mixed_precision_are_left_out() -> None:
    assert is_small(Driver(mlp(), PgdAT(), Ball(0.3)))
    carrying = Driver(mlp(), PgdAT(), Ball(0.3))
    carrying.memory["strength"] = torch.zeros(())
    assert not is_small(carrying)
    assert not is_small(Driver(mlp().float(), PgdAT(), Ball(0.3), autocast=torch.bfloat16))


class Weighted(PgdAT):
    """Losses that are not functions of rows: each has a weight of its own."""

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        for v, update in super().prefixes(ctx, batch, u):
            yield v, update._replace(loss=lambda v=v, update=update: v["steps"] * update.loss())


def test_losses_that_are_no_function_of_rows_are_differentiated_one_by_one(alone: Any) -> None:
    driver, batches = Driver(mlp(), Weighted(), Ball(0.3)), probe()
    weighted, _ = swept(driver, batches)
    assert same(weighted, alone(driver, batches)[0])
    plain, _ = swept(Driver(mlp(), PgdAT(), Ball(0.3)), batches)
    torch.testing.assert_close(weighted[3][0].gradients, [4 * g for g in plain[3][0].gradients])


def test_a_gradient_that_is_not_finite_is_named() -> None:
    driver, batches = Driver(mlp(), PgdAT(random_start=False), Ball(0.3)), probe()
    batches[1].x[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"training loss nan.*epoch 1, batch -2, .*0.06.*steps.*1"):
        swept(driver, batches)
