"""The pre-activation ResNet-18 for CIFAR-10, in the three forms used in adversarial training."""

from __future__ import annotations

from torch import nn

from controlat.models._layers import GlobalPool, check_variant, preact_layers

__all__ = ["INPUT", "VARIANTS", "build"]

INPUT = (3, 32, 32)
VARIANTS = {
    "18": "PreActResNet-18: shortcuts of BN-ReLU(x), BN-ReLU before the pooling",
    "18-locuslab": "PreActResNet-18 of Fast AT: shortcuts of x itself, BN-ReLU before the pooling",
    "18-yopo": "PreActResNet-18 of YOPO: shortcuts of BN-ReLU(x), no BN-ReLU before the pooling",
}


def build(in_shape: tuple[int, int, int], num_classes: int, variant: str = "") -> nn.Module:
    """A 3 x 3 convolution and four stages of two residual blocks with 64, 128, 256 and 512 channels.

    The forms differ in what the 1 x 1 convolution takes where the shape changes, and in the BatchNorm and
    ReLU before the global average pooling. "18" and "18-locuslab" have the same parameters and are
    different functions of them. Weights start as torch starts them. There is no normalisation layer.

    Args:
        in_shape: (C, H, W) of one image of any size; sides of 32 are pooled from 4 x 4.
        num_classes: number of logits.
        variant: "18", "18-locuslab" or "18-yopo".

    Returns:
        The network, from pixels to logits; 11,172,170 parameters for CIFAR-10, "18-yopo" 11,171,146.

    Raises:
        ValueError: no or an unknown variant.

    Example:
        >>> build((3, 32, 32), 10)
        Traceback (most recent call last):
        ValueError: there is no model 'preactresnet'; choose from: preactresnet-18, preactresnet-18-locuslab,
        preactresnet-18-yopo

    Source: He et al., 2016. "18": robust_overfitting (Rice et al., 2020) and AWP (Wu et al., 2020),
    preactresnet.py. "18-locuslab": locuslab/fast_adversarial (Wong et al., 2020), CIFAR10/preact_resnet.py.
    "18-yopo": YOPO (Zhang et al., 2019), lib/base_model/preact_resnet.py; the file they all come from,
    kuangliu/pytorch-cifar, models/preact_resnet.py, is this function too.
    """
    check_variant("preactresnet", variant, VARIANTS)
    layers = preact_layers(in_shape[0], 64, (64, 128, 256, 512), 2, raw_shortcut=variant == "18-locuslab")
    if variant != "18-yopo":
        layers += [nn.BatchNorm2d(512), nn.ReLU()]
    return nn.Sequential(*layers, GlobalPool(), nn.Linear(512, num_classes))
