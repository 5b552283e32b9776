"""Points that fill the space evenly, whatever is told: the reference for every other proposer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Space

__all__ = ["PROPOSER", "Random"]


class Random:
    """What the space starts with, then points of a scrambled Sobol sequence, uniform on the unit cube.

    Args:
        space: what is searched.
        seed: of the scrambling.

    Source:
        Bergstra and Bengio (2012), random search.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._design = space.design(seed)

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points of the sequence."""
        return list(itertools.islice(self._design, count))

    def tell(self, trials: Sequence[Told]) -> None:
        """Nothing follows from it."""


PROPOSER = Random
