"""The Hamiltonian over one outer step: what a change of the control of that step alone is worth.

H_t(v) = p_{t+1} . S_t(z_t, v) - gamma eta n(v), with p = -grad Phi at the end, so that, to first order in the
state, changing u_t to v lowers J = Phi + gamma eta sum n by

    DeltaH_t(v) = p_{t+1} . (S_t(z_t, v) - S_t(z_t, u_t)) - gamma eta (n(v) - n(u_t)).

The whole step counts: all its updates, the optimiser's buffers, and what the method carries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Visit
from controlat.dynamics.state import State
from controlat.methods import Prefixes
from controlat.pmp.candidates import Candidates
from controlat.pmp.maximise import score_one, score_sweep
from controlat.pmp.surface import Array

__all__ = ["Gains", "gains"]


@dataclass(frozen=True)
class Gains:
    """What every candidate would have done at one step, beside its control u_t, which comes first.

    Args:
        number: of the step.
        epoch: of the step.
        controls: the V candidates.
        evaluations: (V,) n(v), gradient evaluations per sample.
        rewards: by horizon, (V,) p_{t+1} . (S(z, v) - S(z, u)).
        sizes: (V,) ||S(z, v) - S(z, u)||^2.
        norms: by horizon, ||p_{t+1}||.
    """

    number: int
    epoch: int
    controls: tuple[Control, ...]
    evaluations: Array
    rewards: Mapping[int, Array]
    sizes: Array
    norms: Mapping[int, float]

    def value(self, horizon: int, price: float) -> Array:
        """DeltaH(v) for every candidate, (V,), at a price of gamma eta per evaluation; 0 for u_t."""
        return np.asarray(self.rewards[horizon] - price * (self.evaluations - self.evaluations[0]))

    def cosine(self, horizon: int) -> Array:
        """Cosine between p_{t+1} and S(z, v) - S(z, u), (V,); 0 where nothing changes."""
        length = np.sqrt(self.sizes) * self.norms[horizon]
        return np.divide(self.rewards[horizon], length, out=np.zeros_like(length), where=length > 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "number": self.number,
            "epoch": self.epoch,
            "controls": [dict(v) for v in self.controls],
            "evaluations": self.evaluations.tolist(),
            "rewards": {str(h): r.tolist() for h, r in self.rewards.items()},
            "sizes": self.sizes.tolist(),
            "norms": {str(h): float(n) for h, n in self.norms.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Gains:
        """The gains that `to_json` described."""
        return cls(
            number=stored["number"],
            epoch=stored["epoch"],
            controls=tuple(Control(**v) for v in stored["controls"]),
            evaluations=np.array(stored["evaluations"], dtype=np.float64),
            rewards={int(h): np.array(r, dtype=np.float64) for h, r in stored["rewards"].items()},
            sizes=np.array(stored["sizes"], dtype=np.float64),
            norms={int(h): float(n) for h, n in stored["norms"].items()},
        )


def gains(
    driver: Driver,
    visit: Visit,
    costates: Mapping[int, State],
    norms: Mapping[int, float],
    grid: Candidates,
    meter: Meter | None = None,
) -> Gains:
    """Score the candidates of G around u_t at one step of a recorded roll-out, under common random numbers.

    Where the method offers the exact sweep over K, and so makes one update whose gradient alone depends on
    u, one trajectory for each step size scores every K, and the difference of two steps is that of their
    gradients, -eta (g_v - g_u) in theta and g_v - g_u in the buffer, and of their running statistics.
    Otherwise each candidate takes the step.

    Args:
        driver: at the state before the step; it stays there.
        visit: the step.
        costates: p_{t+1} by horizon.
        norms: their lengths.
        grid: what is searched.
        meter: where evaluations are counted.

    Raises:
        NonFiniteError: what a candidate would do is not finite.
    """
    meter = Meter() if meter is None else meter
    score = _by_gradients if isinstance(driver.method, Prefixes) else _by_steps
    scores = score(driver, visit, costates, grid, meter)
    for v, (_, of_v, size) in scores.items():
        if not np.isfinite([*of_v, size]).all():
            raise NonFiniteError(f"what {v} would do in step {visit.number} is not finite: narrow the grid")
    n, rewards, sizes = zip(*scores.values(), strict=True)
    table = np.array(rewards, dtype=np.float64).reshape(len(scores), len(costates))
    return Gains(
        number=visit.number,
        epoch=visit.batch.epoch,
        controls=tuple(scores),
        evaluations=np.array(n, dtype=np.float64),
        rewards={h: table[:, i] for i, h in enumerate(costates)},
        sizes=np.array(sizes, dtype=np.float64),
        norms=dict(norms),
    )


# By candidate: n(v), p . DeltaS for each costate, ||DeltaS||^2.
_Scores = dict[Control, tuple[float, list[float], float]]


def _by_gradients(
    driver: Driver, visit: Visit, costates: Mapping[int, State], grid: Candidates, meter: Meter
) -> _Scores:
    """From gradients, as S is affine in the gradient g of its only update, and in running statistics r.

    S(z, v) - S(z, u) is -rate (g_v - g_u) in theta, g_v - g_u in the buffer, and r_v - r_u.
    """
    o, batches, u = driver.optimizer, [visit.batch], visit.control
    # Nesterov looks ahead by the buffer, into which the gradient has gone already.
    rate = visit.rate * (1 + o.momentum if o.nesterov else 1)
    weights = [State(parameters=_weights(p, rate), statistics=p.statistics) for p in costates.values()]
    first = score_one(driver, batches, u, visit.rate, meter)
    (taken,) = first[2]
    base = State(parameters=taken.gradients, statistics=taken.statistics)
    scores: _Scores = {}
    for v, n, (field,) in itertools.chain([first], score_sweep(driver, batches, grid, u, visit.rate, meter)):
        moved = State(parameters=field.gradients, statistics=field.statistics).plus(base, -1)
        g, r = State(parameters=moved.parameters), State(parameters=[], statistics=moved.statistics)
        size = (rate**2 + (o.momentum > 0)) * g.dot(g) + r.dot(r)
        scores.setdefault(v, (n, [w.dot(moved) for w in weights], size))
    return scores


def _weights(p: State, rate: float) -> list[Tensor]:
    """dS/dg, transposed, applied to p."""
    if not p.momentum:
        return [-rate * q for q in p.parameters]
    return [m - rate * q for m, q in zip(p.momentum, p.parameters, strict=True)]


def _by_steps(
    driver: Driver, visit: Visit, costates: Mapping[int, State], grid: Candidates, meter: Meter
) -> _Scores:
    """By taking the step under every candidate from the same state."""
    batch, training = visit.batch, driver.meter
    before = driver.snapshot(batch.indices)
    scores: _Scores = {}
    base: State | None = None
    driver.meter = meter
    try:
        for v in dict.fromkeys([visit.control, *grid.around(driver.method, visit.control)]):
            counted = meter.gradients
            driver.step(batch, v, visit.rate)
            after = driver.point(batch.indices)
            base = after.copy() if base is None else base
            moved = after.plus(base, -1)
            driver.restore(before)
            rewards = [p.dot(moved) for p in costates.values()]
            scores[v] = (meter.gradients - counted) / len(batch.x), rewards, moved.dot(moved)
    finally:
        driver.restore(before)
        driver.meter = training
    return scores
