"""Capturing the output of one layer with a forward hook."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["LayerHook", "StopForward", "first_layer"]

_COMPILED = (
    "the output of a single layer is asked for (YOPO), which torch.jit and torch.compile do not give: give "
    "the network as it was before"
)


class StopForward(Exception):
    """Raised in the hook to end the forward pass once the layer has run."""


class LayerHook:
    """A context manager with a forward hook that keeps a layer's output as `output`.

    Args:
        layer: a module of the model.
        stop: end the model's forward pass once the layer has run; it then returns nothing.
        cut: detach the output: `output` becomes a leaf, and gradients do not flow to earlier layers.

    Raises:
        ValueError: the layer's forward hook is not called, as in compiled networks; the output is not a
            tensor, or depends on no parameter that is trained.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> with LayerHook(model[0]) as hook:
    ...     y = model(torch.ones(1, 2))
    >>> hook.output.shape
    torch.Size([1, 3])
    """

    output: Tensor

    def __init__(self, layer: nn.Module, *, stop: bool = False, cut: bool = False) -> None:
        self.layer, self.stop, self.cut = layer, stop, cut

    def __enter__(self) -> Self:
        if isinstance(self.layer, torch.jit.ScriptModule):
            raise ValueError(_COMPILED)
        self._handle = self.layer.register_forward_hook(self._hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self._handle.remove()
        if kind is None and not hasattr(self, "output"):
            raise ValueError(_COMPILED)
        return kind is StopForward

    def _hook(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        kind = type(module).__name__
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the layer {kind} puts out a {type(output).__name__}; name one that gives a tensor"
            )
        if torch.is_grad_enabled() and not output.requires_grad:
            raise ValueError(f"nothing is trained up to the layer {kind}; name a later one")
        self.output = output.detach().requires_grad_() if self.cut else output
        if self.stop:
            raise StopForward
        return self.output.clone()  # a layer after it that works in place would overwrite `output`


def first_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """A module by its dotted name; by default the first innermost module with trained parameters.

    Raises:
        ValueError: there is no module of that name (the message lists the first ones), or the network is
            compiled.
    """
    if "_orig_mod" in model._modules:  # of torch.compile
        raise ValueError(_COMPILED)
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            listed = ", ".join(n for n in list(modules)[1:9])
            raise ValueError(f"the model has no layer {name!r}; its first ones are: {listed}")
        layer: nn.Module = modules[name]
    else:
        inner = {
            id(part) for m in modules.values() if is_parametrized(m) for part in m.parametrizations.modules()
        }
        layers = [m for m in modules.values() if id(m) not in inner]
        own = [(m, [*m.parameters(recurse=is_parametrized(m))]) for m in layers]
        trained = [m for m, weights in own if any(p.requires_grad for p in weights)]
        owners = trained or [
            m for m, weights in own if weights
        ]  # no parameter requires gradients inside a FrozenModel
        layer = next(m for m in owners if sum(1 for part in m.modules() if part in owners) == 1)
    return layer
