"""A terminal cost of your own: the cross-entropy under uniform noise, which training is to keep low.

Run it as it is: python examples/own_terminal.py (half a minute, on the bundled digits). From the command
line, in the folder of this file: controlat evaluate --terminal own_terminal:Noise ...
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import controlat
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver


@dataclass
class Noise:
    """Phi = mean of l(h(x + xi), y), xi uniform in the ball; one fixed draw of it."""

    x: Tensor
    y: Tensor
    ball: controlat.Ball
    seed: int = 0
    lower = 0.0  # no cross-entropy is below it; -inf if there is no bound

    def _loss(self, driver: Driver) -> Tensor:
        noise = 2 * torch.rand(self.x.shape, generator=torch.Generator().manual_seed(self.seed)) - 1
        noisy = (self.x + self.ball.eps * noise).clamp(0, 1)
        driver.model.eval()  # every step of training sets training mode again
        return F.cross_entropy(driver.model(noisy), self.y)

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's parameters; what it costs goes to the meter."""
        if meter is not None:
            meter.forwards += len(self.x)
        with torch.no_grad():
            return float(self._loss(driver))

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi, one tensor for each of driver.parameters."""
        if meter is not None:
            meter.gradients += len(self.x)
        return list(torch.autograd.grad(self._loss(driver), driver.parameters))

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What the gradient leaves out, in words: nothing here."""
        return ()

    def describe(self) -> str:
        """Phi in words, for tables."""
        return f"cross-entropy under uniform noise on {len(self.x)} held-out points"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # where own_terminal is found from anywhere
    found = controlat.evaluate(
        tempfile.mkdtemp(),
        schedules=["none", "fgsm:alpha=0.15"],
        terminal="own_terminal:Noise",
        seeds=[0],
        epochs=3,
        attacks=["pgd-20"],
        threads=1,
    )
    for schedule in found["schedules"]:
        full, robust = schedule["summary"]["full"], schedule["summary"]["robust"]["mean"]
        j, d = full["objective"]["mean"], full["certificate"]["mean"]
        print(f"{schedule['text']}: J = {j:.3f}, D = {d:.3f}, robust {robust:.1%}")
