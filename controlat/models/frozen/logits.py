"""Calling a model on inputs, and checking that it returns logits; errors name the cause and the cure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from controlat.models.frozen.parts import Parts

__all__ = ["check_kind", "check_logits", "check_model", "check_weights", "checked_logits"]

# Texts of torch's errors for inputs that do not fit the weights. Every other error passes through unchanged.
_DEVICE = re.compile("same device|Input type")
_DTYPE = re.compile("dtype|scalar type|Input type")
_SHAPE = re.compile("shapes cannot be multiplied|expected input|Expected .* channels")


def checked_logits(model: nn.Module, x: Tensor) -> Tensor:
    """The logits model(x). The model is given a copy of x, so that it may work in place.

    Args:
        model: the network.
        x: (N, ...) inputs.

    Returns:
        Logits (N, C), C >= 2.

    Raises:
        ValueError: the model returns something else, or the dtype, device or shape of x does not fit its
            weights. Other errors of the model pass through.

    >>> checked_logits(nn.Linear(4, 3), torch.rand(2, 5))
    Traceback (most recent call last):
    ValueError: x has 5 numbers per sample, but the model's first layer (Linear) takes 4
    """
    # A model that torch.compile has made needs inputs that are leaves, and does not write to its inputs.
    inputs = x if x.requires_grad and "_orig_mod" in model._modules else x.clone()
    try:
        logits = model(inputs)
    except RuntimeError as error:
        if reason := _misfit(model, x, str(error)):
            raise ValueError(reason) from error
        raise
    return check_logits(logits, len(x))


def check_model(model: object) -> Parts:
    """Check that a model is an nn.Module with materialised weights, not wrapped in DistributedDataParallel.

    Returns:
        Its parts.

    Raises:
        TypeError: it is not an nn.Module, or it is a DistributedDataParallel.
        ValueError: its weights are lazy, or on the device meta.
    """
    parts = Parts.of(check_kind(model))
    check_weights(parts)
    return parts


def check_kind(model: object) -> nn.Module:
    """Return a model if it is an nn.Module, not wrapped in DistributedDataParallel; otherwise TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: wrap it in one")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model is wrapped in DistributedDataParallel, which attacks must go around: give .module"
        )
    return model


def check_weights(parts: Parts) -> None:
    """Raise ValueError if weights of a network are lazy, or on the device meta."""
    for p in (*parts.parameters, *parts.buffers):
        if is_lazy(p):
            raise ValueError("the model has lazy layers, which have no shape yet: call it on one batch first")
        if p.is_meta:
            raise ValueError("the model has weights on the device meta: load them first")


def _misfit(model: nn.Module, x: Tensor, error: str) -> str:
    """Why x does not fit the weights, if that is what torch's error is about; otherwise an empty string."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), x)
    if _DEVICE.search(error) and weight.device != x.device:
        return f"x is on {x.device}, but the model's weights are on {weight.device}: move one of them"
    if _DTYPE.search(error) and weight.dtype != x.dtype:
        return f"x is {x.dtype}, but the model's weights are {weight.dtype}: use x.to({weight.dtype})"
    layer = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if layer is None or not _SHAPE.search(error):
        return ""
    if isinstance(layer, nn.Linear):
        expected, actual, unit = layer.in_features, [x[0].numel(), x.shape[-1]], "numbers per sample"
    else:
        expected, actual, unit = layer.in_channels, [x.shape[1]], "channels"
    if expected in actual:
        return ""
    return f"x has {actual[0]} {unit}, but the model's first layer ({type(layer).__name__}) takes {expected}"


def check_logits(output: object, samples: int) -> Tensor:
    """Return a model's output if it is a tensor of logits (samples, C), C >= 2; values are not checked.

    Raises:
        ValueError: it is something else; the message says what it is, and the cure.
    """
    if isinstance(output, Tensor) and output.is_floating_point() and output.layout == torch.strided:
        if output.dim() == 2 and len(output) == samples and output.shape[1] >= 2:
            return output
        got = f"shape {tuple(output.shape)} for {samples} samples"
        if tuple(output.shape) in ((samples,), (samples, 1)):
            cure = "one number z per sample stands for two classes with the logits (0, z): return both"
        elif output.dim() > 2:
            cure = "maps of pixels are not supported: return one row per sample"
        else:
            cure = "return one row per sample"
    elif isinstance(output, Tensor):
        got, cure = f"{output.dtype} ({output.layout})", "return scores, not labels"
    else:
        got, cure = f"a {type(output).__name__}", "wrap it in a module that returns them alone"
        if hasattr(output, "logits") or (isinstance(output, Mapping) and "logits" in output):
            cure = "wrap it in a module that returns its logits alone"
    raise ValueError(
        "the model must return logits, one floating-point tensor of shape (N, C) with C >= 2 classes, got "
        f"{got}; {cure}"
    )
