"""The outer step as a differentiable map: the vector-Jacobian product of z' = S(z, u).

The state is the parameters, the optimiser's momentum buffers, and what the method carries. Whatever the
method froze stays frozen: exact for signs, stopping rules and indices, which are piecewise constant in the
state; smooth quantities that it detached are named in `Update.dropped`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from controlat.control import Control
from controlat.dynamics import Driver
from controlat.methods import Batch, Rows
from controlat.network import Meter

__all__ = ["Pulled", "State", "pullback", "state"]


class State(NamedTuple):
    """The state z, or a costate, which has its shape.

    Args:
        parameters: theta, one tensor per parameter that is trained.
        momentum: the optimiser's buffers v, alike; 0 before the first step.
        memory: what the method carries, floating-point tensors only.
        rows: what the samples of the batch carry, (N, ...).
    """

    parameters: list[Tensor]
    momentum: list[Tensor]
    memory: dict[str, Tensor]
    rows: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [*self.parameters, *self.momentum, *self.memory.values(), *self.rows.values()]

    def like(self, tensors: list[Tensor]) -> State:
        """The same structure with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        return State(
            [next(left) for _ in self.parameters],
            [next(left) for _ in self.momentum],
            {name: next(left) for name in self.memory},
            {name: next(left) for name in self.rows},
        )


class Pulled(NamedTuple):
    """What `pullback` returns: the costate before the step, and what it leaves out."""

    costate: State
    dropped: tuple[str, ...]


def state(driver: Driver, batch: Batch) -> State:
    """A copy of the driver's present state, as far as a step on that batch sees it."""
    buffers = [driver.sgd.state[p].get("momentum_buffer") for p in driver.parameters]
    momentum = [
        torch.zeros_like(p) if b is None else b.clone()
        for p, b in zip(driver.parameters, buffers, strict=True)
    ]
    context = driver._context(batch, 0.0, Meter(), driver.memory)
    return State(
        [p.detach().clone() for p in driver.parameters],
        momentum if driver.optimizer.momentum > 0 else [],
        {name: t.clone() for name, t in driver.memory.items() if t.is_floating_point()},
        {name: rows.values.clone() for name, rows in context.rows.items()},
    )


def pullback(
    driver: Driver, batch: Batch, u: Control, rate: float, costate: State, meter: Meter | None = None
) -> Pulled:
    """p_t = (dS/dz)^T p_{t+1} for one outer step under u at the driver's present state, which stays.

    The step runs again with a graph through torch.optim.SGD's recursion (momentum, Nesterov, weight decay)
    and through all of the method's updates; BatchNorm's running statistics are not part of the state.

    Args:
        driver: at the state before the step.
        batch: of the step.
        u: its control.
        rate: its learning rate.
        costate: after the step. Names of memory or rows that it lacks count as 0.
        meter: where evaluations are counted.

    Returns:
        The costate before the step, and the names of what was dropped.

    Source:
        The discrete costate equation; for SGD with momentum as in Maclaurin et al. (2015), algorithm 2.

    >>> from controlat import Ball
    >>> from controlat.methods import build
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> driver = Driver(model, build("pgd_at"), Ball(0.1))
    >>> batch = Batch(torch.rand(5, 1, 2, 2), torch.arange(5) % 3, torch.arange(5), 0, 0)
    >>> p = state(driver, batch)
    >>> found = pullback(driver, batch, Control(alpha=0.05, steps=2), 0.1, p)
    >>> [t.shape for t in found.costate.parameters]
    [torch.Size([3, 4]), torch.Size([3])]
    """
    before = state(driver, batch)
    leaves = before.like([t.requires_grad_() for t in before.tensors()])
    names = [name for name, p in driver.model.named_parameters() if p.requires_grad]
    dropped: set[str] = set()
    with driver._scoring(), torch.enable_grad():
        memory = {name: t.clone() for name, t in driver.memory.items()} | leaves.memory
        ctx = driver._context(batch, rate, Meter() if meter is None else meter, memory)
        ctx.rows = {name: Rows(leaves.rows[name], rows.seen) for name, rows in ctx.rows.items()}
        theta, momentum = leaves.parameters, leaves.momentum
        ctx.theta = dict(zip(names, theta, strict=True))
        for update, _, gradients in driver._updates(ctx, batch, u):
            shift = [torch.zeros_like(t) for t in theta] if update.shift is None else list(update.shift)
            theta, momentum = _sgd(driver, theta, momentum, gradients, shift, rate)
            ctx.theta = dict(zip(names, theta, strict=True))
            dropped.update(update.dropped)
            with torch.no_grad():  # views of the network run at the present parameters
                torch._foreach_copy_(driver.parameters, [t.detach() for t in theta])
    after = State(
        theta,
        momentum,
        {name: t for name, t in ctx.memory.items() if t.is_floating_point()},
        {name: rows.values for name, rows in ctx.rows.items()},
    )
    return Pulled(leaves.like(_pull(after, costate, leaves)), tuple(sorted(dropped)))


def _sgd(
    driver: Driver,
    theta: list[Tensor],
    momentum: list[Tensor],
    gradients: list[Tensor],
    shift: list[Tensor],
    rate: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """torch.optim.SGD's step at theta + shift, with a graph."""
    o = driver.optimizer
    moved = [g + o.weight_decay * (t + d) for g, t, d in zip(gradients, theta, shift, strict=True)]
    if o.momentum > 0:
        momentum = [o.momentum * v + g for v, g in zip(momentum, moved, strict=True)]
        ahead = [g + o.momentum * v for g, v in zip(moved, momentum, strict=True)]
        moved = ahead if o.nesterov else momentum
    return [t - rate * g for t, g in zip(theta, moved, strict=True)], momentum


def _pull(after: State, costate: State, leaves: State) -> list[Tensor]:
    """Gradients of <costate, after> in the leaves."""
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for mine, theirs in ((after.memory, costate.memory), (after.rows, costate.rows)):
        for name, value in mine.items():
            if name in theirs and value.requires_grad:
                outputs.append(value)
                weights.append(theirs[name])
    outputs += [*after.parameters, *after.momentum]
    weights += [*costate.parameters, *costate.momentum]
    inputs = leaves.tensors()
    found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
