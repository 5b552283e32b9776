"""Whether a network's computation can be captured as a CUDA graph: the same kernels in every pass.

A graph repeats kernels, and nothing that Python does. A network is not captured if it has hooks or is
compiled, or if one pass shows that it draws random numbers, reads values on the CPU (Python control flow on
tensors), uses tensors of the CPU, or changes its attributes.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["ATTRIBUTES", "Contents", "observed", "unsuited"]

ATTRIBUTES = "its attributes change as it runs"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Contents:
    """All that a forward pass depends on beside the values of tensors: modules, attributes, tensors' places.

    It holds weak references, so that a network is freed as without it.

    Args:
        modules: all modules of the network.

    >>> modules = [nn.Linear(2, 2), nn.ReLU()]
    >>> before = Contents(modules)
    >>> before.same(modules)
    True
    >>> modules[1].inplace = True
    >>> before.same(modules)
    False
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        held = _held(modules)
        self._gone: list[object] = []  # weak references to what is no more
        self._held = [self._reference(part) for part in held]
        self._ids, self._places = [*map(id, held)], _places(held)

    def same(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules hold the same objects, or equal numbers and texts, as at construction."""
        held = _held(modules)
        if self._gone or len(held) != len(self._held) or self._places != _places(held):
            return False
        return self._ids == [*map(id, held)] or all(map(_same, self._held, held))

    def _reference(self, part: object) -> object:
        """What stands for an object without keeping it, if numbers and texts cannot."""
        if part is None or isinstance(part, _PLAIN):
            return part
        try:
            return _Reference(part, self._gone.append)
        except TypeError:
            return part


class _Reference(weakref.ref[Any]):
    """A weak reference of ours, beside those that modules hold themselves."""


def _held(modules: Sequence[nn.Module]) -> list[object]:
    """Modules, their attributes, and what is in those that are collections."""
    held: list[object] = []
    for module in modules:
        held.append(module)
        for value in vars(module).values():
            if isinstance(value, dict):
                held += value.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                held += value
            else:
                held.append(value)
    return held


def _places(held: Sequence[object]) -> list[int]:
    """Where tensors are in memory."""
    return [t.data_ptr() for t in held if isinstance(t, Tensor) and t.layout == torch.strided]


def _same(before: object, now: object) -> bool:
    if isinstance(before, _Reference):
        return before() is now
    return before is now or (type(before) is type(now) and isinstance(now, _PLAIN) and before == now)


def unsuited(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> str:
    """Why a network cannot be captured, as far as its structure tells; an empty text if nothing speaks
    against it.

    Args:
        modules: all of the network.
        tensors: its parameters and buffers.
    """
    if any(isinstance(m, torch.jit.ScriptModule) or m._compiled_call_impl is not None for m in modules):
        return "it is compiled"
    if any("_orig_mod" in m._modules for m in modules):  # of torch.compile
        return "it is compiled"
    if any(getattr(m, name) for m in modules for name in _HOOKS):
        return "it has hooks, which run in Python"
    if len({t.device for t in tensors}) > 1:
        return "its tensors are on several devices"
    return ""


@contextmanager
def observed(modules: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Yields a list which, after the block, says why the passes inside it cannot be captured.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with observed([*model.modules()]) as reasons:
    ...     y = model(torch.ones(1, 2))
    >>> reasons
    ['it draws random numbers']
    """
    reasons: list[str] = []
    before, drawn, waits = Contents(modules), _random_states(modules), _Waits()  # type: ignore[no-untyped-call]
    with waits:
        yield reasons
    if waits.reason:
        reasons.append(waits.reason)
    if drawn != _random_states(modules):
        reasons.append("it draws random numbers")
    if not before.same(modules):
        reasons.append(ATTRIBUTES)


def _random_states(modules: Sequence[nn.Module]) -> list[object]:
    """States of all generators that a network may draw from."""
    generators = [torch.default_generator, *(g for g in _held(modules) if isinstance(g, torch.Generator))]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = [g.get_state().numpy().tobytes() for g in generators]
    return [*states, random.getstate(), np.asarray(keys).tobytes(), rest]


class _Waits(TorchDispatchMode):
    """Notes why an operation makes the CPU wait for the device, or is given numbers that are not there."""

    reason = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.reason = self.reason or _waits(func, args, kwargs)
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> str:
    """Why an operation cannot be captured; an empty text if it can."""
    name = func.name().removeprefix("aten::")
    devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if len(devices) > 1 or (func is torch.ops.aten.lift_fresh.default and "cpu" not in devices):
        return f"it takes numbers from one device to another ({name})"
    if func is torch.ops.aten.index.Tensor:  # by a mask: so many rows as are true
        reads = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    else:
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        reads = any(tag in func.tags for tag in tags)
    return f"it reads values of tensors in Python ({name})" if reads else ""
