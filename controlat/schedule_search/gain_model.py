"""A smooth model of the Hamiltonian over (t, log alpha, K), regressed on surfaces of several runs.

The gains of candidates at one time of one run are mostly noise; a model with few coefficients, over all times
and several seeds, keeps what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial.legendre import legvander
from numpy.typing import ArrayLike, NDArray
from scipy.stats.qmc import Sobol

from controlat._util.texts import short
from controlat.control.schedules import Schedule
from controlat.schedule_search.space import Space

__all__ = ["GainModel", "check_knobs", "sensitivities", "usable"]

_TIMES, _SIZES = 2, 2  # degrees in t and in log alpha
_RIDGES = tuple(10.0**i for i in range(-7, 3))  # weights of the penalty, columns scaled to mean square 1
_QUIETEST = 0.01  # smallest variance of the gains of a block that is believed, in units of the mean
_PIECES = 64  # at which a schedule is looked at, at most
Array = NDArray[np.float64]


@dataclass(frozen=True)
class GainModel:
    """The Hamiltonian's part of Phi, up to a function of t alone; its differences are gains per unit of t:

        h(t, alpha, K) = sum_{i,j,k} c_ijk P_i(2t - 1) P_j(a) f_k(K),    f = (log(1 + K), K),

    t in [0, 1], P_i the Legendre polynomials of degree 0 to 2, a = log alpha scaled so that the candidates'
    goes from -1 to 1. It is 0 without an attack, whatever alpha. For a real K, which is dithered, h is linear
    between the whole numbers around it: the relaxed control. Beyond the candidates alpha and K count as at
    their border.

    Args:
        coefficients: c, in the order of `features`.
        log_alpha: the smallest and the largest log alpha of the candidates.
        evaluations: n(K), K = 0, ..., the largest of the candidates.
    """

    coefficients: Array
    log_alpha: tuple[float, float]
    evaluations: Array

    @classmethod
    def of(cls, surfaces: Sequence[Mapping[str, Any]]) -> GainModel:
        """Ridge regression of the gains over the run's own control.

        Each block has its length over the mean square of its gains as weight: noise grows with the costate,
        backward in time. The penalty is that which predicts best the gains of a run that is left out, or, of
        one run, the gains of a block.

        Args:
            surfaces: one or more, as `controlat.pmp.run_surface.surface_of` gives them.

        Raises:
            ValueError: there is none.
        """
        if not surfaces:
            raise ValueError("a model of gains needs at least one surface, got none")
        points = [np.array(s["candidates"]) for s in surfaces]
        alphas = np.concatenate([p[p[:, 1] > 0, 0] for p in points])
        ends = float(np.log(alphas.min())), float(np.log(alphas.max()))
        empty = cls(np.zeros(0), ends, _evaluations(surfaces))
        rows, gains, weights, runs = list[Array](), list[Array](), list[float](), list[int]()
        for run, (surface, at) in enumerate(zip(surfaces, points, strict=True)):
            for block in surface["blocks"]:
                own = np.array(block["own"])
                of_own = empty.features(block["t"], own[:, 0], own[:, 1]).mean(0)
                rows.append(empty.features(block["t"], at[:, 0], at[:, 1]) - of_own)
                gains.append(np.array(block["gains"]))
                weights.append(block["share"])
                runs.append(run)
        noise = np.array([np.square(g).mean() for g in gains])
        noise = np.maximum(noise, _QUIETEST * noise.mean()) if noise.any() else np.ones(len(noise))
        scales = np.sqrt(np.divide(weights, noise * np.array(list(map(len, gains)))))
        folds = np.array(runs) if len(surfaces) > 1 else np.arange(len(runs))
        of_row = np.repeat(np.arange(len(gains)), list(map(len, gains)))
        scale = scales[of_row]
        fitted = _ridge(scale[:, None] * np.concatenate(rows), scale * np.concatenate(gains), folds[of_row])
        return cls(fitted, ends, empty.evaluations)

    def features(self, t: ArrayLike, alpha: ArrayLike, steps: ArrayLike) -> Array:
        """(N, 18): the products P_i P_j f_k at N points.

        Args:
            t: time as a share of the run.
            alpha: step size; without an attack it may be 0.
            steps: K, real where it is dithered.
        """
        arrays = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (t, alpha, steps))
        t, alpha, steps = np.broadcast_arrays(*arrays)
        low, high = self.log_alpha
        a = np.log(np.clip(alpha, math.exp(low), math.exp(high)))
        a = 2 * (a - low) / (high - low) - 1 if high > low else np.zeros_like(a)
        k = np.minimum(steps, len(self.evaluations) - 1)
        down, up = np.log1p(np.floor(k)), np.log1p(np.floor(k) + 1)
        f = np.stack([down + (k - np.floor(k)) * (up - down), k], axis=-1)
        product = np.einsum("ni,nj,nk->nijk", legvander(2 * t - 1, _TIMES), legvander(a, _SIZES), f)
        return np.asarray(product.reshape(len(t), -1))

    def _totals(self, schedule: Schedule) -> tuple[Array, float]:
        """The integral of the features over a run, and the mean of n."""
        count = min(schedule.pieces, _PIECES)
        t = (np.arange(count) + 0.5) / count
        controls = [schedule(s * schedule.epochs) for s in t]
        alpha, steps = (np.array([float(u[knob]) for u in controls]) for knob in ("alpha", "steps"))
        n, most = self.evaluations, len(self.evaluations) - 1
        beyond = np.maximum(steps - most, 0) * (n[-1] - n[-2])
        mean_cost = float((np.interp(steps, np.arange(most + 1), n) + beyond).mean())
        return self.features(t, alpha, steps).mean(0), mean_cost

    def value(self, schedule: Schedule, price: float) -> float:
        """The integral of the Hamiltonian under a schedule, in units of J; a difference is a predicted gain.

        Args:
            schedule: sets alpha and steps.
            price: of the mean cost n of a step.
        """
        features, mean_cost = self._totals(schedule)
        return float(features @ self.coefficients) - price * mean_cost


def _evaluations(surfaces: Sequence[Mapping[str, Any]]) -> Array:
    """n(K), mean over candidates; linear between those that there are."""
    costs: dict[int, list[float]] = {}
    for surface in surfaces:
        for (_, steps), n in zip(surface["candidates"], surface["evaluations"], strict=True):
            costs.setdefault(int(steps), []).append(n)
    known = sorted(costs)
    means = [float(np.mean(costs[k])) for k in known]
    return np.asarray(np.interp(np.arange(max(known[-1], 1) + 1), known, means))


def _ridge(rows: Array, gains: Array, folds: NDArray[np.int64]) -> Array:
    """Coefficients of ridge regression, the penalty chosen by leaving each fold out in turn."""
    size = np.sqrt((rows**2).sum(0))
    size[size == 0] = 1.0
    rows = rows / size
    parts = [(rows[folds == f], gains[folds == f]) for f in np.unique(folds)]
    gram, product = rows.T @ rows, rows.T @ gains

    def solved(gram: Array, product: Array, ridge: float) -> Array:
        return np.asarray(np.linalg.solve(gram + ridge * np.eye(len(size)), product))

    def error(ridge: float) -> float:
        left_out = (solved(gram - a.T @ a, product - a.T @ y, ridge) for a, y in parts)
        return sum(float(np.square(y - a @ c).sum()) for (a, y), c in zip(parts, left_out, strict=True))

    best = min(_RIDGES, key=error) if len(parts) > 1 else _RIDGES[0]
    return np.asarray(solved(gram, product, best) / size)


def usable(surface: Mapping[str, Any] | None) -> bool:
    """Whether there is a surface, and none that failed."""
    return surface is not None and "failed" not in surface


def check_knobs(space: Space, proposer: str) -> None:
    """Refuse a space whose schedules do not set alpha and steps.

    Raises:
        ValueError: as above.
    """
    u = space.schedule(space.point([0.5] * len(space.parameters)))(0)
    if missing := {"alpha", "steps"} - set(u):
        raise ValueError(
            f"{proposer} compares values of alpha and steps, but {short(space.text)!r} does not set "
            f"{' and '.join(sorted(missing))}: take tpe"
        )


def sensitivities(
    model: GainModel, space: Space, price: float, *, points: int = 64, reach: float = 0.25
) -> dict[str, float]:
    """Which parameters of a space the predicted gain depends on: their mean elementary effects.

        mu_i = mean over x of |H(x + d e_i) - H(x)| / d

    in units of J over the whole range of the parameter, H the integral of the Hamiltonian under the schedule
    at x of the unit cube, to first order in the state. One that is small beside the others may be fixed.

    Args:
        model: of the gains.
        space: what is searched.
        price: of the mean cost n of a step.
        points: number of x, of a Sobol sequence.
        reach: d, a share of the range.

    Source:
        Morris (1991); Campolongo et al. (2007), mean of absolute values.

    >>> blocks = [
    ...     {"t": t, "share": 0.25, "own": [[0, 0]], "gains": [0.2, 0.2, 0.2, 0]}
    ...     for t in (0.125, 0.375, 0.625, 0.875)
    ... ]
    >>> candidates, n = [[0.01, 1], [0.032, 1], [0.1, 1], [0, 0]], [2, 2, 2, 1]
    >>> model = GainModel.of([{"candidates": candidates, "evaluations": n, "blocks": blocks}])
    >>> space = Space("pgd:steps=0~1,alpha=0.01~0.1~log,rounding=dither", 4)
    >>> for name, effect in sensitivities(model, space, price=0.02).items():
    ...     print(name, round(effect, 2))  # one step gains 0.2 and costs 0.02, whatever alpha
    steps 0.18
    alpha 0.0
    """
    size = len(space.parameters)
    cube = (1 - reach) * Sobol(size, rng=np.random.default_rng(0)).random(points)
    effects = np.zeros(size)
    for x in cube:
        base = model.value(space.schedule(space.point(x)), price)
        for i in range(size):
            moved = x + reach * np.eye(size)[i]
            effects[i] += abs(model.value(space.schedule(space.point(moved)), price) - base) / reach
    return {p.name: float(e / points) for p, e in zip(space.parameters, effects, strict=True)}
