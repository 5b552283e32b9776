"""The search loop: proposers ask, the ledger answers; the best are judged again, longer and on more seeds.

1. **Explore.** Every space has a proposer. In turn each asks for a few points, which are trained under one
   seed, possibly shorter and on fewer samples, until the space's share of the budget is spent.
2. **Promote.** The best of each space are trained at full length under more seeds, in one or more rungs
   (successive halving: Jamieson and Talwalkar, 2016).
3. **Race.** The best of these get further seeds, one by one, all under the same ones. One that is worse than
   the leader by a paired difference whose interval excludes 0 drops out (Maron and Moore, 1994: Hoeffding
   races; here with Student's interval).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

from controlat.schedule_search.proposers import Proposer, Told
from controlat.schedule_search.space import Point, Space
from controlat.schedule_search.trials import Ledger, Question, Trial

__all__ = ["Branch", "Difference", "Plan", "Rung", "Search", "paired"]


class Rung(NamedTuple):
    """A fidelity of trials.

    Args:
        epochs: length of a run.
        points: training samples; None for all.
        seeds: number of seeds.
        keep: how many trials of each space are judged at it; all that are asked for where it is the first.
        until: epochs that are trained of a run; None for all.
        surface: whether the Hamiltonian of every candidate in every epoch is wanted too.
    """

    epochs: int
    points: int | None = None
    seeds: int = 1
    keep: int = 0
    until: int | None = None
    surface: bool = False


@dataclass(frozen=True)
class Plan:
    """How a search spends its budget.

    Args:
        budget: what is spent on exploring, in the unit below.
        price: of the mean cost n of a step, in units of J: gamma eta T.
        rungs: the first is that of exploring; the last is at full length.
        batch: points that a proposer is asked for at a time; it decides which trials are made, the number of
            processes does not.
        seeds: search seeds, in the order in which they are used.
        race: how many trials take part in the race.
        race_seeds: seeds at most of each of them.
        unit: of the budget, a field of `Answer`: ``gradients`` (evaluations, in samples) or ``seconds`` (of
            trainings, summed).
    """

    budget: float
    price: float
    rungs: tuple[Rung, ...]
    seeds: tuple[int, ...]
    batch: int = 8
    race: int = 3
    race_seeds: int = 8
    unit: str = "gradients"

    def __post_init__(self) -> None:
        needed = max(self.race_seeds, *(rung.seeds for rung in self.rungs))
        if len(self.seeds) < needed:
            raise ValueError(f"seeds must be at least {needed} for this plan, got {len(self.seeds)}")


@dataclass
class Branch:
    """A space with its proposer, and the share of the budget that it gets."""

    space: Space
    proposer: Proposer
    share: float
    trials: list[Trial] = field(default_factory=list)

    def spent(self, unit: str = "gradients") -> float:
        """What its trials took, in a unit of `Plan`."""
        return float(sum(getattr(a, unit) for trial in self.trials for a in trial.answers))


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The mean of a - b with its interval, infinite for fewer than two pairs.

    >>> paired([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    Difference(mean=1.0, low=1.0, high=1.0)
    """
    d = np.subtract(a, b)
    mean = float(d.mean())
    if len(d) < 2:
        return Difference(mean, -np.inf, np.inf)
    half = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    return Difference(mean, mean - half, mean + half)


