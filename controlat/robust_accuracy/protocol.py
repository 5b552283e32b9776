"""The whole evaluation of one network: attacks, checks for masking, AutoAttack, transfer, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from controlat._util.checks import flag, whole
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.robust_accuracy.attack import Attack, read_attacks
from controlat.robust_accuracy.auto import AutoAttacked, auto_cost, autoattack
from controlat.robust_accuracy.curves import (
    POINTS,
    RADII,
    Curves,
    curves,
    curves_cost,
)
from controlat.robust_accuracy.masking import CHECKS, check_cost
from controlat.robust_accuracy.robust import Robustness, run_attacks
from controlat.robust_accuracy.source import Source
from controlat.robust_accuracy.transfer import Transfer, check_surrogate, transfer

__all__ = ["Evaluation", "Extras", "protocol"]


@dataclass(frozen=True)
class Extras:
    """The optional parts of an evaluation.

    Args:
        checks: number of points that are checked for gradient masking.
        autoattack: number of points for AutoAttack; 0 for none.
        sweeps: whether to compute the accuracy as a function of eps and of the number of steps.
        surrogate: a network trained independently, for transfer attacks.
    """

    checks: int = CHECKS
    autoattack: int = 0
    sweeps: bool = False
    surrogate: nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("checks", "autoattack"):
            whole(getattr(self, name), name, 0)
        flag(self.sweeps, "sweeps")

    def cost(self, points: int, classes: int, attacks: Sequence[str | Attack]) -> dict[str, Meter]:
        """Evaluations of each part on a test set of so many points, at most."""
        parsed = read_attacks(attacks)
        steps, restarts = sum(a.cost() for a in parsed), sum(a.restarts for a in parsed)
        parts = {
            "attacks": (points, Meter(steps, 1 + restarts)),
            "checks": (min(self.checks, points), check_cost()),
            "autoattack": (min(self.autoattack, points), auto_cost(classes)),
            "sweeps": (self.sweeps * min(POINTS, points), curves_cost()),
            "transfer": (points * (self.surrogate is not None), Meter(steps, 2 + restarts)),
        }
        return {name: Meter(n * m.gradients, n * m.forwards) for name, (n, m) in parts.items() if n}

    def samples(self, points: int, classes: int, attacks: Sequence[str | Attack]) -> int:
        """The sum of all samples that `protocol` reports to `progress`, at most."""
        restarts = sum(a.restarts for a in read_attacks(attacks))
        total = points * restarts * (1 + (self.surrogate is not None)) + 3 * min(self.checks, points)
        total += min(self.autoattack, points) * 4
        return total + self.sweeps * min(POINTS, points) * (len(RADII) + 2)


@dataclass(frozen=True)
class Evaluation:
    """The results of `protocol`; None for parts that were not requested."""

    robustness: Robustness
    autoattack: AutoAttacked | None = None
    transfer: Transfer | None = None
    curves: Curves | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Signs that the robust accuracy is an overestimate; empty if there are none."""
        warnings = list(self.robustness.warnings)
        survived = self.robustness.survived
        if self.transfer is not None:
            warnings += _broken_more("transfer attacks", survived, self.transfer.survived)
        if self.autoattack is not None:
            subset = survived[self.autoattack.positions]
            warnings += _broken_more("AutoAttack", subset, self.autoattack.survived)
            warnings += [f"AutoAttack: {text}" for text in self.autoattack.warnings]
        return (*warnings, *(self.curves.warnings if self.curves is not None else ()))

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        extra = {"autoattack": self.autoattack, "transfer": self.transfer, "curves": self.curves}
        return (
            self.robustness.to_json()
            | {name: part.to_json() for name, part in extra.items() if part is not None}
            | {"warnings": list(self.warnings)}
        )


def _broken_more(attack: str, listed: Tensor, other: Tensor) -> list[str]:
    """A sentence if an attack broke points that survived the listed attacks.

    A transfer attack uses no gradient of the network, so that its gradients must be masked; AutoAttack only
    shows that the listed attacks were too weak.

    Args:
        attack: its name.
        listed: (N,) mask of the points that survived the listed attacks.
        other: (N,) mask of the points that survived this attack.
    """
    survivors, broken = int(listed.sum()), int((listed & ~other).sum())
    if broken <= max(0.02 * survivors, 1):
        return []
    cure = "trust its figure" if attack == "AutoAttack" else "gradients are masked"
    return [f"{attack} broke {broken} of {survivors} points that survived the listed attacks: {cure}"]


def protocol(
    model: nn.Module,
    source: Source,
    ball: Ball,
    *,
    attacks: Sequence[str | Attack],
    extras: Extras = Extras(),
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    channels_last: bool = True,
) -> Evaluation:
    """Evaluate a network by the listed attacks and the optional parts; the network is left unchanged.

    Args:
        model: from inputs in [0, 1] to logits.
        source: the test points.
        ball: the perturbation set.
        attacks: see `parse_attack`.
        extras: the optional parts.
        batch_size: samples at a time.
        seed: of everything random.
        progress: called with (samples done, what).
        channels_last: run convolutions in NHWC layout; False keeps the layout of the weights.

    Raises:
        ValueError: as raised by one of the parts.
    """
    if extras.surrogate is not None:
        check_surrogate(model, extras.surrogate)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    common["channels_last"] = channels_last
    result = run_attacks(model, source, ball, attacks=attacks, checks=extras.checks, **common)
    auto = transferred = swept = None
    if extras.surrogate is not None:
        transferred = transfer(model, extras.surrogate, source, ball, attacks=attacks, **common)
    if extras.sweeps:
        swept = curves(model, source, ball, **common)
    if extras.autoattack:
        auto = autoattack(model, source, ball, points=extras.autoattack, **common)
    return Evaluation(robustness=result, autoattack=auto, transfer=transferred, curves=swept)
