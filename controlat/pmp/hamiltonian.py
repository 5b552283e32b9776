"""The discrete-time Hamiltonian H_t(v) = p_{t+1} . S_t(z_t, v) - gamma eta n(v) of an outer step.

With p = -grad Phi at the end, replacing u_t by v in step t alone lowers J = Phi + gamma eta sum n, to first
order in the change of the state, by

    DeltaH_t(v) = p_{t+1} . (S_t(z_t, v) - S_t(z_t, u_t)) - gamma eta (n(v) - n(u_t)).

S_t is the whole outer step: all its updates, the momentum buffers, and the memory of the method.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    """The terms of DeltaH_t(v) at one step, for all candidates v.

    Args:
        number: of the step.
        epoch: of the step.
        controls: the V candidates; u_t is the first.
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
        """DeltaH_t(v), (V,), with price = gamma eta per gradient evaluation; 0 for u_t."""
        return np.asarray(self.rewards[horizon] - price * (self.evaluations - self.evaluations[0]))

    def cosine(self, horizon: int) -> Array:
        """Cosine between p_{t+1} and S(z, v) - S(z, u), (V,); 0 where either is 0."""
        length = np.sqrt(self.sizes) * self.norms[horizon]
        return np.divide(self.rewards[horizon], length, out=np.zeros_like(length), where=length > 0)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
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
        """The gains from what `to_json` returned."""
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
    candidates: Candidates,
    meter: Meter | None = None,
) -> Gains:
    """Score the candidates around u_t at one step of a recorded roll-out, with common random numbers.

    A method that offers `Prefixes` makes one update, and only its gradient depends on u. Then one inner
    trajectory per step size scores every K, and S(z, v) - S(z, u) follows from the gradients:
    -eta (g_v - g_u) in theta, g_v - g_u in the momentum buffer, and the difference of the running statistics.
    For other methods the step is taken under each candidate.

    Args:
        driver: at the state z_t before the step, where it is afterwards, too.
        visit: the step.
        costates: p_{t+1} by horizon.
        norms: ||p_{t+1}|| by horizon.
        candidates: the controls that are compared with u_t.
        meter: where evaluations are counted.

    Raises:
        NonFiniteError: the step under a candidate is not finite.
    """
    meter = Meter() if meter is None else meter
    score = _by_gradients if isinstance(driver.method, Prefixes) else _by_steps
    with driver.full_precision():
        scores = score(driver, visit, costates, candidates, meter)
    for v, (_, products, size) in scores.items():
        if not np.isfinite([*products, size]).all():
            raise NonFiniteError(
                f"step {visit.number} under {v} is not finite: leave it out of the candidates"
            )
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
    driver: Driver, visit: Visit, costates: Mapping[int, State], candidates: Candidates, meter: Meter
) -> _Scores:
    """Scores from gradients: the step is affine in the gradient g of its update and in running statistics r.

    S(z, v) - S(z, u) is -rate (g_v - g_u) in theta, g_v - g_u in the momentum buffer, and r_v - r_u.
    """
    sgd, batches, u = driver.optimizer, [visit.batch], visit.control
    # Nesterov's form moves theta along g + mu v', and v' contains g.
    rate = visit.rate * (1 + sgd.momentum if sgd.nesterov else 1)
    weights = torch.stack([_flat([*_weights(p, rate), *p.statistics]) for p in costates.values()])
    scored_u = score_one(driver, batches, u, visit.rate, meter)
    (field_u,) = scored_u[2]
    base = _flat([*field_u.gradients, *field_u.statistics])
    count = sum(g.numel() for g in field_u.gradients)
    others = score_sweep(driver, batches, candidates, u, visit.rate, meter)
    scores: _Scores = {}
    for v, n, (field,) in itertools.chain([scored_u], others):
        change = _flat([*field.gradients, *field.statistics]) - base
        squares = [float(part.square().sum()) for part in change.split([count, len(change) - count])]
        size = (rate**2 + (sgd.momentum > 0)) * squares[0] + squares[1]
        scores.setdefault(v, (n, (weights @ change).tolist(), size))
    return scores


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _weights(p: State, rate: float) -> list[Tensor]:
    """(dS/dg)^T p: the vector-Jacobian product of the optimiser's update."""
    if not p.momentum:
        return [-rate * q for q in p.parameters]
    return [m - rate * q for m, q in zip(p.momentum, p.parameters, strict=True)]


def _by_steps(
    driver: Driver, visit: Visit, costates: Mapping[int, State], candidates: Candidates, meter: Meter
) -> _Scores:
    """Scores by taking the step under every candidate from the same state."""
    batch, training_meter = visit.batch, driver.meter
    before = driver.snapshot(batch.indices)
    scores: _Scores = {}
    base: State | None = None
    driver.meter = meter
    try:
        for v in dict.fromkeys([visit.control, *candidates.around(driver.method, visit.control)]):
            counted = meter.gradients
            driver.step(batch, v, visit.rate)
            after = driver.point(batch.indices)
            base = after.copy() if base is None else base
            change = after.plus(base, -1)
            driver.restore(before)
            rewards = [p.dot(change) for p in costates.values()]
            scores[v] = (meter.gradients - counted) / len(batch.x), rewards, change.dot(change)
    finally:
        driver.restore(before)
        driver.meter = training_meter
    return scores
