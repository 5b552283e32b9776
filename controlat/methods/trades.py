"""TRADES: clean cross-entropy plus a penalty on the divergence between clean and adversarial predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.losses import divergence
from controlat.attacks.pgd import ALPHA, STEPS, ascend
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_flag, check_mode, check_number

__all__ = ["METHOD", "Trades"]

BETA = Knob("real", 0.0, default=6.0, meaning="weight of the divergence")


@dataclass(frozen=True)
class Trades:
    """min over theta of E CE(h(x0), y) + beta E KL(p(x0) || p(x_K)), x_K by K steps of ascent on that KL.

    The ascent starts at x0 + 0.001 N(0, 1), as the gradient of the divergence is 0 at x0. The gradient in
    theta flows through p(x0) too. K = 0 is standard training. beta is 6 on CIFAR-10, 1 in the released MNIST
    script.

    Args:
        start_noise: standard deviation of the noise at the start.
        attack_mode: BatchNorm and dropout during the ascent, ``"eval"`` or ``"train"``.
        separate_clean: take the clean logits of the divergence from a forward pass of their own, as the
            released code does (one more evaluation, one more update of BatchNorm's statistics).

    Raises:
        ValueError: a number or mode is not allowed.

    Source:
        Zhang et al. (2019), equation 5 and algorithm 1.
    """

    start_noise: float = 0.001
    attack_mode: str = "eval"
    separate_clean: bool = False

    def __post_init__(self) -> None:
        check_number(self, "start_noise", 0.0)
        check_mode(self.attack_mode)
        check_flag(self, "separate_clean")

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K, beta), at K + 2 gradient evaluations and a forward pass, one more where separate_clean.

        Standard training, at 1, for K = 0.
        """
        extra = 2 + int(self.separate_clean)
        knobs = {"alpha": ALPHA, "steps": STEPS, "beta": BETA}
        return ControlSpace(knobs, cost=lambda u: u["steps"] + extra if u["steps"] else 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the clean batch and the batch after K steps of ascent on the divergence."""
        x, y, k = batch.x, batch.y, int(u["steps"])
        if k == 0:
            yield Update(lambda: F.cross_entropy(ctx.logits(x), y))
            return
        with ctx.view(self.attack_mode) as view:
            x_adv = ascend(
                view,
                x,
                view(x),
                ball=ctx.ball,
                alpha=u["alpha"],
                steps=k,
                loss=divergence,
                start=x + self.start_noise * ctx.normal(x),
            )

        def loss() -> Tensor:
            clean, adversarial = ctx.logits(x), ctx.logits(x_adv)
            reference = ctx.logits(x) if self.separate_clean else clean
            penalty: Tensor = u["beta"] * divergence(adversarial, reference).mean()
            return F.cross_entropy(clean, y) + penalty

        yield Update(loss, smooth_steps(ctx, u))


METHOD = Trades
