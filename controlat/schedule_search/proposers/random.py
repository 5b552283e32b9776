"""Points that fill the space evenly, whatever is told: the reference for every other proposer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.stats.qmc import Sobol

from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Space

__all__ = ["PROPOSER", "Random"]


class Random:
    """Points of a scrambled Sobol sequence, uniform on the unit cube.

    Args:
        space: what is searched.
        seed: of the scrambling.

    Source:
        Sobol (1967); Owen (1998), scrambling; Bergstra and Bengio (2012), random search.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self._sobol = Sobol(len(space.parameters), rng=np.random.default_rng(seed))

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points of the sequence."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The balance properties")  # of counts that are no power of 2
            return [self.space.point(row) for row in self._sobol.random(count)]

    def tell(self, trials: Sequence[Told]) -> None:
        """Nothing follows from it."""


PROPOSER = Random
