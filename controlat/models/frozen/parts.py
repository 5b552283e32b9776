"""The modules, parameters and buffers of a network, collected in one walk."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Parts"]


class Parts(NamedTuple):
    """What a network consists of: each module and tensor once, in the order of ``model.modules()``.

    ``model.parameters()`` and its like walk through all modules and build their names every time, which takes
    as long as running a small network. Parts are collected anew for every use, never kept: users change their
    networks.

    >>> layer = nn.Linear(3, 3)
    >>> parts = Parts.of(nn.Sequential(layer, nn.ReLU(), layer))
    >>> [type(m).__name__ for m in parts.modules], len(parts.parameters), len(parts.buffers)
    (['Sequential', 'Linear', 'ReLU'], 2, 0)
    """

    modules: list[nn.Module]
    parameters: list[Tensor]
    buffers: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module | Parts) -> Parts:
        """The parts of a network as it is now."""
        if isinstance(model, Parts):
            return model
        modules: dict[int, nn.Module] = {}
        parameters: dict[int, Tensor] = {}
        buffers: dict[int, Tensor] = {}
        _walk(model, modules, parameters, buffers)
        return cls([*modules.values()], [*parameters.values()], [*buffers.values()])

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        return self.modules[0]


def _walk(
    module: nn.Module,
    modules: dict[int, nn.Module],
    parameters: dict[int, Tensor],
    buffers: dict[int, Tensor],
) -> None:
    """Add a module and those below it, unless they are there. (A function within `of` would refer to itself,
    and keep the network until the garbage collector comes.)
    """
    if id(module) in modules:
        return
    modules[id(module)] = module
    for own, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
        # The values are copied, as another thread, whose view is open, may change them meanwhile.
        own.update((id(t), t) for t in [*tensors.values()] if t is not None)
    for child in module._modules.values():
        if child is not None:
            _walk(child, modules, parameters, buffers)
