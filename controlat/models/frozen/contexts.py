"""Context managers for a user's network: exclusive access, another mode, other parameters and buffers.

The network itself runs, not a copy: forward hooks, compiled code and references between modules stay valid,
and activation checkpointing finds the same tensors when the backward pass runs layers again. After the block
the network has the same Parameter and buffer objects, with the same values, flags and gradients, as before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODES", "exclusive", "in_mode", "merges_in_eval", "normal_tensor", "preserved_buffers", "swapped"]

MODES = ("eval", "train")

_RELEASED = threading.Condition()
_OWNER: dict[int, int] = {}  # id of a module or tensor -> the thread that is using it


def normal_tensor(t: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can use if it was made under ``torch.inference_mode()``."""
    return t.clone() if t.is_inference() else t


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """A lock on a network, and on all networks that share modules or tensors with it; re-entrant.

    Other threads wait for their turn. A thread that holds one network does not wait for a second, so that
    there is no deadlock.

    Raises:
        RuntimeError: the thread holds another network, and would have to wait for this one.
    """
    me = threading.get_ident()
    parts = {id(part) for members in (model.modules, model.parameters, model.buffers) for part in members()}
    with _RELEASED:
        while any(_OWNER.get(i, me) != me for i in parts):
            if me in _OWNER.values():
                raise RuntimeError(
                    f"another thread works with this {type(model).__name__}, while this one works with a "
                    "second network: give each thread networks of its own (copy.deepcopy)"
                )
            _RELEASED.wait()
        acquired = parts - _OWNER.keys()
        _OWNER.update(dict.fromkeys(acquired, me))
    try:
        yield
    finally:
        with _RELEASED:
            for i in acquired:
                del _OWNER[i]
            _RELEASED.notify_all()


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The network in training or evaluation mode inside the block; afterwards all training flags as before.

    Some modules override `train` or `eval`, and merge weights, freeze layers or rebuild themselves there. For
    those, structure, values, ``requires_grad`` and attributes are restored as well.
    """
    flags = [(m, m.training) for m in model.modules()]
    restore = _restorer(model) if any(_overrides_train(m) for m, _ in flags) else None
    try:
        model.train(training) if training else model.eval()
        yield
    finally:
        for m, flag in flags:
            if m.training != flag:
                m.train(flag)
        for m, flag in flags:  # the `train` of a module may set other modules' flags, or not set its own
            if m.training != flag:
                m.training = flag
        if restore is not None:
            restore()


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


def _restorer(model: nn.Module) -> Callable[[], None]:
    """A function that restores the network's present structure, values, ``requires_grad`` and attributes."""
    modules = [*model.modules()]
    dictionaries = [d for m in modules for d in (m._modules, m._parameters, m._buffers, vars(m))]
    contents = [(d, dict(d)) for d in dictionaries]
    tensors = [(t, t.detach().clone(), t.requires_grad) for t in [*model.parameters(), *model.buffers()]]

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
def swapped(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Parameters and buffers replaced by other tensors inside the block; the same objects as before after it.

    Args:
        model: the network.
        tensors: the replacements, by the id of the parameter or buffer; tied tensors are replaced in all
            their places.
    """
    modules = [*model.modules()]
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
    return swapped(model, {id(b): b.detach().clone() for b in model.buffers()})


def _fill(dictionary: Any, content: Mapping[str, Any]) -> None:
    """Restore the content of a module's dictionary; those of torch.jit modules cannot be cleared."""
    if isinstance(dictionary, dict):
        dictionary.clear()
        dictionary.update(content)
    else:
        for name, value in content.items():
            dictionary[name] = value
