"""Setting a network and its optimiser to a stored state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from controlat.dynamics.state import State
from controlat.dynamics.state_dict import Names
from controlat.models.frozen.parts import Parts

__all__ = ["put_back"]


def put_back(
    model: nn.Module, sgd: torch.optim.Optimizer, parameters: Sequence[Tensor], names: Names, z: State
) -> None:
    """Set a network and its optimiser to those of z, which is copied.

    The tensors of a network that is nothing but its trained parameters are copied. That is all that
    `load_state_dict` would do then, which takes as long as a step of a small network.

    Args:
        model: the network.
        sgd: its optimiser.
        parameters: the trained parameters.
        names: of the entries of the network's state dict that have a derivative.
        z: the state, of this network or from a checkpoint.
    """
    momentum = [v.clone() for v in z.momentum]  # an optimiser does not copy what it loads
    if not _is_plain(model, names, z):
        model.load_state_dict(z.model)
        sgd.load_state_dict(replace(z, momentum=momentum).optimizer)
        return
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), z.parameters)
    sgd.state.clear()  # no buffers before the first step
    sgd.state.update({p: {"momentum_buffer": v} for p, v in zip(parameters, momentum, strict=False)})
    for group, stored in zip(sgd.param_groups, z.optimizer["param_groups"], strict=True):
        group.update({name: value for name, value in stored.items() if name != "params"})


def _is_plain(model: nn.Module, names: Names, z: State) -> bool:
    """Whether z was taken from this very network, which is nothing but its trained parameters."""
    taken_here = z.rest is not None and z.rest.names is names and not z.rest.entries and not z.statistics
    return taken_here and all(map(_loads_plainly, Parts.of(model).modules))


def _loads_plainly(m: nn.Module) -> bool:
    """Whether a module's entries of a state dict are loaded by torch's own code, with nothing added to it."""
    own = type(m).load_state_dict, type(m)._load_from_state_dict
    plain = own == (nn.Module.load_state_dict, nn.Module._load_from_state_dict)
    return plain and not m._load_state_dict_pre_hooks and not m._load_state_dict_post_hooks
