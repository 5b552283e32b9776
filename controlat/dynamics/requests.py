"""What a method asks for in one outer step: losses, which are differentiated here, and moves of theta."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.kernels import SecondDerivatives
from controlat.control.space import Control
from controlat.methods import Batch, Context, Method, Update
from controlat.models.frozen import batchnorm
from controlat.models.frozen.contexts import normal_tensor, preserved_buffers, swapped

__all__ = ["Requests", "own_batch"]


@dataclass(frozen=True)
class Requests:
    """Takes the gradients that a method asks for, at the network's present parameters.

    Args:
        model: the network.
        parameters: those that are trained.
        method: the training system.
        seed: of everything random in a step.
        autocast: dtype of mixed precision, None for none.
        normalises: whether the network has running statistics.
    """

    model: nn.Module
    parameters: list[Tensor]
    method: Method
    seed: int
    autocast: torch.dtype | None
    normalises: bool

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Update, float, list[Tensor]]]:
        """(the update that moves theta, summed loss, summed gradient) for every move of one outer step.

        What other requests drop counts for the move that follows.
        """
        self.model.train()
        batch = own_batch(batch)
        total: list[Tensor] | None = None
        losses: list[float] = []
        dropped: set[str] = set()
        moved = False
        reply: Sequence[Tensor] | None = None
        try:
            updates = self.method.updates(ctx, batch, u)
            for i in itertools.count():
                with self.random(batch, "inner", i):
                    update = self._next(updates, reply)
                if update is None:
                    break
                loss, gradients, reply = self.differentiate(ctx, batch, u, update, i)
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
            where = _where(batch, u)
            raise error if where in str(error) else NonFiniteError(f"{error} ({where})") from None
        if total is not None or not moved:
            what = "without moving theta" if total is None else "with a gradient that moves nothing"
            raise ValueError(f"{type(self.method).__name__} ends a step {what}")

    @staticmethod
    def _next(updates: Any, reply: Sequence[Tensor] | None) -> Update | None:
        """The next request of a method: a generator takes the reply to the last one."""
        if not hasattr(updates, "__next__"):
            raise TypeError(
                f"`updates` of a method must be a generator: yield each Update; got {type(updates).__name__}"
            )
        if reply is None or not hasattr(updates, "send"):
            request = next(updates, None)
        else:
            try:
                request = updates.send(reply)
            except StopIteration:
                return None
        if request is not None and not isinstance(request, Update):
            raise TypeError(f"a method must yield Update(loss), got {type(request).__name__}")
        return request

    def differentiate(
        self, ctx: Context, batch: Batch, u: Control, update: Update, i: int
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """Loss of request i, its gradient in the parameters, and its gradients in the tensors of `also`.

        Where the step itself is being differentiated (``ctx.theta``), the gradients keep their graph.

        Raises:
            NonFiniteError: loss or gradient; the message names epoch, batch and control.
        """
        graph, before, statistics = ctx.theta is not None, ctx.theta, list(ctx.statistics)
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.parameters[0].device.type, dtype=self.autocast)
        looking = contextlib.nullcontext() if update.add else preserved_buffers(self.model)
        shift = None if graph else update.shift
        if before is not None:  # new names for theta: what a method made of it is held fixed, with its graph
            moved = before.values() if update.shift is None else map(torch.add, before.values(), update.shift)
            ctx.theta = {name: t.view_as(t) for name, t in zip(before, moved, strict=True)}
        parameters = self.parameters if ctx.theta is None else list(ctx.theta.values())
        with (
            self.random(batch, "update", i),
            torch.enable_grad(),
            looking,
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
                given = torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=graph)
        ctx.theta = before
        if not update.add:
            ctx.statistics = statistics
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, given, strict=True)]
        ours = {id(p) for p in parameters}
        shared = [j for j, t in enumerate(inputs) if j < len(parameters) or id(t) in ours]
        value = self._reduce(ctx, loss, gradients, shared, _where(batch, u))
        return value, gradients[: len(parameters)], gradients[len(parameters) :]

    @staticmethod
    def _reduce(ctx: Context, loss: Tensor, gradients: list[Tensor], shared: list[int], where: str) -> float:
        """The mean loss over all processes; the gradients at the positions `shared` become means, too.

        One reduction of all: then a number that is not finite is so in every process.
        """
        norms = torch.stack([loss.detach(), *torch._foreach_norm([g.detach() for g in gradients])])
        *means, norms = ctx.share.mean([*(gradients[j] for j in shared), norms])
        for j, g in zip(shared, means, strict=True):
            gradients[j] = g
        value, norm = float(norms[0]), float(norms[1:].norm())
        if not torch.isfinite(torch.tensor((value, norm))).all():
            raise NonFiniteError(f"training loss {value:g}, gradient norm {norm:g} ({where})")
        return value

    @contextlib.contextmanager
    def placed(self, ctx: Context, once: bool) -> Iterator[None]:
        """``ctx.theta`` in place of the parameters, for layers that the backward pass computes again.

        A second derivative computes such layers once more, with the parameters before the step: allowed where
        the step asks for one gradient, there (`once`).
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
        """The parameters with something added, inside the block; their own bits after it, unless it moves."""
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
        """The random numbers of request i of a step, inside the block."""
        key: list[int | str] = [batch.epoch, batch.number, purpose, i]
        if batch.share is not None:  # masks of dropout are drawn for the rows of one process
            key.append(batch.share.rank)
        return rng.scoped(self.seed, *key, device=self.parameters[0].device)


def _where(batch: Batch, u: Control) -> str:
    return f"epoch {batch.epoch}, batch {batch.number}, {u}"


def own_batch(batch: Batch) -> Batch:
    """A batch that autograd can work with."""
    return batch._replace(x=normal_tensor(batch.x), y=normal_tensor(batch.y))
