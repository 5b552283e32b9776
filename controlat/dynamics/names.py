"""Where in the state dict of a network that stands which has a derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Names"]


class Names(NamedTuple):
    """Under which names the state dict of a network has what has a derivative.

    Args:
        parameters: of the parameters that are trained, in order.
        statistics: of the running statistics of normalisation layers, in order.
        tied: further names of the same tensors, with the name that stands above.
    """

    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[Tensor], statistics: Sequence[Tensor]) -> Names:
        """Find the tensors of a network in its state dict, by where they lie in memory.

        Raises:
            ValueError: one of them is not there, so that it could not be put back.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> Names.of(model, list(model.parameters())[:1], [model[1].running_var])
        Names(parameters=('0.weight',), statistics=('1.running_var',), tied={})
        """
        names: dict[tuple[int, torch.Size], list[str]] = {}
        for name, t in model.state_dict().items():
            if isinstance(t, Tensor):
                names.setdefault((t.data_ptr(), t.shape), []).append(name)
        first: dict[tuple[int, torch.Size], str] = {}

        def take(t: Tensor) -> str:
            place = (t.data_ptr(), t.shape)
            if not names.get(place):
                raise ValueError(
                    f"the state_dict of the {type(model).__name__} lacks one of its own tensors, of shape "
                    f"{tuple(t.shape)}, or has a copy of it: training could not be put back to where it was; "
                    "let state_dict give the tensors themselves"
                )
            first[place] = names[place].pop(0)
            return first[place]

        both = tuple(map(take, parameters)), tuple(map(take, statistics))
        return cls(*both, {name: first[place] for place in first for name in names[place]})
