"""AWP, adversarial weight perturbation: gradients are taken at weights perturbed to raise the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.balls import unit
from controlat.attacks.pgd import ALPHA, STEPS
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import attacked, smooth_steps
from controlat.methods._options import check_flag, check_mode, check_whole

__all__ = ["METHOD", "Awp"]

RADIUS = Knob("real", 0.0, default=0.01, meaning="size of the weight perturbation, relative to each layer")


@dataclass(frozen=True)
class Awp:
    """min over theta of E l(h_{theta + Delta}(x_K), y), with Delta = radius ||w|| g / ||g|| in every layer.

    x_K is the adversary of PGD, g the gradient of the same loss in the weights. As in the released code,
    Delta perturbs parameters with two or more dimensions and "weight" in their name (no biases, no
    BatchNorm). The gradient and the optimiser's step are taken at theta + Delta, then Delta is subtracted.
    The pass for g leaves BatchNorm's running statistics unchanged.

    Args:
        random_start: start the ascent at a random point of the ball.
        attack_mode: BatchNorm and dropout during the ascent; ``"train"`` in the released code.
        warmup: epochs without a weight perturbation.

    Raises:
        ValueError: an option is not allowed.

    Source:
        Wu et al. (2020), adversarial weight perturbation.
    """

    random_start: bool = True
    attack_mode: str = "train"
    warmup: int = 0

    def __post_init__(self) -> None:
        check_flag(self, "random_start")
        check_mode(self.attack_mode)
        check_whole(self, "warmup", 0)

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K, radius), at K + 2 gradient evaluations, K + 1 with radius 0."""
        return ControlSpace(
            {"alpha": ALPHA, "steps": STEPS, "radius": RADIUS},
            cost=lambda u: u["steps"] + 1 + (u["radius"] > 0),
        )

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """A request for the gradient g, and one update at the perturbed weights."""
        x = attacked(ctx, batch, u, mode=self.attack_mode, random_start=self.random_start)

        def loss() -> Tensor:
            return F.cross_entropy(ctx.logits(x), batch.y)

        shift = None
        if u["radius"] > 0 and ctx.epoch >= self.warmup:
            weights = ctx.weights()
            gradients = yield Update(loss, also=lambda: [w for _, w in weights], add=False, move=False)
            shift = [
                self._perturbation(*named, g, u["radius"])
                for named, g in zip(weights, gradients, strict=True)
            ]
        yield Update(loss, smooth_steps(ctx, u), shift=shift)

    @staticmethod
    def _perturbation(name: str, w: Tensor, g: Tensor, radius: float) -> Tensor:
        if w.dim() < 2 or "weight" not in name:
            return torch.zeros_like(w)
        shift: Tensor = radius * w.norm() * unit(g[None])[0]
        return shift


METHOD = Awp
