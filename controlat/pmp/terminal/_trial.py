"""Trial calls of a terminal cost before training: they count its evaluations and check the protocol."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.pmp.terminal._base import Evaluations, Terminal
from controlat.pmp.terminal._weighted import Weighted

__all__ = ["terminal_evaluations", "try_terminal"]


def terminal_evaluations(terminal: Terminal, driver: Driver) -> Evaluations:
    """The gradient evaluations of a terminal cost: as it declares them, or counted in a trial call.

    Args:
        terminal: the terminal cost.
        driver: driver of an untrained network, for the trial call.

    >>> from controlat.attacks.balls import Ball
    >>> from controlat.pmp.terminal import AdversarialLoss
    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
    >>> terminal_evaluations(AdversarialLoss(x, y, Ball("8/255"), steps=3), driver=None)
    Evaluations(value=24, gradient=32)
    """
    if isinstance(terminal, Weighted):
        parts = [terminal_evaluations(part, driver) for _, part in terminal.parts]
        return Evaluations(sum(p.value for p in parts), sum(p.gradient for p in parts))
    declared = getattr(terminal, "evaluations", None)
    if isinstance(declared, Evaluations):
        return declared
    of_value, of_gradient = Meter(), Meter()
    terminal.value(driver, of_value)
    terminal.gradient(driver, of_gradient)
    return Evaluations(of_value.gradients, of_gradient.gradients)


def try_terminal(terminal: Terminal, driver: Driver, name: str) -> None:
    """Call every member of a terminal cost once, so that mistakes are reported before training.

    Args:
        terminal: a terminal cost of the user's.
        driver: driver of an untrained network.
        name: its name in errors.

    Raises:
        ValueError: the value is not a finite number or below the lower bound; the gradient is not finite or
            does not have the shapes of the parameters; dropped is not a tuple of texts; the network changed.
    """
    before = driver.snapshot().model
    value, gradient = terminal.value(driver, Meter()), terminal.gradient(driver, Meter())
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"value of terminal {name} must return a number, got {type(value).__name__}"
        ) from None
    if not math.isfinite(value) or value < terminal.lower:
        raise ValueError(
            f"terminal {name} has the value {value:g} for the untrained network; it must be finite and at "
            f"least its lower bound {terminal.lower:g}"
        )
    shapes = [tuple(g.shape) for g in gradient]
    required = [tuple(p.shape) for p in driver.parameters]
    if shapes not in (required, required + [tuple(r.shape) for r in driver.statistics]):
        raise ValueError(
            f"gradient of terminal {name} must return tensors of shapes {required}, got {shapes}"
        )
    if not all(bool(torch.isfinite(g).all()) for g in gradient):
        raise ValueError(f"gradient of terminal {name} is not finite for the untrained network")
    dropped = terminal.dropped(driver)
    if isinstance(dropped, str) or not all(isinstance(d, str) for d in dropped):
        raise ValueError(f"dropped of terminal {name} must return a tuple of texts, got {dropped!r}")
    after = driver.model.state_dict()
    if not all(torch.equal(t, after[n]) for n, t in before.items() if isinstance(t, Tensor)):
        raise ValueError(f"terminal {name} changes the network; it must leave it as it was")
