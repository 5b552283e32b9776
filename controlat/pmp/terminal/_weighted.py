"""Weighted sums of terminal costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from controlat._util.checks import brief, number
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.pmp.terminal._base import (
    Terminal,
    check_terminal,
    described,
    finite_gradient,
    finite_value,
)

__all__ = ["Weighted"]


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of terminal costs, such as adversarial loss + 0.1 clean loss.

    Args:
        parts: pairs (weight, terminal cost).

    Raises:
        ValueError: there are no parts, all weights are 0, a weight is not a finite number, or a part is not a
            `Terminal`.
    """

    parts: tuple[tuple[float, Terminal], ...]

    def __post_init__(self) -> None:
        pairs = self.parts if isinstance(self.parts, (tuple, list)) else None
        if pairs is None or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
            raise ValueError(f"parts must be pairs (weight, terminal cost), got {brief(self.parts)}")
        parts = tuple((number(weight, "a weight"), part) for weight, part in pairs)
        if not parts:
            raise ValueError("a weighted sum needs at least one (weight, terminal cost), got none")
        for _, part in parts:
            check_terminal(part, "a part of a weighted sum")
        if not any(weight for weight, _ in parts):
            raise ValueError("all weights of a weighted sum of terminal costs are 0: nothing is left of it")
        object.__setattr__(self, "parts", parts)

    @property
    def lower(self) -> float:
        """The weighted sum of the parts' lower bounds; -inf if a weight is negative."""
        if any(weight < 0 for weight, _ in self.parts):
            return -math.inf
        return sum(weight * part.lower for weight, part in self.parts if weight > 0)

    def describe(self) -> str:
        """The sum in words."""
        return " + ".join(f"{weight:g} * ({described(part)})" for weight, part in self.parts)

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """The sum of weight * Phi.

        Raises:
            NonFiniteError: it is not finite.
        """
        return finite_value(sum(weight * part.value(driver, meter) for weight, part in self.parts))

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """The sum of weight * grad Phi; in the running statistics only if every part returns that.

        Raises:
            NonFiniteError: it is not finite.
        """
        gradients = [part.gradient(driver, meter) for _, part in self.parts]
        count = min(map(len, gradients))  # a part may not return the running statistics
        total = [torch.zeros_like(t) for t in gradients[0][:count]]
        for (weight, _), gradient in zip(self.parts, gradients, strict=True):
            torch._foreach_add_(total, gradient[:count], alpha=weight)
        return finite_gradient(total)

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """The dependences that any part neglects."""
        return tuple(sorted({name for _, part in self.parts for name in part.dropped(driver)}))
