"""The record of one outer step."""

from __future__ import annotations

from typing import NamedTuple

from controlat.control.cost import Meter
from controlat.control.space import Control

__all__ = ["Step"]


class Step(NamedTuple):
    """What happened in one outer step z' = S(z, u).

    Args:
        epoch: epoch, from 0.
        batch: position of the batch in its epoch, from 0.
        control: u_t.
        rate: learning rate eta_t.
        samples: samples of the batch, over all processes.
        loss: mean training loss over the updates of theta.
        spent: evaluations, over all processes.
        dropped: names of the dependences on the state that the method detached.
        moves: number of updates of theta.
    """

    epoch: int
    batch: int
    control: Control
    rate: float
    samples: int
    loss: float
    spent: Meter
    dropped: tuple[str, ...]
    moves: int

    @property
    def evaluations(self) -> float:
        """n(u): gradient evaluations per sample."""
        return self.spent.gradients / self.samples
