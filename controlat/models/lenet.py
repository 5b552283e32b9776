"""The LeNet of pytorch/examples from December 2018 to November 2019 (20/50/500)."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import Normalize, check_side

__all__ = ["build"]


def build(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Two 5 x 5 convolutions with max-pooling, then one hidden layer of 500 units; no dropout.

    One-channel images are normalised with the mean and deviation of MNIST, others are taken as they
    are. The original ends in a log-softmax; this one returns logits.

    Args:
        in_shape: (C, H, W) of one image; H and W at least 16.
        num_classes: number of logits.

    Returns:
        The network, from pixels to logits; 431,080 parameters for MNIST.

    Raises:
        ValueError: the image is too small for two convolutions and poolings.

    Example:
        >>> sum(p.numel() for p in build((1, 28, 28), 10).parameters())
        431080

    Source: pytorch/examples, mnist/main.py, commit d8dd8cae, 2018; after LeCun et al., 1998.
    """
    check_side("lenet", in_shape, least=16)
    channels, height, width = in_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        Normalize(0.1307, 0.3081) if channels == 1 else Normalize(0.0, 1.0),
        nn.Conv2d(channels, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * rows * columns, 500),
        nn.ReLU(),
        nn.Linear(500, num_classes),
    )
