"""Sources of test points: tensors, or a split of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from controlat._util.checks import brief, instance, whole
from controlat._util.transfer import to_device
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import check_batch
from controlat.models.frozen.contexts import normal_tensor

__all__ = ["Pair", "Source", "batches", "check_arguments", "read_device", "spread"]


class Source(Protocol):
    """Labelled inputs in [0, 1], such as the splits of `controlat.data`."""

    @property
    def y(self) -> Tensor:
        """Labels (N,)."""

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of each chunk in turn, on the device of the attack."""


@dataclass(frozen=True)
class Pair:
    """Inputs (N, ...) in [0, 1] and labels (N,) as tensors.

    Raises:
        ValueError: x is not a batch in [0, 1], y not its labels, or the device cannot be used.
    """

    x: Tensor
    y: Tensor
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_batch(self.x, self.y)
        object.__setattr__(self, "x", normal_tensor(self.x))
        object.__setattr__(self, "y", normal_tensor(self.y))
        if self.device is not None:
            read_device(self.device)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of each chunk in turn."""
        device = self.x.device if self.device is None else torch.device(self.device)
        for chunk in chunks:
            yield (
                to_device(self.x[to_device(chunk, self.x.device)], device),
                to_device(self.y[to_device(chunk, self.y.device)], device),
            )


def read_device(device: torch.device | str) -> torch.device:
    """A device that can be used.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}); give auto or cpu") from None
    return usable


def check_arguments(
    source: object, ball: object, batch_size: int, seed: int, progress: object
) -> tuple[int, int]:
    """Check the arguments that all evaluations have in common, and return batch_size and seed.

    Raises:
        TypeError: an object of another kind.
        ValueError: a number that is not whole or out of range.
    """
    if not hasattr(source, "stream") or not hasattr(source, "y"):
        raise TypeError(f"source must be test points such as a controlat.Split, got {brief(source)}")
    instance(ball, Ball, "ball")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of (samples done, what), got {brief(progress)}")
    return whole(batch_size, "batch_size", 1), whole(seed, "seed")


def batches(source: Source, positions: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions, x, y) of the test points at some positions, in batches."""
    chunks = torch.split(positions, size) if len(positions) else ()
    for chunk, (x, y) in zip(chunks, source.stream(chunks), strict=True):
        yield chunk, x, y


def spread(positions: Tensor, n: int) -> Tensor:
    """At most n of the positions, evenly spaced, since data sets may be sorted by class."""
    if len(positions) <= n:
        return positions
    return positions[torch.arange(n) * len(positions) // n]
