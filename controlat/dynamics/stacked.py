"""Gradients of many losses at once, for networks so small that calls cost more than arithmetic.

PGD with K = 1, 2, ... steps makes as many batches of one shape. Vectorised over them (`torch.func.vmap`), one
forward and one backward pass give the gradient of each. With layers of convolutions a CPU is busy anyway, and
there it takes longer than one pass after the other (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from controlat.methods import Context, Update
from controlat.models.frozen.parts import Parts

if TYPE_CHECKING:
    from controlat.dynamics.driver import Driver

__all__ = ["gradients", "size"]

_LIMIT = 2**24  # numbers of all gradients that are computed at once: 64 MiB in float32
_KNOWN = {
    *(nn.Sequential, nn.Flatten, nn.Identity, nn.Linear, nn.LayerNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid),
}


def size(driver: Driver) -> int:
    """How many gradients are to be computed at once; 1 for networks where that is not known to be right.

    Known are torch's linear layers and functions of single numbers, in sequence: without buffers, random
    numbers, hooks or code of a user. Mixed precision and several processes rule it out, too.

    >>> from controlat import Ball
    >>> from controlat.dynamics.driver import Driver
    >>> from controlat.methods import build
    >>> layers = [nn.Flatten(), nn.Linear(4, 3)]
    >>> size(Driver(nn.Sequential(*layers), build("pgd_at"), Ball(0.1))) > 1
    True
    >>> size(Driver(nn.Sequential(*layers, nn.Dropout()), build("pgd_at"), Ball(0.1)))
    1
    """
    known = driver.autocast is None and all(map(_is_known, Parts.of(driver.model).modules))
    return max(1, _LIMIT // sum(p.numel() for p in driver.parameters)) if known else 1


def _is_known(m: nn.Module) -> bool:
    """Whether a module is one of torch's, with nothing added to it."""
    hooks = m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks
    return type(m) in _KNOWN and "forward" not in vars(m) and not any(hooks) and not m._buffers


def gradients(ctx: Context, updates: Sequence[Update]) -> list[list[Tensor]] | None:
    """Gradients in the parameters of the losses of several updates, in one pass.

    They equal those of the losses one by one, but for rounding.

    Args:
        ctx: of the step; its network is one that `size` knows.
        updates: their losses must be ``functools.partial`` of one function, with tensors of equal shapes.

    Returns:
        By update, one tensor per parameter; None where it is not possible, or where a number is not finite.
    """
    losses = [update.loss for update in updates]
    if len(losses) < 2 or not ctx.share.alone or not _alike(losses):
        return None
    inputs = [torch.stack(tensors) for tensors in zip(*(loss.args for loss in losses), strict=True)]
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
    for _ in losses[1:]:  # vmap has called the loss once for all
        ctx.meter.add(counted)
    by_name, values = results
    sums = torch.stack([values.sum(), *torch._foreach_norm(list(by_name.values()))])
    if not bool(torch.isfinite(sums).all()):
        return None
    return [list(parts) for parts in zip(*(g.unbind() for g in by_name.values()), strict=True)]


def _alike(losses: Sequence[object]) -> TypeGuard[Sequence[partial[Tensor]]]:
    """Whether these are one function, with tensors of equal shapes in the same places."""
    calls = [loss for loss in losses if isinstance(loss, partial) and not loss.keywords]
    if len(calls) < len(losses) or any(call.func != calls[0].func for call in calls):
        return False
    if not all(isinstance(t, Tensor) for call in calls for t in call.args):
        return False
    return len({tuple((t.shape, t.dtype) for t in call.args) for call in calls}) == 1
