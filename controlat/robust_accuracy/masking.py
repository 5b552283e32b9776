"""Checks that unmask gradient masking: signs that white-box attacks overrate a network.

A gradient attack that fails proves nothing if gradients are useless. Each check is a thing that cannot happen
where they are useful (Athalye et al., 2018; Carlini et al., 2019, section 4).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.square import square
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.attack import Attack, ascent
from controlat.robust_accuracy.source import Source, parts, spread

__all__ = ["CHECKS", "Masking", "MaskingWarning", "check", "check_cost"]

CHECKS = 100  # points that the checks look at
LOOKED_AT = (1, 10, 50)  # steps of the ascent after which the loss is looked at
QUERIES = 500
MANY = Attack("pgd-20-10", steps=20, restarts=10)
_FEW = 10  # points below which a mean says nothing
_ZERO, _BROKEN, _FALL = 0.01, 0.02, 0.02


class MaskingWarning(UserWarning):
    """The robust accuracy of an evaluation is probably overrated."""


@dataclass(frozen=True)
class Masking:
    """What the checks saw.

    Args:
        points: correctly classified points whose gradients and losses were looked at.
        zero_gradients: how many of them have an input gradient of exactly 0.
        tiny_gradients: how many others, of those that survived the evaluation, have a cross-entropy below the
            rounding of 1: its gradient in the logit of the label, p_y - 1, is then 0, and those in the other
            logits, p_j, may be too small for an attack.
        losses: mean cross-entropy after 1, 10 and 50 steps of ascent (alpha = eps/4).
        survivors: points robust to the whole evaluation that were attacked once more.
        restarts: how many of them ten more restarts of PGD-20 broke.
        blackbox: how many of the others 500 queries of random search without gradients broke.
        warnings: what follows, in sentences; empty if nothing does.
        spent: evaluations, in samples.
        seconds: wall time.
    """

    points: int = 0
    zero_gradients: int = 0
    tiny_gradients: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    survivors: int = 0
    restarts: int = 0
    blackbox: int = 0
    warnings: tuple[str, ...] = ()
    spent: Meter = field(default_factory=Meter)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "points": self.points,
            "zero_gradients": self.zero_gradients,
            "tiny_gradients": self.tiny_gradients,
            "losses": {str(k): v for k, v in self.losses.items()},
            "survivors": self.survivors,
            "restarts": self.restarts,
            "blackbox": self.blackbox,
            "warnings": list(self.warnings),
            "gradients": self.spent.gradients,
            "forwards": self.spent.forwards,
            "seconds": self.seconds,
        }


def check_cost() -> Meter:
    """Evaluations per point, at most: of one that nothing breaks."""
    return Meter(1 + LOOKED_AT[-1] + MANY.cost(), len(LOOKED_AT) + MANY.restarts + QUERIES + 1)


def check(
    view: FrozenModel,
    source: Source,
    ball: Ball,
    correct: Tensor,
    robust: Tensor,
    *,
    points: int = CHECKS,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    margin: bool = False,
) -> Masking:
    """Run all checks.

    Args:
        view: the network, open.
        source: the test points.
        ball: the perturbation set.
        correct: (N,) mask of correctly classified points.
        robust: (N,) mask of points that survived the evaluation.
        points: how many of either to look at.
        batch_size: samples at a time.
        seed: of random starts and squares.
        progress: called with (samples done, name of the check).
        margin: whether an attack of the evaluation ascended the margin, whose gradient does not vanish.
    """
    if points == 0 or ball.eps == 0:
        return Masking()
    began, before = time.perf_counter(), view.meter.copy()
    first = spread(correct.nonzero().squeeze(1), points)
    last = spread(robust.nonzero().squeeze(1), points)
    told = progress or (lambda n, name: None)
    zero, tiny, losses = 0, 0, torch.empty(len(LOOKED_AT), 0)
    for part, x, y in parts(source, first, batch_size):
        flat, saturated = _vanishing(view, x, y)
        zero += int(flat.sum())
        tiny += int((saturated & ~flat & robust[part]).sum())
        start = generator(seed, "masking", "loss", int(part[0]), device=x.device)
        losses = torch.cat([losses, _losses(view, x, y, ball, start)], dim=1)
        told(len(part), "gradients and losses")
    restarts = blackbox = 0
    for part, x, y in parts(source, last, batch_size):
        standing = torch.ones(len(part), dtype=torch.bool, device=x.device)
        for restart in range(MANY.restarts):
            start = generator(seed, "masking", "restart", restart, int(part[0]), device=x.device)
            left = standing.nonzero().squeeze(1)
            if len(left):
                standing[left] = view(MANY.perturb(view, x[left], y[left], ball, start)).argmax(1) == y[left]
        restarts += int((~standing).sum())
        told(len(part), "many restarts")
        left = standing.nonzero().squeeze(1)
        if len(left):
            start = generator(seed, "masking", "square", int(part[0]), device=x.device)
            found = square(view, x[left], y[left], ball=ball, queries=QUERIES, generator=start)
            blackbox += int((view(found).argmax(1) != y[left]).sum())
        told(len(part), "black box")
    share, lost = float(robust.float().mean()), 0 if margin else tiny
    mean = {k: float(v) for k, v in zip(LOOKED_AT, losses.mean(1), strict=True)} if len(first) else {}
    return Masking(
        len(first),
        zero,
        tiny,
        mean,
        len(last),
        restarts,
        blackbox,
        tuple(_sentences(len(first), zero, losses, len(last), restarts, blackbox, share, lost)),
        view.meter.since(before),
        time.perf_counter() - began,
    )


def _vanishing(view: FrozenModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) masks of samples whose input gradient is exactly 0, and whose softmax rounds to one-hot."""
    loss = torch.empty(0)

    def objective(logits: Tensor) -> Tensor:
        nonlocal loss
        loss = cross_entropy(logits, y)
        return loss

    gradient = view.gradient(view.prepare(x), objective)
    saturated = loss.detach() < torch.finfo(loss.dtype).eps
    return (gradient.flatten(1) == 0).all(1).cpu(), saturated.cpu()


