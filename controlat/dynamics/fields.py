"""The field F(theta, v), minus the summed gradients of one outer step under a control v that is not taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics import stacked
from controlat.dynamics.requests import own_batch
from controlat.methods import Batch, Prefixes, Update
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


def prefix_fields(driver: Driver, batch: Batch, u: Control, rate: float, meter: Meter) -> Iterator[Field]:
    """`field` for every K = 1, ..., u["steps"] at the step size of u, from one trajectory.

    Raises:
        ValueError: the method has no `prefixes`.
    """
    if not isinstance(driver.method, Prefixes):
        raise ValueError(
            f"{type(driver.method).__name__} offers no sweep over K: score its controls one by one"
        )
    batch = own_batch(batch)
    ctx = driver.context(batch, rate, meter, dict(driver.memory))
    candidates, requests = driver.method.prefixes(ctx, batch, u), driver.requests
    size = stacked.size(driver)
    while True:
        group: list[tuple[Control, Update]] = []
        with driver.scoring():
            for _ in range(size):
                with requests.random(batch, "inner", 0):
                    candidate = next(candidates, None)
                if candidate is None:
                    break
                group.append(candidate)
            gradients = stacked.gradients(ctx, [update for _, update in group])
            if gradients is None:
                gradients = [requests.differentiate(ctx, batch, v, update, 0)[1] for v, update in group]
            after = [r.clone() for r in driver.statistics]
        yield from (Field(v, g, after) for (v, _), g in zip(group, gradients, strict=True))
        if len(group) < size:
            return
