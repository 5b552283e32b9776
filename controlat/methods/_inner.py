"""The inner solver as several methods call it, and the dependence that detaching its result drops."""

from __future__ import annotations

from torch import Tensor

from controlat.attacks.pgd import ascend
from controlat.control.space import Control
from controlat.methods._base import Batch, Context

__all__ = ["attacked", "smooth_steps"]


def attacked(ctx: Context, batch: Batch, u: Control, *, mode: str, random_start: bool) -> Tensor:
    """x_K: the batch after K steps of size alpha, from a random point of the ball or from x_0."""
    k = int(u["steps"])
    start = ctx.start(batch.x) if random_start and k else batch.x
    with ctx.view(mode) as view:
        return ascend(view, batch.x, batch.y, ball=ctx.ball, alpha=u["alpha"], steps=k, start=start)


def smooth_steps(ctx: Context, u: Control) -> tuple[str, ...]:
    """Dependences dropped by detaching the adversary: signs are piecewise constant, l_2 steps are smooth."""
    return ("the adversary's (l_2 steps)",) if ctx.ball.norm != "linf" and u.get("steps", 1) > 0 else ()
