"""Fast adversarial training: one step from a random start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ALPHA, ascend, path
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import (
    Batch,
    Context,
    Epoch,
    Update,
    Updates,
)
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice, check_flag, check_mode
from controlat.models.frozen.view import FrozenModel

__all__ = ["METHOD", "Fast"]

_FALL = 0.2  # of the PGD-5 accuracy, that counts as catastrophic overfitting

ONE = Knob("integer", 1, 1, default=1, meaning="number of steps: one")
START = Knob("real", 0.0, default=1.0, meaning="size of the start, in units of eps")
RANDOM = Knob("real", 0.0, 1.0, default=1.0, meaning="random part of the start; the rest is one constant")


@dataclass(frozen=True)
class Fast:
    """min over theta of E l(h(x0 + delta), y), delta one step of size alpha from a start of size start * eps.

    delta = shrink(delta_0 + alpha direction(grad at x0 + delta_0)), within the pixels. The paper's CIFAR-10
    settings are ``fgsm:alpha=10/255`` at eps 8/255; from a start at 0 any alpha >= eps is the same.

    delta_0 = start * eps * (random * U + (1 - random) * 1), U uniform in the unit ball: random = 1 is the
    paper's start; random = 0 is the same in every pixel (l_2: and of length start * eps), with which Amata
    weakens Fast in the first epochs: ``set:alpha=10/255,start=0.5:1@8,random=0:1@8``.

    Args:
        init: ``"random"``, as above; ``"zero"``; ``"previous"``: the perturbation at the same position of the
            last batch, 0 at first.
        attack_mode: BatchNorm and dropout in the attack; ``"train"`` in the released code.
        clamp_start: keep the start within the pixels (the CIFAR script does, the MNIST script does not).
        early_stop: after each epoch, attack its first batch with PGD-5 (alpha = eps/4, training mode); if
            that accuracy has fallen by more than 0.2, restore the network of the epoch before and end
            training.

    Raises:
        ValueError: an option is not allowed.

    Source:
        Wong et al. (2020), algorithm 3; the fixed start: Ye et al. (2021), Amata+Fast.
    """

    init: str = "random"
    attack_mode: str = "train"
    clamp_start: bool = True
    early_stop: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "init", ("random", "zero", "previous"))
        check_mode(self.attack_mode)
        check_flag(self, "clamp_start")
        check_flag(self, "early_stop")

    @property
    def controls(self) -> ControlSpace:
        """(alpha, start, random), and one step, at 2 gradient evaluations."""
        knobs = {"alpha": ALPHA, "steps": ONE, "start": START, "random": RANDOM}
        return ControlSpace(knobs, cost=lambda u: 2)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch after one step of the attack."""
        x, y, ball = batch.x, batch.y, ctx.ball
        start = x + self._start(ctx, x, u)
        start = ball.box(start) if self.clamp_start else start
        with ctx.view(self.attack_mode) as view:
            (x_adv,) = path(view, x, start, y, ball=ball, alpha=u["alpha"], steps=1, loss=cross_entropy)
        if self.init == "previous":
            stored = ctx.memory.get("delta", x_adv[:0])
            ctx.memory["delta"] = torch.cat([ctx.all_gather(x_adv - x), stored[ctx.share.total :]])
        yield Update(lambda: F.cross_entropy(ctx.logits(x_adv), y), smooth_steps(ctx, u))

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        """Check for catastrophic overfitting if `early_stop` is set."""
        if not self.early_stop:
            return
        x, y, _, *_ = ctx.first()
        with FrozenModel(ctx.model, "train", meter=ctx.meter, channels_last=ctx.channels_last) as view:
            generator = ctx.generator("overfitting", x.device)
            x = ascend(view, x, y, ball=ctx.ball, alpha=ctx.ball.eps / 4, steps=5, generator=generator)
            accuracy = (view(x).argmax(1) == y).double().mean()
        before = ctx.memory.get("robust")
        if before is not None and float(before - accuracy) > _FALL + 1e-9:  # 0.8 - 0.6 is above 0.2
            ctx.reload("previous")
            ctx.stop(f"catastrophic overfitting: PGD-5 accuracy fell from {before:.0%} to {accuracy:.0%}")
            return
        ctx.memory["robust"] = accuracy
        ctx.save("previous")

    def _start(self, ctx: Context, x: Tensor, u: Control) -> Tensor:
        if self.init != "random":
            stored = ctx.here(ctx.memory.get("delta", x[:0]))
            n = len(stored)
            return torch.cat([ctx.carried(stored, x[:n]), torch.zeros_like(x[n:])])
        start = ctx.noise(x, u["start"] * u["random"])
        if u["random"] < 1:
            radius = u["start"] * (1 - u["random"])
            start = start + ctx.ball.shrink(torch.full_like(x, radius * ctx.ball.eps), radius)
        return start


METHOD = Fast
