"""Context managers for a user's network: exclusive access, another mode, other parameters and buffers.

The network itself runs, not a copy: forward hooks, compiled code and references between modules stay valid,
and activation checkpointing finds the same tensors when the backward pass runs layers again. After the block
the network has the same Parameter and buffer objects, with the same values, flags and gradients, as before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controlat.models.frozen.parts import Parts

__all__ = ["MODES", "exclusive", "in_mode", "merges_in_eval", "normal_tensor", "preserved_buffers", "swapped"]

MODES = ("eval", "train")

_RELEASED = threading.Condition()
_OWNER: dict[int, int] = {}  # id of a module or tensor -> the thread that is using it


def normal_tensor(t: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can use if it was made under ``torch.inference_mode()``."""
    return t.clone() if t.is_inference() else t


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[Parts]:
    """A lock on a network, and on all networks that share modules or tensors with it; re-entrant.

    Other threads wait for their turn. A thread that holds one network does not wait for a second, so that
    there is no deadlock.

    Yields:
        The parts of the network, collected once it is locked.

    Raises:
        RuntimeError: the thread holds another network, and would have to wait for this one.
    """
    me = threading.get_ident()
    with _RELEASED:
        while True:
            parts = Parts.of(model)
            ids = {id(part) for group in parts for part in group}
            if _OWNER.keys().isdisjoint(ids) or all(_OWNER.get(i, me) == me for i in ids):
                break
            if me in _OWNER.values():
                raise RuntimeError(
                    f"another thread works with this {type(model).__name__}, while this one works with a "
                    "second network: give each thread networks of its own (copy.deepcopy)"
                )
            _RELEASED.wait()
        acquired = ids - _OWNER.keys()
        _OWNER.update(dict.fromkeys(acquired, me))
    try:
        yield parts
    finally:
        with _RELEASED:
            for i in acquired:
                del _OWNER[i]
            _RELEASED.notify_all()


@contextlib.contextmanager
def in_mode(model: nn.Module | Parts, training: bool) -> Iterator[Parts]:
    """The network in training or evaluation mode inside the block; afterwards all training flags as before.

    Some modules override `train` or `eval`, and merge weights, freeze layers or rebuild themselves there. For
    those, structure, values, ``requires_grad`` and attributes are restored as well.

    Yields:
        The parts of the network in that mode.
    """
    parts = Parts.of(model)
    flags = [(m, m.training) for m in parts.modules]
    overridden = any(map(_overrides_train, parts.modules))
    restore = _restorer(parts) if overridden else None
    try:
        if overridden:
            parts.model.train(training) if training else parts.model.eval()
            yield Parts.of(parts.model)
        else:
            _set_flags((m, training) for m in parts.modules)
            yield parts
    finally:
        for m, flag in flags if overridden else ():
            if m.training != flag:
                m.train(flag)
        _set_flags(flags)  # the `train` of a module may set other modules' flags, or not set its own
        if restore is not None:
            restore()


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set training flags as nn.Module.train does, where they differ."""
    for m, flag in flags:
        if m.training != flag:
            m.training = flag


def merges_in_eval(model: nn.Module) -> bool:
    """Whether evaluation mode uses other parameters than training mode (layers that merge their weights)."""
    if not any(map(_overrides_train, model.modules())):
        return False
    with exclusive(model), in_mode(model, True):
        before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
        with in_mode(model, False):
            now = dict(model.named_parameters())
            same = [now.get(name) is p and torch.equal(p, value) for name, (p, value) in before.items()]
            return len(now) != len(before) or not all(same)


def _overrides_train(module: nn.Module) -> bool:
    """Whether a module has a `train` or `eval` other than nn.Module's."""
    kind = type(module)
    return (
        kind.train is not nn.Module.train
        or kind.eval is not nn.Module.eval
        or not {"train", "eval"}.isdisjoint(vars(module))
    )


def _restorer(parts: Parts) -> Callable[[], None]:
    """A function that restores the network's present structure, values, ``requires_grad`` and attributes."""
    dictionaries = [d for m in parts.modules for d in (m._modules, m._parameters, m._buffers, vars(m))]
    contents = [(d, dict(d)) for d in dictionaries]
    tensors = [(t, t.detach().clone(), t.requires_grad) for t in [*parts.parameters, *parts.buffers]]

    def restore() -> None:
        for d, content in contents:
            _fill(d, content)
        with torch.no_grad():
            for t, value, requires_grad in tensors:
                if not torch.equal(t, value):
                    t.copy_(value)
                if t.requires_grad != requires_grad:
                    t.requires_grad_(requires_grad)

    return restore


@contextlib.contextmanager
def swapped(model: nn.Module | Parts, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Parameters and buffers replaced by other tensors inside the block; the same objects as before after it.

    Args:
        model: the network.
        tensors: the replacements, by the id of the parameter or buffer; tied tensors are replaced in all
            their places.
    """
    modules = Parts.of(model).modules
    contents = [(d, dict(d.items())) for m in modules for d in (m._parameters, m._buffers) if d]
    flat_weights = [(m, m._flat_weights) for m in modules if isinstance(m, nn.RNNBase)]
    try:
        for d, content in contents:
            for name, t in content.items():
                if id(t) in tensors:
                    d[name] = tensors[id(t)]  # type: ignore[assignment]
        for m, weights in flat_weights:
            m._flat_weights = [tensors.get(id(w), w) for w in weights]
        yield
    finally:
        for d, content in contents:
            _fill(d, content)
        for m, weights in flat_weights:
            m._flat_weights = weights


def preserved_buffers(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Buffers replaced by copies inside the block, so that forward passes do not change the originals."""
    parts = Parts.of(model)
    return swapped(parts, {id(b): b.detach().clone() for b in parts.buffers})


def _fill(dictionary: Any, content: Mapping[str, Any]) -> None:
    """Restore the content of a module's dictionary; those of torch.jit modules cannot be cleared."""
    if isinstance(dictionary, dict):
        dictionary.clear()
        dictionary.update(content)
    else:
        for name, value in content.items():
            dictionary[name] = value
