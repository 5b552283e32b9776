"""FAT, friendly adversarial training: each attack is stopped a few steps after it succeeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.per_sample import stopped
from controlat.attacks.pgd import ALPHA, STEPS
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice, check_mode, check_number

__all__ = ["METHOD", "Fat"]

SLACK = Knob("integer", 0, meaning="steps that a sample may take while it is misclassified")


@dataclass(frozen=True)
class Fat:
    """min over theta of E l(h(x~), y), x~ by PGD with at most `slack` steps from misclassified points.

    The attack on a sample stops before its step number `slack` + 1 (the paper's tau + 1) from a misclassified
    point; steps from correctly classified points are not limited, and do not reset the count. slack >= K is
    PGD-K with noise omega, and PGD-K for omega = 0.

    Args:
        start: ``"uniform"`` in the ball (FAT) or ``"gaussian"``, x0 + 0.001 N(0, 1) (FAT for TRADES).
        omega: deviation of the noise that is added to every step (0.001 in FAT).
        attack_mode: BatchNorm and dropout during the ascent, ``"eval"`` or ``"train"``.

    Raises:
        ValueError: an option is not allowed.

    Source:
        Zhang et al. (2020), algorithm 1 and the released earlystop.py.
    """

    start: str = "uniform"
    omega: float = 0.001
    attack_mode: str = "eval"

    def __post_init__(self) -> None:
        check_choice(self, "start", ("uniform", "gaussian"))
        check_number(self, "omega", 0.0)
        check_mode(self.attack_mode)

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K, slack), at K + 1 gradient evaluations at most."""
        return ControlSpace({"alpha": ALPHA, "steps": STEPS, "slack": SLACK}, cost=lambda u: u["steps"] + 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on friendly adversaries."""
        x, y = batch.x, batch.y
        slack = torch.full((len(x),), int(u["slack"]), device=x.device)
        generator = ctx.generator("noise", x.device)

        def goes_on(k: int, rows: Tensor, points: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
            wrong = logits.argmax(1) != y[rows]
            mask = ~wrong | (slack[rows] > 0)
            slack[rows] -= wrong.long()
            return mask

        def noise(rows: Tensor) -> Tensor:
            normal = ctx.draw(x, lambda whole: torch.empty_like(whole).normal_(generator=generator))
            return self.omega * normal[rows]

        with ctx.view(self.attack_mode) as view:
            x_adv = stopped(
                view,
                x,
                self._start(ctx, x) if u["steps"] else x,
                y,
                ball=ctx.ball,
                alpha=u["alpha"],
                steps=int(u["steps"]),
                goes_on=goes_on,
                noise=noise if self.omega else None,
            )
        yield Update(lambda: F.cross_entropy(ctx.logits(x_adv), y), smooth_steps(ctx, u))

    def _start(self, ctx: Context, x: Tensor) -> Tensor:
        return ctx.start(x) if self.start == "uniform" else (x + 0.001 * ctx.normal(x)).clamp(0, 1)


METHOD = Fat
