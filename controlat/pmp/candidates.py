"""The maximum of the Hamiltonian over G: an exact sweep over K for each step size, or hyperopt's TPE."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from controlat._util.checks import brief, number, whole
from controlat._util.errors import NonFiniteError
from controlat.attacks.pgd import ALPHA, STEPS
from controlat.control.cost import Meter
from controlat.control.space import Control, Knob
from controlat.dynamics.driver import Driver, Field
from controlat.methods import Batch, Method, Prefixes

__all__ = ["MAXIMISERS", "Grid", "Scored", "rerun", "sweep", "tpe"]

MAXIMISERS = ("sweep", "tpe")

# One candidate: the control, its cost n(v) per sample, and what it would do on every probe batch.
Scored = tuple[Control, float, list[Field]]


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
        if isinstance(self.alphas, (str, bytes, Mapping)) or not isinstance(self.alphas, Iterable):
            raise ValueError(f"alphas must be a list of step sizes > 0, got {brief(self.alphas)}")
        object.__setattr__(self, "alphas", tuple(sorted({number(a, "an alpha") for a in self.alphas})))
        if not self.alphas or self.alphas[0] <= 0:
            raise ValueError(f"the step sizes of a grid must be > 0, got {self.alphas}")
        object.__setattr__(self, "max_steps", whole(self.max_steps, "max_steps", 1))

    @classmethod
    def default(cls, eps: float, max_steps: int, count: int = 5) -> Grid:
        """`count` step sizes spaced logarithmically in [eps/40, 2 eps]."""
        eps, count = number(eps, "eps"), whole(count, "count", 1)
        if eps <= 0:
            raise ValueError(f"the default step sizes need eps > 0, got {eps:g}; give alphas")
        return cls(tuple(float(f"{a:.6g}") for a in np.geomspace(eps / 40, 2 * eps, count)), max_steps)

    def candidates(self, method: Method, u: Control) -> list[Control]:
        """The controls that are searched: u with other alpha and K, as far as the method has these knobs.

        Every K up to max_steps where the method offers the exact sweep; else, as each costs a run of its own,
        every K up to 8 and about four for each doubling beyond.
        """
        knobs = method.controls
        alphas: Sequence[float | None] = self.alphas if "alpha" in knobs else (None,)
        low, high = self.bounds(knobs)
        every = isinstance(method, Prefixes)
        coarse = (k <= 8 or k == high or k % (2 ** (k.bit_length() - 3)) == 0 for k in range(low, high + 1))
        counts = [k for k, kept in zip(range(low, high + 1), coarse, strict=True) if every or kept]
        found = (self.control(u, a, k) for a in alphas for k in counts)
        return list(dict.fromkeys(found))

    def cost(self, method: Method, u: Control) -> float:
        """Gradient evaluations per sample of scoring u and all candidates around it, by a sweep."""
        price = method.controls.cost
        if isinstance(method, Prefixes):
            return len(self.alphas) * 2 * self.bounds(method.controls)[1] + 1 + price(u)
        return sum(map(price, self.candidates(method, u))) + price(u)

    def mean_cost(self, method: Method, u: Control) -> float:
        """Gradient evaluations per sample of one candidate whose K is drawn evenly, as TPE begins."""
        low, high = self.bounds(method.controls)
        costs = [method.controls.cost(self.control(u, self.alphas[-1], k)) for k in range(low, high + 1)]
        return sum(costs) / len(costs)

    def control(self, u: Control, alpha: float | None, steps: int) -> Control:
        """u with another step size and another K, where it has them."""
        other = {"alpha": alpha, "steps": steps}
        return Control(**{name: other.get(name, value) for name, value in u.items()})

    def bounds(self, knobs: Mapping[str, Knob]) -> tuple[int, int]:
        """Smallest and largest K: those of the grid within the method's."""
        if "steps" not in knobs:
            return 0, 0
        low = int(knobs["steps"].low)
        return low, max(low, int(min(knobs["steps"].high, self.max_steps)))

    def within(self, v: Control) -> bool:
        """Whether `v` lies in the bounds that TPE searches."""
        alpha, steps = v.get("alpha", self.alphas[0]), v.get("steps", 1)
        return bool(steps == 0 or (self.alphas[0] <= alpha <= self.alphas[-1] and steps <= self.max_steps))


