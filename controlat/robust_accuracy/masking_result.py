"""The results of the checks for gradient masking, and what they show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from controlat.control.cost import Meter

__all__ = ["Masking", "MaskingWarning", "masking_warnings"]

_FEW = 10  # fewer points are not judged
_ZERO, _BROKEN, _FALL = 0.01, 0.02, 0.02  # thresholds: zero gradients, broken points, fall of the loss


class MaskingWarning(UserWarning):
    """The robust accuracy of an evaluation is probably an overestimate."""


@dataclass(frozen=True)
class Masking:
    """The results of the checks.

    Args:
        points: number of correctly classified points whose gradients and losses were computed.
        zero_gradients: how many of them have an input gradient of exactly 0.
        tiny_gradients: how many others that survived the evaluation have a cross-entropy below the rounding
            of 1: its gradient in the logit of the label, p_y - 1, is then 0, and those in the other logits,
            p_j, may be too small for an attack.
        losses: mean cross-entropy after 1, 10 and 50 steps of ascent (alpha = eps/4).
        survivors: number of points robust to the whole evaluation that were attacked again.
        restarts: how many of them ten more restarts of PGD-20 broke.
        blackbox: how many of the others random search with 500 queries and no gradients broke.
        warnings: sentences on what the results show; empty if there is no sign of masking.
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


def masking_warnings(result: Masking, losses: Tensor, share: float, margin: bool = False) -> tuple[str, ...]:
    """What the results of the checks show, in sentences.

    Args:
        result: the results.
        losses: (3, N) cross-entropy of each point after 1, 10 and 50 steps.
        share: robust accuracy of the evaluation.
        margin: whether an attack of the evaluation ascended the margin, for which tiny gradients of the
            cross-entropy do not matter.
    """
    tiny = 0 if margin else result.tiny_gradients
    return (
        *_gradient_warnings(result.points, result.zero_gradients, tiny),
        *_loss_warnings(losses),
        *_attack_warnings(result.survivors, result.restarts, result.blackbox, share),
    )


def _gradient_warnings(points: int, zero: int, tiny: int) -> Iterator[str]:
    if zero > max(_ZERO * points, 1):
        yield (
            f"{zero} of {points} points have an input gradient of exactly zero, so that gradient attacks do "
            "not move them (a saturated or quantised network?)"
        )
    if tiny > max(_ZERO * points, 1):
        yield (
            f"{tiny} of {points} points survived with a cross-entropy whose gradient is lost in rounding (a "
            "saturated softmax): attack the margin of the logits too, which does not saturate (add cw-30)"
        )


def _loss_warnings(losses: Tensor) -> Iterator[str]:
    points = losses.shape[1]
    if points < _FEW:
        return
    one, ten, fifty = losses
    up, down = int((fifty > one).sum()), int((fifty < one).sum())
    if up - down <= 2 * math.sqrt(up + down):
        yield (
            f"the loss does not rise with steps (from 1 to 50 it rises for {up} of {points} points and "
            f"falls for {down}): the gradient does not point uphill"
        )
    elif _above(ten, fifty) and float((ten - fifty).mean()) > _FALL * float(ten.mean()):
        yield (
            f"the loss falls from {ten.mean():.3g} after 10 steps to {fifty.mean():.3g} after 50: steps "
            "of eps/4 overshoot; add an attack with a smaller alpha"
        )


def _attack_warnings(survivors: int, restarts: int, blackbox: int, share: float) -> Iterator[str]:
    allowed = max(_BROKEN * survivors / max(share, _BROKEN), 1)
    if survivors >= _FEW and restarts > allowed:
        yield (
            f"ten more restarts of PGD-20 broke {restarts} of {survivors} points that survived the "
            "evaluation: add attacks or restarts, such as pgd-50-10"
        )
    if survivors >= _FEW and blackbox > allowed:
        yield (
            f"random search without gradients broke {blackbox} of {survivors - restarts} points that "
            "survived the evaluation and those restarts: its gradients are masked, or the attacks were too "
            "weak (add cw-30); use --autoattack"
        )


def _above(a: Tensor, b: Tensor) -> bool:
    """Whether a is larger than b on average, by more than two standard errors of the paired difference."""
    d = (a - b).double()
    return float(d.mean()) > 2 * float(d.std()) / math.sqrt(len(d))
