"""All points of a grid, coarse ones first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from controlat._util.checks import whole
from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Parameter, Space

__all__ = ["PROPOSER", "Grid"]


class Grid:
    """Every combination of `levels` evenly spaced values of each parameter, ends included, in random order.

    The order is random so that a search that runs out of its budget has looked everywhere.

    Args:
        space: what is searched.
        seed: of the order.
        levels: values of each parameter; of whole numbers all, where there are no more.

    Raises:
        ValueError: levels is less than 2, or there are more than a million points.
    """

    def __init__(self, space: Space, seed: int, levels: int = 3) -> None:
        levels = whole(levels, "levels", 2)
        axes = [_values(p, levels) for p in space.parameters]
        total = int(np.prod([len(axis) for axis in axes], dtype=float))
        if total > 1_000_000:
            raise ValueError(f"a grid of {levels} levels has {total} points; choose fewer levels or ranges")
        points = list(itertools.product(*axes))
        order = np.random.default_rng(seed).permutation(total)
        names = [p.name for p in space.parameters]
        self._left = iter([dict(zip(names, points[i], strict=True)) for i in order])

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points, none at the end."""
        return list(itertools.islice(self._left, count))

    def tell(self, trials: Sequence[Told]) -> None:
        """Nothing follows from it."""


def _values(p: Parameter, levels: int) -> list[float]:
    if p.scale == "whole" and p.high - p.low < levels:
        return [float(v) for v in range(int(p.low), int(p.high) + 1)]
    return sorted({p.value(share) for share in np.linspace(0, 1, levels)})


PROPOSER = Grid
