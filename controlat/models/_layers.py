"""Layers, checks and initialisation that several networks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ANY = "NAME"  # a key of VARIANTS for all names that an optional library defines


class Normalize(nn.Module):
    """Normalise each channel: (x - mean) / std.

    Normalisation lives in the model, not in the data, so that everything outside the model is in pixel
    units: eps, the ball and the range [0, 1] keep their meaning, and an attack sees the whole function.

    Args:
        mean: one number, or one per channel, in pixel units [0, 1].
        std: likewise, > 0.

    Raises:
        ValueError: values that are not finite, std not > 0, or numbers of channels that differ.

    Example:
        >>> Normalize(0.5, 0.25)(torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)).flatten()
        tensor([0., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        # in Python, not in torch: `describe` builds networks on the device "meta", which holds no numbers
        means, stds = ([float(v) for v in (x if isinstance(x, Iterable) else [x])] for x in (mean, std))
        if not all(map(math.isfinite, means)):
            raise ValueError(f"mean must be finite, got {mean}")
        if not all(math.isfinite(v) and v > 0 for v in stds):
            raise ValueError(f"std must be finite and > 0, got {std}")
        if 1 not in (len(means), len(stds)) and len(means) != len(stds):
            raise ValueError(f"mean and std must have one number per channel each, got {mean} and {std}")
        for name, values in (("mean", means), ("std", stds)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.get_default_dtype()).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images of the same shape (N, C, H, W)."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The values, for `print(model)`."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def check_side(network: str, in_shape: tuple[int, int, int], least: int) -> None:
    """Refuse images whose height or width is below `least` pixels (ValueError)."""
    _, height, width = in_shape
    if min(height, width) < least:
        allowed = f"height and width must be >= {least}; choose another network, such as mlp"
        raise ValueError(f"{network} cannot take images of {height} x {width} pixels: {allowed}")


def check_variant(network: str, variant: str, allowed: Mapping[str, str]) -> None:
    """Refuse a variant that is no key of `allowed` (ValueError)."""
    if variant not in allowed:
        given, *choices = (f"{network}-{text}" if text else network for text in (variant, *allowed))
        raise ValueError(f"there is no model {given!r}; choose from: {', '.join(choices)}")


def initialise(layer: nn.Conv2d | nn.Linear, draw: Callable[[Tensor], Tensor], bias: float = 0.0) -> None:
    """Draw the weights of a layer in place by `draw`, an initialiser of torch.nn.init, and set its biases."""
    assert layer.bias is not None
    draw(layer.weight)
    nn.init.constant_(layer.bias, bias)


class GlobalPool(nn.Module):
    """The mean over height and width.

    Adaptive average pooling to one pixel gives the same, but torch lists it among the operations whose
    gradient in CUDA is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Means of shape (N, C) of maps (N, C, H, W)."""
        return x.mean((2, 3))


class PreActBlock(nn.Module):
    """A residual block: twice BatchNorm, ReLU and a 3 x 3 convolution, then the shortcut is added.

    Where the shape changes, the shortcut is a 1 x 1 convolution of relu(bn1(x)), or of x itself.

    Args:
        channels: of the input.
        width: channels of the output.
        stride: of the first convolution and of the shortcut.
        raw_shortcut: whether the 1 x 1 convolution takes x itself.

    Example:
        >>> PreActBlock(4, 8, stride=2)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 8, 3, 3])

    Source: He, Zhang, Ren and Sun, 2016, "Identity mappings in deep residual networks".
    """

    def __init__(self, channels: int, width: int, stride: int = 1, raw_shortcut: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes else None
        self.raw_shortcut = raw_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, width, H', W') of maps (N, channels, H, W)."""
        active = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.shortcut is not None:
            x = self.shortcut(x if self.raw_shortcut else active)
        return x + residual


def preact_layers(
    in_channels: int, stem: int, widths: Sequence[int], blocks: int, raw_shortcut: bool = False
) -> list[nn.Module]:
    """A 3 x 3 convolution, then one stage of `blocks` blocks per width; all but the first halve the side."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)]
    channels = stem
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(PreActBlock(channels, width, stride, raw_shortcut))
            channels = width
    return layers
