"""The margin under an attack, on held-out data."""

from __future__ import annotations

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = ["build"]


def build(x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> AdversarialLoss:
    """Mean of max over j != y of z_j, less z_y, under PGD-20 on the cross-entropy, as in adversarial."""
    return AdversarialLoss(x, y, ball, seed=seed, loss="margin")
