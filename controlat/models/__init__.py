"""Networks: one file each, the folder is the registry.

A file defines `build(in_shape, num_classes, variant="") -> nn.Module`, its usual image `INPUT` (C, H, W)
and `VARIANTS`, one line on each of its networks: the network of file "lenet" and variant "32-64" is named
"lenet-32-64", that of the empty variant "lenet". `INPUTS`, if defined, has the images of those variants
that differ from `INPUT`.

A network takes pixels (N, C, H, W) in [0, 1] and returns logits (N, num_classes); normalisation, where
wanted, is its first layer. Weights are drawn from torch's global generator, which the caller seeds
(`controlat._util.rng.scoped`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from controlat._util import registry
from controlat.models._layers import ANY
from controlat.models.frozen.contexts import in_mode
from controlat.models.frozen.logits import check_logits

__all__ = ["build", "describe", "names"]


def build(name: str, in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build a network and check that it maps images to logits.

    Args:
        name: one of `names()`, any other "wideresnet-D-W" or "torchvision-NAME", or the user's own
            "package.module:factory"; the factory returns an `nn.Module` and may take the keywords
            `in_shape` and `num_classes`.
        in_shape: (C, H, W) of one image, in pixels.
        num_classes: number of logits.

    Returns:
        The network, in the training or evaluation mode in which it was built.

    Raises:
        ValueError: an unknown name or variant, an image too small for the network, a factory that returns
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
        module, variant = registry.variant(__name__, name)
        model = module.build(in_shape, num_classes, variant)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} is a {type(model).__name__}; its factory must return an nn.Module")
    _check_output(name, model, in_shape, num_classes)
    return model


def names() -> tuple[str, ...]:
    """The networks of this folder, as `build` takes them.

    Returns:
        The sorted names; "torchvision-NAME" stands for all networks of torchvision.

    Example:
        >>> [name for name in names() if name.startswith("lenet")]
        ['lenet', 'lenet-32-64']
    """
    return tuple(name for name, _, _ in _listed())


def describe(num_classes: int = 10) -> list[dict[str, Any]]:
    """The networks of `names`, with their sizes; no weights are drawn, and torchvision is not needed.

    Args:
        num_classes: number of logits of the counted networks.

    Returns:
        One dictionary for each name: "name", "parameters" for the usual image (None for
        "torchvision-NAME"), "input" (that image's C, H, W) and "what" (one line).

    Example:
        >>> describe()[0]
        {'name': 'cnn_bn', 'parameters': 90090, 'input': (1, 8, 8),
         'what': 'three convolutions with BatchNorm, and dropout'}
    """
    table: list[dict[str, Any]] = []
    for name, module, variant in _listed():
        in_shape = getattr(module, "INPUTS", {}).get(variant, module.INPUT)
        parameters = None
        if variant != ANY:
            with torch.device("meta"), _NoNormals():  # shapes only, no memory and no random numbers
                network = module.build(in_shape, num_classes, variant)
            parameters = sum(p.numel() for p in network.parameters())
        table.append(
            {"name": name, "parameters": parameters, "input": in_shape, "what": module.VARIANTS[variant]}
        )
    return table


def _listed() -> Iterator[tuple[str, ModuleType, str]]:
    """Name, module and variant of each listed network."""
    for short in registry.names(__name__):
        module = registry.member(__name__, short)
        for variant in sorted(module.VARIANTS):
            yield (f"{short}-{variant}" if variant else short), module, variant


class _NoNormals(TorchFunctionMode):
    """Skips `Tensor.normal_`, whose implementation for the device "meta" imports torch's compiler (1 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def _check_output(name: str, model: nn.Module, in_shape: tuple[int, int, int], num_classes: int) -> None:
    """Check the logits of two zero images in evaluation mode; training flags are restored."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.zeros(2, *in_shape, dtype=first.dtype, device=first.device)
    try:
        with in_mode(model, False), torch.no_grad():
            logits = model(x)
    except Exception as error:
        raise ValueError(f"model {name!r} fails on images of shape {tuple(x.shape)}: {error}") from error
    try:
        check_logits(logits, len(x))
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from None
    if logits.shape != (2, num_classes):
        shapes = f"maps images {tuple(x.shape)} to {tuple(logits.shape)}"
        raise ValueError(f"model {name!r} {shapes}; it must return logits of shape {(2, num_classes)}")
