"""ATTA: each sample's attack continues from its perturbation of the last epoch."""

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
    """ATTA-k: k steps of PGD from the perturbation stored for the sample, which the result replaces.

    Perturbations are stored for the padded image: the window of this epoch's crop and flip is cut out,
    updated by the attack and written back, so that each pixel keeps its perturbation. As in the released
    code, the start is not clamped to [0, 1], the steps are.

    Args:
        init: first perturbation of a sample: ``"gaussian"``, 0.001 N(0, 1), or ``"uniform"`` in the ball
            (of the padded image: for l_2 its window is shorter).
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
        """Forget the stored perturbations in epochs reset, 2 reset, ..., counted from 1."""
        if (ctx.epoch + 1) % int(u["reset"]) == 0:
            ctx.forget("delta")

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch after k more steps of its attack."""
        x, y, placement = batch.x, batch.y, batch.placement
        zero = torch.zeros_like(x)
        frame = self._stored(ctx, zero if placement is None else placement.frame(zero))
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
            delta = x_adv - x
            frame = delta if placement is None else placement.invert(delta, frame)
        ctx.rows["delta"] = Rows(frame, torch.ones(len(x), dtype=torch.bool, device=x.device))
        yield Update(lambda: self.loss_scale * F.cross_entropy(ctx.logits(x_adv), y), smooth_steps(ctx, u))

    def _stored(self, ctx: Context, like: Tensor) -> Tensor:
        """The stored perturbations; samples without one are given a random one."""
        fresh = ctx.noise(like) if self.init == "uniform" else 0.001 * ctx.normal(like)
        if "delta" not in ctx.rows:
            return fresh
        values, seen = ctx.rows["delta"]
        return torch.where(seen.view(-1, *[1] * (like.dim() - 1)), values, fresh)


METHOD = Atta
