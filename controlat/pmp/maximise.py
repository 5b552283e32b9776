"""The maximum of the Hamiltonian over G: an exact sweep over K for each step size, or hyperopt's TPE."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from controlat.control import Control, number
from controlat.dynamics import Driver
from controlat.methods import Batch
from controlat.network import Meter, NonFiniteError

__all__ = ["MAXIMISERS", "Grid", "Scored", "rerun", "sweep", "tpe"]

MAXIMISERS = ("sweep", "tpe")

# One candidate: the control, its cost n(v) per sample, and its gradient on every probe batch.
Scored = tuple[Control, float, list[list[Tensor]]]


@dataclass(frozen=True)
class Grid:
    """The bounded admissible set that is searched: step sizes and K = 0, ..., max_steps.

    Args:
        alphas: step sizes > 0; a sweep visits each, TPE searches between the smallest and the largest.
        max_steps: largest K.

    Raises:
        ValueError: a number is out of range.

    >>> Grid.default(eps=0.4, max_steps=10).alphas[0], Grid.default(eps=0.4, max_steps=10).alphas[-1]
    (0.01, 0.8)
    """

    alphas: tuple[float, ...]
    max_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(sorted({number(a, "alpha") for a in self.alphas})))
        if not self.alphas or self.alphas[0] <= 0:
            raise ValueError(f"the step sizes of a grid must be > 0, got {self.alphas}")
        if self.max_steps < 1 or self.max_steps != int(self.max_steps):
            raise ValueError(f"max_steps must be a whole number >= 1, got {self.max_steps}")

    @classmethod
    def default(cls, eps: float, max_steps: int, count: int = 5) -> Grid:
        """`count` step sizes spaced logarithmically in [eps/40, 2 eps]."""
        if eps <= 0:
            raise ValueError(f"the default step sizes need eps > 0, got {eps:g}; give alphas")
        return cls(tuple(float(f"{a:.6g}") for a in np.geomspace(eps / 40, 2 * eps, count)), max_steps)

    def __len__(self) -> int:
        return len(self.alphas) * self.max_steps + 1

    def within(self, v: Control) -> bool:
        """Whether `v` lies in the bounds that TPE searches."""
        inside = self.alphas[0] <= v["alpha"] <= self.alphas[-1] and v["steps"] <= self.max_steps
        return bool(v["steps"] == 0 or inside)


def rerun(driver: Driver, batches: Sequence[Batch], v: Control, rate: float, meter: Meter) -> Scored:
    """Score one candidate by running it from the start on every probe batch; its cost is counted."""
    before = meter.gradients
    gradients = [driver.field(batch, v, rate, meter) for batch in batches]
    return v, (meter.gradients - before) / sum(len(b.x) for b in batches), gradients


def sweep(
    driver: Driver, batches: Sequence[Batch], grid: Grid, rate: float, meter: Meter
) -> Iterator[Scored]:
    """Score every (alpha, K) of the grid at the price of ONE trajectory of max_steps for each alpha.

    PGD-K is the beginning of PGD-(K+1), so this equals running every candidate by itself. All candidates
    share the probe batches and the random start.
    """
    yield rerun(driver, batches, Control(alpha=0.0, steps=0), rate, meter)
    for alpha in grid.alphas:
        longest = Control(alpha=alpha, steps=grid.max_steps)
        for scored in zip(*(driver.fields(b, longest, rate, meter) for b in batches), strict=True):
            v = scored[0][0]
            yield v, driver.method.controls.cost(v), [gradients for _, gradients in scored]


def tpe(
    objective: Callable[[Control], float], grid: Grid, trials: int, seed: int, first: Sequence[Control] = ()
) -> None:
    """Maximise objective(v) over log alpha and K in the bounds of G with hyperopt's Parzen estimators.

    The caller keeps what it scored; a candidate whose value is not finite counts as failed and never wins.

    Args:
        objective: value of a control.
        grid: bounds: alpha between its smallest and largest step size, K up to max_steps.
        trials: number of evaluations, those of `first` not counted.
        seed: of hyperopt's generator.
        first: controls to try before the search starts; those outside the bounds are passed over.

    Raises:
        ValueError: trials is less than 1.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    from hyperopt import STATUS_FAIL, STATUS_OK, fmin, hp
    from hyperopt import tpe as algorithm
    from hyperopt.exceptions import AllTrialsFailed
    from hyperopt.fmin import generate_trials_to_calculate

    low, high = math.log(grid.alphas[0]), math.log(grid.alphas[-1])
    space = {
        "alpha": hp.loguniform("alpha", low, max(high, low + 1e-9)),
        "steps": hp.quniform("steps", -0.5, grid.max_steps + 0.5, 1),
    }

    def loss(point: dict[str, float]) -> dict[str, Any]:
        steps = min(max(int(point["steps"]), 0), grid.max_steps)
        alpha = min(max(point["alpha"], grid.alphas[0]), grid.alphas[-1])
        try:
            value = objective(Control(alpha=alpha, steps=steps))
        except NonFiniteError as error:
            return {"status": STATUS_FAIL, "error": str(error)}
        if not math.isfinite(value):
            return {"status": STATUS_FAIL, "error": f"value {value}"}
        return {"status": STATUS_OK, "loss": -value}

    # A point outside the bounds would come back with its K cut: a control that nobody asked for.
    points = [
        {"alpha": v["alpha"] or grid.alphas[0], "steps": float(v["steps"])} for v in first if grid.within(v)
    ]
    with contextlib.suppress(AllTrialsFailed):  # then nothing was found, which is no error of the search
        fmin(
            loss,
            space,
            algo=algorithm.suggest,
            max_evals=trials,
            trials=generate_trials_to_calculate(points) if points else None,
            rstate=np.random.default_rng(seed),
            show_progressbar=False,
            verbose=False,
        )
