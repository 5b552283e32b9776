"""The record of one outer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controlat.control.cost import Meter
from controlat.control.space import Control

__all__ = ["Step", "When", "read_losses"]


class When(NamedTuple):
    """A time t and the control taken there, as errors name it."""

    epoch: int
    batch: int
    control: Control

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch}, {self.control}"


class Step(NamedTuple):
    """What happened in one outer step z' = S(z, u).

    Args:
        epoch: epoch, from 0.
        batch: position of the batch in its epoch, from 0.
        control: u_t.
        rate: learning rate eta_t.
        samples: samples of the batch, over all processes.
        value: `loss`, or a tensor on the device that holds it.
        spent: evaluations, over all processes.
        dropped: names of the dependences on the state that the method detached.
        moves: number of updates of theta.
    """

    epoch: int
    batch: int
    control: Control
    rate: float
    samples: int
    value: Tensor | float
    spent: Meter
    dropped: tuple[str, ...]
    moves: int

    @property
    def loss(self) -> float:
        """Mean training loss over the updates of theta; a value that is on a GPU is waited for."""
        return float(self.value)

    @property
    def evaluations(self) -> float:
        """n(u): gradient evaluations per sample."""
        return self.spent.gradients / self.samples


def read_losses(steps: Sequence[Step]) -> list[float]:
    """The losses of several steps, in one transfer from the device."""
    on_device = [step.value for step in steps if isinstance(step.value, Tensor)]
    values = iter(torch.stack(on_device).tolist() if on_device else ())
    return [next(values) if isinstance(step.value, Tensor) else step.value for step in steps]
