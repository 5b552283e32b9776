"""Memory layouts: convolutions run faster in NHWC, where the network can."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlat.models.frozen.hook import Reached

__all__ = [
    "LayoutWarning",
    "channels_first",
    "channels_last",
    "in_layout",
    "is_convolutional",
    "runs_nchw_only",
]


def channels_last(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NHWC in memory, others as they are.

    Unlike ``t.contiguous(memory_format=...)`` it sets the strides for one channel too, where both layouts
    hold the same bytes but only these strides select the fast kernels (pooling above all).
    """
    return _laid_out(t, torch.channels_last)


def channels_first(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NCHW, strides for one channel too."""
    return _laid_out(t, torch.contiguous_format)


def _laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    if t.dim() != 4:
        return t
    like = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=layout)
    return t if t.stride() == like.stride() else like.copy_(t)


class LayoutWarning(UserWarning):
    """A network does not run in NHWC layout, and is run in NCHW."""


# Networks that ran in NHWC, by id and mode, and that do not: users' modules need not be hashable.
_NHWC: weakref.WeakValueDictionary[tuple[int, bool], nn.Module] = weakref.WeakValueDictionary()


_NCHW: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def in_layout(model: nn.Module, x: Tensor, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """run(x, True), x in NHWC layout, or run(x, False), x in NCHW, for a network that does not run in NHWC.

    Such flatten by ``h.view(N, -1)``, which needs NCHW. A first pass that fails in NHWC and not in NCHW
    decides for good, and is told once. Other errors are the network's own.

    Warns:
        LayoutWarning: the network runs in NCHW only.
    """
    if _NCHW.get(id(model)) is model:
        return run(channels_first(x), False)
    key = id(model), model.training
    if _NHWC.get(key) is model:
        return run(channels_last(x), True)
    before = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        output = run(channels_last(x), True)
        _NHWC[key] = model
        return output
    except (Reached, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
    with torch.no_grad():
        for b, value in before:  # of a forward pass that got half way
            b.copy_(value)
    output = run(channels_first(x), False)
    _NCHW[id(model)] = model
    kind = type(model).__name__
    warnings.warn(
        f"{kind} runs in NCHW layout only, which is used from here on (in NHWC: {reason}). With h.flatten(1) "
        "in place of h.view(len(h), -1) it would run in the faster one; channels_last=False asks for NCHW",
        LayoutWarning,
        stacklevel=2,
    )
    return output


def is_convolutional(model: nn.Module) -> bool:
    """Whether the model has weights of two-dimensional convolutions."""
    return any(p.dim() == 4 for p in model.parameters())


def runs_nchw_only(model: nn.Module) -> bool:
    """Whether a forward pass of the network has shown that it does not run in NHWC."""
    return _NCHW.get(id(model)) is model
