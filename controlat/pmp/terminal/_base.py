"""The protocol of terminal costs, and functions that all of them share."""

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
    "Evaluations",
    "Terminal",
    "check_terminal",
    "described",
    "differentiated",
    "finite_gradient",
    "finite_value",
]


class Evaluations(NamedTuple):
    """Gradient evaluations, in samples, of one call of a terminal cost.

    Args:
        value: of ``value``.
        gradient: of ``gradient``.
    """

    value: int
    gradient: int


class Terminal(Protocol):
    """A terminal cost Phi. Its methods must not change the driver's state.

    Two members are optional: ``describe() -> str``, a description in words (see `described`), and
    ``evaluations``, the `Evaluations` of its calls (without it, they are counted in a trial call).
    """

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters."""

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi: one tensor per trained parameter, then one for each of ``driver.statistics``.

        `differentiated` computes both. If the tensors of the running statistics are missing, results state
        that the dependence of Phi on them was neglected.
        """

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """The dependences on the state that the gradient neglects, by name; results state them."""

    @property
    def lower(self) -> float:
        """A lower bound of Phi; -inf if there is none."""


def differentiated(driver: Driver, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The gradient of a loss in the driver's parameters and then in its running statistics.

    Hooks on the layers give the part of the running statistics. Where they are not called, as in compiled
    networks, that part is missing.

    Args:
        driver: at the state to differentiate at. Put its network into the mode of the loss before
            (``model.eval()``).
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
    statistics = [t.detach().clone().requires_grad_() for t in driver.statistics]
    inputs = [*driver.parameters, *statistics]
    with torch.enable_grad(), differentiable_statistics(driver.model, list(statistics)) as reached:
        value = loss()
        if not value.requires_grad:  # eval mode merged all trained weights, see `AdversarialLoss.dropped`
            return [torch.zeros_like(t) for t in inputs]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    if 2 * len(reached) < len(statistics):  # the hooks of some layer were not called
        gradients, inputs = gradients[: len(driver.parameters)], driver.parameters
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]


def finite_value(total: float) -> float:
    """The value itself.

    Raises:
        NonFiniteError: it is not finite.
    """
    if not math.isfinite(total):
        raise NonFiniteError("the terminal cost is not finite")
    return total


def finite_gradient(total: list[Tensor]) -> list[Tensor]:
    """The gradient itself.

    Raises:
        NonFiniteError: it is not finite.
    """
    if not all(bool(torch.isfinite(t).all()) for t in total):
        raise NonFiniteError("the gradient of the terminal cost is not finite")
    return total


def check_terminal(terminal: object, what: str) -> None:
    """Check that an object has the members of a `Terminal`.

    Args:
        terminal: the object.
        what: what errors call it.

    Raises:
        ValueError: it is a class, or lacks a member.
    """
    if isinstance(terminal, type):
        raise ValueError(f"{what} is the class {terminal.__name__}; it must be an object of it")
    methods = "value", "gradient", "dropped"
    missing = [name for name in methods if not callable(getattr(terminal, name, None))]
    lower = getattr(terminal, "lower", None)
    if not isinstance(lower, numbers.Real) or math.isnan(lower):
        missing.append("lower (a number, -inf for none)")
    if missing:
        kind = type(terminal).__name__
        raise ValueError(f"{what} is a {kind} without {', '.join(missing)}; see controlat.pmp.Terminal")


def described(terminal: Terminal) -> str:
    """A terminal cost in words: its own ``describe()``, or the name of its class."""
    describe = getattr(terminal, "describe", None)
    return str(describe()) if callable(describe) else type(terminal).__name__
