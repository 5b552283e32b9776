"""Running statistics of normalisation layers as part of the state z: r' = (1 - m) r + m s(x).

torch updates them in place, outside autograd. While a step or a terminal cost is differentiated,
`differentiable_statistics` keeps them in the graph: layers in training mode update them, layers in evaluation
mode read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["differentiable_statistics", "frozen_statistics", "statistics"]


_INSTANCE: Any = nn.modules.instancenorm._InstanceNorm
# Subclasses with a forward pass of their own are left out: they may use the buffers in another way.
_KNOWN = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, _INSTANCE.forward)


def _layers(model: nn.Module) -> list[Any]:
    """torch's layers with running statistics, in the order of ``model.modules()``, each once."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [m for m in norms if m.running_mean is not None and type(m).forward in _KNOWN]


def statistics(model: nn.Module) -> list[Tensor]:
    """Running mean and variance of every layer that has them: the model's own tensors.

    >>> [tuple(t.shape) for t in statistics(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))]
    [(3,), (3,)]
    """
    return [t for layer in _layers(model) for t in (layer.running_mean, layer.running_var)]


@contextmanager
def differentiable_statistics(model: nn.Module, r: list[Tensor]) -> Iterator[set[int]]:
    """Inside the block, forward passes read and update the running statistics r with a graph.

    The model's own buffers are updated as well, as torch does it.

    Args:
        model: the network.
        r: copies of `statistics` (model); the entries are replaced when layers in training mode update them.

    Yields:
        Positions in r of the layers that have run so far. The layers of a compiled network are not seen, as
        it calls no forward hooks.

    >>> model = nn.BatchNorm1d(1, momentum=0.5).train()
    >>> x, r = torch.tensor([[1.0], [3.0]], requires_grad=True), [t.clone() for t in statistics(model)]
    >>> with differentiable_statistics(model, r):
    ...     y = model(x)
    >>> r[0].item(), torch.autograd.grad(r[0], x)[0].flatten().tolist()
    (1.0, [0.25, 0.25])
    """
    handles, passes, reached = [], [], set[int]()
    for i, layer in enumerate(_layers(model)):

        def hook(layer: Any, arguments: tuple[Tensor, ...], output: Tensor, i: int = 2 * i) -> Tensor | None:
            reached.add(i)
            if not layer.training:
                return _normalised(layer, arguments[0], r[i], r[i + 1]).to(output.dtype)
            if layer.track_running_stats:
                passes.append((i, layer, _momentum(layer), arguments[0]))
            return None

        handles.append(layer.register_forward_hook(hook))
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()
        # Not in the hook: activation checkpointing, which runs layers again, requires that both passes save
        # the same tensors for backward.
        for i, layer, m, x in passes:
            batch_statistics = _batch_statistics(layer, x)
            r[i : i + 2] = (
                (1 - m) * old + m * new for old, new in zip(r[i : i + 2], batch_statistics, strict=True)
            )


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block, forward passes leave the running statistics as they are.

    For the backward pass: with activation checkpointing it runs layers a second time, which would update the
    statistics twice for each batch.
    """
    before = [(layer, layer.momentum, layer.num_batches_tracked) for layer in _layers(model)]
    for layer, *_ in before:
        layer.momentum = 0.0
        layer._buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for layer, momentum, count in before:
            layer.momentum = momentum
            layer._buffers["num_batches_tracked"] = count


def _momentum(layer: Any) -> float:
    """m of the last forward pass: momentum=None means the average over all n passes, m = 1/n."""
    if layer.momentum is not None:
        return float(layer.momentum)
    if isinstance(layer, _INSTANCE):
        return 0.0
    return 1.0 / float(layer.num_batches_tracked)


def _batch_statistics(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance that the running statistics average; InstanceNorm: means over instances."""
    x = x.to(layer.running_mean.dtype)
    if isinstance(layer, _INSTANCE):
        pixels = x.flatten(2)
        return pixels.mean((0, 2)), pixels.var(2).mean(0)
    others = [d for d in range(x.dim()) if d != 1]
    return x.mean(others), x.var(others)


def _normalised(layer: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in operations with derivatives in the statistics."""
    shape = [-1, *[1] * (x.dim() - 2)]
    y = (x - mean.view(shape)) * torch.rsqrt(variance + layer.eps).view(shape)
    for t, combine in ((layer.weight, torch.mul), (layer.bias, torch.add)):
        y = y if t is None else combine(y, t.view(shape))
    return y
