"""Free adversarial training: each backward pass updates both the network and the perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from controlat.attacks.pgd import ALPHA
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates

__all__ = ["METHOD", "Free"]

REPLAYS = Knob("integer", 1, meaning="replays m of each batch, each a step of theta and of the perturbation")


@dataclass(frozen=True)
class Free:
    """m simultaneous steps of descent in theta and of ascent in a perturbation that the next batch inherits.

    For j = 1..m, with one backward pass: theta' = SGD(theta, grad_theta l(x + delta)) and
    delta' = shrink(delta + alpha direction(grad_delta l(x + delta))), x + delta clamped to [0, 1]. delta
    belongs to a position in the batch, not to a sample, and starts at 0. alpha = eps in the paper.

    All m replays have the learning rate of the step, and an epoch visits each batch once, so that m = 4 costs
    four times as much per epoch (the paper divides the number of epochs by m).

    Source:
        Shafahi et al. (2019), algorithm 1.
    """

    @property
    def controls(self) -> ControlSpace:
        """(alpha, m), at m gradient evaluations: theta and delta share each backward pass."""
        return ControlSpace({"alpha": ALPHA, "steps": REPLAYS}, cost=lambda u: u["steps"])

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """m updates, and the perturbation carried on."""
        x, y, n = batch.x, batch.y, len(batch.x)
        stored = ctx.memory.get("delta", x[:0])
        delta = ctx.carried(ctx.here(stored))
        delta = torch.cat([delta, torch.zeros_like(x[len(delta) :])])
        for _ in range(int(u["steps"])):
            point = ctx.leaf(delta)
            (gradient,) = yield Update(
                lambda point=point: F.cross_entropy(ctx.logits(ctx.ball.box(x + point)), y),  # type: ignore[misc]
                also=lambda point=point: (point,),  # type: ignore[misc]
            )
            per_sample = n * gradient  # gradient of each sample's own loss; the loss is a mean over n samples
            delta = ctx.ball.shrink(point + u["alpha"] * ctx.ball.direction(per_sample))
        ctx.memory["delta"] = torch.cat([ctx.all_gather(delta), stored[ctx.share.total :]])


METHOD = Free
