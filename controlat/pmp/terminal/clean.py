"""The loss without an attack, on held-out data."""

from __future__ import annotations

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = ["build"]


def build(x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> AdversarialLoss:
    """Mean cross-entropy without an attack."""
    return AdversarialLoss(x, y, ball, seed=seed, steps=0)