def rerun(driver: Driver, batches: Sequence[Batch], v: Control, rate: float, meter: Meter) -> Scored:
    """Score one candidate by running it from the start on every probe batch; its cost is counted."""
    before = meter.gradients
    found = [driver.field(batch, v, rate, meter) for batch in batches]
    return v, (meter.gradients - before) / sum(len(b.x) for b in batches), found


def sweep(
    driver: Driver, batches: Sequence[Batch], grid: Grid, u: Control, rate: float, meter: Meter
) -> Iterator[Scored]:
    """Score every candidate of the grid around u, on common probe batches and random numbers.

    Where the method passes through the step of every smaller K (`Prefixes`: PGD-K is the beginning of
    PGD-(K+1)), at the price of ONE trajectory of max_steps for each alpha, which equals running every
    candidate by itself; otherwise each candidate is run.
    """
    if not isinstance(driver.method, Prefixes):
        for v in grid.candidates(driver.method, u):
            yield rerun(driver, batches, v, rate, meter)
        return
    yield rerun(driver, batches, grid.control(u, 0.0, 0), rate, meter)
    for alpha in grid.alphas:
        longest = grid.control(u, alpha, grid.max_steps)
        for scored in zip(*(driver.fields(b, longest, rate, meter) for b in batches), strict=True):
            v = scored[0].control
            yield v, driver.method.controls.cost(v), list(scored)


def tpe(
    objective: Callable[[Control], float],
    grid: Grid,
    trials: int,
    seed: int,
    first: Sequence[Control] = (),
    knobs: Mapping[str, Knob] = MappingProxyType({"alpha": ALPHA, "steps": STEPS}),
) -> list[str]:
    """Maximise objective(v) over log alpha and K in the bounds of G with hyperopt's Parzen estimators.

    The caller keeps what it scored; a candidate whose value is not finite counts as failed and never wins.

    Args:
        objective: value of a control.
        grid: bounds: alpha between its smallest and largest step size, K up to max_steps.
        trials: number of evaluations, those of `first` not counted.
        seed: of hyperopt's generator.
        first: controls to try before the search starts; those outside the bounds are passed over. The first
            of them says what knobs other than alpha and K are.
        knobs: what the method has; those of PGD by default.

    Returns:
        Why trials failed, one text for each that did; those of `first` do not count.

    Raises:
        ValueError: trials is less than 1.
        NonFiniteError: all trials failed, so that nothing was searched.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    from hyperopt import STATUS_FAIL, STATUS_OK, fmin, hp
    from hyperopt import tpe as algorithm
    from hyperopt.exceptions import AllTrialsFailed
    from hyperopt.fmin import generate_trials_to_calculate

    low, high = math.log(grid.alphas[0]), math.log(grid.alphas[-1])
    least, most = grid.bounds(knobs)
    base = first[0] if first else Control(**{name: knob.default or 1 for name, knob in knobs.items()})
    space = {
        "alpha": hp.loguniform("alpha", low, max(high, low + 1e-9)),
        "steps": hp.quniform("steps", least - 0.5, most + 0.5, 1),
    }

    outcomes: list[str] = []  # of every trial: why it failed, or nothing

    def loss(point: dict[str, float]) -> dict[str, Any]:
        steps = min(max(int(point["steps"]), least), most)
        alpha = min(max(point["alpha"], grid.alphas[0]), grid.alphas[-1])
        v = grid.control(base, alpha, steps)
        try:
            value = objective(v)
            outcomes.append("" if math.isfinite(value) else f"the value of {v} is {value}")
        except NonFiniteError as error:
            outcomes.append(str(error))
        return {"status": STATUS_FAIL} if outcomes[-1] else {"status": STATUS_OK, "loss": -value}

    # A point outside the bounds would come back with its K cut: a control that nobody asked for.
    points = [
        {"alpha": v.get("alpha") or grid.alphas[0], "steps": float(v.get("steps", least))}
        for v in first
        if grid.within(v)
    ]
    with contextlib.suppress(AllTrialsFailed):  # told below, with the reason
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
    searched = outcomes[len(points) :]
    failed = [outcome for outcome in searched if outcome]
    if len(failed) == len(searched):
        raise NonFiniteError(f"all {len(failed)} trials of TPE failed: nothing was searched ({failed[0]})")
    return failed
