"""The optimiser torch.optim.SGD: its settings, and its step as a differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from controlat._util.checks import flag, number

__all__ = ["SGDSettings"]


@dataclass(frozen=True)
class SGDSettings:
    """The optimiser, torch.optim.SGD: v' = mu v + g + wd theta, theta' = theta - eta v' (or Nesterov's form).

    Args:
        momentum: mu in [0, 1).
        nesterov: theta' = theta - eta (g + wd theta + mu v') instead.
        weight_decay: wd >= 0.

    Raises:
        ValueError: a number is out of range.
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay"):
            object.__setattr__(self, name, number(getattr(self, name), name))
        flag(self.nesterov, "nesterov")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got momentum 0")

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.SGD:
        """A torch.optim.SGD with these settings; the driver sets its learning rate before every step."""
        return torch.optim.SGD(
            parameters,
            lr=0.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )

    def step(
        self,
        theta: Sequence[Tensor],
        momentum: Sequence[Tensor],
        gradients: Sequence[Tensor],
        shift: Sequence[Tensor] | None,
        rate: float,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(theta', v') of one step of torch.optim.SGD, differentiable in all its tensors.

        Args:
            theta: the parameters.
            momentum: v, one tensor per parameter; unused if mu = 0.
            gradients: g, one tensor per parameter.
            shift: added to the parameters for the step and subtracted after it (AWP), so that weight decay
                acts on the shifted parameters.
            rate: learning rate eta.

        >>> SGDSettings(0.5).step([torch.tensor(1.0)], [torch.tensor(2.0)], [torch.tensor(3.0)], None, 0.1)
        ([tensor(0.6000)], [tensor(4.)])
        """
        shifted = list(theta) if shift is None else [t + d for t, d in zip(theta, shift, strict=True)]
        direction = [g + self.weight_decay * t for g, t in zip(gradients, shifted, strict=True)]
        after = list(momentum)
        if self.momentum > 0:
            after = [self.momentum * v + g for v, g in zip(momentum, direction, strict=True)]
            nesterov = [g + self.momentum * v for g, v in zip(direction, after, strict=True)]
            direction = nesterov if self.nesterov else after
        return [t - rate * g for t, g in zip(theta, direction, strict=True)], after
