"""The MNIST network of Madry's challenge."""

from __future__ import annotations

from functools import partial

from torch import nn

from controlat.models._layers import check_variant, initialise

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (1, 28, 28)
VARIANTS = {"": "Madry's MNIST network: 5 x 5 convolutions 32 and 64, 1024 units"}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Two 5 x 5 convolutions with max-pooling, then one hidden layer of 1024 units.

    Weights start normal with deviation 0.1, truncated at two deviations; biases start at 0.1. There is no
    normalisation layer. An odd side is pooled to half of it, rounded up, as in TensorFlow's padding "SAME".

    Args:
        in_shape: (C, H, W) of one image of any size.
        num_classes: number of logits.
        variant: there is none; leave it empty.

    Returns:
        The network, from pixels to logits; 3,274,634 parameters for MNIST.

    Raises:
        ValueError: a variant was given.

    Example:
        >>> sum(p.numel() for p in build((1, 28, 28), 10).parameters())
        3274634

    Source: Madry et al., 2018; MadryLab/mnist_challenge, model.py.
    """
    check_variant("madry_mnist", variant, VARIANTS)
    channels, height, width = in_shape
    rows, columns = (-(-side // 4) for side in (height, width))
    network = nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * rows * columns, 1024),
        nn.ReLU(),
        nn.Linear(1024, num_classes),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            initialise(layer, partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2), bias=0.1)
    return network
