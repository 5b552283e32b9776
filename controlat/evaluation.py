"""Robust accuracy: a sample counts as robust only if it survives every attack and every restart."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlat.attacks.pgd import ascend, check_batch, check_labels
from controlat.balls import Ball
from controlat.control import number
from controlat.losses import Loss, cross_entropy, margin
from controlat.network import Meter, View
from controlat.rng import generator
from controlat.texts import only, split

__all__ = ["Accuracy", "Attack", "Robustness", "parse_attack", "robustness", "wilson"]


def wilson(successes: int, points: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Raises:
        ValueError: no points, or more successes than points.

    Source:
        E. B. Wilson (1927).

    >>> tuple(round(v, 4) for v in wilson(0, 10))
    (0.0, 0.2775)
    """
    if not 0 <= successes <= points or points == 0:
        raise ValueError(f"wilson needs 0 <= successes <= points and points > 0, got {successes} of {points}")
    p, q = successes / points, z * z / points
    centre = (p + q / 2) / (1 + q)
    half = z * math.sqrt(p * (1 - p) / points + q / (4 * points)) / (1 + q)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == points else centre + half


@dataclass(frozen=True)
class Accuracy:
    """A share of points, with its Wilson interval."""

    correct: int
    points: int

    @property
    def value(self) -> float:
        """correct / points."""
        return self.correct / self.points

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return wilson(self.correct, self.points)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "correct": self.correct,
            "points": self.points,
            "value": self.value,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Attack:
    """One evaluation attack: projected ascent of a loss, from one or more starts.

    Args:
        name: for tables.
        steps: K.
        alpha: step size, in pixel units; None: `relative` times eps.
        restarts: number of starts; a sample must survive all.
        random_start: start at a random point of the ball.
        kappa: None for the cross-entropy; a number for the C&W margin loss with that lead.
        relative: step size over eps where alpha is None; 1/4 as in FOSC's evaluation.

    Raises:
        ValueError: a number is out of range.
    """

    name: str
    steps: int
    alpha: float | None = None
    restarts: int = 1
    random_start: bool = True
    kappa: float | None = None
    relative: float = 0.25

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("restarts", 1), ("alpha", 0), ("kappa", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"attack {self.name!r}: {name} must be >= {low} and finite, got {value:g}")
            if name in ("steps", "restarts") and value != int(value):
                raise ValueError(f"attack {self.name!r}: {name} must be a whole number, got {value:g}")

    @property
    def loss(self) -> Loss:
        """What is ascended."""
        return cross_entropy if self.kappa is None else functools.partial(margin, kappa=self.kappa)

    def cost(self) -> int:
        """Gradient evaluations per sample attacked."""
        return self.steps * self.restarts


_PARAMETERS = ("steps", "alpha", "restarts", "kappa")


def parse_attack(text: str) -> Attack:
    """Read an attack: ``fgsm``, ``pgd-20``, ``pgd-50-10`` (10 restarts), ``cw-30``, ``cw-30-k50`` (kappa 50).

    Or with everything said: ``pgd:steps=50,restarts=10,alpha=2/255``, ``cw:steps=30,kappa=50``.

    Raises:
        ValueError: it is none of these.

    >>> parse_attack("pgd-50-10").restarts
    10
    """
    cure = "write fgsm, pgd-20, pgd-50-10, cw-30, cw-30-k50 or pgd:steps=50,restarts=10,alpha=2/255"
    family, found = split(text)
    family, *short = family.split("-")
    if family not in ("fgsm", "pgd", "cw") or (found and short):
        raise ValueError(f"unknown attack {text!r}; {cure}")
    if family == "fgsm":
        only(found, (), (), "attack fgsm")
        if short:
            raise ValueError(f"unknown attack {text!r}; {cure}")
        return Attack("fgsm", steps=1, random_start=False, relative=1.0)
    for part, name in zip(short, ("steps", "restarts"), strict=False):
        found |= {"kappa": part[1:]} if part[:1] == "k" else {name: part}
    if len(short) > 2:
        raise ValueError(f"unknown attack {text!r}; {cure}")
    only(found, ("steps",), _PARAMETERS[1 : 4 if family == "cw" else 3], f"attack {family} ({cure})")
    values = {name: number(value, name) for name, value in found.items()}
    kappa = values.get("kappa", 0.0) if family == "cw" else None
    counts = {name: values.get(name, 1) for name in ("steps", "restarts")}
    whole = {name: int(v) if v == int(v) else v for name, v in counts.items()}
    return Attack(text, alpha=values.get("alpha"), kappa=kappa, **whole)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Robustness:
    """The outcome of an evaluation.

    Args:
        clean: accuracy without an attack.
        after: accuracy that is left after each attack in turn, by its name: samples that survived it and all
            before it.
        robust: accuracy that is left at the end.
        spent: evaluations, in samples.
        seconds: wall time.
    """

    clean: Accuracy
    after: dict[str, Accuracy]
    robust: Accuracy
    spent: Meter
    seconds: float

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
        }


