"""The classification networks of torchvision, `torchvision-NAME`."""

from __future__ import annotations

import difflib

from torch import nn

from controlat._util.vision import torchvision
from controlat.models._layers import ANY, Normalize

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (3, 224, 224)
VARIANTS = {ANY: "a classification network of torchvision, such as torchvision-resnet18 (untrained)"}

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
_AUXILIARY = ("googlenet", "inception_v3")


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """Any classification network of torchvision with fresh weights, after normalisation as for ImageNet.

    Networks that pool adaptively to more than one pixel (AlexNet, VGG) have no deterministic gradient in
    CUDA.

    Args:
        in_shape: (3, H, W) of one image; the least size depends on the network.
        num_classes: number of logits.
        variant: a name of `torchvision.models.list_models(module=torchvision.models)`.

    Returns:
        The network, from pixels to logits; "resnet18" has 11,181,642 parameters for 10 classes.

    Raises:
        ValueError: images without three channels; no or an unknown name; a network that returns more than
            logits in training; torchvision is not installed.

    Example:
        >>> build((1, 28, 28), 10, "resnet18")
        Traceback (most recent call last):
        ValueError: torchvision-resnet18 takes images of 3 channels, got 1

    Source: torchvision, torchvision/models.
    """
    name = f"torchvision-{variant}" if variant else "torchvision"
    if in_shape[0] != 3:
        raise ValueError(f"{name} takes images of 3 channels, got {in_shape[0]}")
    if variant in _AUXILIARY:
        raise ValueError(f"{name} returns auxiliary logits beside the logits in training; choose another")
    models = torchvision().models
    names = models.list_models(module=models)
    if variant not in names:
        close = difflib.get_close_matches(variant, names) or ["resnet18", "resnet50"]
        examples = ", ".join(f"torchvision-{text}" for text in close)
        raise ValueError(
            f"there is no model {name!r}; write torchvision-NAME with a name of "
            f"torchvision.models.list_models(), such as {examples}"
        )
    return nn.Sequential(
        Normalize(_MEAN, _STD), models.get_model(variant, weights=None, num_classes=num_classes)
    )
