"""Accuracy as a function of the radius and of the number of steps, to check that the attack works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.checks import whole
from controlat._util.precision import full_precision
from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.attack import Attack, ascent
from controlat.robust_accuracy.source import Source, batches, check_arguments, spread

__all__ = ["RADII", "STEPS", "Curves", "curves", "curves_cost"]

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # in units of eps
STEPS = (1, 2, 5, 10, 20, 50, 100)
POINTS = 200
_ATTACK = Attack("pgd-20", steps=20)


@dataclass(frozen=True)
class Curves:
    """Accuracy under PGD alone: all points are attacked, not only survivors of other attacks.

    Args:
        eps: (radius, accuracy after PGD-20 with alpha = radius/4) for every radius; at the last one every
            image can be made uniformly grey.
        steps: (K, accuracy after K steps of alpha = eps/4, mean cross-entropy) along one path.
        chance: share of the largest class, the highest accuracy on images that are all grey.
        spent: evaluations, in samples.
        seconds: wall time.
    """

    eps: tuple[tuple[float, Accuracy], ...]
    steps: tuple[tuple[int, Accuracy, float], ...]
    chance: float
    spent: Meter
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence if the attack fails at the radius at which every image can be made grey."""
        radius, last = self.eps[-1]
        if last.interval[0] <= self.chance + 0.05:
            return ()
        return (
            f"accuracy under PGD is still {last.value:.0%} at eps {radius:.3g}, where every image can be "
            "made grey: the attack fails",
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "eps": [{"eps": eps} | a.to_json() for eps, a in self.eps],
            "steps": [{"steps": k, "loss": loss} | a.to_json() for k, a, loss in self.steps],
            "chance": self.chance,
            "gradients": self.spent.gradients,
            "forwards": self.spent.forwards,
            "seconds": self.seconds,
        }


def curves_cost() -> Meter:
    """Evaluations per point, at most: at all radii but 0, and at the radius of grey."""
    return Meter(_ATTACK.steps * len(RADII) + STEPS[-1], len(RADII) + 1 + len(STEPS))


@full_precision()
def curves(
    model: nn.Module,
    source: Source,
    ball: Ball,
    *,
    points: int = POINTS,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    channels_last: bool = True,
) -> Curves:
    """Accuracy under PGD for several radii, and for several numbers of steps.

    It must fall to chance for a large radius, and become constant in the number of steps; otherwise the
    attack fails.

    Args:
        model: from inputs in [0, 1] to logits.
        source: the test points.
        ball: the perturbation set; radii are multiples of its eps.
        points: how many points, spread evenly.
        batch_size: samples at a time.
        seed: of the random starts.
        progress: called with (samples done, what).
        channels_last: run convolutions in NHWC layout; False keeps the layout of the weights.
    """
    points = whole(points, "points", 1)
    batch_size, seed = check_arguments(source, ball, batch_size, seed, progress)
    start_time, meter = time.perf_counter(), Meter()
    positions, notify = spread(torch.arange(len(source.y)), points), progress or (lambda n, name: None)
    by_radius = dict.fromkeys(_radii(source, ball, positions), 0)
    by_steps, losses = dict.fromkeys(STEPS, 0), dict.fromkeys(STEPS, 0.0)
    with FrozenModel(model, "eval", channels_last=channels_last, meter=meter) as view:
        for index, x, y in batches(source, positions, batch_size):
            for i, radius in enumerate(by_radius):
                start = generator(seed, "curves", "eps", i, int(index[0]), device=x.device)
                adversarial = _ATTACK.perturb(view, x, y, Ball(radius, ball.norm), start) if radius else x
                by_radius[radius] += int((view(adversarial).argmax(1) == y).sum())
                notify(len(index), "sweep over eps")
            start = generator(seed, "curves", "steps", int(index[0]), device=x.device)
            for k, point in enumerate(ascent(view, x, y, ball, STEPS[-1], start), start=1):
                if k in by_steps:
                    logits = view(point)
                    by_steps[k] += int((logits.argmax(1) == y).sum())
                    losses[k] += float(cross_entropy(logits, y).sum())
            notify(len(index), "sweep over steps")
    n, labels = len(positions), source.y[positions.to(source.y.device)]
    return Curves(
        eps=tuple((radius, Accuracy(correct, n)) for radius, correct in by_radius.items()),
        steps=tuple((k, Accuracy(correct, n), losses[k] / n) for k, correct in by_steps.items()),
        chance=int(labels.bincount().max()) / n,
        spent=meter,
        seconds=time.perf_counter() - start_time,
    )


def _radii(source: Source, ball: Ball, positions: Tensor) -> list[float]:
    """The multiples of eps at which every image cannot be made grey yet, and the radius at which it can."""
    (_, first, _), *_ = batches(source, positions[:1], 1)
    grey = 0.5 if ball.norm == "linf" else 0.5 * first.numel() ** 0.5
    return [*(f * ball.eps for f in RADII if f * ball.eps < grey), grey]