@dataclass
class Search:
    """A search under way.

    Args:
        branches: what is searched.
        ledger: answers.
        plan: how the budget is spent.
        each: called after every training, with the best trial so far; None before there is one.
        made: all trials in the order in which they were made; those of a race again with every seed more.
    """

    branches: Sequence[Branch]
    ledger: Ledger
    plan: Plan
    each: Callable[[Trial | None], object] = lambda _: None
    made: list[Trial] = field(default_factory=list)
    promoted: list[Trial] = field(default_factory=list)
    raced: list[Trial] = field(default_factory=list)

    def run(self) -> Trial:
        """The winner.

        Raises:
            ValueError: every training failed.
        """
        self.explore()
        self.promoted = self._promote()
        self.raced = self._race([t for t in self.promoted if not t.failed][: self.plan.race])
        return self.raced[0]

    @property
    def best(self) -> Trial | None:
        """The trial of smallest J so far, at the highest fidelity that there is."""
        for trials in (self.raced, self.promoted, [t for b in self.branches for t in b.trials]):
            good = [t for t in trials if not t.failed]
            if good:
                return min(good, key=self._rank)
        return None

    def _j(self, trial: Trial) -> float:
        return trial.mean(self.plan.price)

    def _rank(self, trial: Trial) -> tuple[float, float]:
        """Its place: those that were trained the furthest first, by their J."""
        return (math.inf if trial.failed else -trial.reach, self._j(trial))

    def explore(self) -> None:
        """Ask each proposer in turn, until its share of the budget is spent or it has nothing left."""
        open_ = list(self.branches)
        while open_:
            for branch in list(open_):
                points = branch.proposer.ask(self.plan.batch)
                rung = self.plan.rungs[0]._replace(**getattr(branch.proposer, "fidelity", {}))
                trials = self._judged([(branch.space, p) for p in points], rung)
                told = [
                    Told(t.point, None if t.failed else self._j(t), t.error(self.plan.price), t.answers)
                    for t in trials
                ]
                branch.proposer.tell(told)
                branch.trials += trials
                if not points or branch.spent(self.plan.unit) >= branch.share * self.plan.budget:
                    open_.remove(branch)

    def _promote(self) -> list[Trial]:
        """The best of every space at the last rung, best first."""
        ranked = [sorted(branch.trials, key=self._rank) for branch in self.branches]
        for rung in self.plan.rungs[1:]:
            kept = [t for trials in ranked for t in _distinct(trials)[: rung.keep]]
            judged = self._judged([(t.space, t.point) for t in kept], rung)
            spaces = [branch.space for branch in self.branches]
            ranked = [sorted((t for t in judged if t.space is s), key=self._j) for s in spaces]
        every = sorted((t for trials in ranked for t in trials), key=self._j)
        if all(t.failed for t in every):
            reason = next((a.error for t in every for a in t.answers if a.error), "no trial was made")
            raise ValueError(f"every training of the search failed; the first one: {reason}")
        return every

    def _race(self, contenders: list[Trial]) -> list[Trial]:
        """The contenders on more seeds, the winner first, those that dropped out last."""
        out: list[Trial] = []
        last = self.plan.rungs[-1]
        for count in range(last.seeds + 1, self.plan.race_seeds + 1):
            if len(contenders) < 2:
                break
            pairs = [(t.space, t.point) for t in contenders]
            contenders = sorted(self._judged(pairs, last._replace(seeds=count)), key=self._j)
            lead = contenders[0].values(self.plan.price)
            behind = [
                t for t in contenders[1:] if t.failed or paired(t.values(self.plan.price), lead).low > 0
            ]
            out = behind + out
            contenders = [t for t in contenders if t not in behind]
        return contenders + out

    def _judged(self, pairs: Iterable[tuple[Space, Point]], rung: Rung) -> list[Trial]:
        """Trials of points at a rung: all their trainings together."""
        pairs = list(pairs)
        seeds = self.plan.seeds[: rung.seeds]
        questions = [
            [
                Question(
                    text=space.text_of(point),
                    seed=seed,
                    epochs=rung.epochs,
                    points=rung.points,
                    until=rung.until,
                    surface=rung.surface,
                )
                for seed in seeds
            ]
            for space, point in pairs
        ]
        self.ledger.ask([q for each in questions for q in each], lambda: self.each(self.best))
        answers = self.ledger.answers
        trials = [
            Trial(space, point, tuple(asked), tuple(answers[q] for q in asked))
            for (space, point), asked in zip(pairs, questions, strict=True)
        ]
        self.made += trials
        return trials


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """Trials without those whose schedule stands before."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.text, trial)
    return list(first.values())
