"""Where test points come from: tensors, or a split that hands them out batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from controlat.attacks.pgd import check_batch
from controlat.borrowed import owned

__all__ = ["Pair", "Source", "parts", "spread"]


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
        object.__setattr__(self, "x", owned(self.x))
        object.__setattr__(self, "y", owned(self.y))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels at the positions of each chunk in turn."""
        device = self.x.device if self.device is None else torch.device(self.device)
        for chunk in chunks:
            yield (
                self.x[chunk.to(self.x.device)].to(device),
                self.y[chunk.to(self.y.device)].to(device),
            )


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
