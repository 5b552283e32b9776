"""The entries of a network's state dict: those that have a derivative, by name, and all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Names", "Rest", "copied"]


class Names(NamedTuple):
    """The names, in the state dict of a network, of the tensors that have a derivative.

    Args:
        parameters: names of the trained parameters, in order.
        statistics: names of the running statistics of normalisation layers, in order.
        tied: further names of these tensors, each with the name listed above.
    """

    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[Tensor], statistics: Sequence[Tensor]) -> Names:
        """Find the tensors of a network in its state dict, by their addresses in memory.

        Raises:
            ValueError: the state dict does not contain one of the tensors, or a copy in place of it.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> Names.of(model, list(model.parameters())[:1], [model[1].running_var])
        Names(parameters=('0.weight',), statistics=('1.running_var',), tied={})
        """
        names: dict[tuple[int, torch.Size], list[str]] = {}
        for name, t in model.state_dict().items():
            if isinstance(t, Tensor):
                names.setdefault((t.data_ptr(), t.shape), []).append(name)
        first: dict[tuple[int, torch.Size], str] = {}

        def name_of(t: Tensor) -> str:
            address = (t.data_ptr(), t.shape)
            if not names.get(address):
                raise ValueError(
                    f"the state_dict of the {type(model).__name__} lacks one of its own tensors, of shape "
                    f"{tuple(t.shape)}, or has a copy of it: training could not be put back to where it was; "
                    "let state_dict give the tensors themselves"
                )
            first[address] = names[address].pop(0)
            return first[address]

        both = tuple(map(name_of, parameters)), tuple(map(name_of, statistics))
        return cls(*both, {name: first[address] for address in first for name in names[address]})


@dataclass(frozen=True)
class Rest:
    """The part of a network's and an optimiser's state dict that has no derivative.

    Args:
        names: of the entries that have a derivative.
        entries: all other entries of the network's state dict: frozen parameters, other buffers, extra state.
        groups: the optimiser's parameter groups, as in its state dict.
    """

    names: Names
    entries: dict[str, Any]
    groups: list[dict[str, Any]]


def copied(value: Any) -> Any:
    """A copy of an entry of a state dict: a tensor without its graph, or a module's extra state."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
