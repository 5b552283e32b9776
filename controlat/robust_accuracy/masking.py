"""Checks for gradient masking: signs that gradient attacks overestimate the robust accuracy of a network.

A gradient attack that fails proves nothing if the gradients are useless. Each check looks for behaviour that
does not occur with useful gradients (Athalye et al., 2018; Carlini et al., 2019, section 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.square import square
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.attack import Attack, ascent
from controlat.robust_accuracy.masking_result import Masking, masking_warnings
from controlat.robust_accuracy.source import Source, batches, spread

__all__ = ["CHECKS", "check_cost", "check_masking"]

CHECKS = 100  # default number of points
LOSS_STEPS = (1, 10, 50)  # steps of the ascent after which losses are compared
QUERIES = 500
MANY = Attack("pgd-20-10", steps=20, restarts=10)
_ZERO, _BROKEN, _FALL = (
    0.01,
    0.02,
    0.02,
)  # shares of zero gradients, of broken points, and of the loss that warn


def check_cost() -> Meter:
    """Evaluations per point, at most: those of a point that no attack breaks."""
    return Meter(1 + LOSS_STEPS[-1] + MANY.cost(), len(LOSS_STEPS) + MANY.restarts + QUERIES + 1)


def check_masking(
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
        view: the network, as an open context.
        source: the test points.
        ball: the perturbation set.
        correct: (N,) mask of correctly classified points.
        robust: (N,) mask of points that survived the evaluation.
        points: number of correctly classified points, and of robust points, to check.
        batch_size: samples at a time.
        seed: of random starts and squares.
        progress: called with (samples done, name of the check).
        margin: whether an attack of the evaluation ascended the margin, whose gradient does not vanish.
    """
    if points == 0 or ball.eps == 0:
        return Masking()
    start_time, before = time.perf_counter(), view.meter.copy()
    checks = _Checks(view, source, ball, batch_size, seed, progress or (lambda n, name: None))
    inspected = spread(correct.nonzero().squeeze(1), points)
    attacked = spread(robust.nonzero().squeeze(1), points)
    zero, tiny, losses = checks.gradients(inspected, robust)
    restarts, blackbox = checks.attacks(attacked)
    means = zip(LOSS_STEPS, losses.mean(1), strict=True) if len(inspected) else ()
    result = Masking(
        points=len(inspected),
        zero_gradients=zero,
        tiny_gradients=tiny,
        losses={k: float(v) for k, v in means},
        survivors=len(attacked),
        restarts=restarts,
        blackbox=blackbox,
        spent=view.meter.since(before),
        seconds=time.perf_counter() - start_time,
    )
    return replace(result, warnings=masking_warnings(result, losses, float(robust.float().mean()), margin))


@dataclass(frozen=True)
class _Checks:
    """The checks on test points at some positions."""

    view: FrozenModel
    source: Source
    ball: Ball
    batch_size: int
    seed: int
    progress: Callable[[int, str], object]

    def gradients(self, positions: Tensor, robust: Tensor) -> tuple[int, int, Tensor]:
        """Numbers of points with zero and with tiny gradients, and the losses (3, N) along an ascent."""
        zero, tiny, losses = 0, 0, torch.empty(len(LOSS_STEPS), 0)
        for index, x, y in batches(self.source, positions, self.batch_size):
            flat, saturated = _vanishing(self.view, x, y)
            zero += int(flat.sum())
            tiny += int((saturated & ~flat & robust[index]).sum())
            start = self._generator("loss", x, index)
            losses = torch.cat([losses, _losses(self.view, x, y, self.ball, start)], dim=1)
            self.progress(len(index), "gradients and losses")
        return zero, tiny, losses

    def attacks(self, positions: Tensor) -> tuple[int, int]:
        """Numbers of robust points that more restarts break, and that random search breaks of the others."""
        restarts = blackbox = 0
        for index, x, y in batches(self.source, positions, self.batch_size):
            survives = self._restarts(index, x, y)
            restarts += int((~survives).sum())
            self.progress(len(index), "many restarts")
            rows = survives.nonzero().squeeze(1)
            if len(rows):
                generator = self._generator("square", x, index)
                adversarial = square(
                    self.view, x[rows], y[rows], ball=self.ball, queries=QUERIES, generator=generator
                )
                blackbox += int((self.view(adversarial).argmax(1) != y[rows]).sum())
            self.progress(len(index), "black box")
        return restarts, blackbox

    def _restarts(self, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(N,) mask of the samples that survive ten more restarts of PGD-20."""
        survives = torch.ones(len(index), dtype=torch.bool, device=x.device)
        for restart in range(MANY.restarts):
            start = self._generator("restart", x, restart, index)
            rows = survives.nonzero().squeeze(1)
            if len(rows):
                adversarial = MANY.perturb(self.view, x[rows], y[rows], self.ball, start)
                survives[rows] = self.view(adversarial).argmax(1) == y[rows]
        return survives

    def _generator(self, purpose: str, x: Tensor, *key: int | Tensor) -> torch.Generator:
        """Random numbers of one check on a batch, identified by the position of its first sample."""
        numbers = [int(k[0]) if isinstance(k, Tensor) else k for k in key]
        return generator(self.seed, "masking", purpose, *numbers, device=x.device)


def _vanishing(view: FrozenModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) masks of samples with an input gradient of 0, and with a softmax that rounds to one-hot."""
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
    points = enumerate(ascent(view, x, y, ball, LOSS_STEPS[-1], start), start=1)
    return torch.stack([cross_entropy(view(x), y).float().cpu() for k, x in points if k in LOSS_STEPS])
