"""Robust accuracy: a sample is robust if no attack and no restart makes the network misclassify it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.checks import number, whole
from controlat._util.precision import full_precision
from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import check_labels
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.attack import Attack, read_attacks
from controlat.robust_accuracy.masking import CHECKS, check_masking
from controlat.robust_accuracy.masking_result import Masking, MaskingWarning
from controlat.robust_accuracy.source import Pair, Source, batches, check_arguments

__all__ = ["Robustness", "correct_mask", "robustness", "run_attacks"]

DEFAULT_ATTACKS = ("fgsm", "pgd-20", "cw-30", "cw-30-k50")


@dataclass(frozen=True)
class Robustness:
    """The outcome of an evaluation.

    Args:
        clean: accuracy without an attack.
        after: accuracy after each attack, by its name: the share of samples that survived it and all attacks
            before it.
        robust: accuracy after all attacks.
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
        """Signs that the robust accuracy is an overestimate; empty if there are none."""
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

    Each attack is applied to the samples that survived all attacks before it. A sample is broken when the
    last point of an attack's path is misclassified. The order of the attacks determines the cost and, through
    the batches of survivors, the random starts: the result depends on it within chance. At the end some
    points are checked for gradient masking.

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
        MaskingWarning: a check shows that the robust accuracy is probably an overestimate.
        UserWarning: the alpha of an attack is more than 4 eps.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    >>> x, y = torch.rand(50, 1, 4, 4), torch.arange(50) % 10
    >>> result = robustness(model, x, y, eps=0.1, attacks=["fgsm", "pgd-10"], checks=0)
    >>> result.robust.value <= result.clean.value
    True
    """
    source, ball, attacks = Pair(x, y, device), Ball(number(eps, "eps"), norm), read_attacks(attacks)
    ball.check(x.shape[1:])
    if warning := ball.step_size_warning(max((a.alpha for a in attacks if a.alpha is not None), default=0.0)):
        warnings.warn(warning, stacklevel=2)
    result = run_attacks(
        model,
        source,
        ball,
        attacks=attacks,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        checks=checks,
        channels_last=channels_last,
    )
    for warning in result.warnings:
        warnings.warn(warning, MaskingWarning, stacklevel=2)
    return result


def correct_mask(view: FrozenModel, source: Source, batch_size: int) -> Tensor:
    """(N,) mask of the samples that the network classifies correctly."""
    correct = torch.zeros(len(source.y), dtype=torch.bool)
    for index, x, y in batches(source, torch.arange(len(correct)), batch_size):
        logits = view(x)
        check_labels(int(y.max()), logits.shape[1])
        correct[index] = (logits.argmax(1) == y).cpu()
    return correct


@full_precision()
def run_attacks(
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
    """`robustness` for any source of test points; warnings are in the result only."""
    attacks, checks = read_attacks(attacks), whole(checks, "checks", 0)
    batch_size, seed = check_arguments(source, ball, batch_size, seed, progress)
    start_time, meter = time.perf_counter(), Meter()
    with FrozenModel(model, "eval", channels_last=channels_last, meter=meter) as view:
        clean = correct_mask(view, source, batch_size)
        survived = clean.clone()
        after: dict[str, Accuracy] = {}
        for attack, restart in ((a, i) for a in attacks for i in range(a.restarts)):
            key = seed, "evaluation", attack.name, restart
            for index, x, y in batches(source, survived.nonzero().squeeze(1), batch_size):
                start = generator(*key, int(index[0]), device=x.device)
                adversarial = attack.perturb(view, x, y, ball, start)
                survived[index] = (view(adversarial).argmax(1) == y).cpu()
                if progress is not None:
                    progress(len(index), attack.name)
            after[attack.name] = Accuracy.of(survived)  # the last restart counts
        result = Robustness(
            clean=Accuracy.of(clean),
            after=after,
            robust=Accuracy.of(survived),
            spent=meter.copy(),
            seconds=time.perf_counter() - start_time,
            survived=survived,
        )
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
        margin = any(a.kappa is not None for a in attacks)
        masking = check_masking(view, source, ball, clean, survived, points=checks, margin=margin, **options)
    return replace(result, masking=masking)
