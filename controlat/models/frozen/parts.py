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
        ahead = [model]
        while ahead:
            module = ahead.pop()
            if id(module) in modules:
                continue
            modules[id(module)] = module
            # The values are copied, as another thread, whose view is open, may change them meanwhile.
            for own, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
                for t in [*tensors.values()] if tensors else ():
                    if t is not None:
                        own[id(t)] = t
            if module._modules:
                ahead += [m for m in reversed([*module._modules.values()]) if m is not None]
        return cls([*modules.values()], [*parameters.values()], [*buffers.values()])

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        return self.modules[0]
