"""N-FGSM: one step of size eps from a noisy point, and no projection on the ball."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ALPHA, path
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_mode

__all__ = ["METHOD", "NFgsm"]

ONE = Knob("integer", 1, 1, default=1, meaning="number of steps: one")
NOISE = Knob("real", 0.0, default=2.0, meaning="size of the noise, in units of eps")
CLIP = Knob("real", 0.0, default=100.0, meaning="largest perturbation, in units of eps")


@dataclass(frozen=True)
class NFgsm:
    """min over theta of E l(h(x0 + eta + alpha direction(grad at x0 + eta)), y), eta of size noise * eps.

    The result is clamped to [0, 1], but not projected on the ball: its perturbation may be as long as
    noise * eps + alpha. alpha is eps in the paper. noise = 0 is FGSM training. The default clip is so large
    that it has no effect.

    Args:
        attack_mode: BatchNorm and dropout in the attack, ``"train"`` in the released code, or ``"eval"``.

    Raises:
        ValueError: unknown mode.

    Source:
        de Jorge et al. (2022), algorithm 1.
    """

    attack_mode: str = "train"

    def __post_init__(self) -> None:
        check_mode(self.attack_mode)

    @property
    def controls(self) -> ControlSpace:
        """(alpha, noise, clip), and one step, at 2 gradient evaluations."""
        return ControlSpace({"alpha": ALPHA, "steps": ONE, "noise": NOISE, "clip": CLIP}, cost=lambda u: 2)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch after one step of the attack from the noisy batch."""
        x, y, ball = batch.x, batch.y, ctx.ball
        start = (x + ctx.noise(x, u["noise"])).clamp(0, 1)
        with ctx.view(self.attack_mode) as view:
            (x_adv,) = path(
                view,
                x,
                start,
                y,
                ball=ball,
                alpha=u["alpha"],
                steps=1,
                loss=cross_entropy,
                radius=u["clip"],
            )
        yield Update(lambda: F.cross_entropy(ctx.logits(x_adv), y), smooth_steps(ctx, u))


METHOD = NFgsm
