"""The form of a method: a generator of parameter updates, run by the driver (`controlat.dynamics`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from controlat import network, rng
from controlat.augment import Placement
from controlat.balls import Ball
from controlat.control import Control, ControlSpace
from controlat.network import Meter, View

__all__ = ["Batch", "Context", "Method", "Prefixes", "Update"]


class Batch(NamedTuple):
    """What one outer step is given.

    Args:
        x: (N, ...) clean inputs in [0, 1].
        y: (N,) labels.
        indices: (N,) positions of the samples in the training set.
        epoch: epoch, from 0.
        number: position of the batch in its epoch, from 0.
        placement: the augmentation that made x from the stored images, with its inverse; None for none.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    epoch: int
    number: int
    placement: Placement | None = None


class Update(NamedTuple):
    """One parameter update: the driver differentiates `loss` and moves theta.

    Args:
        loss: a scalar, differentiable in the parameters, with everything piecewise constant frozen; built
            from ``Context.logits``.
        dropped: smooth dependences on theta that were detached, by name; results print them.
    """

    loss: Callable[[], Tensor]
    dropped: tuple[str, ...] = ()


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
        autocast: dtype of mixed precision, None for none.
        channels_last: run convolutions in NHWC layout.
    """

    model: nn.Module
    ball: Ball
    meter: Meter
    seed: int
    epoch: int
    batch: int
    rate: float
    memory: dict[str, Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    channels_last: bool = True

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this step for one purpose: the same whichever control is tried."""
        return rng.generator(self.seed, self.epoch, self.batch, purpose, device=device)

    def view(self, mode: str = "eval") -> View:
        """The network for an inner solver. Leave it before the next yield: theta may move there."""
        return View(
            self.model, mode, channels_last=self.channels_last, meter=self.meter, autocast=self.autocast
        )

    def logits(self, x: Tensor) -> Tensor:
        """Differentiable logits of the model as it is trained; one gradient evaluation per sample."""
        self.meter.gradients += len(x)
        logits: Tensor = self.model(network.channels_last(x) if self.channels_last else x)
        return logits


class Method(Protocol):
    """An adversarial-training system: one file in ``controlat/methods``, or the user's own class."""

    @property
    def controls(self) -> ControlSpace:
        """The admissible set G of u."""

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        """One outer step S(z, u): after each yield the driver has moved theta.

        No view may be open and no gradient graph be shared across a yield; methods never call backward.
        """


@runtime_checkable
class Prefixes(Protocol):
    """A method whose run at K_max passes through the step of every smaller K: offers the exact sweep."""

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        """Yield (control, its only update) for steps = 1, ..., u["steps"], from one trajectory.

        Each equals the update of `updates` under that control. theta does not move in between.
        """
