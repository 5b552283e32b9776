"""Computes the gradients of the losses that a method yields in one outer step."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.kernels import SecondDerivatives
from controlat.control.space import Control
from controlat.dynamics.step import When
from controlat.methods import Batch, Context, Method, Update
from controlat.models.frozen import batchnorm
from controlat.models.frozen.contexts import normal_tensor, preserved_buffers, swapped

__all__ = ["Requests", "diverged", "own_batch"]


@dataclass(frozen=True)
class Requests:
    """Differentiates the losses of a method's `Update` requests at the network's present parameters.

    Args:
        model: the network.
        parameters: its trained parameters.
        method: the training system.
        seed: of all random numbers in a step.
        autocast: dtype of mixed precision; None for none.
        normalises: whether the network has running statistics.
    """

    model: nn.Module
    parameters: list[Tensor]
    method: Method
    seed: int
    autocast: torch.dtype | None
    normalises: bool

    def updates(
        self, ctx: Context, batch: Batch, u: Control
    ) -> Iterator[tuple[Update, Tensor | float, list[Tensor]]]:
        """Yield (update, summed loss, summed gradient) for each update of theta in one outer step.

        The loss is a number if ``ctx.watch`` looks at once; otherwise it stays on the device, in float64.

        `update.dropped` also has the names that the other requests since the last update of theta dropped.
        """
        self.model.train()
        batch, where = own_batch(batch), When(batch.epoch, batch.number, u)
        ctx.watch.place = where
        total: list[Tensor] | None = None
        losses: list[Tensor | float] = []
        dropped: set[str] = set()
        moved = False
        answer: Sequence[Tensor] | None = None
        try:
            updates = self.method.updates(ctx, batch, u)
            for i in itertools.count():
                with self.random(batch, "inner", i):
                    update = self._next(updates, answer)
                if update is None:
                    break
                loss, gradients, answer = self.differentiate(ctx, batch, u, update, i)
                dropped.update(update.dropped)
                if update.add:
                    total = gradients if total is None else [*map(torch.add, total, gradients)]
                    losses.append(loss)
                if update.move:
                    if total is None:
                        raise ValueError(f"{type(self.method).__name__} moves theta without a gradient")
                    yield update._replace(dropped=tuple(sorted(dropped))), sum(losses), total
                    total, losses, moved = None, [], True
        except NonFiniteError as error:
            raise error if str(where) in str(error) else NonFiniteError(f"{error} ({where})") from None
        if total is not None or not moved:
            what = "without moving theta" if total is None else "with a gradient that moves nothing"
            raise ValueError(f"{type(self.method).__name__} ends a step {what}")

    @staticmethod
    def _next(updates: Any, answer: Sequence[Tensor] | None) -> Update | None:
        """The next request of a method; the generator is sent `answer`, the gradients of the last one."""
        if not hasattr(updates, "__next__"):
            raise TypeError(
                f"`updates` of a method must be a generator: yield each Update; got {type(updates).__name__}"
            )
        if answer is None or not hasattr(updates, "send"):
            request = next(updates, None)
        else:
            try:
                request = updates.send(answer)
            except StopIteration:
                return None
        if request is not None and not isinstance(request, Update):
            raise TypeError(f"a method must yield Update(loss), got {type(request).__name__}")
        return request

    def differentiate(
        self, ctx: Context, batch: Batch, u: Control, update: Update, i: int
    ) -> tuple[Tensor | float, list[Tensor], list[Tensor]]:
        """Loss of request i, its gradients in the parameters, and its gradients in the tensors of `also`.

        If the step itself is being differentiated (``ctx.theta`` is set), the gradients have a graph.

        Raises:
            NonFiniteError: loss or gradient; the message names epoch, batch and control.
        """
        ctx.watch.place = When(batch.epoch, batch.number, u)
        graph, before, statistics = ctx.theta is not None, ctx.theta, list(ctx.statistics)
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.parameters[0].device.type, dtype=self.autocast)
        buffers = contextlib.nullcontext() if update.add else preserved_buffers(self.model)
        shift = None if graph else update.shift
        if before is not None:  # views: what a method computed from theta earlier counts as a constant
            moved = before.values() if update.shift is None else map(torch.add, before.values(), update.shift)
            ctx.theta = {name: t.view_as(t) for name, t in zip(before, moved, strict=True)}
        parameters = self.parameters if ctx.theta is None else list(ctx.theta.values())
        with (
            self.random(batch, "update", i),
            torch.enable_grad(),
            buffers,
            self.shifted(shift),
            self.placed(ctx, once=i == 0 and update.shift is None),
        ):
            with cast:
                loss = update.loss()
            if loss.dim():
                raise ValueError(
                    f"the loss of an Update must be one number, got shape {tuple(loss.shape)}: take the mean"
                )
            inputs = [*parameters, *([] if update.also is None else update.also())]
            with batchnorm.frozen_statistics(self.model) if self.normalises else contextlib.nullcontext():
                partials = torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=graph)
        ctx.theta = before
        if not update.add:
            ctx.statistics = statistics
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, partials, strict=True)]
        trained = {id(p) for p in parameters}
        shared = [j for j, t in enumerate(inputs) if j < len(parameters) or id(t) in trained]
        value = self._reduce(ctx, loss, gradients, shared)
        return value, gradients[: len(parameters)], gradients[len(parameters) :]

    @staticmethod
    def _reduce(ctx: Context, loss: Tensor, gradients: list[Tensor], shared: list[int]) -> Tensor | float:
        """All-reduce: return the mean loss over all processes; average the gradients at `shared` in place.

        In one reduction with all norms, so that all processes see a loss or gradient that is not finite.
        """
        norms = torch.stack([loss.detach(), *torch._foreach_norm([g.detach() for g in gradients])])
        *means, norms = ctx.share.mean([*(gradients[j] for j in shared), norms])
        for j, g in zip(shared, means, strict=True):
            gradients[j] = g
        ctx.watch.finite(norms, diverged)
        return norms[0].double() if ctx.watch.every else float(norms[0])

    @contextlib.contextmanager
    def placed(self, ctx: Context, once: bool) -> Iterator[None]:
        """Inside the block ``ctx.theta`` replaces the parameters, for layers that a backward pass runs again.

        With activation checkpointing the backward pass of the whole step runs such layers once more, with the
        parameters before the step. This is right only if the step has one gradient, taken there (`once`);
        otherwise checkpointing is refused.
        """
        if ctx.theta is None:
            yield
            return
        hooks: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not once:
            hooks = torch.autograd.graph.disable_saved_tensors_hooks(
                f"costates of {type(self.method).__name__} need the output of every layer: turn activation "
                "checkpointing off (torch.utils.checkpoint)"
            )
        second: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if SecondDerivatives.needed(self.model):
            second = SecondDerivatives()
        theta = dict(zip(map(id, self.parameters), ctx.theta.values(), strict=True))
        with hooks, second, swapped(self.model, theta):
            yield

    @contextlib.contextmanager
    def shifted(self, shift: Sequence[Tensor] | None, moves: bool = False) -> Iterator[None]:
        """`shift` added to the parameters inside the block; after it subtracted if they move, else undone."""
        if shift is None:
            yield
            return
        before = None if moves else [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_add_(self.parameters, list(shift))
        try:
            yield
        finally:
            with torch.no_grad():
                if before is None:
                    torch._foreach_sub_(self.parameters, list(shift))
                else:
                    torch._foreach_copy_(self.parameters, before)

    def random(self, batch: Batch, purpose: str, i: int) -> contextlib.AbstractContextManager[None]:
        """A block with torch's global generators seeded for request i of a step."""
        key: list[int | str] = [batch.epoch, batch.number, purpose, i]
        if batch.share is not None:  # dropout masks are drawn for the rows of this process only
            key.append(batch.share.rank)
        return rng.scoped(self.seed, *key, device=self.parameters[0].device)


def diverged(numbers: list[float]) -> str:
    """The message for a loss and the norms of its gradients."""
    return f"training loss {numbers[0]:g}, gradient norm {math.hypot(*numbers[1:]):g}"


def own_batch(batch: Batch) -> Batch:
    """The batch, with tensors that autograd can use."""
    return batch._replace(x=normal_tensor(batch.x), y=normal_tensor(batch.y))
