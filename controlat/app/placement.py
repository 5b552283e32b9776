"""Where and how a network is trained: its device and layout, deterministic kernels, its initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from controlat._util import rng
from controlat.models.frozen.layout import channels_last
from controlat.models.frozen.view import runs_channels_last

__all__ = ["deterministic", "initial_model", "place"]


def place(
    model: nn.Module,
    device: torch.device | str,
    nhwc: bool = True,
    in_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Move a model to its device and, where `nhwc`, its convolution weights to NHWC layout.

    Where the shape of its inputs is given, it is tried first whether the model runs in that layout.
    """
    model = model.to(device)
    if nhwc and (in_shape is None or runs_channels_last(model, in_shape)):
        for p in model.parameters():
            p.data = channels_last(p.data)
    return model


@contextlib.contextmanager
def deterministic(threads: int | None = None) -> Iterator[None]:
    """Deterministic kernels, and a number of CPU threads, inside the block only."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with initial weights that are a function of the seed."""
    with rng.scoped(seed, "model"):
        return build()
