"""Networks: one file each, with a function `build(in_shape, num_classes) -> nn.Module`.

A network takes pixels (N, C, H, W) in [0, 1] and returns logits (N, num_classes); normalisation, where
wanted, is its first layer. Random initialisation draws from torch's generator as the caller has scoped
it; nothing is seeded here.
"""

from __future__ import annotations

import torch
from torch import nn

from controlat import registry

__all__ = ["build"]


def build(name: str, in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build a network and check that it maps images to logits.

    Args:
        name: a module of this folder, or the user's own "package.module:factory"; the factory returns
            an `nn.Module` and may take the keywords `in_shape` and `num_classes`.
        in_shape: (C, H, W) of one image, in pixels.
        num_classes: number of logits.

    Returns:
        The network, in the training or evaluation mode in which it was built.

    Raises:
        ValueError: an unknown name, an image too small for the network, a factory that returns
            something else, a network that does not map two zero images to (2, num_classes) floats.

    Example:
        >>> net = build("mlp", (1, 8, 8), num_classes=10)
        >>> net(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"in_shape must be (C, H, W), each at least 1, got {tuple(in_shape)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    model: object
    if ":" in name:
        model = registry.call_factory(name, {"in_shape": in_shape, "num_classes": num_classes})
    else:
        model = registry.member(__name__, name).build(in_shape, num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} is a {type(model).__name__}; its factory must return an nn.Module")
    _check_output(name, model, in_shape, num_classes)
    return model


def _check_output(name: str, model: nn.Module, in_shape: tuple[int, int, int], num_classes: int) -> None:
    """Try two zero images in evaluation mode, then put every module back into its own mode."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.zeros(2, *in_shape, dtype=first.dtype, device=first.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(x)
    except Exception as error:
        raise ValueError(f"model {name!r} fails on images of shape {tuple(x.shape)}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model {name!r} returns {kind}; it must return logits, a floating-point tensor")
    if logits.shape != (2, num_classes):
        found = f"maps images {tuple(x.shape)} to {tuple(logits.shape)}"
        raise ValueError(f"model {name!r} {found}; it must return logits of shape {(2, num_classes)}")
