"""Projected ascent with a stopping rule per sample: the inner solver of FAT and of Dynamic training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from controlat._util.watch import finiteness
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy
from controlat.attacks.pgd import NON_FINITE
from controlat.models.frozen.view import FrozenModel

__all__ = ["Rule", "fosc", "stopped"]

# (step, rows that have not stopped, their points, logits and gradients) -> mask of those that take the step.
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

    Before each step the rule gets the points, their logits and input gradients, which one pass computes, and
    decides which samples take the step; the others stop for good. In mode ``"train"``, where BatchNorm
    couples the samples, the whole batch is evaluated as long as one sample moves; in mode ``"eval"`` only
    those that move. As the rule decides what is computed next, the CPU waits for a GPU before every step.

    Args:
        view: the network.
        x0: (N, ...) clean inputs.
        start: (N, ...) where the ascent starts.
        y: (N,) labels, or what `loss` compares logits with.
        ball: the perturbation set.
        alpha: step size.
        steps: K.
        goes_on: the stopping rule.
        loss: per-sample loss to ascend.
        noise: rows that move -> noise that is added to their points before the projection.

    Returns:
        The last point of every sample.
    """
    x0, x = view.prepare(x0), view.prepare(start).clone()
    rows = torch.arange(len(x), device=x.device)
    for k in range(steps):
        outputs: list[Tensor] = []
        evaluated = torch.arange(len(x), device=x.device) if view.mode == "train" else rows

        def objective(logits: Tensor, outputs: list[Tensor] = outputs, rows: Tensor = evaluated) -> Tensor:
            outputs.append(logits.detach())
            return loss(logits, y[rows])

        gradient, logits = view.gradient(x[evaluated], objective), outputs[0]
        if len(evaluated) > len(rows):
            gradient, logits = gradient[rows], logits[rows]
        mask = goes_on(k, rows, x[rows], logits, gradient)
        rows, gradient = rows[mask], gradient[mask]
        if len(rows) == 0:
            break
        point = x[rows] + alpha * ball.direction(gradient)
        if noise is not None:
            point = point + noise(rows)
        x = x.index_copy(0, rows, ball.project(point, x0[rows]))
    view.watch.finite(finiteness(x), NON_FINITE)
    return x


def fosc(x: Tensor, x0: Tensor, gradient: Tensor, ball: Ball, box: bool = False) -> Tensor:
    """First-order stationary condition of the inner maximum, per sample; 0 at a stationary point.

    c = max over ||x' - x0|| <= eps of <x' - x, g> = eps ||g||_dual - <x - x0, g>, g the input gradient of the
    sample's own loss. With `box` the maximum is over x' in [0, 1] as well (l_inf): then c is at most as
    large, and can reach 0 for black and white pixels too.

    Args:
        x: (N, ...) points.
        x0: (N, ...) centres.
        gradient: (N, ...) input gradients.
        ball: the perturbation set.
        box: whether x' is restricted to [0, 1].

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
