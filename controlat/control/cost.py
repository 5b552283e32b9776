"""Counts of evaluations; the running cost is R(u) = gamma n(u), n the gradient evaluations per sample."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Meter"]


@dataclass
class Meter:
    """Numbers of evaluations, each counted once per sample.

    Args:
        gradients: gradient evaluations: a forward and a backward pass.
        forwards: forward passes without a backward pass.
        layers: forward and backward passes through the first layer alone, as in YOPO.

    >>> meter = Meter()
    >>> meter.add(Meter(gradients=32))  # one forward-backward pass of a batch of 32
    >>> meter.gradients
    32
    """

    gradients: int = 0
    forwards: int = 0
    layers: int = 0

    def since(self, earlier: Meter) -> Meter:
        """The evaluations counted since `earlier`, a copy of this meter."""
        return Meter(
            self.gradients - earlier.gradients,
            self.forwards - earlier.forwards,
            self.layers - earlier.layers,
        )

    def add(self, more: Meter) -> None:
        """Add the counts of another meter, in place."""
        self.gradients += more.gradients
        self.forwards += more.forwards
        self.layers += more.layers

    def copy(self) -> Meter:
        """A meter with the same counts."""
        return Meter(self.gradients, self.forwards, self.layers)
