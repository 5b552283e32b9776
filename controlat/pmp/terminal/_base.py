"""What a terminal cost is, and what all of them share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.models.frozen.batchnorm import differentiable_statistics

__all__ = [
    "Price",
    "Terminal",
    "check_terminal",
    "described",
    "differentiated",
    "finite_gradient",
    "finite_value",
]


class Price(NamedTuple):
    """Gradient evaluations of one call of a terminal cost's `value` and of its `gradient`, in samples."""

    value: int
    gradient: int


class Terminal(Protocol):
    """A terminal cost: a file of this folder, or the user's own. The driver's state must stay as it is.

    A method ``describe() -> str`` besides says in words what it is; `described` does without one. So does
    `price` without an attribute ``price``: it counts a trial.
    """

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters."""

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi: one tensor per parameter that is trained, then one for each of ``driver.statistics``.

        `differentiated` gives both. Without the latter, results say that they were left out.
        """

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What the gradient leaves out, by name; results print it."""

    @property
    def lower(self) -> float:
        """A lower bound of Phi, -inf if there is none."""


def differentiated(driver: Driver, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The gradient of a loss at the driver's state, in its parameters and then in its running statistics.

    Without the latter where layers run unseen, as in compiled networks: results then say so.

    Args:
        driver: at the state; its network is in the mode that the loss is meant for (``model.eval()``).
        loss: computes a scalar with ``driver.model``.

    >>> from torch import nn
    >>> from controlat.attacks.balls import Ball
    >>> from controlat.methods import build
    >>> layers = nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)
    >>> model = nn.Sequential(*layers).eval()
    >>> driver, x = Driver(model, build("pgd_at"), Ball(0.1)), torch.rand(5, 1, 2, 2)
    >>> [tuple(g.shape) for g in differentiated(driver, lambda: model(x).square().mean())]
    [(3, 4), (3,), (3,), (3,), (3,), (3,)]
    """
    r = [t.detach().clone().requires_grad_() for t in driver.statistics]
    inputs = [*driver.parameters, *r]
    with torch.enable_grad(), differentiable_statistics(driver.model, list(r)) as reached:
        value = loss()
        if not value.requires_grad:  # all that is trained is merged, see `AdversarialLoss.dropped`
            return [torch.zeros_like(t) for t in inputs]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    if 2 * len(reached) < len(r):  # compiled
        gradients, inputs = gradients[: len(driver.parameters)], driver.parameters
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]


def finite_value(total: float) -> float:
    if not math.isfinite(total):
        raise NonFiniteError("the terminal cost is not finite")
    return total


def finite_gradient(total: list[Tensor]) -> list[Tensor]:
    if not all(bool(torch.isfinite(t).all()) for t in total):
        raise NonFiniteError("the gradient of the terminal cost is not finite")
    return total


def check_terminal(made: object, what: str) -> None:
    """Refuse what has not the form of a `Terminal`."""
    if isinstance(made, type):
        raise ValueError(f"{what} is the class {made.__name__}; it must be an object of it")
    lacks = [name for name in ("value", "gradient", "dropped") if not callable(getattr(made, name, None))]
    lower = getattr(made, "lower", None)
    if not isinstance(lower, numbers.Real) or math.isnan(lower):
        lacks.append("lower (a number, -inf for none)")
    if lacks:
        kind = type(made).__name__
        raise ValueError(f"{what} is a {kind} without {', '.join(lacks)}; see controlat.pmp.Terminal")


def described(terminal: Terminal) -> str:
    """What a terminal cost is, in words: its own, or the name of its class."""
    describe = getattr(terminal, "describe", None)
    return str(describe()) if callable(describe) else type(terminal).__name__
