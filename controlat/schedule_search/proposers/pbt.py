"""Population based training: between stages of training, copies of the best members replace the worst."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from controlat._util.checks import number, whole
from controlat._util.texts import short
from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Space

__all__ = ["PBT", "PROPOSER"]

Member = dict[str, float]  # the coordinates of a point in the unit cube, by the names of its parameters


class PBT:
    """A population of trainings that is judged between the stages of training.

    The space must be one of stages: controls that are constant but for given times, from each of which on one
    or more of the parameters act, as in ``step:steps=0~8:0~8,at=6,alpha=0.01~0.1``. All members are trained
    to the end of a stage, and judged by J there: Phi of the state, with the cost so far. Then copies of the
    best replace the worst (exploit), and their controls from there on are changed at random (explore). A
    member that is not replaced keeps its controls, as constants. Every member is a schedule, and after the
    last stage a whole trial; then a new population begins.

    All members have the same seed: the schedule of a copy begins as its parent's does, hence it goes on from
    the same state, which the judge has kept. A copy costs its new stage only.

    Args:
        space: what is searched.
        seed: of its random numbers.
        population: number of members.
        replaced: share of them that is replaced after a stage, at most 1/2; as many may be copied.
        spread: by how much a parameter is changed, as a standard deviation in units of its range.
        renewed: the probability with which it is drawn anew in place of that.

    Raises:
        ValueError: a number is out of range, or it is no space of stages.

    Source:
        Jaderberg et al. (2017), "Population based training of neural networks", algorithm 1, with truncation
        selection.

    >>> space = Space("step:steps=0~8:0~8,at=6,alpha=0.1,rounding=dither", 12)
    >>> pbt = PBT(space, seed=0, population=2)
    >>> first = pbt.ask(4)
    >>> pbt.fidelity["until"], [p["steps[0]"] == p["steps[1]"] for p in first]
    (6, [True, True])
    >>> pbt.tell([Told(p, value) for p, value in zip(first, (0.3, 0.1))])
    >>> second = pbt.ask(4)
    >>> pbt.fidelity["until"], {p["steps[0]"] for p in second} == {first[1]["steps[0]"]}
    (None, True)
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        population: int = 8,
        replaced: float = 0.5,
        spread: float = 0.2,
        renewed: float = 0.25,
    ) -> None:
        self.space, self._size = space, whole(population, "population", 2)
        for name, value, high in (
            ("replaced", replaced, 0.5),
            ("spread", spread, 1.0),
            ("renewed", renewed, 1.0),
        ):
            if not 0 <= number(value, name) <= high:
                raise ValueError(f"{name} must be from 0 to {high:g}, got {value:g}")
        self._moved, self._spread, self._renewed = int(replaced * population), spread, renewed
        self._onset = {p.name: int(t) for p, t in zip(space.parameters, _onsets(space), strict=True)}
        self._ends: list[int | None] = [*sorted({t for t in self._onset.values() if t}), None]
        self._rng = np.random.default_rng(seed)
        self._design = space.design(seed)
        self._begin()

    @property
    def fidelity(self) -> dict[str, int | None]:
        """How the points of the last `ask` are judged: up to the end of the present stage."""
        return {"epochs": self.space.epochs, "until": self._ends[self._stage]}

    def ask(self, count: int) -> list[dict[str, float]]:
        """Members that are not judged yet in the present stage, at most `count`."""
        if len(self._values) == self._size:
            self._next()
        waiting = self._members[len(self._values) :][:count]
        return [self.space.point([m[p.name] for p in self.space.parameters]) for m in waiting]

    def tell(self, trials: Sequence[Told]) -> None:
        """What they came to; a failed one is worst."""
        self._values += [np.inf if t.value is None else t.value for t in trials]

    def _begin(self) -> None:
        """A new population, whose first controls fill their space evenly."""
        self._stage, self._values = 0, list[float]()
        points = list(itertools.islice(self._design, self._size))
        drawn = [dict(zip(p, self.space.shares(p), strict=True)) for p in points]
        self._members = [self._continued(m, 0) for m in drawn]

    def _next(self) -> None:
        """The population of the next stage."""
        start = self._ends[self._stage]
        good = int(np.isfinite(self._values).sum())
        if start is None or not good:
            self._begin()
            return
        order = np.argsort(self._values, kind="stable")
        best = order[: min(max(self._moved, 1), good)]
        for i in order[min(self._size - self._moved, good) :]:
            self._members[i] = self._explored(self._members[self._rng.choice(best)], start)
        self._stage, self._values = self._stage + 1, []

    def _explored(self, parent: Member, start: int) -> Member:
        """A copy of a member, with other controls in the stage that begins at an epoch."""
        copy = dict(parent)
        for name, onset in self._onset.items():
            if onset == start:
                near = parent[name] + self._spread * self._rng.standard_normal()
                copy[name] = float(np.clip(near, 0, 1))
                if self._rng.random() < self._renewed:
                    copy[name] = float(self._rng.random())
        return self._continued(copy, start)

    def _continued(self, member: Member, start: int) -> Member:
        """The member whose parameters that begin to act after an epoch have the values of those before."""
        for name, onset in self._onset.items():
            before = _before(name)
            if onset > start and before in member:
                member[name] = member[before]
        return member


def _before(name: str) -> str:
    """The name of the parameter before one of several: of ``steps[1]``, ``steps[0]``."""
    base, _, index = name.rstrip("]").partition("[")
    return f"{base}[{int(index) - 1}]" if index else ""


def _onsets(space: Space) -> list[float]:
    """The time at which each parameter begins to act, in epochs: the first at which it changes a control.

    It is looked for with the other parameters at their smallest, middle and largest values; 0 for a parameter
    that never changes one.

    Raises:
        ValueError: it is no space of stages: controls change at other times.
    """
    onsets, changes = [math.inf] * len(space.parameters), set[float]()
    for level in (0.0, 0.5, 1.0):
        base = [level] * len(space.parameters)
        for i, onset in enumerate(onsets):
            probes = [space.schedule(space.point([*base[:i], x, *base[i + 1 :]])) for x in (0.0, 0.5, 1.0)]
            a = probes[0]
            times = [piece * a.resolution for piece in range(a.pieces)]
            onsets[i] = min(onset, next((t for t in times if any(b(t) != a(t) for b in probes)), math.inf))
            changes |= {t for s, t in itertools.pairwise(times) if any(b(t) != b(s) for b in probes)}
    if not changes or not changes <= set(onsets):
        raise ValueError(
            f"pbt takes a space of stages, as --spaces stages: one whose controls are constant but for given "
            f"times, from each of which on a parameter acts; got {short(space.text)!r}"
        )
    return [0.0 if t == math.inf else t for t in onsets]


PROPOSER = PBT
