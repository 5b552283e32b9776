"""What was learnt of the Hamiltonian at one instant, and the gap of a control in it.

The M probe batches' gradients of every candidate enter through their inner products only; plain, unbiased and
cross-fitted values and the jackknife all follow from those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from controlat._util.checks import number
from controlat.control.space import Control

__all__ = ["FORMS", "Array", "Gap", "Surface", "interval"]

FORMS = ("norm", "costate")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """C at one instant, in one form, with what it consists of.

    Args:
        form: ``"norm"`` or ``"costate"``.
        value: the gap, >= 0; 0 where u maximises the Hamiltonian over the candidates.
        control: u_t.
        maximiser: the best candidate v.
        reward: (s q(v), s q(u)), the two first terms.
        cost: (gamma n(v), gamma n(u)), the two second terms.
        unbiased: the gap of the unbiased estimates of ||E g||^2 (None with one probe batch). The plain norm
            of a batch mean exceeds it by tr(Cov)/B.
        cross_fitted: v chosen on one half of the probe and scored by the unbiased estimate on the other, both
            ways; it may be negative. The plain maximum over noisy values is biased upward. None where a half
            has no unbiased estimate: with fewer than four probe batches in the norm form, with one in the
            costate form.
        jackknife: the gap between maximiser and u without each probe batch in turn.
        spent: gradient evaluations that it took, in samples.
        dropped: what the number leaves out, by name.
        doubt: where u is the best, the largest upper end of the intervals of all candidates' gains over it.
    """

    form: str
    value: float
    control: Control
    maximiser: Control
    reward: tuple[float, float]
    cost: tuple[float, float]
    unbiased: float | None
    cross_fitted: float | None
    jackknife: tuple[float, ...]
    spent: int
    dropped: tuple[str, ...] = ()
    doubt: float = 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the value over probe batches: jackknife, Student t, and no number below 0.

        The maximiser is held fixed. As C >= 0, the part of an interval at and above 0 covers it as often as
        the whole does. Where u is the best, its own gain has no noise: the upper end is `doubt`.
        """
        return interval(self.value, self.jackknife, least=0.0, more=self.doubt)

    def __str__(self) -> str:
        """The gap in one line, with what it leaves out."""
        bounds = "" if self.interval is None else " [{:.3g}, {:.3g}]".format(*self.interval)
        better = "u is the best" if self.maximiser == self.control else f"better: {_knobs(self.maximiser)}"
        left_out = f"; leaves out: {'; '.join(self.dropped)}" * bool(self.dropped)
        return f"C = {self.value:.3g}{bounds} at {_knobs(self.control)}, {better}{left_out}"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        names = ("form", "value", "reward", "cost", "unbiased", "cross_fitted")
        return {name: getattr(self, name) for name in names} | {
            "control": dict(self.control),
            "maximiser": dict(self.maximiser),
            "jackknife": list(self.jackknife),
            "interval": self.interval,
            "spent": self.spent,
            "dropped": list(self.dropped),
            "doubt": self.doubt,
        }


def _knobs(u: Control) -> str:
    return ", ".join(f"{name}={value:.3g}" for name, value in u.items())


def interval(
    value: float, jackknife: Sequence[float], least: float = -math.inf, more: float = 0.0
) -> tuple[float, float] | None:
    """95 % interval from leave-one-out values: value +- t sqrt((m - 1)/m sum (j - mean j)^2), cut at `least`.

    Args:
        value: the estimate.
        jackknife: the m estimates without each part in turn; None comes back where there are less than two.
        least: what is estimated is at least this: numbers below it are cut off, which costs no coverage.
        more: what is added at the upper end.

    Source:
        Tukey (1958), for the jackknife.
    """
    if len(jackknife) < 2:
        return None
    half = float(_half(np.asarray(jackknife)))
    return max(least, value - half), max(least, value + half + more)


def _half(jackknife: Array) -> Array:
    """Half the interval, of values without each of m parts, (m, ...)."""
    m = len(jackknife)
    return np.asarray(stdtrit(m - 1, 0.975) * np.sqrt((m - 1) * jackknife.var(0)))


