"""A small convolutional network with batch normalisation and dropout."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import check_side, check_variant

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (1, 8, 8)
VARIANTS = {"": "three convolutions with BatchNorm, and dropout"}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Three 3 x 3 convolutions with BatchNorm, average-pooled to 2 x 2, and dropout .25 and .5.

    It has both kinds of layer that behave differently in training and evaluation mode.

    Args:
        in_shape: (C, H, W) of one image; H and W at least 8.
        num_classes: number of logits.
        variant: there is none; leave it empty.

    Returns:
        The network, from pixels to logits.

    Raises:
        ValueError: the image is too small, or a variant was given.

    Example:
        >>> sum(p.numel() for p in build((1, 8, 8), 10).parameters())
        90090
    """
    check_variant("cnn_bn", variant, VARIANTS)
    check_side("cnn_bn", in_shape, least=8)
    channels, height, width = in_shape
    return nn.Sequential(
        *_convolution(channels, 32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *_convolution(64, 64),
        nn.AvgPool2d((height // 4, width // 4)),  # to 2 x 2; adaptive pooling is not deterministic on CUDA
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
