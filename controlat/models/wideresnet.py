"""Wide residual networks for CIFAR-10."""

from __future__ import annotations

import re

from torch import nn

from controlat.models._layers import GlobalPool, preact_layers

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (3, 32, 32)
VARIANTS = {
    "34-10": "WideResNet-34-10, the usual one of TRADES and later work",
    "28-10": "WideResNet-28-10",
}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """A 3 x 3 convolution and three stages of residual blocks with 16, 32 and 64 times W channels.

    The depth D = 6n + 4 counts the convolutions, n blocks of two in each stage and three shortcuts among
    them. No dropout. Convolutions start normal with variance 2 / (k * k * out) for k x k pixels and out
    channels, the bias of the last layer at 0. There is no normalisation layer.

    Args:
        in_shape: (C, H, W) of one image of any size.
        num_classes: number of logits.
        variant: "D-W", depth and width: "34-10", "28-10", or for trials something small such as "10-1".

    Returns:
        The network, from pixels to logits; 46,160,474 parameters for "34-10" and CIFAR-10, 36,479,194 for
        "28-10". The file of TRADES defines another stage that its network never calls.

    Raises:
        ValueError: the variant is not D-W with D = 6n + 4, n >= 1, and W >= 1.

    Example:
        >>> sum(p.numel() for p in build((3, 32, 32), 10, "10-1").parameters())
        77850

    Source: Zagoruyko and Komodakis, 2016; xternalz/WideResNet-pytorch; yaodongyu/TRADES,
    models/wideresnet.py.
    """
    depth, widen = _sizes(variant)
    widths = [16 * widen, 32 * widen, 64 * widen]
    network = nn.Sequential(
        *preact_layers(in_shape[0], 16, widths, (depth - 4) // 6),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        GlobalPool(),
        nn.Linear(widths[-1], num_classes),
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            # a gain of sqrt(2) over the fan-out, which is k * k * out here as no convolution is grouped
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return network


def _sizes(variant: str) -> tuple[int, int]:
    """Depth and width of "D-W"."""
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", variant, re.ASCII)
    depth, widen = map(int, match.groups()) if match else (0, 0)
    if depth < 10 or depth % 6 != 4:
        given = f"wideresnet-{variant}" if variant else "wideresnet"
        form = "write wideresnet-D-W with depth D = 6n + 4 (10, 16, 22, 28, 34, ...) and width W >= 1"
        raise ValueError(f"there is no model {given!r}; {form}, such as wideresnet-34-10")
    return depth, widen
