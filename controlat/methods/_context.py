"""The arguments of a method: the batch, the context of a step, and the context of an epoch's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.parallel import Share
from controlat._util.watch import Watch
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.data import Placement
from controlat.models.frozen import batchnorm
from controlat.models.frozen.contexts import swapped
from controlat.models.frozen.hook import LayerHook
from controlat.models.frozen.layout import is_convolutional, run_in_layout
from controlat.models.frozen.logits import checked_logits
from controlat.models.frozen.view import FrozenModel

__all__ = ["Batch", "Context", "Epoch", "Rows"]


class Batch(NamedTuple):
    """The batch of one outer step.

    Args:
        x: (N, ...) clean inputs in [0, 1].
        y: (N,) labels.
        indices: (N,) positions of the samples in the training set.
        epoch: epoch, from 0.
        number: position of the batch in its epoch, from 0.
        placement: the augmentation that made x from the stored images, with its inverse; None for none.
        share: with several processes, which rows of the whole batch these are; None if they are all.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    epoch: int
    number: int
    placement: Placement | None = None
    share: Share | None = None


class Rows(NamedTuple):
    """Memory per training sample: one row for each sample of a batch, or of the training set.

    Args:
        values: (N, ...) rows; 0 for samples that have none yet.
        seen: (N,) mask of the samples that have a row.
    """

    values: Tensor
    seen: Tensor


