"""The scale s_t of the greedy criterion, from a user's optimiser."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from controlat._util.checks import number

__all__ = ["Pace"]


class Pace(NamedTuple):
    """How far an optimiser displaces theta per unit of gradient.

    In SGD with momentum, v' = mu v + (1 - d) g, theta' = theta - eta v', a unit of gradient displaces theta
    by eta (1 - d)/(1 - mu) over all later steps, and by as much in Nesterov's form. The unit of time is the
    mean learning rate of the run, so that

        s_t = (eta_t / mean eta) (1 - d)/(1 - mu).

    Args:
        scale: s_t.
        rate: eta_t.
        dropped: what of the optimiser s_t does not account for, by name.
    """

    scale: float
    rate: float
    dropped: tuple[str, ...]

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, model: nn.Module, mean_rate: float | str | None, form: str
    ) -> Pace:
        """Read momentum, dampening and rate of the parameter group with most of the model's parameters.

        Args:
            optimizer: SGD. Others are treated as plain SGD with their rate, which `dropped` says.
            model: the network that it trains.
            mean_rate: mean eta over the run; eta_t by default.
            form: ``"norm"`` or ``"costate"``. Weight decay cancels between candidates in the costate form; in
                the norm form it is not accounted for.

        Raises:
            ValueError: `optimizer` is not an optimiser, or holds no parameter of this model; a number is out
                of range.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        sizes = [sum(trained.get(id(p), 0) for p in group["params"]) for group in optimizer.param_groups]
        if not any(sizes):
            raise ValueError(
                "optimizer holds no parameter of this model that requires gradients: give the one that "
                "trains it"
            )
        groups = [group for group, n in zip(optimizer.param_groups, sizes, strict=True) if n]
        main = optimizer.param_groups[sizes.index(max(sizes))]
        is_sgd = type(optimizer) is torch.optim.SGD
        rate, factor = number(float(main["lr"]), "lr"), _factor(main) if is_sgd else 1.0
        mean = rate if mean_rate is None else number(mean_rate, "mean_rate")
        if mean_rate is not None and mean <= 0:
            raise ValueError(f"mean_rate must be > 0, got {mean:g}")
        dropped = {
            f"the steps of {type(optimizer).__name__} (they are taken for those of plain SGD)": not is_sgd,
            "groups of parameters with another rate or momentum (those of the largest are taken)": any(
                group["lr"] != main["lr"] or (is_sgd and _factor(group) != factor) for group in groups
            ),
            "that the optimizer holds some of the parameters only": sum(sizes) < sum(trained.values()),
            "weight decay": form == "norm" and any(group.get("weight_decay", 0) for group in groups),
            "maximize (the loss is taken to be descended)": any(group.get("maximize") for group in groups),
            "how the rate changes over the run (give mean_rate)": mean_rate is None and "initial_lr" in main,
        }
        return cls(
            rate / mean * factor if mean else factor,
            rate,
            tuple(n for n, applies in dropped.items() if applies),
        )


def _factor(group: dict[str, Any]) -> float:
    """(1 - d)/(1 - mu) of a parameter group of SGD."""
    momentum, dampening = number(group["momentum"], "momentum"), number(group["dampening"], "dampening")
    if momentum == 0:  # torch ignores the dampening then
        return 1.0
    if not momentum < 1 or dampening > 1:
        raise ValueError(f"momentum must be < 1 and dampening <= 1, got {momentum:g} and {dampening:g}")
    return (1 - dampening) / (1 - momentum)
