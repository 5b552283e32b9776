"""Where test points come from: tensors, or a split that hands them out batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from controlat.attacks.pgd import check_batch
from controlat.control import brief

__all__ = ["Pair", "Source", "check_progress", "parts", "read_device", "spread"]


class Source(Protocol):
    """Labelled inputs in [0, 1]; the splits of `controlat.data` are such."""

    @property
    def y(self) -> Tensor:
        """Labels (N,)."""

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of each chunk in turn, on the device of the attack."""


@dataclass(frozen=True)
class Pair:
    """Inputs (N, ...) in [0, 1] and labels (N,) as tensors.

    Raises:
        ValueError: they are not such.
    """

    x: Tensor
    y: Tensor
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_batch(self.x, self.y)
        if self.device is not None:
            read_device(self.device)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of each chunk in turn."""
        device = self.x.device if self.device is None else torch.device(self.device)
        for chunk in chunks:
            yield (
                self.x[chunk.to(self.x.device)].to(device),
                self.y[chunk.to(self.y.device)].to(device),
            )


def read_device(device: torch.device | str) -> torch.device:
    """A device that can be used.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}); give auto or cpu") from None
    return found


def check_progress(progress: object) -> None:
    """Raise TypeError unless progress is None or can be called."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of (samples done, what), got {brief(progress)}")


def parts(source: Source, positions: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions, x, y) in batches."""
    chunks = torch.split(positions, size) if len(positions) else ()
    for chunk, (x, y) in zip(chunks, source.stream(chunks), strict=True):
        yield chunk, x, y


def spread(positions: Tensor, n: int) -> Tensor:
    """At most n of the positions, evenly spread: data sets may be sorted by class."""
    if len(positions) <= n:
        return positions
    return positions[torch.arange(n) * len(positions) // n]