@dataclass
class Context:
    """What a method may use during one outer step.

    Args:
        model: the network, in training mode.
        ball: the perturbation set.
        meter: counts the evaluations of `logits` and `view`.
        seed: seed of the run; random numbers are drawn through `generator` only.
        epoch: epoch, from 0.
        batch: position of the batch in its epoch, from 0.
        rate: learning rate of this step.
        memory: dense tensors that the method carries from step to step; part of the state z.
        rows: memory per training sample, by name: the rows of the samples of this batch. Rows assigned here
            are stored for these samples; part of the state z.
        autocast: dtype of mixed precision; None for none.
        channels_last: run convolutions in NHWC layout.
        share: the rows of the whole batch that this process works on.
        theta: while the step itself is differentiated (`controlat.dynamics.adjoint`), the parameters with a
            graph to the state before the step; None otherwise.
        statistics: likewise the running statistics of the network's normalisation layers.
        margin: distance by which `carried` moves perturbations off the edge of their set; 0 in training.
        passes: number of samples that `logits` has been evaluated on.
        watch: looks whether results of the inner solver are finite.
    """

    model: nn.Module
    ball: Ball
    meter: Meter
    seed: int
    epoch: int
    batch: int
    rate: float
    memory: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    channels_last: bool = True
    share: Share = Share(0, 1, 0)  # noqa: RUF009
    theta: dict[str, Tensor] | None = None
    statistics: list[Tensor] = field(default_factory=list)
    margin: float = 0.0
    passes: int = 0
    watch: Watch = field(default_factory=Watch)

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one purpose in this step; its numbers do not depend on the control."""
        return rng.generator(self.seed, self.epoch, self.batch, purpose, device=device)

    def draw(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Random numbers for the rows of this process, out of those that `fill` draws for the whole batch.

        With several processes each sample then has the same numbers as with one process.
        """
        if self.share.alone:
            return fill(like)
        return fill(like.new_empty(self.share.total, *like.shape[1:]))[self.share.rows]

    def noise(self, like: Tensor, radius: float = 1.0, purpose: str = "start") -> Tensor:
        """A random perturbation of norm at most radius * eps for each row; x + noise may leave [0, 1]."""
        generator = self.generator(purpose, like.device)
        return self.draw(like, lambda whole: self.ball.noise(whole, generator, radius))

    def normal(self, like: Tensor, purpose: str = "start") -> Tensor:
        """Standard normal numbers for each row."""
        generator = self.generator(purpose, like.device)
        return self.draw(like, lambda whole: torch.empty_like(whole).normal_(generator=generator))

    def start(self, x: Tensor) -> Tensor:
        """A random point of the perturbation set of each row, as `Ball.start` draws it."""
        return (x + self.noise(x)).clamp_(0, 1)

    def here(self, carried: Tensor) -> Tensor:
        """The rows of this process out of a tensor with one row per position in the whole batch."""
        return carried[self.share.rows]

    def all_gather(self, rows: Tensor) -> Tensor:
        """All-gather: the rows of all processes, in the order of the whole batch."""
        return self.share.all_gather(rows)

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce: the sum of `value` over the processes."""
        return self.share.sum(value)

    def view(self, mode: str = "eval") -> FrozenModel:
        """The frozen network for an inner solver; close it before the next yield, which may update theta."""
        return FrozenModel(
            self.model,
            mode,
            channels_last=self.channels_last,
            meter=self.meter,
            autocast=self.autocast,
            watch=self.watch,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Differentiable logits of the model in training mode; counts one gradient evaluation per sample."""
        self.meter.gradients += len(x)
        self.passes += len(x)
        return self._forward(x)

    def layer(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Differentiable output of one layer in training mode; counts one first-layer pass per sample."""
        self.meter.layers += len(x)
        with LayerHook(layer, stop=True) as hook:
            self._forward(x)
        return hook.output

    def _forward(self, x: Tensor) -> Tensor:
        if self.channels_last and is_convolutional(self.model):
            return run_in_layout(self.model, x, lambda x, nhwc: self._run(x))
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.theta is None:
            return checked_logits(self.model, x)
        # BatchNorm writes to its buffers in place, which would invalidate graphs that saved them: it is given
        # copies, which are written back after the pass.
        buffers = dict(self.model.named_buffers())
        tensors = {id(b): b.detach().clone() for b in buffers.values()}
        for name, p in self.model.named_parameters():
            tensors[id(p)] = self.theta.get(name, p)
        with swapped(self.model, tensors), batchnorm.differentiable_statistics(self.model, self.statistics):
            try:
                logits = checked_logits(self.model, x)
            finally:
                after = dict(self.model.named_buffers())
                with torch.no_grad():
                    for name, b in buffers.items():
                        b.copy_(after[name])
        return logits

    def weights(self) -> list[tuple[str, Tensor]]:
        """The trained parameters, with their names, at their present values."""
        if self.theta is not None:
            return list(self.theta.items())
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def carried(self, delta: Tensor, x: Tensor | None = None) -> Tensor:
        """Perturbations of an earlier step, moved off the edge of their set by `margin` (0 in training).

        When a step is differentiated, a pixel on the edge can only move inwards. At a small distance inside,
        the derivative of the following clip is that of such a move; exactly on the edge torch's derivative of
        clamp is 1 for moves in both directions.

        Args:
            delta: (N, ...) perturbations within the ball.
            x: (N, ...) inputs, if x + delta was kept within [0, 1] too.
        """
        if not self.margin:
            return delta
        low, high = self.ball.bounds(x)
        near = self.margin / 2
        return delta + self.margin * ((delta < low + near).to(delta) - (delta > high - near).to(delta))

    def leaf(self, t: Tensor) -> Tensor:
        """A carried tensor in which a loss can be differentiated: detached, and requiring gradients.

        While the step itself is differentiated, its graph is kept.
        """
        return t if self.theta is not None and t.requires_grad else t.detach().requires_grad_()


@dataclass
class Epoch:
    """The context of a method's hooks at the beginning and at the end of an epoch.

    Args:
        model: the network.
        ball: the perturbation set.
        meter: counts evaluations.
        seed: seed of the run; random numbers are drawn through `generator` only.
        epoch: epoch, from 0.
        memory: as in `Context`.
        held_out: samples that are never trained on; None if there are none.
        channels_last: run convolutions in NHWC layout.
        forget: forget(name) removes the rows of that name of all training samples.
        save: save(name) keeps a copy of the network and of the optimiser's state.
        reload: reload(name) restores that copy.
        stop: stop(reason) ends training after this epoch.
        first: first() returns the first batch of the epoch.
    """

    model: nn.Module
    ball: Ball
    meter: Meter
    seed: int
    epoch: int
    memory: dict[str, Tensor]
    held_out: HeldOut | None
    channels_last: bool
    forget: Callable[[str], None]
    save: Callable[[str], None]
    reload: Callable[[str], None]
    stop: Callable[[str], None]
    first: Callable[[], Batch]

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one purpose in this epoch."""
        return rng.generator(self.seed, self.epoch, -1, purpose, device=device)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out samples in batches; no batch if there are no held-out samples."""
        if self.held_out is not None:
            yield from self.held_out.stream(torch.arange(len(self.held_out)).split(size))


class HeldOut(Protocol):
    """Held-out samples: a split of `controlat.data`."""

    def __len__(self) -> int: ...

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of every chunk in turn."""
