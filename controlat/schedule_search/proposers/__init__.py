"""Proposers, one file each: they ask for points of a search space, and are told what came of them.

The folder is the registry. Each file assigns its class to `PROPOSER`; the arguments of its constructor behind
space and seed are its options. The user's own is named by ``package.module:Class``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from controlat._util import registry
from controlat.schedule_search.space import Point, Space
from controlat.schedule_search.trials import Answer

__all__ = ["Proposer", "Told", "build", "check", "names", "price_of"]


class Told(NamedTuple):
    """What a proposer is told about a point.

    Args:
        point: as it was asked for.
        value: mean of J over seeds; None where the trial failed.
        error: standard error of the mean; None where one seed was judged.
        answers: of every seed.
    """

    point: Point
    value: float | None
    error: float | None = None
    answers: tuple[Answer, ...] = ()


@runtime_checkable
class Proposer(Protocol):
    """Proposes points of a search space for trials.

    It is deterministic: the same space, seed and history of calls give the same points. A search that was
    stopped goes on by telling a new one all that happened, so that a proposer needs no files of its own.

    It may have an attribute `fidelity`, {field of `controlat.schedule_search.loop.Rung`: value}: how the
    points of the last `ask` are judged where that differs from the plan, such as under several seeds.
    """

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points, at most `count`; none if there is nothing left to propose."""

    def tell(self, trials: Sequence[Told]) -> None:
        """What came of the points of the last `ask`, in their order."""


def names() -> tuple[str, ...]:
    """The proposers in this folder."""
    return registry.names(__name__)


def check(name: str) -> Any:
    """The class of a proposer.

    Raises:
        ValueError: there is none of that name.
    """
    kind = registry.import_path(name) if ":" in name else registry.member(__name__, name).PROPOSER
    if not callable(kind):
        raise ValueError(f"proposer {name!r} is not a class or factory")
    return kind


def build(name: str, space: Space, seed: int, options: Mapping[str, Any] | None = None) -> Proposer:
    """Make a proposer: by its file name, or the user's own class by ``package.module:Class``.

    Args:
        name: such as ``"tpe"``.
        space: what is searched.
        seed: of its random numbers.
        options: further keyword arguments of its constructor.

    Raises:
        ValueError: unknown proposer, or an option that it does not take; the message lists what it takes.

    >>> space = Space("pgd:steps=1~9~whole,alpha=0.01~0.1~log", 10)
    >>> build("random", space, seed=0).ask(1) == build("random", space, seed=0).ask(1)
    True
    """
    kind = check(name)
    takes = inspect.signature(kind)
    try:
        takes.bind(space, seed, **(options or {}))
    except TypeError as error:
        listed = ", ".join(list(takes.parameters)[2:]) or "none"
        raise ValueError(f"proposer {name!r}: {error}; its options: {listed}") from None
    made = kind(space, seed, **(options or {}))
    if not isinstance(made, Proposer):
        raise ValueError(f"proposer {name!r} must have ask(count) and tell(trials)")
    return made


def price_of(told: Told) -> float:
    """The price of the mean cost n of a step that J was told with, J = Phi + price n; 0 where n is 0.

    >>> price_of(Told({}, 1.0, answers=(Answer(0.25, 3.0, 0, 0), Answer(0.75, 1.0, 0, 0))))
    0.25
    """
    phi = [a.phi for a in told.answers if a.phi is not None]
    n = float(np.mean([a.mean_cost for a in told.answers])) if told.answers else 0.0
    if told.value is None or len(phi) < len(told.answers) or n == 0:
        return 0.0
    return float((told.value - np.mean(phi)) / n)
