"""The running cost R(u) = gamma n(u), counted: gradient evaluations, and what is cheaper than one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Meter"]


@dataclass
class Meter:
    """What was spent, in samples: a batch of 32 taken forward and backward once adds 32.

    Args:
        gradients: forward-backward passes (gradient evaluations).
        forwards: forward passes without a backward one.
        layers: passes through the first layer alone, forward and backward (YOPO).
    """

    gradients: int = 0
    forwards: int = 0
    layers: int = 0

    def since(self, earlier: Meter) -> Meter:
        """What was spent after `earlier` was copied."""
        gone = self.gradients - earlier.gradients, self.forwards - earlier.forwards
        return Meter(*gone, self.layers - earlier.layers)

    def add(self, more: Meter) -> None:
        """Count more, in place."""
        self.gradients += more.gradients
        self.forwards += more.forwards
        self.layers += more.layers

    def copy(self) -> Meter:
        """The present counts."""
        return Meter(self.gradients, self.forwards, self.layers)