@dataclass(frozen=True)
class Surface:
    """Everything that was learnt of the Hamiltonian at one instant; C for any gamma follows without a run.

    Args:
        controls: the V candidates.
        evaluations: (V,) n(v), gradient evaluations per sample of one outer step.
        gram: (V, M, M) inner products of the gradients of the M probe batches.
        costate: (V, M) inner products of grad Phi with them, or None.
        scale: s_t.
        spent: gradient evaluations spent, in samples.
        dropped: what its numbers leave out, by name.
    """

    controls: tuple[Control, ...]
    evaluations: Array
    gram: Array
    costate: Array | None
    scale: float
    spent: int
    dropped: tuple[str, ...] = ()

    @property
    def batches(self) -> int:
        """M, the number of probe batches."""
        return int(self.gram.shape[1])

    def reward(self, form: str, members: Sequence[int] | None = None, *, unbiased: bool = False) -> Array:
        """s q(v) for every candidate, (V,), from the probe batches `members` (all by default).

        Raises:
            ValueError: unknown form, or no terminal cost was given for ``"costate"``; an unbiased squared
                norm of one batch.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        chosen = np.arange(self.batches) if members is None else np.asarray(members)
        if form == "costate":
            if self.costate is None:
                raise ValueError("form 'costate' needs a terminal cost: give held-out data")
            return np.asarray(self.scale * self.costate[:, chosen].mean(1))
        gram = self.gram[np.ix_(np.arange(len(self.controls)), chosen, chosen)]
        total, m = gram.sum((1, 2)), len(chosen)
        if unbiased:
            if m < 2:
                raise ValueError(f"an unbiased squared norm needs at least two probe batches, got {m}")
            return np.asarray(self.scale * (total - np.trace(gram, axis1=1, axis2=2)) / (m * (m - 1)))
        return np.asarray(self.scale * total / m**2)

    def gap(self, control: Control, gamma: float, form: str = "norm") -> Gap:
        """The gap of `control`, which is one of the candidates, at a price of gamma per evaluation.

        Raises:
            ValueError: `control` was not scored, or gamma is negative or not finite.
        """
        if control not in self.controls:
            raise ValueError(f"{control} is not among the {len(self.controls)} candidates that were scored")
        gamma = number(gamma, "gamma")
        if gamma < 0:
            raise ValueError(f"gamma must be >= 0, got {gamma:g}")
        u, price = self.controls.index(control), gamma * self.evaluations
        reward = self.reward(form)
        plain = reward - price
        best = self._argmax(plain, u)
        every, unbiased, crossed, doubt = range(self.batches), None, None, 0.0
        jackknife: tuple[float, ...] = ()
        if self.batches > 1:
            value = self.reward(form, unbiased=True) - price
            unbiased = float(value.max() - value[u])
            halves = (every[::2], every[1::2])
            if form == "costate" or len(halves[1]) > 1:  # each half scores the other's choice without bias
                both = [self._crossed(a, b, u, price, form) for a, b in (halves, halves[::-1])]
                crossed = float(np.mean(both))
            without = np.stack([self.reward(form, [i for i in every if i != m]) - price for m in every])
            gains = without - without[:, [u]]
            jackknife = tuple(map(float, gains[:, best]))
            if best == u:
                doubt = float((plain - plain[u] + _half(gains)).max())
        return Gap(
            form,
            float(plain[best] - plain[u]),
            control,
            self.controls[best],
            (float(reward[best]), float(reward[u])),
            (float(price[best]), float(price[u])),
            unbiased,
            crossed,
            jackknife,
            self.spent,
            self.dropped,
            doubt,
        )

    def _argmax(self, value: Array, u: int) -> int:
        """The best candidate; u where it ties with the best, so that an optimal control has itself."""
        best = int(np.argmax(value))
        return u if value[u] >= value[best] else best

    def _crossed(self, choose: Sequence[int], judge: Sequence[int], u: int, price: Array, form: str) -> float:
        best = self._argmax(self.reward(form, choose) - price, u)
        value = self.reward(form, judge, unbiased=True) - price
        return float(value[best] - value[u])

    def to_json(self) -> dict[str, Any]:
        """Plain data, numbers to 7 digits; `from_json` reads it back."""
        upper = np.triu_indices(self.batches)
        return {
            "controls": [dict(v) for v in self.controls],
            "evaluations": _digits(self.evaluations),
            "gram": _digits(self.gram[:, upper[0], upper[1]]),
            "costate": None if self.costate is None else _digits(self.costate),
            "batches": self.batches,
            "scale": self.scale,
            "spent": self.spent,
            "dropped": list(self.dropped),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Surface:
        """The surface that `to_json` described."""
        m, rows = found["batches"], np.array(found["gram"], dtype=np.float64)
        gram, upper = np.zeros((len(rows), m, m)), np.triu_indices(m)
        gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = rows
        costate = None if found["costate"] is None else np.array(found["costate"], dtype=np.float64)
        controls = tuple(Control(**v) for v in found["controls"])
        evaluations, dropped = np.array(found["evaluations"]), tuple(found.get("dropped", ()))
        return cls(controls, evaluations, gram, costate, found["scale"], found["spent"], dropped)


def _digits(values: Array) -> Any:
    if values.ndim > 1:
        return [_digits(row) for row in values]
    return [float(f"{v:.7g}") for v in values]
