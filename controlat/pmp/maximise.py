"""How the Hamiltonian is maximised over candidates: a sweep, exact in K, or hyperopt's TPE."""

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

# One candidate: the control, its cost n(v) per sample, and what it would do on every probe batch.
Scored = tuple[Control, float, list[Field]]


def score_one(driver: Driver, batches: Sequence[Batch], v: Control, rate: float, meter: Meter) -> Scored:
    """Score one control by running it from the start on every probe batch; its cost is counted."""
    before = meter.gradients
    fields = [driver.field(batch, v, rate, meter) for batch in batches]
    return v, (meter.gradients - before) / sum(len(b.x) for b in batches), fields


def score_sweep(
    driver: Driver, batches: Sequence[Batch], candidates: Candidates, u: Control, rate: float, meter: Meter
) -> Iterator[Scored]:
    """Score every candidate around u, on common probe batches and random numbers.

    Where the method passes through the step of every smaller K (`Prefixes`: PGD-K is the beginning of
    PGD-(K+1)), at the price of ONE trajectory of the largest K for each step size, which equals running
    every candidate by itself; otherwise each candidate is run.
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
            for fields in zip(*(driver.fields(b, longest, rate, meter) for b in batches), strict=True):
                v = fields[0].control
                if v["steps"] in steps:
                    yield v, driver.method.controls.cost(v), list(fields)


def tpe(
    objective: Callable[[Control], float],
    candidates: Candidates,
    trials: int,
    seed: int,
    first: Sequence[Control] = (),
    knobs: Mapping[str, Knob] = MappingProxyType({"alpha": ALPHA, "steps": STEPS}),
) -> list[str]:
    """Maximise objective(v) over knobs, real ones and whole ones, with hyperopt's Parzen estimators.

    Each knob is searched between the smallest and the largest of its values: whole numbers evenly, real ones
    by their logarithm where they are positive. The caller keeps what it scored; a control whose value is not
    finite counts as failed and never wins.

    Args:
        objective: value of a control.
        candidates: which knobs are searched, and their bounds.
        trials: number of evaluations, those of `first` not counted.
        seed: of hyperopt's generator.
        first: controls to try before the search starts; those outside the bounds are passed over. The first
            of them says what the knobs are that are not searched.
        knobs: what the method has; those of PGD by default.

    Returns:
        Why trials failed, one text for each that did; those of `first` do not count.

    Raises:
        ValueError: trials is less than 1.
        NonFiniteError: all trials failed, so that nothing was searched.
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    from hyperopt import STATUS_FAIL, STATUS_OK, fmin
    from hyperopt import tpe as algorithm
    from hyperopt.exceptions import AllTrialsFailed
    from hyperopt.fmin import generate_trials_to_calculate

    axes = {name: (values[0], values[-1]) for name, values in candidates.within(knobs).items()}
    base = first[0] if first else Control(**{name: knob.default or 1 for name, knob in knobs.items()})
    outcomes: list[str] = []  # of every trial: why it failed, or nothing

    def loss(point: dict[str, float]) -> dict[str, Any]:
        inside = {name: min(max(point[name], low), high) for name, (low, high) in axes.items()}
        whole = {name: int(value) for name, value in inside.items() if knobs[name].kind == "integer"}
        v = replaced(base, inside | whole)
        try:
            value = objective(v)
            outcomes.append("" if math.isfinite(value) else f"the value of {v} is {value}")
        except NonFiniteError as error:
            outcomes.append(str(error))
        return {"status": STATUS_FAIL} if outcomes[-1] else {"status": STATUS_OK, "loss": -value}

    # A point outside the bounds would come back cut: a control that nobody asked for.
    points = [p for v in first if (p := _point(v, axes)) is not None]
    with contextlib.suppress(AllTrialsFailed):  # told below, with the reason
        fmin(
            loss,
            {name: _prior(name, knobs[name].kind, *ends) for name, ends in axes.items()},
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


def _prior(name: str, kind: str, low: float, high: float) -> Any:
    """What hyperopt draws a knob from."""
    from hyperopt import hp

    if kind == "integer":
        return hp.quniform(name, low - 0.5, high + 0.5, 1)
    if low > 0:
        return hp.loguniform(name, math.log(low), max(math.log(high), math.log(low) + 1e-9))
    return hp.uniform(name, low, max(high, low + 1e-9))


def _point(v: Control, axes: Mapping[str, tuple[float, float]]) -> dict[str, float] | None:
    """A control as hyperopt is told it; None where it lies outside the bounds."""
    known = {name: float(v[name]) for name in axes}
    if v.get("steps") == 0 and "alpha" in known:  # no attack, whatever the step size
        known["alpha"] = axes["alpha"][0]
    return known if all(low <= known[name] <= high for name, (low, high) in axes.items()) else None
