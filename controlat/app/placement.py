"""Where and how a network is trained: device and layout, kernels, precision, CPU threads, initial weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from controlat._util import precision, rng
from controlat._util.cores import available_cores
from controlat.models.frozen.layout import channels_last
from controlat.models.frozen.view import FrozenModel, runs_channels_last

__all__ = ["TF32_CHOICES", "Threads", "default_threads", "deterministic", "initial_model", "place", "threads"]

TF32_CHOICES = {"auto": None, "on": True, "off": False}  # of the setting `tf32`; auto: as torch is set
FLOPS_PER_THREAD = 1e9  # of a forward pass of one batch: benchmarks/threads.py


class Threads(NamedTuple):
    """A number of CPU threads, and how it was chosen."""

    number: int
    why: str


_CHOSEN: ContextVar[Threads | None] = ContextVar("_CHOSEN", default=None)


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
def deterministic(threads: int | Threads | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Deterministic kernels, a number of CPU threads and TF32 or not, inside the block only.

    cuDNN stays as it is, with its autotuner off, which may pick other kernels in another run.

    Args:
        threads: CPU threads; as many as before if None.
        tf32: whether products of float32 numbers are computed in TF32; None leaves that as it is.
    """
    cudnn = torch.backends.cudnn
    kernels = precision.assigned((cudnn, "deterministic", True), (cudnn, "benchmark", False))
    chosen = Threads(threads, "given") if isinstance(threads, int) else threads
    chosen = chosen or Threads(torch.get_num_threads(), "as torch was set")
    with _running(chosen), kernels, precision.tf32(tf32):
        yield


@contextlib.contextmanager
def _running(threads: Threads) -> Iterator[None]:
    """So many CPU threads inside the block only."""
    before, token = torch.get_num_threads(), _CHOSEN.set(threads)
    try:
        torch.set_num_threads(threads.number)
        yield
    finally:
        torch.set_num_threads(before)
        _CHOSEN.reset(token)


def threads() -> Threads:
    """The CPU threads at present, and how they were chosen."""
    number, chosen = torch.get_num_threads(), _CHOSEN.get()
    return chosen if chosen is not None and chosen.number == number else Threads(number, "as torch was set")


def default_threads(
    model: nn.Module, jobs: int = 1, *, in_shape: tuple[int, int, int], batch_size: int
) -> Threads:
    """CPU threads that suit a network: one for every 10^9 operations of a forward pass of a batch.

        min(cores / jobs, max(1, operations / 10^9)), rounded down

    The operations of a small network are over before a second thread has begun, and where another process
    has its core, the first one waits for it at the end of each of them. The number decides the bits of the
    results; it depends on the network and the machine alone, not on what else runs there. ``OMP_NUM_THREADS``
    is heeded where it is set, and a network on a GPU is given one thread.

    Args:
        model: the network, on its device.
        jobs: processes that share the cores.
        in_shape: (C, H, W) of its inputs.
        batch_size: samples per step.

    >>> from unittest.mock import patch
    >>> tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> with patch.dict(os.environ, OMP_NUM_THREADS=""):
    ...     default_threads(tiny, in_shape=(1, 8, 8), batch_size=64)
    Threads(number=1, why='a small network: 8.2e+04 operations per batch')
    """
    word = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # it may be a list, by nesting
    if word.isdecimal() and 1 <= int(word) <= 1024:
        return Threads(int(word), "OMP_NUM_THREADS")
    first = next(model.parameters(), torch.empty(0))
    if first.device.type != "cpu":
        return Threads(1, f"the network is on {first.device.type}")
    operations = batch_size * _operations(model, in_shape, first)
    told, cores = f"{operations:.2g} operations per batch", available_cores()
    wanted = int(operations / FLOPS_PER_THREAD)
    if wanted <= 1:
        return Threads(1, f"a small network: {told}")
    told += f", {cores} cores" + (f" for {jobs} jobs" if jobs > 1 else "")
    return Threads(max(1, min(cores // jobs, wanted)), told)


def _operations(model: nn.Module, in_shape: tuple[int, int, int], first: torch.Tensor) -> int:
    """Additions and multiplications of a forward pass of one sample, in layers with a matrix of weights."""
    counted: list[int] = []

    def count(layer: Any, arguments: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            counted.append(2 * layer.weight.numel() * output[0].numel() // len(layer.weight))

    layers = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) > 1]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    x = torch.zeros(2, *in_shape, dtype=first.dtype if first.is_floating_point() else torch.float32)
    try:
        with _running(Threads(1, "counting")), rng.scoped(0, "operations"), FrozenModel(model) as view:
            view.logits(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counted)


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with initial weights that are a function of the seed."""
    with rng.scoped(seed, "model"):
        return build()