def robustness(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    attacks: Sequence[str | Attack] = ("fgsm", "pgd-20", "cw-30", "cw-30-k50"),
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, str], object] | None = None,
) -> Robustness:
    """Clean and robust accuracy, in eval mode and full precision; the model is left as it was.

    The attacks come in turn, and each is tried only on samples that survived all before it. A sample is
    broken when the last point of an attack's path is misclassified. The order of attacks decides the cost,
    and through the batches of survivors the random starts, so that it can move the result by chance.

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

    Returns:
        `Robustness`, with Wilson intervals.

    Raises:
        ValueError: a bad attack text or number; x not in [0, 1].

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    >>> x, y = torch.rand(50, 1, 4, 4), torch.arange(50) % 10
    >>> found = robustness(model, x, y, eps=0.1, attacks=["fgsm", "pgd-10"])
    >>> found.robust.value <= found.clean.value
    True
    """
    check_batch(x, y)
    ball = Ball(number(eps, "eps"), norm)
    chosen = [parse_attack(a) if isinstance(a, str) else a for a in attacks]
    if len({a.name for a in chosen}) < len(chosen):
        raise ValueError(f"an attack is given twice: {', '.join(a.name for a in chosen)}")
    began, meter = time.perf_counter(), Meter()
    device = x.device if device is None else torch.device(device)
    standing = torch.zeros(len(x), dtype=torch.bool)
    with View(model, "eval", meter=meter) as view:
        for part in torch.split(torch.arange(len(x)), batch_size):
            logits = view(x[part].to(device))
            check_labels(int(y[part].max()), logits.shape[1])
            standing[part] = (logits.argmax(1) == y[part].to(device)).cpu()
        clean = Accuracy(int(standing.sum()), len(x))
        after: dict[str, Accuracy] = {}
        for attack in chosen:
            for restart in range(attack.restarts):
                left = standing.nonzero().squeeze(1)
                for part in torch.split(left, batch_size) if len(left) else ():
                    start = generator(seed, "evaluation", attack.name, restart, int(part[0]), device=device)
                    batch = x[part].to(device), y[part].to(device)
                    standing[part] = _survives(view, *batch, ball, attack, start).cpu()
                    if progress is not None:
                        progress(len(part), attack.name)
            after[attack.name] = Accuracy(int(standing.sum()), len(x))
    return Robustness(clean, after, Accuracy(int(standing.sum()), len(x)), meter, time.perf_counter() - began)


def _survives(view: View, x: Tensor, y: Tensor, ball: Ball, attack: Attack, start: torch.Generator) -> Tensor:
    adversarial = ascend(
        view,
        x,
        y,
        ball=ball,
        alpha=attack.relative * ball.eps if attack.alpha is None else attack.alpha,
        steps=attack.steps,
        random_start=attack.random_start,
        loss=attack.loss,
        generator=start,
    )
    return view(adversarial).argmax(1) == y
