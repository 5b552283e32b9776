"""ATTA: each sample's attack goes on where it stopped in the last epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.pgd import ALPHA, STEPS, ascend
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import (
    Batch,
    Context,
    Epoch,
    Rows,
    Update,
    Updates,
)
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice, check_mode, check_number

__all__ = ["METHOD", "Atta"]

RESET = Knob("integer", 1, default=10, meaning="epochs after which the carried perturbations are forgotten")


@dataclass(frozen=True)
class Atta:
    """ATTA-k: k steps of PGD from the perturbation that the sample carries, and the result is carried on.

    Perturbations are kept in the padded frame of the image: the window of this epoch's crop and flip is taken
    out, moved, and put back, so that what was learnt about a pixel stays with it. The start is not clamped to
    the pixels, the first step is, as released.

    Args:
        init: what a sample carries at first: ``"gaussian"``, 0.001 N(0, 1), or ``"uniform"`` in the ball
            (around the padded frame: shorter within the window for l_2).
        attack_mode: BatchNorm and dropout during the ascent.
        loss_scale: factor of the loss (the released CIFAR script divides it by the batch size once more).

    Raises:
        ValueError: an option is not allowed.

    Source:
        Zheng et al. (2020), algorithm 1.
    """

    init: str = "gaussian"
    attack_mode: str = "eval"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "init", ("gaussian", "uniform"))
        check_mode(self.attack_mode)
        check_number(self, "loss_scale", 0.0)

    @property
    def controls(self) -> ControlSpace:
        """(alpha, k, reset), at k + 1 gradient evaluations."""
        return ControlSpace({"alpha": ALPHA, "steps": STEPS, "reset": RESET}, cost=lambda u: u["steps"] + 1)

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        """Forget what samples carry, in epochs reset, 2 reset, ... counted from 1."""
        if (ctx.epoch + 1) % int(u["reset"]) == 0:
            ctx.forget("delta")

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch that k more steps produced."""
        x, y, placement = batch.x, batch.y, batch.placement
        clean = torch.zeros_like(x)
        frame = self._carried(ctx, clean if placement is None else placement.frame(clean))
        x_adv = x
        if u["steps"]:
            with ctx.view(self.attack_mode) as view:
                x_adv = ascend(
                    view,
                    x,
                    y,
                    ball=ctx.ball,
                    alpha=u["alpha"],
                    steps=int(u["steps"]),
                    start=x + ctx.carried(frame if placement is None else placement.apply(frame), x),
                )
            moved = x_adv - x
            frame = moved if placement is None else placement.invert(moved, frame)
        ctx.rows["delta"] = Rows(frame, torch.ones(len(x), dtype=torch.bool, device=x.device))
        yield Update(lambda: self.loss_scale * F.cross_entropy(ctx.logits(x_adv), y), smooth_steps(ctx, u))

    def _carried(self, ctx: Context, like: Tensor) -> Tensor:
        """What the samples carry, drawn for those that carry nothing yet."""
        fresh = ctx.noise(like) if self.init == "uniform" else 0.001 * ctx.normal(like)
        if "delta" not in ctx.rows:
            return fresh
        kept = ctx.rows["delta"]
        return torch.where(kept.seen.view(-1, *[1] * (like.dim() - 1)), kept.values, fresh)


METHOD = Atta
