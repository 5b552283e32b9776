"""The gradients of a sweep over K computed together, for networks so small that calls are what costs.

PGD with K = 1, 2, ... steps on several probe batches makes as many batches of one shape. Here all of them
ascend together, and one pass that is vectorised over them (`torch.func.vmap`) gives all gradients, instead of
one pass for each. Results equal those but for rounding; a sign of the ascent may differ where a gradient is
nearly 0. Convolutions keep a CPU busy anyway, and vectorised they take longer: networks with them are left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.requests import diverged, own_batch
from controlat.dynamics.step import When
from controlat.methods import Batch, Context, Prefixes, Update
from controlat.models.frozen.parts import Parts

if TYPE_CHECKING:
    from controlat.dynamics.driver import Driver

__all__ = ["Together", "is_small"]

_LIMIT = 2**24  # numbers in all gradients that are computed at once: 64 MiB in float32
_KNOWN = {
    *(nn.Sequential, nn.Flatten, nn.Identity, nn.Linear, nn.LayerNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid),
}


def is_small(driver: Driver) -> bool:
    """Whether a network treats samples one by one, without random numbers, and spends little time on each.

    True for torch's linear layers and functions of single numbers in sequence, with nothing of a user's: no
    buffers, hooks or modules. Mixed precision and memory of a method rule it out, too.

    >>> from controlat import Ball
    >>> from controlat.dynamics.driver import Driver
    >>> from controlat.methods import build
    >>> layers = [nn.Flatten(), nn.Linear(4, 3)]
    >>> is_small(Driver(nn.Sequential(*layers), build("pgd_at"), Ball(0.1)))
    True
    >>> is_small(Driver(nn.Sequential(*layers, nn.Dropout()), build("pgd_at"), Ball(0.1)))
    False
    """
    plain = driver.autocast is None and not driver.memory and not driver.rows
    return plain and all(map(_is_known, Parts.of(driver.model).modules))


def _is_known(m: nn.Module) -> bool:
    """Whether a module is one of torch's, with nothing added to it."""
    hooks = m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks
    return type(m) in _KNOWN and "forward" not in vars(m) and not any(hooks) and not m._buffers


@dataclass
class _Joined(Context):
    """The context of several batches of equal size as one, in which each has its own random numbers.

    Args:
        parts: the context of each batch.
    """

    parts: Sequence[Context] = ()

    def noise(self, like: Tensor, radius: float = 1.0, purpose: str = "start") -> Tensor:
        """As of each batch alone."""
        return torch.cat([ctx.noise(t, radius, purpose) for ctx, t in self._each(like)])

    def normal(self, like: Tensor, purpose: str = "start") -> Tensor:
        """As of each batch alone."""
        return torch.cat([ctx.normal(t, purpose) for ctx, t in self._each(like)])

    def _each(self, like: Tensor) -> Iterator[tuple[Context, Tensor]]:
        return zip(self.parts, like.chunk(len(self.parts)), strict=True)


@dataclass(frozen=True)
class Together:
    """The updates of all K on several batches, which are differentiated together.

    Args:
        driver: at the state that they are of.
        batches: of equal size.
        ctx: the context of all batches.
        updates: by K, of all batches as one.
    """

    driver: Driver
    batches: Sequence[Batch]
    ctx: Context
    updates: Sequence[tuple[Control, Update]]

    @classmethod
    def of(
        cls, driver: Driver, batches: Sequence[Batch], u: Control, rate: float, meter: Meter
    ) -> Together | None:
        """Run the ascent on all batches; None where that is not known to be right, or does not pay."""
        if not is_small(driver) or len({len(b.x) for b in batches}) != 1 or any(b.share for b in batches):
            return None
        parts = [driver.context(b, rate, meter, {}) for b in batches]
        whole = own_batch(_joined(batches))
        settings: dict[str, Any] = {f.name: getattr(parts[0], f.name) for f in fields(Context)}
        ctx = _Joined(**settings, parts=parts)
        with driver.scoring(), driver.requests.random(whole, "inner", 0):
            updates = list(cast(Prefixes, driver.method).prefixes(ctx, whole, u))
        if not all(isinstance(update.loss, partial) and update.rowwise for _, update in updates):
            return None
        return cls(driver, batches, ctx, updates)

    def gradients(self) -> Iterator[tuple[Control, list[list[Tensor]]]]:
        """(v, by batch the gradients in the parameters) for K = 1, 2, ...

        Raises:
            NonFiniteError: one is not finite; the message names epoch, batch and control.
        """
        numbers = len(self.batches) * sum(p.numel() for p in self.driver.parameters)
        at_once = max(1, _LIMIT // numbers)
        for i in range(0, len(self.updates), at_once):
            group = self.updates[i : i + at_once]
            with self.driver.scoring():
                values, gradients = self._differentiated([update for _, update in group])
            sums = torch.stack([values.sum(), *torch._foreach_norm(gradients)])
            if not bool(torch.isfinite(sums).all()):
                self._refuse(group, values, gradients)
            rows = zip(*(g.unbind() for g in gradients), strict=True)
            for v, _ in group:
                yield v, [list(next(rows)) for _ in self.batches]

    def _differentiated(self, updates: Sequence[Update]) -> tuple[Tensor, list[Tensor]]:
        """The losses, and by parameter the gradients, of all batches for the first K, the second, ..."""
        losses = [cast("partial[Tensor]", update.loss) for update in updates]
        m, ctx = len(self.batches), self.ctx
        inputs = [
            torch.cat([t.unflatten(0, (m, -1)) for t in tensors])
            for tensors in zip(*(loss.args for loss in losses), strict=True)
        ]
        before = ctx.meter.copy()

        def loss_at(theta: dict[str, Tensor], *tensors: Tensor) -> Tensor:
            ctx.theta = theta
            value: Tensor = losses[0].func(*tensors)
            return value

        theta = {name: p.detach() for name, p in ctx.weights()}
        try:
            results = vmap(grad_and_value(loss_at), in_dims=(None, *(0 for _ in inputs)))(theta, *inputs)
        finally:
            ctx.theta = None
        counted = ctx.meter.since(before)
        for _ in range(m * len(losses) - 1):  # vmap has called the loss once for all
            ctx.meter.add(counted)
        return results[1], list(results[0].values())

    def _refuse(
        self, group: Sequence[tuple[Control, Update]], values: Tensor, gradients: Sequence[Tensor]
    ) -> None:
        """Raise the error of the first loss or gradient that is not finite."""
        named = [(v, b) for v, _ in group for b in self.batches]
        for (v, b), value, *own in zip(named, values, *gradients, strict=True):
            self.ctx.watch.place = When(b.epoch, b.number, v)
            self.ctx.watch.finite(torch.stack([value, *torch._foreach_norm(own)]), diverged)
        self.ctx.watch.look()


def _joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    x, y, indices = (torch.cat([getattr(b, name) for b in batches]) for name in ("x", "y", "indices"))
    return first._replace(x=x, y=y, indices=indices, placement=None)
