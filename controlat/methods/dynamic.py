"""Dynamic adversarial training: attack each sample until its inner maximum is solved to a given FOSC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.per_sample import fosc, stopped
from controlat.attacks.pgd import ALPHA, STEPS
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice, check_flag, check_mode

__all__ = ["METHOD", "Dynamic"]

FOSC = Knob("real", 0.0, meaning="level of the first-order stationary condition at which a sample stops")


@dataclass(frozen=True)
class Dynamic:
    """min over theta of E l(h(x_k), y), k the first step >= 1 with FOSC(x_k) <= c, and K at most.

    c decreases during training; the paper's values for MNIST are ``pgd:steps=10,alpha=0.075,fosc=0.5..0@40``.
    c = 0 is PGD-K, except with displacement ``"start"``, where the condition can be negative.

    Args:
        gap: ``"paper"``, eps ||g||_1 - <x - x0, g>, or ``"box"`` (l_inf), the Frank-Wolfe gap of the true
            set: max of <x' - x, g> over ||x' - x0|| <= eps and pixels in [0, 1].
        displacement: of the paper's gap: ``"clean"``, x - x0, or ``"start"``, x - x_start as in the released
            code. The true set lies around x0, wherever the ascent starts.
        outer_weight: ``"none"``, or ``"loss"``: from the second epoch on the released code weights each
            sample by its own cross-entropy, held fixed; that is the gradient of half the mean square.
        random_start: start at a random point of the ball.
        attack_mode: BatchNorm and dropout during the ascent, ``"eval"`` or ``"train"``.

    Raises:
        ValueError: an option is not allowed, or two of them together; ``"box"`` with another norm than l_inf.

    Source:
        Wang et al. (2019), equation 4 and algorithm 1.
    """

    gap: str = "paper"
    displacement: str = "clean"
    outer_weight: str = "none"
    random_start: bool = True
    attack_mode: str = "eval"

    def __post_init__(self) -> None:
        check_choice(self, "gap", ("paper", "box"))
        check_choice(self, "displacement", ("clean", "start"))
        if self.gap == "box" and self.displacement == "start":
            raise ValueError(
                "gap 'box' is a maximum over the true set, which lies around the clean input, got "
                "displacement 'start': leave displacement at 'clean', or take gap 'paper'"
            )
        check_choice(self, "outer_weight", ("none", "loss"))
        check_flag(self, "random_start")
        check_mode(self.attack_mode)

    def check_ball(self, ball: Ball) -> None:
        """The gap over the box is implemented for l_inf only."""
        if self.gap == "box" and ball.norm != "linf":
            raise ValueError(f"gap 'box' is for the norm linf, got {ball.norm}: take gap 'paper'")

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K, c), at K + 1 gradient evaluations at most: a step and its FOSC share one gradient."""
        return ControlSpace({"alpha": ALPHA, "steps": STEPS, "fosc": FOSC}, cost=lambda u: u["steps"] + 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on adversaries with FOSC <= c, or after K steps."""
        x, y = batch.x, batch.y
        start = x
        if self.random_start and u["steps"]:
            start = ctx.start(x)
        centre = x if self.displacement == "clean" else start

        def goes_on(k: int, rows: Tensor, points: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
            level = fosc(points, centre[rows], gradient, ctx.ball, self.gap == "box")
            return torch.ones_like(rows, dtype=torch.bool) if k == 0 else level > u["fosc"]

        with ctx.view(self.attack_mode) as view:
            x_adv = stopped(
                view,
                x,
                start,
                y,
                ball=ctx.ball,
                alpha=u["alpha"],
                steps=int(u["steps"]),
                goes_on=goes_on,
            )
        weighted = self.outer_weight == "loss" and ctx.epoch > 0

        def loss() -> Tensor:
            logits = ctx.logits(x_adv)
            return cross_entropy(logits, y).square().mean() / 2 if weighted else F.cross_entropy(logits, y)

        yield Update(loss, smooth_steps(ctx, u))


METHOD = Dynamic
