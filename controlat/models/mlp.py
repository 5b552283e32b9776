"""A small multilayer perceptron for tests and quick trials."""

from __future__ import annotations

import math

from torch import nn

from controlat.models._layers import check_variant

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (1, 8, 8)
VARIANTS = {"": "two hidden layers of 64 ReLU units"}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Two hidden layers of 64 ReLU units; takes images of any size.

    Args:
        in_shape: (C, H, W) of one image.
        num_classes: number of logits.
        variant: there is none; leave it empty.

    Returns:
        The network, from pixels to logits.

    Raises:
        ValueError: a variant was given.

    Example:
        >>> sum(p.numel() for p in build((1, 8, 8), 10).parameters())
        8970
    """
    check_variant("mlp", variant, VARIANTS)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(in_shape), 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )
