"""The terminal cost ``adversarial``: the loss under an attack on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from controlat._util.checks import choice, instance, number, whole
from controlat._util.rng import generator, scoped
from controlat.attacks.balls import Ball
from controlat.attacks.losses import LOSSES
from controlat.attacks.pgd import ascend, check_batch
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.models.frozen.contexts import (
    exclusive,
    in_mode,
    merges_in_eval,
    normal_tensor,
    preserved_buffers,
)
from controlat.models.frozen.logits import checked_logits
from controlat.models.frozen.view import FrozenModel
from controlat.pmp.terminal._base import Evaluations, differentiated, finite_gradient, finite_value

__all__ = ["AdversarialLoss", "build"]

_BATCH = 256


@dataclass(frozen=True)
class AdversarialLoss:
    """Phi(theta) = mean of l(h_theta(A(x)), y) over held-out data, in eval mode.

    A is PGD-K on the cross-entropy, whatever the loss l, with a random start; K = 0 gives the clean loss.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        steps: K of the attack.
        alpha: step size > 0 of the attack; eps/4 by default, as in Wang et al. (2019).
        seed: seed of the random start.
        loss: l, ``"cross_entropy"`` or ``"margin"``: max over j != y of z_j, less z_y, of the logits z.

    Raises:
        ValueError: unknown loss; a number is out of range; x is empty or not in [0, 1]; y is not one integer
            label per sample.

    >>> import torch
    >>> AdversarialLoss(torch.rand(8, 1, 4, 4), torch.arange(8), Ball("8/255"), steps=0).describe()
    'clean cross-entropy on 8 held-out points'
    """

    x: Tensor
    y: Tensor
    ball: Ball
    _: KW_ONLY
    steps: int = 20
    alpha: float | None = None
    seed: int = 0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        choice(self.loss, "loss", LOSSES)
        check_batch(self.x, self.y)
        object.__setattr__(self, "x", normal_tensor(self.x))
        object.__setattr__(self, "y", normal_tensor(self.y))
        instance(self.ball, Ball, "ball")
        object.__setattr__(self, "seed", whole(self.seed, "seed"))
        steps = number(self.steps, "steps")
        if steps < 0 or not steps.is_integer():
            raise ValueError(f"steps must be a whole number >= 0 (0 for the clean loss), got {steps:g}")
        object.__setattr__(self, "steps", int(steps))
        if self.alpha is None:
            return
        object.__setattr__(self, "alpha", number(self.alpha, "alpha"))
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha:g}; leave it out for eps/4")

    @property
    def lower(self) -> float:
        """A lower bound of Phi: 0 for the cross-entropy, none for the margin."""
        return 0.0 if self.loss == "cross_entropy" else -math.inf

    @property
    def evaluations(self) -> Evaluations:
        """K gradient evaluations per sample for the attack, and one more for the gradient of Phi."""
        return Evaluations(self.steps * len(self.x), (self.steps + 1) * len(self.x))

    def describe(self) -> str:
        """Loss, samples and attack in words."""
        what = f"{self.loss.replace('_', '-')} on {len(self.x)} held-out points"
        if self.steps == 0:
            return f"clean {what}"
        attack = f"PGD-{self.steps}" + (" on cross-entropy" if self.loss != "cross_entropy" else "")
        alpha = "eps/4" if self.alpha is None else f"{self.alpha:g}"
        within = f"eps = {self.ball.eps:g} ({self.ball.norm})"
        return f"adversarial {what}, {attack}, {within}, alpha = {alpha}, one random start"

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters: the attack, and a forward pass per sample.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        with self._evaluating(driver), torch.no_grad():
            total = sum(float(part()) for part in self._parts(driver, meter))
        meter.forwards += len(self.x)
        return finite_value(total)

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi in theta and in the running statistics, with the adversarial examples held fixed.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        total = [torch.zeros_like(t) for t in (*driver.parameters, *driver.statistics)]
        with self._evaluating(driver):
            for part in self._parts(driver, meter):
                torch._foreach_add_(total, differentiated(driver, part))
        meter.gradients += len(self.x)
        return finite_gradient(total)

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What `gradient` neglects.

        Where eval mode merges weights, Phi is not connected to the trained ones. Fixed adversarial examples
        are exact for the sign steps of l_inf attacks, while l_2 steps depend on theta smoothly.
        """
        names = ["weights that the network merges in eval mode (Phi)"] if merges_in_eval(driver.model) else []
        if self.ball.norm != "linf" and self.steps:
            names.append("the adversary's (l_2 steps of Phi)")
        return tuple(names)

    def _parts(self, driver: Driver, meter: Meter) -> Iterator[Callable[[], Tensor]]:
        """The terms of Phi, one per batch; each evaluates its batch, which has been attacked."""
        alpha = self.ball.eps / 4 if self.alpha is None else self.alpha
        device, channels_last = self.x.device, driver.channels_last
        for i in range(0, len(self.x), _BATCH):
            x, y = self.x[i : i + _BATCH], self.y[i : i + _BATCH]
            start = generator(self.seed, "terminal", i, device=device)
            with scoped(self.seed, "terminal", "network", i, device=device):  # for noise in eval mode
                with FrozenModel(driver.model, channels_last=channels_last, meter=meter) as view:
                    x = ascend(view, x, y, ball=self.ball, alpha=alpha, steps=self.steps, generator=start)
                yield partial(self._term, driver.model, x, y)

    def _term(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The term of a batch in Phi."""
        return LOSSES[self.loss](checked_logits(model, x), y).sum() / len(self.x)

    @contextmanager
    def _evaluating(self, driver: Driver) -> Iterator[None]:
        """The network in eval mode inside the block; flags and buffers as before after it."""
        with exclusive(driver.model), in_mode(driver.model, False), preserved_buffers(driver.model):
            yield


def build(x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> AdversarialLoss:
    """Mean cross-entropy under PGD-20 from a random start, alpha = eps/4.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        seed: seed of the random start.

    Raises:
        ValueError: x is empty or not in [0, 1]; y is not one integer label per sample.

    >>> build(torch.rand(8, 1, 4, 4), torch.arange(8), Ball("8/255")).evaluations
    Evaluations(value=160, gradient=168)

    Source:
        The objective of Madry et al. (2018), equation 2.1; the attack as in Wang et al. (2019).
    """
    return AdversarialLoss(x, y, ball, seed=seed)
