"""What a method is given: a batch, and what it may use in a step and between epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.parallel import Share
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
    """What one outer step is given.

    Args:
        x: (N, ...) clean inputs in [0, 1].
        y: (N,) labels.
        indices: (N,) positions of the samples in the training set.
        epoch: epoch, from 0.
        number: position of the batch in its epoch, from 0.
        placement: the augmentation that made x from the stored images, with its inverse; None for none.
        share: which rows of a larger batch these are, where several processes share it; None if it is whole.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    epoch: int
    number: int
    placement: Placement | None = None
    share: Share | None = None


class Rows(NamedTuple):
    """What the samples of a batch carry.

    Args:
        values: (N, ...), 0 where nothing is carried.
        seen: (N,) mask of samples that carry something.
    """

    values: Tensor
    seen: Tensor


@dataclass
class Context:
    """What a method may use during one outer step.

    Args:
        model: the network, in training mode.
        ball: the perturbation set.
        meter: where evaluations are counted; `logits` and `view` do it.
        seed: of the run; draw through `generator` only.
        epoch: epoch, from 0.
        batch: position of the batch in its epoch, from 0.
        rate: learning rate of this step.
        memory: dense tensors that the method carries from step to step; part of the state z.
        rows: memory per training sample, by name: for the samples of this batch, what they carry, and a mask
            of those that carry anything. What is assigned here is kept for them; part of the state z.
        autocast: dtype of mixed precision, None for none.
        channels_last: run convolutions in NHWC layout.
        share: the rows of the whole batch that this process works on.
        theta: parameters with a graph to the state before the step, while the step itself is differentiated
            (`controlat.dynamics.adjoint`); None otherwise.
        statistics: running statistics of the network's normalisation layers, alike.
        margin: how far inside the perturbation set `carried` puts what lies on its edge; 0 in training.
        passes: samples that `logits` has been asked about.
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

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this step for one purpose: the same whichever control is tried."""
        return rng.generator(self.seed, self.epoch, self.batch, purpose, device=device)

    def draw(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Random numbers for the rows of `like`, one per sample here: `fill` draws those of the whole batch.

        Several processes then use the numbers that one process would.
        """
        if self.share.alone:
            return fill(like)
        return fill(like.new_empty(self.share.total, *like.shape[1:]))[self.share.rows]

    def noise(self, like: Tensor, radius: float = 1.0, purpose: str = "start") -> Tensor:
        """A random perturbation of norm at most radius * eps for every row, whatever the pixel box."""
        generator = self.generator(purpose, like.device)
        return self.draw(like, lambda whole: self.ball.noise(whole, generator, radius))

    def normal(self, like: Tensor, purpose: str = "start") -> Tensor:
        """Standard normal numbers for every row."""
        generator = self.generator(purpose, like.device)
        return self.draw(like, lambda whole: torch.empty_like(whole).normal_(generator=generator))

    def start(self, x: Tensor) -> Tensor:
        """A random point of the perturbation set of every row: that of `Ball.start`."""
        return (x + self.noise(x)).clamp_(0, 1)

    def here(self, carried: Tensor) -> Tensor:
        """The rows of this process, of a tensor with a row for every place of the whole batch."""
        return carried[self.share.rows]

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the whole batch."""
        return self.share.all_gather(rows)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, of what each has on its rows."""
        return self.share.sum(value)

    def view(self, mode: str = "eval") -> FrozenModel:
        """The network for an inner solver. Leave it before the next yield: theta may move there."""
        return FrozenModel(
            self.model, mode, channels_last=self.channels_last, meter=self.meter, autocast=self.autocast
        )

    def logits(self, x: Tensor) -> Tensor:
        """Differentiable logits of the model as it is trained; one gradient evaluation per sample."""
        self.meter.gradients += len(x)
        self.passes += len(x)
        return self._forward(x)

    def layer(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Differentiable output of one layer, as the model is trained; one first-layer pass per sample."""
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
        # BatchNorm writes into its statistics, and the graph keeps those that it has seen.
        buffers = dict(self.model.named_buffers())
        placed = {id(b): b.detach().clone() for b in buffers.values()}
        for name, p in self.model.named_parameters():
            placed[id(p)] = self.theta.get(name, p)
        with swapped(self.model, placed), batchnorm.differentiable_statistics(self.model, self.statistics):
            try:
                logits = checked_logits(self.model, x)
            finally:
                after = dict(self.model.named_buffers())
                with torch.no_grad():
                    for name, b in buffers.items():
                        b.copy_(after[name])
        return logits

    def weights(self) -> list[tuple[str, Tensor]]:
        """The parameters that are trained, by name, at their present values."""
        if self.theta is not None:
            return list(self.theta.items())
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def carried(self, delta: Tensor, x: Tensor | None = None) -> Tensor:
        """A perturbation of an earlier step; where a step is differentiated, off the edge of its set.

        A pixel on the edge can only move inwards. A hair inside, the derivative of the clips to come is that
        of such a move; on the edge torch's is that of a move to either side.

        Args:
            delta: (N, ...) perturbations within the ball.
            x: (N, ...) inputs, if x + delta was kept within the pixel box too.
        """
        if not self.margin:
            return delta
        low, high = self.ball.bounds(x)
        near = self.margin / 2
        return delta + self.margin * ((delta < low + near).to(delta) - (delta > high - near).to(delta))

    def leaf(self, t: Tensor) -> Tensor:
        """A carried tensor that a loss can be differentiated in.

        Cut off from what made it; but where the step itself is differentiated, it keeps that.
        """
        return t if self.theta is not None and t.requires_grad else t.detach().requires_grad_()


@dataclass
class Epoch:
    """What a method may use at the beginning and at the end of an epoch.

    Args:
        model: the network.
        ball: the perturbation set.
        meter: where evaluations are counted.
        seed: of the run; draw through `generator` only.
        epoch: epoch, from 0.
        memory: as in `Context`.
        held_out: samples that are never trained on, if there are any.
        channels_last: run convolutions in NHWC layout.
        forget: called with a name: no sample carries that any more.
        save: called with a name: keep a copy of the network and of the optimiser's state.
        reload: called with a name: put that copy back.
        stop: called with a reason: end training after this epoch.
        first: the first batch of the epoch.
    """

    model: nn.Module
    ball: Ball
    meter: Meter
    seed: int
    epoch: int
    memory: dict[str, Tensor]
    held_out: Held | None
    channels_last: bool
    forget: Callable[[str], None]
    save: Callable[[str], None]
    reload: Callable[[str], None]
    stop: Callable[[str], None]
    first: Callable[[], Batch]

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this epoch for one purpose."""
        return rng.generator(self.seed, self.epoch, -1, purpose, device=device)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out samples in batches; none if there are none."""
        if self.held_out is not None:
            yield from self.held_out.stream(torch.arange(len(self.held_out)).split(size))


class Held(Protocol):
    """Held-out samples: a split of `controlat.data`."""

    def __len__(self) -> int: ...

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of every chunk in turn."""
