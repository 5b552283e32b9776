"""Maximisation of the Hamiltonian: a sweep scores every candidate; hyperopt's TPE searches among them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from controlat._util.errors import NonFiniteError
from controlat.attacks.pgd import ALPHA, STEPS
from controlat.control.cost import Meter
from controlat.control.space import Control, Knob
from controlat.dynamics.driver import Driver, Field
from controlat.methods import Batch, Prefixes
from controlat.pmp.candidates import Candidates, replaced

__all__ = ["MAXIMISERS", "Scored", "score_one", "score_sweep", "tpe"]

MAXIMISERS = ("sweep", "tpe")

# A scored candidate: the control v, its cost n(v) per sample, and its `Field` on every probe batch.
Scored = tuple[Control, float, list[Field]]


def score_one(driver: Driver, batches: Sequence[Batch], v: Control, rate: float, meter: Meter) -> Scored:
    """Score one control by an outer step on every probe batch; n(v) is the number of evaluations counted."""
    before = meter.gradients
    fields = [driver.field(batch, v, rate, meter) for batch in batches]
    return v, (meter.gradients - before) / sum(len(b.x) for b in batches), fields


def score_sweep(
    driver: Driver, batches: Sequence[Batch], candidates: Candidates, u: Control, rate: float, meter: Meter
) -> Iterator[Scored]:
    """Score every candidate around u, on common probe batches and with common random numbers.

    Where the method offers it (`Prefixes`), one inner trajectory per step size, up to the largest K, gives
    the outer step of every smaller K on the way: PGD-K is the beginning of PGD-(K+1). The scores equal those
    of the candidates one by one (`score_one`), which is how they are computed for other methods. For small
    networks all K and all batches are computed together, which may change the last digits
    (`controlat.dynamics.stacked`).
    """
    if not isinstance(driver.method, Prefixes):
        for v in candidates.around(driver.method, u):
            yield score_one(driver, batches, v, rate, meter)
        return
    axes = candidates.within(driver.method.controls)
    steps, alphas = axes.pop("steps", (u["steps"],)), axes.pop("alpha", (u["alpha"],))
    for point in itertools.product(*axes.values()):
        base = replaced(u, dict(zip(axes, point, strict=True)))
        if 0 in steps:
            yield score_one(driver, batches, replaced(base, {"alpha": 0.0, "steps": 0}), rate, meter)
        for alpha in alphas if steps[-1] else ():
            longest = replaced(base, {"alpha": alpha, "steps": steps[-1]})
            for fields in driver.fields(batches, longest, rate, meter):  # K = 1, 2, ... on all batches
                v = fields[0].control
                if v["steps"] in steps:
                    yield v, driver.method.controls.cost(v), fields


def tpe(
    objective: Callable[[Control], float],
    candidates: Candidates,
    trials: int,
    seed: int,
    first: Sequence[Control] = (),
    knobs: Mapping[str, Knob] = MappingProxyType({"alpha": ALPHA, "steps": STEPS}),
) -> list[str]:
    """Search for the maximum of objective(v) with hyperopt's tree-structured Parzen estimator (TPE).

    Each knob is searched between the smallest and the largest of its candidate values, with a uniform prior
    for integers and a log-uniform one for positive real numbers. The controls that were tried, and their
    values, are for `objective` to keep. A trial fails if the value is not finite.

    Args:
        objective: value of a control.
        candidates: the knobs that are searched, and their bounds.
        trials: number of evaluations, besides those of `first`.
        seed: seed of hyperopt's generator.
        first: controls to try before the search; those outside the bounds are left out. Knobs that are not
            searched keep their value in the first of these.
        knobs: the method's knobs; those of PGD by default.

    Returns:
        The reason of every failed trial, those of `first` not counted.

    Source:
        Bergstra et al. (2011), "Algorithms for hyper-parameter optimization".

    Raises:
        ValueError: trials is less than 1.
        NonFiniteError: all trials failed, so that nothing was searched.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    bounds = {name: (values[0], values[-1]) for name, values in candidates.within(knobs).items()}
    base = first[0] if first else Control(**{name: knob.default or 1 for name, knob in knobs.items()})
    outcomes: list[str] = []  # of every trial: why it failed, or an empty text

    def value(point: Mapping[str, float]) -> float | None:
        v = replaced(base, _clipped(point, bounds, knobs))
        try:
            h = objective(v)
            outcomes.append("" if math.isfinite(h) else f"the value of {v} is {h}")
        except NonFiniteError as error:
            outcomes.append(str(error))
        return None if outcomes[-1] else h

    # `_clipped` would turn a control outside the bounds into another one: it is not tried.
    points = [point for v in first if (point := _point(v, bounds)) is not None]
    priors = {name: _prior(name, knobs[name].kind, *ends) for name, ends in bounds.items()}
    _fmin(value, priors, points, trials, seed)
    searched = outcomes[len(points) :]
    failed = [outcome for outcome in searched if outcome]
    if len(failed) == len(searched):
        raise NonFiniteError(f"all {len(failed)} trials of TPE failed: nothing was searched ({failed[0]})")
    return failed


def _fmin(
    value: Callable[[Mapping[str, float]], float | None],
    priors: Mapping[str, Any],
    points: Sequence[Mapping[str, float]],
    trials: int,
    seed: int,
) -> None:
    """Call `value` at these points and at as many of TPE's as there are trials; None is a failed trial."""
    from hyperopt import STATUS_FAIL, STATUS_OK, fmin
    from hyperopt import tpe as algorithm
    from hyperopt.exceptions import AllTrialsFailed
    from hyperopt.fmin import generate_trials_to_calculate

    def loss(point: dict[str, float]) -> dict[str, Any]:
        h = value(point)
        return {"status": STATUS_FAIL} if h is None else {"status": STATUS_OK, "loss": -h}

    with contextlib.suppress(AllTrialsFailed):  # `tpe` gives the reason
        fmin(
            loss,
            dict(priors),
            algo=algorithm.suggest,
            max_evals=trials,
            trials=generate_trials_to_calculate(list(points)) if points else None,
            rstate=np.random.default_rng(seed),
            show_progressbar=False,
            verbose=False,
        )


def _clipped(
    point: Mapping[str, float], bounds: Mapping[str, tuple[float, float]], knobs: Mapping[str, Knob]
) -> dict[str, float]:
    """A point that hyperopt drew, clipped to the bounds, which the priors slightly exceed."""
    values = {name: min(max(point[name], low), high) for name, (low, high) in bounds.items()}
    integers = {name: int(value) for name, value in values.items() if knobs[name].kind == "integer"}
    return values | integers


def _prior(name: str, kind: str, low: float, high: float) -> Any:
    """hyperopt's prior of a knob."""
    from hyperopt import hp

    if kind == "integer":
        return hp.quniform(name, low - 0.5, high + 0.5, 1)
    if low > 0:
        return hp.loguniform(name, math.log(low), max(math.log(high), math.log(low) + 1e-9))
    return hp.uniform(name, low, max(high, low + 1e-9))


def _point(v: Control, bounds: Mapping[str, tuple[float, float]]) -> dict[str, float] | None:
    """A control as a point of hyperopt's search space; None where it lies outside the bounds."""
    point = {name: float(v[name]) for name in bounds}
    if v.get("steps") == 0 and "alpha" in point:  # without an attack the step size has no effect
        point["alpha"] = bounds["alpha"][0]
    return point if all(low <= point[name] <= high for name, (low, high) in bounds.items()) else None
