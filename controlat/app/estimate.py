"""What `evaluate` would cost, said before anything is trained."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from controlat.app.evaluate import strides, tried_terminal
from controlat.app.experiment import Experiment
from controlat.app.jobs import number_of_jobs
from controlat.app.schedule_run import schedule_runs
from controlat.app.settings import EvaluateSettings, settings_from
from controlat.control.controller import Controller
from controlat.control.cost import Meter
from controlat.pmp import terminal_evaluations

__all__ = ["estimate", "seconds_per_evaluation"]


def estimate(**settings: Any) -> dict[str, Any]:
    """What `evaluate` would cost: gradient evaluations by part, and seconds from a few timed steps.

    The seconds count on a core for each of the runs that are made at a time (`jobs`).

    The counts of the evaluation and of the full criterion are upper bounds: survivors alone are attacked
    again, and all states of a roll-out may fit in memory. Three forward passes count as one gradient
    evaluation there.

    Args:
        **settings: the fields of `controlat.app.settings.EvaluateSettings`.

    Returns:
        ``{"gradients": {"training", "validation", "Phi", "criterion", "full criterion", "evaluation",
        "total"}, "seconds"}``.

    Raises:
        ValueError: bad settings, or a roll-out that does not fit in memory.
    """
    chosen = settings_from(EvaluateSettings, settings, "evaluate")
    experiment = Experiment.of(chosen)
    runs = list(schedule_runs(experiment, chosen, Path("unused")))
    tried_terminal(experiment, chosen)
    first = chosen.seeds[0]
    phi = terminal_evaluations(experiment.terminal(first, chosen.terminal), experiment.driver(first))
    replays = len(strides(experiment, chosen, runs[0])) - 1 if chosen.full else 0
    parts: Counter[str] = Counter()
    for run in runs:
        parts.update(run.cost(phi, replays))
    parts["evaluation"] = len(runs) * experiment.evaluation_cost(chosen)  # type: ignore[assignment]
    jobs = number_of_jobs(chosen, experiment)
    with experiment.running(experiment.threads(jobs=jobs)):
        seconds = seconds_per_evaluation(experiment, runs[0].controller)
    total = sum(parts.values())
    gradients = {k: round(v) for k, v in parts.items()} | {"total": round(total)}
    rounds = -(-len(runs) // jobs)  # as many runs at a time as there are jobs
    return {"gradients": gradients, "seconds": total * seconds * rounds / len(runs)}


def seconds_per_evaluation(experiment: Experiment, controller: Controller) -> float:
    """Seconds of a gradient evaluation of one sample, by the fastest of a few first steps."""
    driver, spec = experiment.driver(0), experiment.spec(controller, 0)
    batch, (control,) = next(spec.batches(0)), spec.plan(0, 1)
    best = float("inf")
    for _ in range(4):
        meter, began = Meter(), time.perf_counter()
        driver.field(batch, control, meter=meter)
        best = min(best, (time.perf_counter() - began) / meter.gradients)
    return best
