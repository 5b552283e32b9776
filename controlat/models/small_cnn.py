"""The SmallCNN of TRADES for MNIST, also used by YOPO and ATTA."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import check_side, check_variant, initialise

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (1, 28, 28)
VARIANTS = {"": "SmallCNN of TRADES: four 3 x 3 convolutions, 200 and 200 units, last layer starts at 0"}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Four 3 x 3 convolutions with two max-poolings, then two hidden layers of 200 units and dropout .5.

    Convolutions start as in He et al., with biases 0. The last layer starts at 0, weights and biases:
    the gradient in the pixels is 0 until the first update of the weights, so that attacks on the untrained
    network do not move. There is no normalisation layer.

    Args:
        in_shape: (C, H, W) of one image; H and W at least 16.
        num_classes: number of logits.
        variant: there is none; leave it empty.

    Returns:
        The network, from pixels to logits; 312,202 parameters for MNIST.

    Raises:
        ValueError: the image is too small, or a variant was given.

    Example:
        >>> sum(p.numel() for p in build((1, 28, 28), 10).parameters())
        312202

    Source: Zhang et al., 2019; yaodongyu/TRADES, models/small_cnn.py.
    """
    check_variant("small_cnn", variant, VARIANTS)
    check_side("small_cnn", in_shape, least=16)
    channels, height, width = in_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    last = nn.Linear(200, num_classes)
    network = nn.Sequential(
        *_pair(channels, 32),
        *_pair(32, 64),
        nn.Flatten(),
        nn.Linear(64 * rows * columns, 200),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(200, 200),
        nn.ReLU(),
        last,
    )
    initialise(last, nn.init.zeros_)
    return network


def _pair(channels: int, width: int) -> tuple[nn.Module, ...]:
    first, second = nn.Conv2d(channels, width, 3), nn.Conv2d(width, width, 3)
    for layer in (first, second):
        initialise(layer, nn.init.kaiming_normal_)
    return first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)