def _losses(view: FrozenModel, x: Tensor, y: Tensor, ball: Ball, start: torch.Generator) -> Tensor:
    """Cross-entropy (3, N) after 1, 10 and 50 steps."""
    points = enumerate(ascent(view, x, y, ball, LOOKED_AT[-1], start), start=1)
    return torch.stack([cross_entropy(view(x), y).float().cpu() for k, x in points if k in LOOKED_AT])


def _sentences(
    points: int,
    zero: int,
    losses: Tensor,
    survivors: int,
    restarts: int,
    blackbox: int,
    share: float = 1.0,
    tiny: int = 0,
) -> list[str]:
    found = []
    if zero > max(_ZERO * points, 1):
        found.append(
            f"{zero} of {points} points have an input gradient of exactly zero, so that gradient attacks do "
            "not move them (a saturated or quantised network?)"
        )
    if tiny > max(_ZERO * points, 1):
        found.append(
            f"{tiny} of {points} points survived with a cross-entropy whose gradient is lost in rounding (a "
            "saturated softmax): attack the margin of the logits too, which does not saturate (add cw-30)"
        )
    if points >= _FEW:
        one, ten, fifty = losses
        up, down = int((fifty > one).sum()), int((fifty < one).sum())
        if up - down <= 2 * math.sqrt(up + down):
            found.append(
                f"the loss does not rise with steps (from 1 to 50 it rises for {up} of {points} points and "
                f"falls for {down}): the gradient does not point uphill"
            )
        elif _above(ten, fifty) and float((ten - fifty).mean()) > _FALL * float(ten.mean()):
            found.append(
                f"the loss falls from {ten.mean():.3g} after 10 steps to {fifty.mean():.3g} after 50: steps "
                "of eps/4 overshoot; add an attack with a smaller alpha"
            )
    few = max(_BROKEN * survivors / max(share, _BROKEN), 1)
    if survivors >= _FEW and restarts > few:
        found.append(
            f"ten more restarts of PGD-20 broke {restarts} of {survivors} points that survived the "
            "evaluation: add attacks or restarts, such as pgd-50-10"
        )
    if survivors >= _FEW and blackbox > few:
        found.append(
            f"random search without gradients broke {blackbox} of {survivors - restarts} points that "
            "survived the evaluation and those restarts: its gradients are masked, or the attacks were too "
            "weak (add cw-30); use --autoattack"
        )
    return found


def _above(a: Tensor, b: Tensor) -> bool:
    """Whether a is larger than b on average, by more than two standard errors of the paired difference."""
    d = (a - b).double()
    return float(d.mean()) > 2 * float(d.std()) / math.sqrt(len(d))
