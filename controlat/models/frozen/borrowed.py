"""A user's network while the library works with it: alone, in another mode, with other tensors.

The very modules run, so that hooks, compiled code and references between modules keep their meaning, and
what a backward pass computes again (activation checkpointing) finds the same tensors. After the block the
network is as it was: the very Parameters and buffers, their bits, flags and gradients.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODES", "alone", "buffers_kept", "in_mode", "merges", "owned", "replaced"]

MODES = ("eval", "train")

_CHANGED = threading.Condition()
_TAKEN: dict[int, int] = {}  # modules and tensors by id, and the thread that works with them


def owned(t: Tensor) -> Tensor:
    """A tensor that autograd can work with: a copy where it was made under ``torch.inference_mode()``."""
    return t.clone() if t.is_inference() else t


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """No other thread is in such a block with this network, or with one that shares modules or weights.

    A thread waits for its turn. It never waits in a block with another network, so that no two threads can
    wait for each other.

    Raises:
        RuntimeError: the thread would have to wait in a block.
    """
    me = threading.get_ident()
    wanted = {id(part) for parts in (model.modules, model.parameters, model.buffers) for part in parts()}
    with _CHANGED:
        while any(_TAKEN.get(i, me) != me for i in wanted):
            if me in _TAKEN.values():
                raise RuntimeError(
                    f"another thread works with this {type(model).__name__}, while this one works with a "
                    "second network: give each thread networks of its own (copy.deepcopy)"
                )
            _CHANGED.wait()
        mine = wanted - _TAKEN.keys()
        _TAKEN.update(dict.fromkeys(mine, me))
    try:
        yield
    finally:
        with _CHANGED:
            for i in mine:
                del _TAKEN[i]
            _CHANGED.notify_all()


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The network in one mode, entered and left through the `train` of its modules; flags end as they were.

    A module may do more there than set a flag: merge weights, freeze layers, rebuild itself. Then structure,
    values to the bit, ``requires_grad`` and attributes are put back as well.
    """
    flags = [(m, m.training) for m in model.modules()]
    put_back = _restorer(model) if any(_does_more(m) for m, _ in flags) else None
    try:
        model.train(training) if training else model.eval()
        yield
    finally:
        for m, flag in flags:
            if m.training != flag:
                m.train(flag)
        for m, flag in flags:  # a module may put others in a mode, or refuse its own
            if m.training != flag:
                m.training = flag
        if put_back is not None:
            put_back()


def merges(model: nn.Module) -> bool:
    """Whether eval mode runs on other parameters than training mode has, as layers do that merge them."""
    if not any(map(_does_more, model.modules())):
        return False
    with alone(model), in_mode(model, True):
        before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
        with in_mode(model, False):
            now = dict(model.named_parameters())
            same = [now.get(name) is p and torch.equal(p, value) for name, (p, value) in before.items()]
            return len(now) != len(before) or not all(same)


def _does_more(module: nn.Module) -> bool:
    """Whether `train` or `eval` of a module is its own."""
    kind = type(module)
    return (
        kind.train is not nn.Module.train
        or kind.eval is not nn.Module.eval
        or not {"train", "eval"}.isdisjoint(vars(module))
    )


def _restorer(model: nn.Module) -> Callable[[], None]:
    """What puts a network back to its present structure, values, ``requires_grad`` and attributes."""
    modules = [*model.modules()]
    homes = [home for m in modules for home in (m._modules, m._parameters, m._buffers, vars(m))]
    contents = [(home, dict(home)) for home in homes]
    tensors = [(t, t.detach().clone(), t.requires_grad) for t in [*model.parameters(), *model.buffers()]]

    def put_back() -> None:
        for home, content in contents:
            _fill(home, content)
        with torch.no_grad():
            for t, value, wanted in tensors:
                if not torch.equal(t, value):
                    t.copy_(value)
                if t.requires_grad != wanted:
                    t.requires_grad_(wanted)

    return put_back


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters and buffers, wherever these stand; then the very ones again.

    Args:
        model: the network.
        tensors: what is put in the place of a parameter or buffer, by the id of that.
    """
    modules = [*model.modules()]
    homes = [(home, dict(home.items())) for m in modules for home in (m._parameters, m._buffers) if home]
    lists = [(m, m._flat_weights) for m in modules if isinstance(m, nn.RNNBase)]
    try:
        for home, content in homes:
            for name, t in content.items():
                if id(t) in tensors:
                    home[name] = tensors[id(t)]  # type: ignore[assignment]
        for m, weights in lists:
            m._flat_weights = [tensors.get(id(w), w) for w in weights]
        yield
    finally:
        for home, content in homes:
            _fill(home, content)
        for m, weights in lists:
            m._flat_weights = weights


def buffers_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Copies of the buffers in their place inside the block, so that their values are as before after it."""
    return replaced(model, {id(b): b.detach().clone() for b in model.buffers()})


def _fill(home: Any, content: Mapping[str, Any]) -> None:
    """Give a dictionary of a module its content of before; one of torch.jit has the same names always."""
    if isinstance(home, dict):
        home.clear()
        home.update(content)
    else:
        for name, value in content.items():
            home[name] = value
