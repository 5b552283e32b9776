"""Robust accuracy: a sample counts as robust only if it survives every attack and every restart."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.checks import number, whole
from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import check_labels
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.attack import Attack, read_attacks
from controlat.robust_accuracy.masking import CHECKS, Masking, MaskingWarning, check
from controlat.robust_accuracy.source import Pair, Source, checked, parts

__all__ = ["Robustness", "correct", "measure", "robustness"]

DEFAULT_ATTACKS = ("fgsm", "pgd-20", "cw-30", "cw-30-k50")


@dataclass(frozen=True)
class Robustness:
    """The outcome of an evaluation.

    Args:
        clean: accuracy without an attack.
        after: accuracy that is left after each attack in turn, by its name: samples that survived it and all
            before it.
        robust: accuracy that is left at the end.
        spent: evaluations of the attacks, in samples.
        seconds: wall time of the attacks.
        masking: the checks for gradient masking, with their own cost.
        survived: (N,) mask of the robust samples.
    """

    clean: Accuracy
    after: dict[str, Accuracy]
    robust: Accuracy
    spent: Meter
    seconds: float
    masking: Masking = field(default_factory=Masking)
    survived: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the robust accuracy is probably overrated; empty if nothing says so."""
        return self.masking.warnings

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "points": self.clean.points,
            "clean": self.clean.to_json(),
            "after": {name: accuracy.to_json() for name, accuracy in self.after.items()},
            "robust": self.robust.to_json(),
            "gradients": self.spent.gradients,
            "forwards": self.spent.forwards,
            "seconds": self.seconds,
            "masking": self.masking.to_json(),
        }


def robustness(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    attacks: Sequence[str | Attack] = DEFAULT_ATTACKS,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, str], object] | None = None,
    checks: int = CHECKS,
    channels_last: bool = True,
) -> Robustness:
    """Clean and robust accuracy, in eval mode and full precision; the model is left as it was.

    The attacks come in turn, and each is tried only on samples that survived all before it. A sample is
    broken when the last point of an attack's path is misclassified. The order of attacks decides the cost,
    and through the batches of survivors the random starts, so that it can move the result by chance.
    At the end some points are checked for gradient masking.

    Args:
        model: from inputs in [0, 1] to logits.
        x: (N, ...) test inputs.
        y: (N,) labels.
        eps: radius, in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        attacks: see `parse_attack`; cheap ones first.
        batch_size: samples at a time.
        seed: of the random starts.
        device: where to attack; that of x by default.
        progress: called with (samples done, name of the attack) as it goes.
        checks: points that are checked for gradient masking; 0 for no checks.
        channels_last: run convolutions in NHWC layout; False keeps the layout of the weights.

    Returns:
        `Robustness`, with Wilson intervals.

    Raises:
        ValueError: a bad attack text or number; x not in [0, 1].

    Warns:
        MaskingWarning: a check says that the robust accuracy is overrated.
        UserWarning: the alpha of an attack is more than 4 eps.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    >>> x, y = torch.rand(50, 1, 4, 4), torch.arange(50) % 10
    >>> found = robustness(model, x, y, eps=0.1, attacks=["fgsm", "pgd-10"], checks=0)
    >>> found.robust.value <= found.clean.value
    True
    """
    source, ball, chosen = Pair(x, y, device), Ball(number(eps, "eps"), norm), read_attacks(attacks)
    ball.check(x.shape[1:])
    if told := ball.far(max((a.alpha for a in chosen if a.alpha is not None), default=0.0)):
        warnings.warn(told, stacklevel=2)
    found = measure(
        model,
        source,
        ball,
        attacks=chosen,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        checks=checks,
        channels_last=channels_last,
    )
    for warning in found.warnings:
        warnings.warn(warning, MaskingWarning, stacklevel=2)
    return found


def correct(view: FrozenModel, source: Source, batch_size: int) -> Tensor:
    """(N,) mask of the samples that the network classifies correctly."""
    found = torch.zeros(len(source.y), dtype=torch.bool)
    for part, x, y in parts(source, torch.arange(len(found)), batch_size):
        logits = view(x)
        check_labels(int(y.max()), logits.shape[1])
        found[part] = (logits.argmax(1) == y).cpu()
    return found


def measure(
    model: nn.Module,
    source: Source,
    ball: Ball,
    *,
    attacks: Sequence[str | Attack] = DEFAULT_ATTACKS,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    checks: int = 0,
    channels_last: bool = True,
) -> Robustness:
    """`robustness` on any source of test points; warnings are in the result only."""
    chosen, checks = read_attacks(attacks), whole(checks, "checks", 0)
    batch_size, seed = checked(source, ball, batch_size, seed, progress)
    began, meter = time.perf_counter(), Meter()
    with FrozenModel(model, "eval", channels_last=channels_last, meter=meter) as view:
        clean = correct(view, source, batch_size)
        standing = clean.clone()
        after: dict[str, Accuracy] = {}
        for attack in chosen:
            for restart in range(attack.restarts):
                for part, x, y in parts(source, standing.nonzero().squeeze(1), batch_size):
                    start = generator(seed, "evaluation", attack.name, restart, int(part[0]), device=x.device)
                    adversarial = attack.perturb(view, x, y, ball, start)
                    standing[part] = (view(adversarial).argmax(1) == y).cpu()
                    if progress is not None:
                        progress(len(part), attack.name)
            after[attack.name] = Accuracy(int(standing.sum()), len(standing))
        spent, seconds = meter.copy(), time.perf_counter() - began
        masking = check(
            view,
            source,
            ball,
            clean,
            standing,
            points=checks,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            margin=any(a.kappa is not None for a in chosen),
        )
    first, last = (Accuracy(int(mask.sum()), len(mask)) for mask in (clean, standing))
    return Robustness(first, after, last, spent, seconds, masking, standing)
