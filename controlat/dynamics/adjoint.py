"""The adjoint of the outer step z' = S(z, u): its vector-Jacobian product.

Quantities that the method detached count as constants. That is exact for signs, stopping rules and indices,
which are piecewise constant in the state; smooth quantities that were detached are named in `Update.dropped`.
`controlat.dynamics.verify` compares the product with finite differences of the step, for any method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.kinks import Kinks, inward
from controlat.dynamics.state import State
from controlat.methods import Batch, Context, Rows

__all__ = ["Pulled", "pullback", "pullbacks"]


class Pulled(NamedTuple):
    """What `pullback` returns: the costate before the step, and the names of dropped dependences."""

    costate: State
    dropped: tuple[str, ...]


def pullback(
    driver: Driver, batch: Batch, u: Control, rate: float, costate: State, meter: Meter | None = None
) -> Pulled:
    """p_t = (dS/dz)^T p_{t+1} for one outer step under u at the driver's present state, which is kept.

    The step is run again with a graph through torch.optim.SGD (momentum, Nesterov, weight decay) and through
    all updates of the method. Buffers other than running statistics that a forward pass writes to are
    treated as constants, and named in `dropped`.

    A step that was taken in mixed precision or TF32 is run in float32 here.

    Args:
        driver: at the state before the step.
        batch: of the step.
        u: its control.
        rate: its learning rate.
        costate: p_{t+1}, with the rows of the batch. Missing memory or rows count as 0.
        meter: counts the evaluations.

    Returns:
        The costate before the step, in the components that the step acts on, and the names of the
        dependences that were dropped.

    Source:
        The discrete costate equation; for SGD with momentum as in Maclaurin et al. (2015), algorithm 2.

    >>> from controlat import Ball
    >>> from controlat.methods import build
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> driver = Driver(model, build("pgd_at"), Ball(0.1))
    >>> batch = Batch(torch.rand(5, 1, 2, 2), torch.arange(5) % 3, torch.arange(5), 0, 0)
    >>> p = driver.point(batch.indices).copy()
    >>> before = pullback(driver, batch, Control(alpha=0.05, steps=2), 0.1, p).costate
    >>> [t.shape for t in before.parameters]
    [torch.Size([3, 4]), torch.Size([3])]
    """
    kinks = Kinks()
    (before,), dropped = pullbacks(driver, batch, u, rate, [costate], meter, kinks)
    return Pulled(before, tuple(sorted({*dropped, *kinks.names()})))


def pullbacks(
    driver: Driver,
    batch: Batch,
    u: Control,
    rate: float,
    costates: Sequence[State],
    meter: Meter | None = None,
    kinks: Kinks | None = None,
) -> tuple[list[State], tuple[str, ...]]:
    """`pullback` of several costates: the step is run once, with one backward pass per costate.

    In addition to the step, each costate counts as two gradient evaluations per sample of the loss, since it
    differentiates a forward and a backward pass. If a perturbation lies on a kink, it counts one more.
    """
    meter, kinks = Meter() if meter is None else meter, Kinks() if kinks is None else kinks
    present = driver.point(batch.indices)
    z = present.like(t.detach().clone().requires_grad_() for t in present.tensors())
    float32 = driver.full_precision()
    with float32, driver.scoring(), torch.enable_grad(), inward(driver), kinks.watched(driver):
        ctx = _context(driver, batch, rate, z, meter)
        start = ctx.theta
        after, dropped = _step(driver, ctx, batch, u, z)
        ctx.theta = start

        def pull(costate: State, keep: bool = False) -> State:
            meter.gradients += 2 * ctx.passes
            return z.like(_gradients(after, costate, z, keep))

        with driver.requests.placed(ctx, once=True):  # activation checkpointing runs layers again
            last = len(costates) - 1
            before = [pull(p, keep=kinks.met or i < last) for i, p in enumerate(costates)]
            kinks.compare(before[0], lambda: pull(costates[0]))
    for p in before:  # samples that carried nothing have no state
        for values, seen in p.rows.values():
            values[~seen] = 0
    return before, dropped


def _context(driver: Driver, batch: Batch, rate: float, z: State, meter: Meter) -> Context:
    """The context of a step whose differentiable state is z."""
    memory = {name: z.memory[name] if name in z.memory else t.clone() for name, t in driver.memory.items()}
    ctx = driver.context(batch, rate, meter, memory)
    ctx.rows = dict(z.rows)
    trained = {id(p) for p in driver.parameters}
    names = [name for name, p in driver.model.named_parameters() if id(p) in trained]
    ctx.theta, ctx.statistics = dict(zip(names, z.parameters, strict=True)), list(z.statistics)
    return ctx


def _step(driver: Driver, ctx: Context, batch: Batch, u: Control, z: State) -> tuple[State, tuple[str, ...]]:
    """S(z, u) with a graph to z, and the names of dropped dependences; changes the driver's parameters."""
    theta, momentum, names = z.parameters, z.momentum, list(ctx.theta or {})
    others, dropped = _other_buffers(driver), set[str]()
    for update, _, gradients in driver.requests.updates(ctx, batch, u):
        theta, momentum = driver.optimizer.step(theta, momentum, gradients, update.shift, ctx.rate)
        ctx.theta = dict(zip(names, theta, strict=True))
        dropped.update(update.dropped)
        with torch.no_grad():  # attacks use the driver's own parameters
            torch._foreach_copy_(driver.parameters, [t.detach() for t in theta])
    written = [name for name, b in _other_buffers(driver).items() if not torch.equal(b, others[name])]
    dropped.update(f"the buffer {name}, which forward passes write to" for name in written)
    pairs = zip(driver.statistics, ctx.statistics, strict=True)
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs):
        dropped.add("BatchNorm's running statistics, which move unseen in a compiled network")
    after = State(
        parameters=theta,
        momentum=momentum,
        statistics=ctx.statistics,
        memory=ctx.memory,
        rows={name: Rows(*rows) for name, rows in ctx.rows.items()},
        index=batch.indices,
    )
    return after, tuple(sorted(dropped))


def _other_buffers(driver: Driver) -> dict[str, Tensor]:
    """Copies of the floating-point buffers that are not running statistics."""
    statistics = {id(r) for r in driver.statistics}
    named = driver.model.named_buffers()
    return {name: b.clone() for name, b in named if b.is_floating_point() and id(b) not in statistics}


def _gradients(after: State, costate: State, z: State, keep: bool) -> list[Tensor]:
    """Gradients of <costate, after> in the tensors of z; `keep` retains the graph."""
    pairs = [
        (value, weights[name])
        for values, weights in zip(after.parts(), costate.parts(), strict=True)
        for name, value in values.items()
        if name in weights and value.requires_grad
    ]
    outputs, weights = zip(*pairs, strict=True)
    inputs = z.tensors()
    gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]
