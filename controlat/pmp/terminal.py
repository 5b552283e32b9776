"""Terminal costs Phi(theta_T): what training is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from controlat.attacks import ascend
from controlat.balls import Ball
from controlat.dynamics import Driver
from controlat.losses import cross_entropy
from controlat.network import Meter, NonFiniteError, View
from controlat.rng import generator, scoped

__all__ = ["AdversarialLoss"]

_BATCH = 256


@dataclass(frozen=True)
class AdversarialLoss:
    """Phi(theta) = mean of l(h_theta(A(x)), y) over held-out data, A = PGD with a random start, eval mode.

    The dependence of BatchNorm's running statistics on theta is dropped.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        steps: K of the attack.
        alpha: step size; eps/4 by default, as FOSC's evaluation.
        seed: of the random start.
    """

    x: Tensor
    y: Tensor
    ball: Ball
    steps: int = 20
    alpha: float | None = None
    seed: int = 0

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi(theta), one tensor per parameter, with the adversary held fixed.

        Raises:
            NonFiniteError: it is not finite.
        """
        alpha = self.ball.eps / 4 if self.alpha is None else self.alpha
        device = self.x.device
        total = [torch.zeros_like(p) for p in driver.parameters]
        flags = [(m, m.training) for m in driver.model.modules()]
        meter = Meter() if meter is None else meter
        try:
            for i in range(0, len(self.x), _BATCH):
                x, y = self.x[i : i + _BATCH], self.y[i : i + _BATCH]
                start = generator(self.seed, "terminal", i, device=device)
                with scoped(self.seed, "terminal", "network", i, device=device):  # for noise in eval mode
                    with View(driver.model, channels_last=driver.channels_last, meter=meter) as view:
                        x = ascend(view, x, y, ball=self.ball, alpha=alpha, steps=self.steps, generator=start)
                    driver.model.eval()
                    with torch.enable_grad():
                        loss = cross_entropy(driver.model(x), y).sum() / len(self.x)
                        found = torch.autograd.grad(loss, driver.parameters, allow_unused=True)
                meter.gradients += len(x)
                for t, g in zip(total, found, strict=True):
                    if g is not None:
                        t += g
        finally:
            for module, training in flags:
                module.training = training
        if not all(bool(torch.isfinite(t).all()) for t in total):
            raise NonFiniteError("the gradient of the terminal cost is not finite")
        return total
