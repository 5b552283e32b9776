"""The two networks of the MNIST example of pytorch/examples, since December 2018."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import Normalize, check_side, check_variant

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (1, 28, 28)
VARIANTS = {
    "": "pytorch/examples from 12/2018 to 11/2019: 5 x 5 convolutions 20 and 50, 500 units, no dropout",
    "32-64": "pytorch/examples since 2020: 3 x 3 convolutions 32 and 64, 128 units, dropout",
}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Two convolutions and one hidden layer.

    One-channel images are normalised with the mean and deviation of MNIST, others are not normalised. The
    originals end in a log-softmax; these return logits.

    Args:
        in_shape: (C, H, W) of one image; H and W at least 16, and 6 for `lenet-32-64`.
        num_classes: number of logits.
        variant: empty for the 20/50/500 network with two max-poolings, or "32-64" for the newer one with
            one max-pooling and dropout .25 and .5 of single units.

    Returns:
        The network, from pixels to logits; for MNIST 431,080 parameters, `lenet-32-64` has 1,199,882.

    Raises:
        ValueError: the image is too small for the convolutions and poolings; an unknown variant.

    Example:
        >>> sum(p.numel() for p in build((1, 28, 28), 10).parameters())
        431080

    Source: pytorch/examples, mnist/main.py, commit d8dd8cae, 2018, after LeCun et al., 1998; `lenet-32-64`
    as there since 0f0c9131, 2020 (before, dropout took whole channels, and until dce9319f the second
    convolution had no ReLU).
    """
    check_variant("lenet", variant, VARIANTS)
    normalize = Normalize(0.1307, 0.3081) if in_shape[0] == 1 else Normalize(0.0, 1.0)
    return nn.Sequential(normalize, *(_newer if variant else _older)(in_shape, num_classes))


def _older(in_shape: tuple[int, int, int], num_classes: int) -> tuple[nn.Module, ...]:
    check_side("lenet", in_shape, least=16)
    channels, height, width = in_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return (
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


def _newer(in_shape: tuple[int, int, int], num_classes: int) -> tuple[nn.Module, ...]:
    check_side("lenet-32-64", in_shape, least=6)
    channels, height, width = in_shape
    rows, columns = ((side - 4) // 2 for side in (height, width))
    return (
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * rows * columns, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )
