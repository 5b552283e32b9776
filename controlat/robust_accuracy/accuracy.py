"""A share of test points, and how sure one can be of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Accuracy", "wilson"]


def wilson(successes: int, points: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Raises:
        ValueError: no points, or more successes than points.

    Source:
        E. B. Wilson (1927).

    >>> tuple(round(v, 4) for v in wilson(0, 10))
    (0.0, 0.2775)
    """
    if not 0 <= successes <= points or points == 0:
        raise ValueError(f"wilson needs 0 <= successes <= points and points > 0, got {successes} of {points}")
    p, q = successes / points, z * z / points
    centre = (p + q / 2) / (1 + q)
    half = z * math.sqrt(p * (1 - p) / points + q / (4 * points)) / (1 + q)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == points else centre + half


@dataclass(frozen=True)
class Accuracy:
    """A share of points, with its Wilson interval."""

    correct: int
    points: int

    @property
    def value(self) -> float:
        """correct / points."""
        return self.correct / self.points

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return wilson(self.correct, self.points)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "correct": self.correct,
            "points": self.points,
            "value": self.value,
            "interval": list(self.interval),
        }
