"""PGD adversarial training, with its two limits: standard training (K = 0) and FGSM training (K = 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ALPHA, STEPS, path
from controlat.control.space import Control, ControlSpace
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import attacked, smooth_steps
from controlat.methods._options import check_flag, check_mode, check_number

__all__ = ["METHOD", "PgdAT"]


@dataclass(frozen=True)
class PgdAT:
    """min over theta of E l(h_theta(x_K), y) + c E l(h_theta(x_0), y), x_K after K steps of size alpha.

    One update per batch, at a cost of K + 1 gradient evaluations (one more for the clean term). K = 0 trains
    on the clean batch and is, with c = 0, standard training bit for bit; K = 1, alpha = eps without a random
    start is FGSM training.

    Args:
        random_start: start the ascent at a random point of the ball (Madry et al.) or at x_0 (Amata's
            Algorithm 1).
        attack_mode: BatchNorm and dropout during the ascent, ``"eval"`` or ``"train"``.
        clean_weight: c, the weight of a clean term (0 in Madry et al., 1 in YOPO's released baseline).

    Raises:
        ValueError: unknown mode, or a negative weight.

    Source:
        Madry et al. (2018), equation 2.1; Ye et al. (2021), Algorithm 1.
    """

    random_start: bool = True
    attack_mode: str = "eval"
    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        check_mode(self.attack_mode)
        check_flag(self, "random_start")
        check_number(self, "clean_weight", 0.0)

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K), at K + 1 gradient evaluations, K + 2 with a clean term."""
        clean = int(self.clean_weight > 0)
        return ControlSpace({"alpha": ALPHA, "steps": STEPS}, cost=lambda u: u["steps"] + 1 + clean)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch after K steps of ascent."""
        x = attacked(ctx, batch, u, mode=self.attack_mode, random_start=self.random_start)
        yield self._update(ctx, batch, x, u)

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        """Every K = 1, ..., u["steps"] from one trajectory: PGD-K is the beginning of PGD-(K+1)."""
        start = ctx.start(batch.x) if self.random_start else batch.x
        with ctx.view(self.attack_mode) as view:
            points = path(
                view,
                batch.x,
                start,
                batch.y,
                ball=ctx.ball,
                alpha=u["alpha"],
                steps=int(u["steps"]),
                loss=cross_entropy,
            )
            trajectory = list(points)
        for k, x in enumerate(trajectory, start=1):
            v = Control(alpha=u["alpha"], steps=k)
            yield v, self._update(ctx, batch, x, v)

    def _update(self, ctx: Context, batch: Batch, x: Tensor, u: Control) -> Update:
        def loss(x: Tensor, x0: Tensor, y: Tensor) -> Tensor:
            value = F.cross_entropy(ctx.logits(x), y)
            if self.clean_weight > 0:
                value = value + self.clean_weight * F.cross_entropy(ctx.logits(x0), y)
            return value

        return Update(partial(loss, x, batch.x, batch.y), smooth_steps(ctx, u), rowwise=True)


METHOD = PgdAT
