"""Terminal costs Phi(theta_T): what training is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from controlat.attacks import ascend
from controlat.balls import Ball
from controlat.dynamics import Driver
from controlat.losses import LOSSES
from controlat.network import Meter, NonFiniteError, View
from controlat.rng import generator, scoped

__all__ = ["AdversarialLoss", "Terminal", "Weighted"]

_BATCH = 256


class Terminal(Protocol):
    """A terminal cost: one of this module, or the user's own. The driver's state must stay as it is."""

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters."""

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi, one tensor per parameter that is trained."""

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What the gradient leaves out, by name; results print it."""

    @property
    def lower(self) -> float:
        """A lower bound of Phi, -inf if there is none."""


@dataclass(frozen=True)
class AdversarialLoss:
    """Phi(theta) = mean of l(h_theta(A(x)), y) over held-out data, A = PGD with a random start, eval mode.

    The ascent is on the cross-entropy whatever l is; K = 0 gives the clean loss.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        steps: K of the attack.
        alpha: step size; eps/4 by default, as FOSC's evaluation.
        seed: of the random start.
        loss: ``"cross_entropy"``, or ``"margin"``: max over j != y of z_j, less z_y.

    Raises:
        ValueError: unknown loss.
    """

    x: Tensor
    y: Tensor
    ball: Ball
    steps: int = 20
    alpha: float | None = None
    seed: int = 0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")

    @property
    def lower(self) -> float:
        """A lower bound of Phi: 0 for the cross-entropy, none for the margin."""
        return 0.0 if self.loss == "cross_entropy" else -math.inf

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters, with one forward pass beside the attack.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        with self._evaluating(driver), torch.no_grad():
            total = sum(float(part()) for part in self._parts(driver, meter))
        meter.forwards += len(self.x)
        if not torch.isfinite(torch.tensor(total)):
            raise NonFiniteError("the terminal cost is not finite")
        return total

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi(theta), one tensor per parameter, with the adversary held fixed.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        total = [torch.zeros_like(p) for p in driver.parameters]
        with self._evaluating(driver), torch.enable_grad():
            for part in self._parts(driver, meter):
                found = torch.autograd.grad(part(), driver.parameters, allow_unused=True)
                for t, g in zip(total, found, strict=True):
                    if g is not None:
                        t += g
        meter.gradients += len(self.x)
        if not all(bool(torch.isfinite(t).all()) for t in total):
            raise NonFiniteError("the gradient of the terminal cost is not finite")
        return total

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """BatchNorm's running statistics depend on theta; so does an attack by l_2 steps."""
        norms = [m for m in driver.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        running = any(m.running_mean is not None for m in norms)
        names = ["BatchNorm's running statistics (Phi)"] if running else []
        if self.ball.norm != "linf" and self.steps:
            names.append("the adversary's (l_2 steps of Phi)")
        return tuple(names)

    def _parts(self, driver: Driver, meter: Meter) -> Iterator[Callable[[], Tensor]]:
        """Phi as a sum over batches, each under its attack."""
        alpha = self.ball.eps / 4 if self.alpha is None else self.alpha
        device, channels_last = self.x.device, driver.channels_last
        for i in range(0, len(self.x), _BATCH):
            x, y = self.x[i : i + _BATCH], self.y[i : i + _BATCH]
            start = generator(self.seed, "terminal", i, device=device)
            with scoped(self.seed, "terminal", "network", i, device=device):  # for noise in eval mode
                with View(driver.model, channels_last=channels_last, meter=meter) as view:
                    x = ascend(view, x, y, ball=self.ball, alpha=alpha, steps=self.steps, generator=start)
                driver.model.eval()
                yield lambda x=x, y=y: LOSSES[self.loss](driver.model(x), y).sum() / len(self.x)  # type: ignore[misc]

    @contextmanager
    def _evaluating(self, driver: Driver) -> Iterator[None]:
        """Training flags as they were, afterwards."""
        flags = [(m, m.training) for m in driver.model.modules()]
        try:
            with driver._buffers_kept():
                yield
        finally:
            for module, training in flags:
                module.training = training


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of terminal costs, such as adversarial and clean loss.

    Args:
        parts: (weight, terminal cost) of each.
    """

    parts: tuple[tuple[float, Terminal], ...]

    @property
    def lower(self) -> float:
        """The sum of the parts' lower bounds, if no weight is negative."""
        if any(weight < 0 for weight, _ in self.parts):
            return -math.inf
        return sum(weight * part.lower for weight, part in self.parts if weight > 0)

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """The sum of weight * Phi."""
        return sum(weight * part.value(driver, meter) for weight, part in self.parts)

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """The sum of weight * grad Phi."""
        total = [torch.zeros_like(p) for p in driver.parameters]
        for weight, part in self.parts:
            torch._foreach_add_(total, part.gradient(driver, meter), alpha=weight)
        return total

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What any part leaves out."""
        return tuple(sorted({name for _, part in self.parts for name in part.dropped(driver)}))
