"""The terminal cost ``margin``: the margin under an attack on held-out data."""

from __future__ import annotations

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = ["build"]


def build(x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> AdversarialLoss:
    """Mean of max over j != y of z_j, less z_y, under PGD-20 on the cross-entropy, as in adversarial.

    The margin of a sample is negative if it is classified correctly under the attack; it has no lower bound.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        seed: seed of the random start.

    Raises:
        ValueError: x is empty or not in [0, 1]; y is not one integer label per sample.

    >>> import torch
    >>> build(torch.rand(8, 1, 4, 4), torch.arange(8), Ball("8/255")).lower
    -inf

    Source:
        The loss of Carlini and Wagner (2017), without clipping at 0.
    """
    return AdversarialLoss(x, y, ball, seed=seed, loss="margin")
