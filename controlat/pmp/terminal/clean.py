"""The terminal cost ``clean``: the loss without an attack on held-out data."""

from __future__ import annotations

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = ["build"]


def build(x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> AdversarialLoss:
    """Mean cross-entropy without an attack.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set, without effect here.
        seed: seed of random numbers that the network draws in eval mode.

    Raises:
        ValueError: x is empty or not in [0, 1]; y is not one integer label per sample.

    >>> import torch
    >>> build(torch.rand(8, 1, 4, 4), torch.arange(8), Ball("8/255")).evaluations
    Evaluations(value=0, gradient=8)
    """
    return AdversarialLoss(x, y, ball, seed=seed, steps=0)
