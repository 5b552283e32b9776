"""The specification of a run: data in batches, controller, learning rate, seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from controlat._util import rng
from controlat._util.checks import brief, instance, whole
from controlat._util.parallel import World
from controlat.control.controller import Controller, Moment, as_controller, is_open, nominal
from controlat.control.learning_rate import Rate
from controlat.control.space import Control
from controlat.data import Augment, Samples
from controlat.dynamics import feedback
from controlat.methods import Batch

__all__ = ["RunSpec"]


@dataclass(frozen=True)
class RunSpec:
    """The specification of a run: data in batches, controller, learning rate, seed.

    Args:
        data: training samples; their order in an epoch is a function of (seed, epoch).
        batch_size: samples per outer step; the last batch of an epoch may be smaller.
        epochs: number of epochs T.
        controller: gives u_t: a schedule, a function t -> u, or a closed loop
            (`controlat.control.controller`).
        rate: (t, T) -> learning rate.
        seed: of all random numbers.
        augment: random crops and flips, a function of (seed, epoch, batch); None for none.
        held_out: samples that are never trained on, for methods that evaluate between epochs.
        world: the processes that share every batch.

    Raises:
        ValueError: a number below 1, or a last batch with fewer samples than there are processes.
    """

    data: Samples
    batch_size: int
    epochs: int
    controller: Controller
    rate: Rate
    seed: int = 0
    augment: Augment | None = None
    held_out: Samples | None = None
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1.0), ("epochs", 1.0), ("seed", -math.inf)):
            object.__setattr__(self, name, whole(getattr(self, name), name, low))
        for name in ("data", "held_out"):
            samples = getattr(self, name)
            if not hasattr(samples, "stream") and (name == "data" or samples is not None):
                raise TypeError(f"{name} must be samples such as controlat.Split, got {brief(samples)}")
        object.__setattr__(self, "controller", as_controller(self.controller))
        if not callable(self.rate):
            raise TypeError(f"rate must be a function of t (see parse_rate), got {brief(self.rate)}")
        instance(self.augment, (Augment, type(None)), "augment")
        instance(self.world, World, "world")
        last = (len(self.data) - 1) % self.batch_size + 1
        if last < self.world.size:
            raise ValueError(
                f"the last batch of an epoch has {last} samples for {self.world.size} processes; choose a "
                "batch_size or train_points that leave more"
            )
        if hasattr(self.controller, "for_run") and not is_open(self.controller):
            object.__setattr__(self, "controller", as_controller(self.controller.for_run(self)))

    @property
    def batches_per_epoch(self) -> int:
        """Outer steps per epoch."""
        return -(-len(self.data) // self.batch_size)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """Positions of the samples of every batch of an epoch."""
        return _order(len(self.data), self.batch_size, self.seed, epoch)

    def indices(self, start: int, stop: int) -> Tensor:
        """Positions of the samples that the steps start, ..., stop - 1 of the run use, without repetition."""
        steps = range(start, min(stop, self.epochs * self.batches_per_epoch))
        used = [self.order(epoch)[i] for epoch, i in (divmod(n, self.batches_per_epoch) for n in steps)]
        positions: Tensor = torch.cat(used).unique()
        return positions

    def batches(self, epoch: int, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """This process's rows of the batches first, ..., last - 1 of one epoch, by default of all.

        Streamed data is decoded some batches ahead, but not beyond `last`.
        """
        batches = self.order(epoch)[first:last]
        shares = [self.world.share(len(index)) for index in batches]
        chunks = [index[share.rows] for index, share in zip(batches, shares, strict=True)]
        parts = zip(chunks, shares, self.data.stream(chunks), strict=True)
        for number, (index, share, (x, y)) in enumerate(parts, first):
            placement = None
            if self.augment is not None:
                draw = rng.generator(self.seed, epoch, number, "augment")
                placement = self.augment.draw(share.total, draw)[share.rows].to(x.device)
                x = placement(x)
            yield Batch(
                x=x,
                y=y,
                indices=index,
                epoch=epoch,
                number=number,
                placement=placement,
                share=None if share.alone else share,
            )

    @property
    def open_loop(self) -> bool:
        """Whether the controller is open loop: all controls are known before the run."""
        return is_open(self.controller)

    def moment(self, number: int) -> Moment:
        """The time t of a step, from its number."""
        return Moment(*divmod(number, self.batches_per_epoch), self.batches_per_epoch)

    def plan(self, first: int = 0, last: int | None = None) -> list[Control]:
        """The controls of the steps first, ..., last - 1, by default of all, for planning the cost.

        For a closed loop, whose controls are not known before the run, each is its attribute
        `most_expensive`: an upper bound of the cost.

        Raises:
            ValueError: a closed loop without the attribute `most_expensive`.
        """
        numbers = range(first, self.epochs * self.batches_per_epoch if last is None else last)
        if is_open(self.controller):
            return [self.controller.control(self.moment(n)) for n in numbers]
        most_expensive = getattr(self.controller, "most_expensive", None)
        if most_expensive is None:
            name = type(self.controller).__name__
            raise ValueError(
                f"the controls of the closed loop {name} are not known before the run: give it an attribute "
                "`most_expensive`, the control with the most gradient evaluations that it may give, for an "
                "upper bound of the cost"
            )
        return [Control(**most_expensive)] * len(numbers)

    @property
    def decision_cost(self) -> float:
        """Gradient evaluations, in samples, that a closed loop spends on its decisions in the run at most.

        It is the attribute of that name of the controller; 0 where it has none.
        """
        return float(getattr(self.controller, "decision_cost", 0.0))

    def blocks(self, first: int, last: int) -> tuple[int, ...]:
        """The number of the block of each step first, ..., last - 1.

        A block is an interval of one epoch in which u(t) is constant. Every step of a closed loop is a block
        of its own; a recorded closed loop is cut where its control did change.
        """
        if not is_open(self.controller):
            return tuple(range(last - first))
        blocks: list[int] = []
        before = None
        for now in map(self.moment, range(first, last)):
            piece = now.epoch, nominal(self.controller, now)
            blocks.append(blocks[-1] + (piece != before) if blocks else 0)
            before = piece
        return tuple(blocks)

    def control(self, batch: Batch, z: Any = None) -> Control:
        """u_t of the step on a batch.

        Args:
            batch: the batch.
            z: the driver at the state before the step; an open loop does not need it.

        Raises:
            ValueError: a closed loop gives no admissible control.
        """
        return self.control_at(batch.epoch, batch.number, z)

    def control_at(self, epoch: int, number: int, z: Any = None) -> Control:
        """u_t of a step, from its epoch and its position in the epoch; otherwise as `control`.

        For the first step of an epoch (number 0) it can be called until the epoch ends.
        """
        now = Moment(epoch, number, self.batches_per_epoch)
        return feedback.decide(self.controller, now, z, self.world)

    def observe(self, step: Any, z: Any) -> None:
        """Call a closed loop's `observe` after a step, with the driver z at the state after it."""
        feedback.observe(self.controller, step, z, self.world)

    def learning_rate(self, epoch: int, number: int) -> float:
        """Learning rate eta of a step, evaluated at the middle of its time interval."""
        return self.rate(epoch + (number + 0.5) / self.batches_per_epoch, self.epochs)

    def price(self, gamma: float) -> float:
        """gamma eta: the price of one gradient evaluation per sample, in units of J."""
        return gamma * self.mean_rate()

    def mean_rate(self, epoch: int | None = None) -> float:
        """Mean learning rate of an epoch, or of the whole run: the unit of time and of cost."""
        epochs = range(self.epochs) if epoch is None else (epoch,)
        rates = [self.learning_rate(e, b) for e in epochs for b in range(self.batches_per_epoch)]
        return sum(rates) / len(rates)


@lru_cache(maxsize=2)  # steps are visited one by one, also across the end of an epoch
def _order(samples: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Positions of the samples of every batch of an epoch; cached, hence not to be written to."""
    order = torch.randperm(samples, generator=rng.generator(seed, epoch, "order"))
    return torch.split(order, batch_size)
