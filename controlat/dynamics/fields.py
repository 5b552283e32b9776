"""The field F(theta, v), minus the summed gradients of one outer step under a control v that is not taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.requests import own_batch
from controlat.dynamics.stacked import Together
from controlat.methods import Batch, Prefixes
from controlat.models.frozen.contexts import exclusive, in_mode, preserved_buffers

if TYPE_CHECKING:
    from controlat.dynamics.driver import Driver

__all__ = ["Field", "field", "prefix_fields", "restored"]


class Field(NamedTuple):
    """The field of one outer step under a control.

    Args:
        control: v.
        gradients: -F(theta, v), the sum of the gradients of the step, one tensor per parameter.
        statistics: running statistics after the step, as in `Driver.statistics`.
    """

    control: Control
    gradients: list[Tensor]
    statistics: list[Tensor]


@contextmanager
def restored(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """The network in training mode inside the block; parameters, buffers and flags are restored after it."""
    with exclusive(model), in_mode(model, True):
        saved = [(p, p.detach().clone()) for p in parameters]
        try:
            with preserved_buffers(model):
                yield
        finally:
            with torch.no_grad():
                for p, before in saved:
                    if not torch.equal(p, before):  # a write would invalidate a graph that saved p
                        p.copy_(before)


def field(driver: Driver, batch: Batch, v: Control, rate: float, meter: Meter) -> Field:
    """The field of one outer step under v; the state stays as it is.

    Args:
        driver: at the state before the step.
        batch: of the step.
        v: the control.
        rate: learning rate of the plain gradient steps between the updates of a method that has several.
        meter: counts the evaluations.
    """
    with driver.scoring():
        total = [torch.zeros_like(p) for p in driver.parameters]
        memory = {name: t.clone() for name, t in driver.memory.items()}
        ctx = driver.context(batch, rate, meter, memory)
        for _, _, gradients in driver.requests.updates(ctx, batch, v):
            torch._foreach_add_(total, gradients)
            if rate:
                with torch.no_grad():
                    torch._foreach_add_(driver.parameters, gradients, alpha=-rate)
        return Field(v, total, [r.clone() for r in driver.statistics])


def prefix_fields(
    driver: Driver, batches: Sequence[Batch], u: Control, rate: float, meter: Meter
) -> Iterator[list[Field]]:
    """`field` on several batches for every K = 1, ..., u["steps"] at the step size of u.

    There is one trajectory for each batch. Where the network allows it, those of all batches are one ascent,
    and the gradients are computed together, which equals the others but for rounding (`Together`).

    Raises:
        ValueError: the method has no `prefixes`.
    """
    if not isinstance(driver.method, Prefixes):
        raise ValueError(
            f"{type(driver.method).__name__} offers no sweep over K: score its controls one by one"
        )
    together = Together.of(driver, batches, u, rate, meter)
    if together is None:
        yield from map(list, zip(*(_one_by_one(driver, b, u, rate, meter) for b in batches), strict=True))
        return
    for v, by_batch in together.gradients():
        yield [Field(v, gradients, []) for gradients in by_batch]


def _one_by_one(driver: Driver, batch: Batch, u: Control, rate: float, meter: Meter) -> Iterator[Field]:
    """The fields on one batch, one after the other."""
    assert isinstance(driver.method, Prefixes)
    batch = own_batch(batch)
    ctx = driver.context(batch, rate, meter, dict(driver.memory))
    candidates, requests = driver.method.prefixes(ctx, batch, u), driver.requests
    while True:
        with driver.scoring():
            with requests.random(batch, "inner", 0):
                candidate = next(candidates, None)
            if candidate is None:
                return
            v, update = candidate
            _, gradients, _ = requests.differentiate(ctx, batch, v, update, 0)
            after = [r.clone() for r in driver.statistics]
        yield Field(v, gradients, after)
