"""The search loop: proposers ask, the ledger answers; the best are judged again, longer and on more seeds.

1. **Explore.** Every space has a proposer. In turn each asks for a few points, which are trained under one
   seed, possibly shorter and on fewer samples, until the space's share of the budget is spent.
2. **Promote.** The best are trained at full length, in one or more rungs, under seeds of their own: what is
   best of many under one seed owes much to luck there.
3. **Race.** Those get further seeds, all the same ones. After each round the worse half drops out (sequential
   halving: Karnin et al., 2013), and so does what is worse than the leader by a paired difference whose
   interval excludes 0 (Maron and Moore, 1994: Hoeffding races; here with Student's interval).
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
from controlat.schedule_search.trials import Answer, Ledger, Question, Trial

__all__ = ["Branch", "Difference", "Plan", "Rung", "Search", "paired"]


_RACE = 1.5  # what a race costs that halves its field and doubles its seeds three times, in promotions


class Rung(NamedTuple):
    """A fidelity of trials.

    Args:
        epochs: length of a run.
        points: training samples; None for all.
        seeds: number of seeds.
        first: the place of the first of them among those of the plan.
        until: epochs that are trained of a run; None for all.
        surface: whether the Hamiltonian of every candidate in every epoch is wanted too.
    """

    epochs: int
    points: int | None = None
    seeds: int = 1
    first: int = 0
    until: int | None = None
    surface: bool = False


@dataclass(frozen=True)
class Plan:
    """How a search spends its budget.

    Args:
        budget: what the search may spend, in the unit below. It goes on until the budget is spent, and may
            overdraw it by what is asked for at a time.
        price: of the mean cost n of a step, in units of J: gamma eta T.
        rungs: the first is that of exploring; the last is at full length.
        batch: points that a proposer is asked for at a time; it decides which trials are made, the number of
            processes does not.
        seeds: search seeds, in the order in which they are used.
        samples: of the whole training set.
        rate: gradient evaluations of a training, with Phi, over those of its steps alone.
        exploring: the share of the budget for exploring.
        race_seeds: seeds at most of what takes part in the race.
        unit: of the budget, a field of `Answer`: ``gradients`` (evaluations, in samples) or ``seconds`` (of
            trainings, summed).
    """

    budget: float
    price: float
    rungs: tuple[Rung, ...]
    seeds: tuple[int, ...]
    samples: int = 1
    rate: float = 1.0
    batch: int = 8
    exploring: float = 0.5
    race_seeds: int = 8
    unit: str = "gradients"

    def __post_init__(self) -> None:
        needed = max(rung.first + max(rung.seeds, self.race_seeds) for rung in self.rungs)
        if len(self.seeds) < needed:
            raise ValueError(f"seeds must be at least {needed} for this plan, got {len(self.seeds)}")

    def size(self, points: int | None) -> int:
        """The number of training samples that a rung's `points` stands for."""
        return points or self.samples


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
        self.raced = self._race([t for t in self.promoted if not t.failed])
        return self.raced[0]

    @property
    def answers(self) -> dict[Question, Answer]:
        """What came of every training of the search."""
        return {q: a for trial in self.made for q, a in zip(trial.questions, trial.answers, strict=True)}

    @property
    def spent(self) -> float:
        """What all trainings took, in the plan's unit."""
        return float(sum(getattr(a, self.plan.unit) for a in self.answers.values()))

    @property
    def best(self) -> Trial | None:
        """The trial of smallest J so far, at the highest fidelity that there is."""
        for trials in (self.raced, self.promoted, [t for b in self.branches for t in b.trials]):
            good = [t for t in trials if not t.failed]
            if good:
                return min(good, key=self.rank)
        return None

    def _j(self, trial: Trial) -> float:
        return trial.mean(self.plan.price)

    def rank(self, trial: Trial) -> tuple[float, float]:
        """Its place: those that were trained the furthest first, by their J."""
        return (math.inf if trial.failed else -trial.reach, self._j(trial))

    def explore(self) -> None:
        """Ask each proposer in turn, until its share of the budget is spent or it has nothing left."""
        open_ = list(self.branches)
        while open_:
            for branch in list(open_):
                share = branch.share * (self.plan.exploring if len(self.plan.rungs) > 1 else 1.0)
                left = share * self.plan.budget - branch.spent(self.plan.unit)
                points = branch.proposer.ask(self._affordable(left, branch.trials or self.made))
                rung = self.plan.rungs[0]._replace(**getattr(branch.proposer, "fidelity", {}))
                trials = self._judged([(branch.space, p) for p in points], rung)
                told = [
                    Told(t.point, None if t.failed else self._j(t), t.error(self.plan.price), t.answers)
                    for t in trials
                ]
                branch.proposer.tell(told)
                branch.trials += trials
                if not points or branch.spent(self.plan.unit) >= share * self.plan.budget:
                    open_.remove(branch)

    def _affordable(self, left: float, like: Sequence[Trial]) -> int:
        """How many trials to ask for at a time: no more than what is left pays for, by what others took."""
        each = np.mean([getattr(a, self.plan.unit) for t in like for a in t.answers]) if like else left
        return int(np.clip(left // max(float(each), 1e-9), 1, self.plan.batch))

    def _promote(self) -> list[Trial]:
        """The best at the last rung, best first: at every rung as many as its share of the budget allows."""
        above = self.plan.rungs[1:]
        ranked = _distinct(sorted((t for branch in self.branches for t in branch.trials), key=self.rank))
        for i, rung in enumerate(above):
            left = self.plan.budget - self.spent
            costs = np.cumsum([self._cost(t, rung) for t in ranked])
            share = left / (len(above) - i + _RACE)
            paid, at_most = (int(np.searchsorted(costs, money, "right")) for money in (share, left))
            kept = [t for t in ranked if not t.failed][: max(1, paid, min(2, at_most))]
            if len(kept) == 1 and kept[0].whole(rung.epochs, rung.points):  # nothing to compare it with
                return kept
            judged = self._judged([(t.space, t.point) for t in kept], rung)
            ranked = sorted(judged, key=self._j)
        if all(t.failed for t in ranked):
            reason = next((a.error for t in self.made for a in t.answers if a.error), "no trial was made")
            raise ValueError(f"every training of the search failed; the first one: {reason}")
        return ranked

    def _cost(self, trial: Trial, rung: Rung) -> float:
        """What a trial will take at a rung, in the plan's unit, by its mean cost n."""
        n = float(np.mean([a.mean_cost for a in trial.answers])) / trial.reach
        gradients = self.plan.rate * n * self.plan.size(rung.points) * rung.epochs * rung.seeds
        answers = [a for t in self.made for a in t.answers]
        took, of = (sum(getattr(a, key) for a in answers) for key in (self.plan.unit, "gradients"))
        return float(gradients * took / of) if of else 0.0

    def _race(self, contenders: list[Trial]) -> list[Trial]:
        """The contenders on more seeds, the winner first, those that dropped out last."""
        out, last, count = list[Trial](), self.plan.rungs[-1], self.plan.rungs[-1].seeds
        while len(contenders) > 1 and count < self.plan.race_seeds:
            halved = contenders[: max(2, -(-len(contenders) // 2))]
            more = min(2 * count, self.plan.race_seeds)
            costs = np.cumsum([self._cost(t, last._replace(seeds=more - count)) for t in halved])
            halved = halved[: int(np.searchsorted(costs, self.plan.budget - self.spent, side="right"))]
            if len(halved) < 2:
                break
            count = more
            judged = self._judged([(t.space, t.point) for t in halved], last._replace(seeds=count))
            judged = sorted(judged, key=self._j)
            lead = judged[0].values(self.plan.price)
            behind = [t for t in judged[1:] if t.failed or paired(t.values(self.plan.price), lead).low > 0]
            out = behind + contenders[len(halved) :] + out
            contenders = [t for t in judged if t not in behind]
        return contenders + out

    def _judged(self, pairs: Iterable[tuple[Space, Point]], rung: Rung) -> list[Trial]:
        """Trials of points at a rung: all their trainings together."""
        pairs = list(pairs)
        seeds = self.plan.seeds[rung.first :][: rung.seeds]
        if len(seeds) < rung.seeds:
            raise ValueError(f"{rung.seeds} seeds are asked for at a time; the search has {len(seeds)}")
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
        asked = [tuple(map(self.ledger.answered, each)) for each in questions]
        trials = [
            Trial(space, point, each, tuple(answers[q] for q in each))
            for (space, point), each in zip(pairs, asked, strict=True)
        ]
        self.made += trials
        return trials


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """Trials without those whose schedule stands before."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.text, trial)
    return list(first.values())
