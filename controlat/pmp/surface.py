"""The scores of all candidates at one time t, and the gap of a control among them.

Only inner products of the candidates' gradients on the M probe batches are kept. The plain, the unbiased and
the cross-fitted value of C and its jackknife interval follow from those, for any price gamma.
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
    """C at one time t, in one form: gap = [s q(v) - gamma n(v)] - [s q(u) - gamma n(u)].

    Args:
        form: ``"norm"`` or ``"costate"``.
        value: the gap, >= 0; 0 where u maximises the Hamiltonian over the candidates.
        control: u_t.
        maximiser: the best candidate v.
        reward: (s q(v), s q(u)).
        cost: (gamma n(v), gamma n(u)).
        unbiased: the gap with an unbiased estimate of ||E g||^2 in place of the squared norm of a batch mean,
            which exceeds it by tr(Cov)/B on average. None with one probe batch.
        cross_fitted: the mean gap of two halves of the probe, v chosen on one and scored on the other by the
            unbiased estimate. It has no selection bias, unlike the maximum over noisy values, and may be
            negative. None where a half has no unbiased estimate: with fewer than four probe batches in the
            norm form, with one in the costate form.
        jackknife: the gap between maximiser and u without each probe batch in turn.
        spent: gradient evaluations spent, in samples.
        dropped: what the value does not account for, by name.
        doubt: if u is the maximiser, the largest upper end of the intervals of s q - gamma n of all
            candidates less that of u; else 0.
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
        """95 % interval of the value over probe batches: jackknife and Student t, with the maximiser fixed.

        It is cut off at 0, which costs no coverage, as C >= 0. Where u itself is the maximiser, the jackknife
        values are all 0, and the upper end is `doubt` instead.
        """
        return interval(self.value, self.jackknife, least=0.0, more=self.doubt)

    def __str__(self) -> str:
        """The gap in one line, with what it does not account for."""
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
    """95 % jackknife interval, value +- t sqrt((m - 1)/m sum (j - mean j)^2), cut off at `least`.

    t is the 0.975 quantile of Student's distribution with m - 1 degrees of freedom.

    Args:
        value: the estimate.
        jackknife: the m leave-one-out estimates j.
        least: a lower bound of the quantity; cutting the interval off there costs no coverage.
        more: added to the upper end.

    Returns:
        Lower and upper end; None if m < 2.

    Source:
        Tukey (1958), for the jackknife.
    """
    if len(jackknife) < 2:
        return None
    half_width = float(_half_width(np.asarray(jackknife)))
    return max(least, value - half_width), max(least, value + half_width + more)


def _half_width(jackknife: Array) -> Array:
    """Half the width of the interval, from m leave-one-out estimates, (m, ...)."""
    m = len(jackknife)
    return np.asarray(stdtrit(m - 1, 0.975) * np.sqrt((m - 1) * jackknife.var(0)))


@dataclass(frozen=True)
class Surface:
    """The scores of all candidates at one time t, from which C follows for any gamma.

    Args:
        controls: the V candidates.
        evaluations: (V,) n(v), gradient evaluations per sample of one outer step.
        gram: (V, M, M) inner products of the gradients of the M probe batches with each other.
        costate: (V, M) inner products of grad Phi with the gradients, or None.
        scale: s_t.
        spent: gradient evaluations spent, in samples.
        dropped: what C does not account for, by name.
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
            ValueError: unknown form; the costate form without a terminal cost; an unbiased squared norm from
                one batch.
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
        """The gap of `control`, one of the candidates, at a price of gamma per gradient evaluation.

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
        value = reward - price
        best = self._argmax(value, u)
        unbiased, crossed, doubt = None, None, 0.0
        jackknife: tuple[float, ...] = ()
        if self.batches > 1:
            debiased = self.reward(form, unbiased=True) - price
            unbiased = float(debiased.max() - debiased[u])
            crossed = self._cross_fitted(u, price, form)
            gains = self._leave_one_out_gains(u, price, form)
            jackknife = tuple(map(float, gains[:, best]))
            if best == u:
                doubt = float((value - value[u] + _half_width(gains)).max())
        return Gap(
            form=form,
            value=float(value[best] - value[u]),
            control=control,
            maximiser=self.controls[best],
            reward=(float(reward[best]), float(reward[u])),
            cost=(float(price[best]), float(price[u])),
            unbiased=unbiased,
            cross_fitted=crossed,
            jackknife=jackknife,
            spent=self.spent,
            dropped=self.dropped,
            doubt=doubt,
        )

    def _argmax(self, value: Array, u: int) -> int:
        """The index of the best candidate; u if it ties with the best, so that a maximiser is its own."""
        best = int(np.argmax(value))
        return u if value[u] >= value[best] else best

    def _leave_one_out_gains(self, u: int, price: Array, form: str) -> Array:
        """(M, V) values of all candidates less that of u, without each probe batch in turn."""
        batches = range(self.batches)
        values = np.stack([self.reward(form, [i for i in batches if i != m]) - price for m in batches])
        return np.asarray(values - values[:, [u]])

    def _cross_fitted(self, u: int, price: Array, form: str) -> float | None:
        """The gap with the maximiser chosen on one half of the batches and scored on the other, both ways.

        None where a half has no unbiased estimate.
        """
        first, second = range(self.batches)[::2], range(self.batches)[1::2]
        if form == "norm" and len(second) < 2:
            return None
        gaps = []
        for choosing, scoring in ((first, second), (second, first)):
            best = self._argmax(self.reward(form, choosing) - price, u)
            value = self.reward(form, scoring, unbiased=True) - price
            gaps.append(float(value[best] - value[u]))
        return float(np.mean(gaps))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with numbers rounded to 7 digits."""
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
    def from_json(cls, stored: Mapping[str, Any]) -> Surface:
        """The surface from what `to_json` returned."""
        m, rows = stored["batches"], np.array(stored["gram"], dtype=np.float64)
        gram, upper = np.zeros((len(rows), m, m)), np.triu_indices(m)
        gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = rows
        costate = None if stored["costate"] is None else np.array(stored["costate"], dtype=np.float64)
        return cls(
            controls=tuple(Control(**v) for v in stored["controls"]),
            evaluations=np.array(stored["evaluations"]),
            gram=gram,
            costate=costate,
            scale=stored["scale"],
            spent=stored["spent"],
            dropped=tuple(stored.get("dropped", ())),
        )


def _digits(values: Array) -> Any:
    """The array as nested lists of numbers rounded to 7 digits."""
    if values.ndim > 1:
        return [_digits(row) for row in values]
    return [float(f"{v:.7g}") for v in values]
