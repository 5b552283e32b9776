"""Amata's criterion (13) over any horizon, from exact costates.

With DeltaH_t(v) of `controlat.pmp.hamiltonian`, in units of the objective J = Phi + gamma eta sum n:

    G = sum_t max_v DeltaH_t(v),        C = G / (eta T),

eta the mean learning rate and T the number of steps. Where a control is held over a block of steps (an
epoch), DeltaH is summed over the block before the maximum is taken: a schedule cannot change more often.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from controlat.control.space import Control
from controlat.pmp.hamiltonian import Gains
from controlat.pmp.objective import Outcome
from controlat.pmp.surface import Array

__all__ = ["Block", "Criterion"]


@dataclass(frozen=True)
class Block:
    """Steps that share one control: what each candidate would be worth in all of them.

    Args:
        index: number of the block.
        control: u in the block.
        maximiser: the best candidate v.
        gain: sum over the block of DeltaH(v), >= 0.
        size: sum over the block of ||S(z, v) - S(z, u)||^2.
        looked: number of steps that were looked at.
        steps: number of steps.
    """

    index: int
    control: Control
    maximiser: Control
    gain: float
    size: float
    looked: int
    steps: int


class _Part(NamedTuple):
    """What is known of a block: its steps that were looked at, u and the candidates that all of these have,
    where each has them, and the number of all its steps."""

    members: list[Gains]
    controls: list[Control]
    where: list[list[int]]
    steps: int

    @classmethod
    def of(cls, members: list[Gains], steps: int) -> _Part:
        places = [{v: i for i, v in reversed(list(enumerate(g.controls)))} for g in members]
        one = all(g.controls[0] == members[0].controls[0] for g in members)  # not where a knob is dithered
        common = [v for v in members[0].controls[one:] if all(v in known for known in places)]
        where = [[0, *(known[v] for v in common)] for known in places]
        return cls(members, [members[0].controls[0], *common], where, steps)


@dataclass(frozen=True)
class Criterion:
    """C over several horizons, of one roll-out.

    Args:
        looked: what was learnt at every step that was looked at, in order.
        blocks: number of the block that each step of the roll-out belongs to.
        first: number of the first step.
        rate: eta, the mean learning rate: the unit of time and of cost.
        gamma: price of one evaluation per sample.
        phi: terminal cost at the end.
        evaluations: sum over steps of n(u_t).
        lower: a lower bound of the terminal cost.
        norms: (step, ||p||) of the longest horizon along the run.
        dropped: what the costates leave out.
        spent: gradient evaluations of costates and scoring, in samples.
        replayed: gradient evaluations of taking steps again, in samples.
    """

    looked: tuple[Gains, ...]
    blocks: tuple[int, ...]
    first: int
    rate: float
    gamma: float
    phi: float
    evaluations: float
    lower: float
    norms: tuple[tuple[int, float], ...]
    dropped: tuple[str, ...]
    spent: int
    replayed: int

    @property
    def horizons(self) -> tuple[int, ...]:
        """The horizons, in steps; the last one is the longest."""
        return tuple(sorted(self.looked[0].rewards))

    def _known(self, horizon: int | None) -> int:
        """A horizon that was examined; the whole roll-out where none is given."""
        if horizon is not None and horizon not in self.horizons:
            raise ValueError(f"horizon {horizon} was not examined; there are {self.horizons}")
        return self.horizons[-1] if horizon is None else horizon

    @property
    def steps(self) -> int:
        """T, the number of steps of the roll-out."""
        return len(self.blocks)

    @property
    def price(self) -> float:
        """gamma eta, the price of one evaluation per sample in units of J."""
        return self.gamma * self.rate

    @property
    def objective(self) -> float:
        """J = Phi + gamma eta sum n."""
        return Outcome(phi=self.phi, evaluations=self.evaluations).objective(self.price)

    def best(self, horizon: int | None = None, rho: float = 0.0) -> list[Block]:
        """For every block the candidate with the largest gain, less (rho/2) ||DeltaS||^2.

        Sums over the steps that were looked at stand for those over all steps of the block.
        """
        h = self._known(horizon)
        return [self._best(index, h, rho) for index in self._parts]

    def _best(self, index: int, h: int, rho: float) -> Block:
        members, names, _, total = self._parts[index]
        scale = total / len(members)
        value, size = self._table(index, h)
        worth = scale * (value - rho / 2 * size).sum(0)
        i = int(np.argmax(worth)) if worth.max() > 0 else 0
        gain, moved = float(worth[i]), float(scale * size[:, i].sum())
        return Block(index, names[0], names[i], gain, moved, len(members), total)

    @functools.cached_property
    def _parts(self) -> dict[int, _Part]:
        """What is known of every block, by its number."""
        members: dict[int, list[Gains]] = {index: [] for index in self.blocks}
        for g in self.looked:
            members[self.blocks[g.number - self.first]].append(g)
        steps = Counter(self.blocks)
        return {index: _Part.of(looked, steps[index]) for index, looked in members.items()}

    def _table(self, index: int, h: int) -> tuple[Array, Array]:
        """Values and sizes (steps looked at, candidates) of a block's candidates, u_t of each step first."""
        members, _, where, _ = self._parts[index]
        value = np.stack([g.value(h, self.price)[w] for g, w in zip(members, where, strict=True)])
        size = np.stack([g.sizes[w] for g, w in zip(members, where, strict=True)])
        return value, size

    def surface(self, index: int, horizon: int | None = None) -> list[tuple[Control, float]]:
        """(v, sum of DeltaH(v) over the block) for every candidate of a block, u first."""
        h = self._known(horizon)
        members, names, _, total = self._parts[index]
        worth = self._table(index, h)[0].sum(0) * total / len(members)
        return list(zip(names, map(float, worth), strict=True))

    def total(self, horizon: int | None = None, rho: float = 0.0) -> float:
        """G, the sum over blocks, in units of J."""
        return sum(b.gain for b in self.best(horizon, rho))

    def value(self, horizon: int | None = None, rho: float = 0.0) -> float:
        """C = G / (eta T)."""
        return self.total(horizon, rho) / (self.rate * self.steps)

    def cosines(self, horizon: int | None = None) -> list[float]:
        """Cosine between p_{t+1} and S(z, v) - S(z, u), v the maximiser of the block: mean for every block.

        Near 0 the costate hardly sees what the maximiser does, and noise decides.
        """
        h = self._known(horizon)
        means = []
        for block in self.best(h):
            members = self._parts[block.index].members
            means.append(float(np.mean([g.cosine(h)[_index(g, block.maximiser)] for g in members])))
        return means

    @property
    def growth(self) -> float:
        """||p|| after the first step that was looked at over ||p|| at the end, for the longest horizon."""
        return self.norms[0][1] / self.norms[-1][1] if self.norms[-1][1] > 0 else math.nan

    def per_step(self, horizon: int | None = None) -> Array:
        """max_v DeltaH_t(v) / eta at every step that was looked at: C if u could change at every step."""
        h = self._known(horizon)
        return np.array([g.value(h, self.price).max() / self.rate for g in self.looked])

    def per_block(self, horizon: int | None = None) -> list[float]:
        """C of every block."""
        return [b.gain / (self.rate * b.steps) for b in self.best(horizon)]

    def interval(self, horizon: int | None = None) -> tuple[float, float] | None:
        """95 % interval of this roll-out's C, of whose steps some were looked at (Student t), not below 0.

        Blocks are strata of a finite population: the variance of a sum is the sum of their variances, and a
        block whose steps were all looked at has none. Maximisers are held fixed; where u is the best, the
        upper end has what the second best might gain. None where one step stands for several.

        Source:
            Cochran (1977), equation 5.14, for strata.
        """
        h = self._known(horizon)
        total, variance, degrees = 0.0, 0.0, 0
        seconds: list[tuple[float, float]] = []
        for block in self.best(h):
            n, left = block.looked, 1 - block.looked / block.steps
            if left == 0:
                total += block.gain
                continue
            if n < 2:
                return None
            value, _ = self._table(block.index, h)
            mean, spread = block.steps * value.mean(0), block.steps * value.std(0, ddof=1) * (left / n) ** 0.5
            degrees += n - 1
            if block.gain > 0:
                i = int(np.argmax(mean))
                total, variance = total + block.gain, variance + float(spread[i]) ** 2
            elif len(mean) > 1:
                i = 1 + int(np.argmax(mean[1:]))
                seconds.append((float(mean[i]), float(spread[i])))
        t = float(stdtrit(degrees, 0.975)) if degrees else 0.0
        half, more = t * variance**0.5, sum(max(0.0, m + t * s) for m, s in seconds)
        unit = self.rate * self.steps
        return max(0.0, total - half) / unit, (total + half + more) / unit

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "looked"}
        return plain | {"looked": [g.to_json() for g in self.looked]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Criterion:
        """The criterion that `to_json` described."""
        looked = tuple(Gains.from_json(g) for g in plain["looked"])
        norms = tuple((int(n), float(p)) for n, p in plain["norms"])
        others = {"blocks": tuple(plain["blocks"]), "dropped": tuple(plain["dropped"]), "norms": norms}
        known = {f.name: plain[f.name] for f in fields(cls)}
        return cls(**{**known, **others, "lower": float(plain["lower"]), "looked": looked})


def _index(g: Gains, v: Control) -> int:
    return g.controls.index(v) if v in g.controls else 0
