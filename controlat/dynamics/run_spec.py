"""What a roll-out is run on: data in batches, schedule, learning rate, seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from controlat._util import rng
from controlat._util.checks import brief, instance, whole
from controlat._util.parallel import World
from controlat.control.learning_rate import Rate
from controlat.control.schedules import Schedule
from controlat.control.space import Control
from controlat.data import Augment, Samples
from controlat.methods import Batch

__all__ = ["RunSpec"]


@dataclass(frozen=True)
class RunSpec:
    """What a roll-out is run on: data in batches, learning rate, schedule, seed.

    Args:
        data: training samples; the order of an epoch is a function of (seed, epoch).
        batch_size: samples per outer step; the last batch of an epoch may be smaller.
        epochs: number of epochs T.
        schedule: t -> u.
        rate: t -> learning rate.
        seed: of everything random.
        augment: random crops and flips, a function of (seed, epoch, batch); None for none.
        held_out: samples never trained on, for methods that look at them between epochs.
        world: the processes that share every batch.

    Raises:
        ValueError: a number below 1, or a last batch with fewer samples than there are processes.
    """

    data: Samples
    batch_size: int
    epochs: int
    schedule: Schedule
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
        for name in ("schedule", "rate"):
            if not callable(value := getattr(self, name)):
                raise TypeError(f"{name} must be a function of t (see parse_{name}), got {brief(value)}")
        instance(self.augment, (Augment, type(None)), "augment")
        instance(self.world, World, "world")
        last = (len(self.data) - 1) % self.batch_size + 1
        if last < self.world.size:
            raise ValueError(
                f"the last batch of an epoch has {last} samples for {self.world.size} processes; choose a "
                "batch_size or train_points that leave more"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Outer steps per epoch."""
        return -(-len(self.data) // self.batch_size)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """Positions of the samples of every batch of an epoch."""
        return _order(len(self.data), self.batch_size, self.seed, epoch)

    def indices(self, start: int, stop: int) -> Tensor:
        """Positions of all samples that the steps start, ..., stop - 1 of the run use, each once."""
        steps = range(start, min(stop, self.epochs * self.batches_per_epoch))
        used = [self.order(epoch)[i] for epoch, i in (divmod(n, self.batches_per_epoch) for n in steps)]
        found: Tensor = torch.cat(used).unique()
        return found

    def batches(self, epoch: int, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The batches first, ..., last - 1 of one epoch, by default all: this process's rows of them.

        Data that is decoded as it is needed is decoded some batches ahead, but none from `last` on.
        """
        wholes = self.order(epoch)[first:last]
        shares = [self.world.share(len(index)) for index in wholes]
        chunks = [index[share.rows] for index, share in zip(wholes, shares, strict=True)]
        found = zip(chunks, shares, self.data.stream(chunks), strict=True)
        for number, (index, share, (x, y)) in enumerate(found, first):
            placement = None
            if self.augment is not None:
                draw = rng.generator(self.seed, epoch, number, "augment")
                placement = self.augment.draw(share.total, draw)[share.rows]
                x = placement(x)
            yield Batch(x, y, index, epoch, number, placement, None if share.alone else share)

    def blocks(self, first: int, last: int) -> tuple[int, ...]:
        """The block of every step first, ..., last - 1: epochs, cut where the control changes in one."""
        found: list[int] = []
        before = None
        for number in range(first, last):
            epoch, batch = divmod(number, self.batches_per_epoch)
            here = epoch, self.schedule(epoch + batch / self.batches_per_epoch)
            found.append(found[-1] + (here != before) if found else 0)
            before = here
        return tuple(found)

    def control(self, batch: Batch) -> Control:
        """u at the start of that batch's step."""
        return self.schedule(batch.epoch + batch.number / self.batches_per_epoch)

    def learning_rate(self, epoch: int, number: int) -> float:
        """eta of one step, taken at its middle."""
        return self.rate(epoch + (number + 0.5) / self.batches_per_epoch, self.epochs)

    def price(self, gamma: float) -> float:
        """gamma eta: the price of one gradient evaluation per sample, in units of J."""
        return gamma * self.mean_rate()

    def mean_rate(self, epoch: int | None = None) -> float:
        """Mean learning rate of an epoch, or of the whole run: the unit of time and of cost."""
        epochs = range(self.epochs) if epoch is None else (epoch,)
        rates = [self.learning_rate(e, b) for e in epochs for b in range(self.batches_per_epoch)]
        return sum(rates) / len(rates)


@lru_cache(maxsize=2)  # consecutive steps are looked at one by one, also around the end of an epoch
def _order(samples: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Positions of the samples of every batch of an epoch; shared, hence never to be changed."""
    order = torch.randperm(samples, generator=rng.generator(seed, epoch, "order"))
    return torch.split(order, batch_size)
