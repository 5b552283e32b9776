"""Memory layouts of images: convolutions run faster in NHWC (channels last), if the network supports it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlat.models.frozen.hook import StopForward
from controlat.models.frozen.parts import Parts

__all__ = [
    "LayoutWarning",
    "channels_first",
    "channels_last",
    "is_convolutional",
    "run_in_layout",
    "runs_nchw_only",
]


def channels_last(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NHWC in memory, others as they are.

    Unlike ``t.contiguous(memory_format=...)`` it sets the strides for one channel too, where both layouts
    hold the same bytes but only these strides select the fast kernels (pooling above all).
    """
    if t.dim() != 4:
        return t
    _, c, h, w = t.shape
    return _with_layout(t, (c * h * w, 1, c * w, c), torch.channels_last)


def channels_first(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NCHW in memory, others as they are; strides as in `channels_last`."""
    if t.dim() != 4:
        return t
    _, c, h, w = t.shape
    return _with_layout(t, (c * h * w, h * w, w, 1), torch.contiguous_format)


def _with_layout(t: Tensor, strides: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    """The tensor itself if it has these strides, or a copy that torch lays out so."""
    return t if t.stride() == strides else torch.empty_like(t, memory_format=layout).copy_(t)


class LayoutWarning(UserWarning):
    """A network does not run in NHWC layout, and is run in NCHW."""


# Networks that ran in NHWC, by id and training flag, and those that failed, by id: users' modules need not be
# hashable.
_NHWC: weakref.WeakValueDictionary[tuple[int, bool], nn.Module] = weakref.WeakValueDictionary()
_NCHW: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def run_in_layout(model: nn.Module, x: Tensor, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """run(x, True) with x in NHWC layout; run(x, False) with x in NCHW if the network does not run in NHWC.

    That is so for networks that flatten by ``h.view(N, -1)``. The first pass in each mode tries NHWC; if it
    fails there and succeeds in NCHW, the network is run in NCHW from then on, with one warning. An error in
    both layouts passes through.

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
    except (StopForward, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
    with torch.no_grad():
        for b, value in before:  # undo what the failed forward pass wrote
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


def is_convolutional(model: nn.Module | Parts) -> bool:
    """Whether the model has weights of two-dimensional convolutions."""
    parameters = model.parameters if isinstance(model, Parts) else model.parameters()
    return any(p.dim() == 4 for p in parameters)


def runs_nchw_only(model: nn.Module) -> bool:
    """Whether a forward pass in NHWC has failed before."""
    return _NCHW.get(id(model)) is model
