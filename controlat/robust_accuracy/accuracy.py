"""Accuracies with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Accuracy", "wilson"]


def wilson(successes: int, points: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Its ends are the p with (successes / points - p)^2 = z^2 p (1 - p) / points, where z = 1.96.

    Args:
        successes: number of successes.
        points: number of points.

    Returns:
        The lower and the upper end, exactly 0 without a success and exactly 1 without a failure.

    Raises:
        ValueError: no points, or more successes than points.

    Source:
        E. B. Wilson (1927).

    >>> tuple(round(v, 4) for v in wilson(0, 10))
    (0.0, 0.2775)
    """
    if not 0 <= successes <= points or points == 0:
        raise ValueError(f"wilson needs 0 <= successes <= points and points > 0, got {successes} of {points}")
    from scipy.stats import binomtest  # its import takes a second, which training and attacks do not need

    interval = binomtest(successes, points).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Accuracy:
    """A share of points, with its Wilson interval."""

    correct: int
    points: int

    @classmethod
    def of(cls, mask: Tensor) -> Accuracy:
        """The share of points where a mask (N,) is true."""
        return cls(int(mask.sum()), len(mask))

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
