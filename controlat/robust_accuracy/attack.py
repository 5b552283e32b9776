"""The attacks of an evaluation, and their text form."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from controlat._util.checks import (
    brief,
    flag,
    instance,
    number,
    whole,
)
from controlat._util.registry import meant
from controlat._util.texts import only, split
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy, margin
from controlat.attacks.pgd import ascend, path
from controlat.models.frozen.view import FrozenModel

__all__ = ["Attack", "ascent", "parse_attack", "read_attacks"]


@dataclass(frozen=True)
class Attack:
    """One evaluation attack: projected ascent of a loss, from one or more starts.

    Args:
        name: for tables.
        steps: K.
        alpha: step size, in pixel units; None: `relative` times eps.
        restarts: number of starts; a sample is robust if it survives all of them.
        random_start: start at a random point of the ball.
        kappa: None for the cross-entropy; a number for the C&W margin loss with that margin kappa.
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
        what = f"attack {instance(self.name, str, 'name of an attack')!r}"
        for name in ("steps", "restarts"):
            object.__setattr__(self, name, whole(getattr(self, name), f"{what}: {name}", 1))
        flag(self.random_start, f"{what}: random_start")
        for name in ("alpha", "kappa", "relative"):
            if getattr(self, name) is None and name != "relative":
                continue
            object.__setattr__(self, name, value := number(getattr(self, name), f"{what}: {name}"))
            if value < 0:
                raise ValueError(f"{what}: {name} must be >= 0 and finite, got {value:g}")

    @property
    def loss(self) -> Loss:
        """The loss that is ascended."""
        return cross_entropy if self.kappa is None else functools.partial(margin, kappa=self.kappa)

    def cost(self) -> int:
        """Gradient evaluations per attacked sample."""
        return self.steps * self.restarts

    def perturb(self, view: FrozenModel, x: Tensor, y: Tensor, ball: Ball, start: torch.Generator) -> Tensor:
        """The last point of one restart."""
        return ascend(
            view,
            x,
            y,
            ball=ball,
            alpha=self.relative * ball.eps if self.alpha is None else self.alpha,
            steps=self.steps,
            random_start=self.random_start,
            loss=self.loss,
            generator=start,
        )


FAMILIES = ("fgsm", "pgd", "cw")
_PARAMETERS = ("steps", "alpha", "restarts", "kappa")


def ascent(
    view: FrozenModel, x: Tensor, y: Tensor, ball: Ball, steps: int, start: torch.Generator
) -> Iterator[Tensor]:
    """The points x^1, ..., x^steps of PGD on the cross-entropy with alpha = eps/4, from a random start."""
    return path(
        view, x, ball.start(x, start), y, ball=ball, alpha=ball.eps / 4, steps=steps, loss=cross_entropy
    )


def parse_attack(text: str) -> Attack:
    """Read an attack: ``fgsm``, ``pgd-20``, ``pgd-50-10`` (10 restarts), ``cw-30``, ``cw-30-k50`` (kappa 50).

    The long form names all parameters: ``pgd:steps=50,restarts=10,alpha=2/255``, ``cw:steps=30,kappa=50``.

    Raises:
        ValueError: it is none of these.

    >>> parse_attack("pgd-50-10").restarts
    10
    """
    cure = "write fgsm, pgd-20, pgd-50-10, cw-30, cw-30-k50 or pgd:steps=50,restarts=10,alpha=2/255"
    family, parameters = split(text)
    family, *short = family.split("-")
    if family not in FAMILIES or (parameters and short):
        raise ValueError(f"unknown attack {text!r}; {meant(family, FAMILIES)}{cure}")
    if family == "fgsm":
        only(parameters, (), (), "attack fgsm")
        if short:
            raise ValueError(f"unknown attack {text!r}; {cure}")
        return Attack("fgsm", steps=1, random_start=False, relative=1.0)
    for part, name in zip(short, ("steps", "restarts"), strict=False):
        parameters |= {"kappa": part[1:]} if part[:1] == "k" else {name: part}
    if len(short) > 2:
        raise ValueError(f"unknown attack {text!r}; {cure}")
    only(parameters, ("steps",), _PARAMETERS[1 : 4 if family == "cw" else 3], f"attack {family} ({cure})")
    values = {name: number(value, name) for name, value in parameters.items()}
    kappa = values.get("kappa", 0.0) if family == "cw" else None
    counts = {name: values.get(name, 1) for name in ("steps", "restarts")}
    whole = {name: int(v) if v == int(v) else v for name, v in counts.items()}
    return Attack(text, alpha=values.get("alpha"), kappa=kappa, **whole)  # type: ignore[arg-type]


def read_attacks(attacks: Sequence[str | Attack]) -> list[Attack]:
    """Attacks from their texts.

    Raises:
        ValueError: one is malformed, or given twice.
    """
    if isinstance(attacks, (str, bytes, Mapping)) or not isinstance(attacks, Iterable):
        raise ValueError(f"attacks must be a list such as ['pgd-20', 'cw-30'], got {brief(attacks)}")
    attacks = list(attacks)
    for a in attacks:
        instance(a, (str, Attack), "an attack", "such as 'pgd-20'")
    parsed = [parse_attack(a) if isinstance(a, str) else a for a in attacks]
    if len({a.name for a in parsed}) < len(parsed):
        raise ValueError(f"an attack is given twice: {', '.join(a.name for a in parsed)}")
    return parsed
