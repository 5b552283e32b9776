"""Projected ascent with a stop per sample: the inner solver of FAT and of Dynamic adversarial training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy
from controlat.models.frozen.view import FrozenModel

__all__ = ["Rule", "fosc", "stopped"]

# (step, rows that are still moving, their points, their logits, their gradients) -> which of them go on.
Rule = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


def stopped(
    view: FrozenModel,
    x0: Tensor,
    start: Tensor,
    y: Tensor,
    *,
    ball: Ball,
    alpha: float,
    steps: int,
    goes_on: Rule,
    loss: Loss = cross_entropy,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """At most `steps` steps of x^{k+1} = Pi(x^k + alpha direction(grad loss(x^k)) + noise), per sample.

    A rule looks at each point, its logits and its gradient, which one pass gives, and says who goes on.
    A sample that stopped rests. In mode ``"train"``, where samples meet in BatchNorm, the whole batch is
    evaluated as long as one of them moves; else those that move, as the gradients of others do not change.

    Args:
        view: the network.
        x0: (N, ...) clean inputs.
        start: (N, ...) where the ascent starts.
        y: (N,) labels, or what `loss` compares logits with.
        ball: the perturbation set.
        alpha: step size.
        steps: K.
        goes_on: the rule; returns a mask.
        loss: what is ascended.
        noise: called with the rows that move, what is added to their step before the projection.

    Returns:
        The last point of every sample.
    """
    x0, x = view.prepare(x0), view.prepare(start).clone()
    rows = torch.arange(len(x), device=x.device)
    for k in range(steps):
        seen: list[Tensor] = []
        asked = torch.arange(len(x), device=x.device) if view.mode == "train" else rows

        def objective(logits: Tensor, seen: list[Tensor] = seen, asked: Tensor = asked) -> Tensor:
            seen.append(logits.detach())
            return loss(logits, y[asked])

        gradient, logits = view.gradient(x[asked], objective), seen[0]
        if len(asked) > len(rows):
            gradient, logits = gradient[rows], logits[rows]
        mask = goes_on(k, rows, x[rows], logits, gradient)
        rows, gradient = rows[mask], gradient[mask]
        if len(rows) == 0:
            break
        point = x[rows] + alpha * ball.direction(gradient)
        if noise is not None:
            point = point + noise(rows)
        x = x.index_copy(0, rows, ball.project(point, x0[rows]))
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the gradient of the loss with respect to the input is not finite")
    return x


def fosc(x: Tensor, x0: Tensor, gradient: Tensor, ball: Ball, box: bool = False) -> Tensor:
    """First-order stationary condition of the inner maximum, per sample: 0 where it is reached.

    c = max over ||x' - x0|| <= eps of <x' - x, g> = eps ||g||_dual - <x - x0, g>, with g of the loss of the
    sample alone. With `box` the maximum is over the pixels in [0, 1] as well (l_inf): then it is at most as
    large, and 0 can be reached where pixels are black or white.

    Args:
        x: (N, ...) points.
        x0: (N, ...) centres.
        gradient: (N, ...) input gradients.
        ball: the perturbation set.
        box: whether the pixel range counts.

    Raises:
        ValueError: box with another norm than l_inf.

    Source:
        Wang et al. (2019), equation 4; the boxed form is the Frank-Wolfe gap (Jaggi, 2013) of the true set.
    """
    if not box:
        return ball.support(gradient) - ((x - x0) * gradient).flatten(1).sum(1)
    if ball.norm != "linf":
        raise ValueError(f"the boxed FOSC is for linf, got {ball.norm}")
    low, high = (x0 - ball.eps).clamp(min=0), (x0 + ball.eps).clamp(max=1)
    return torch.maximum(gradient * (high - x), gradient * (low - x)).flatten(1).sum(1)
