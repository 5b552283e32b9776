"""The two convolutional networks of dynamic adversarial training (FOSC)."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import check_side, check_variant, initialise

__all__ = ["INPUT", "INPUTS", "VARIANTS", "build"]

INPUT = (1, 28, 28)
INPUTS = {"8": (3, 32, 32)}
VARIANTS = {
    "4": "FOSC's MNIST network: 3 x 3 convolutions 32 and 64 with BatchNorm, 128 units",
    "8": "FOSC's CIFAR network: six 3 x 3 convolutions 64 to 196 with BatchNorm, 256 units",
}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Convolutions that keep the size, each with BatchNorm, max-poolings, then one hidden layer.

    As in Keras, BatchNorm has eps 1e-3 and moves its averages by 0.01 (Keras: momentum .99). Weights
    start Glorot-uniform and biases at 0; the hidden layer starts normal as in He et al. (Keras truncates that
    normal distribution at two deviations; here it is not truncated). There is no normalisation layer.

    Args:
        in_shape: (C, H, W) of one image; H and W at least 4, and 8 for `fosc-8`.
        num_classes: number of logits.
        variant: "4" for MNIST or "8" for CIFAR-10, the number of layers with weights. The original of
            "8" adds an l2 penalty of 0.01 on weights and biases of its hidden layer; a penalty is not
            part of a network here.

    Returns:
        The network, from pixels to logits; 421,834 parameters for MNIST, 1,639,794 for CIFAR-10.

    Raises:
        ValueError: no or an unknown variant; the image is too small.

    Example:
        >>> sum(p.numel() for p in build((1, 28, 28), 10, "4").parameters())
        421834

    Source: Wang et al., 2019; YisenWang/dynamic_adv_training, models.py (`fosc-8` is commented out there,
    in favour of a residual network).
    """
    check_variant("fosc", variant, VARIANTS)
    # widths of the convolutions, one tuple for each max-pooling
    widths = ((32,), (64,)) if variant == "4" else ((64, 64), (128, 128), (196, 196))
    units = 128 if variant == "4" else 256
    check_side(f"fosc-{variant}", in_shape, least=2 ** len(widths))
    channels, height, width = in_shape
    layers: list[nn.Module] = []
    for stage in widths:
        for filters in stage:
            layers += [nn.Conv2d(channels, filters, 3, padding=1), _norm(nn.BatchNorm2d, filters), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    pixels = (height >> len(widths)) * (width >> len(widths))
    hidden = nn.Linear(channels * pixels, units)
    norm = [] if variant == "4" else [_norm(nn.BatchNorm1d, units)]
    network = nn.Sequential(*layers, nn.Flatten(), hidden, *norm, nn.ReLU(), nn.Linear(units, num_classes))
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            initialise(layer, nn.init.kaiming_normal_ if layer is hidden else nn.init.xavier_uniform_)
    return network


def _norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], features: int) -> nn.Module:
    return kind(features, eps=1e-3, momentum=0.01)
