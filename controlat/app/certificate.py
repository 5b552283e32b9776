"""The certificate of a schedule that was found: the full criterion, and the decrease of J reached."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from controlat.app.evaluate import evaluate
from controlat.app.experiment import Experiment
from controlat.app.settings import Problem
from controlat.app.settings.search import SearchSettings

__all__ = ["CERTIFICATE", "certificate"]

CERTIFICATE = "certificate"  # the folder of it in that of the search
_SEEDS = 3  # judging seeds at most: it costs about ten trainings under each


def certificate(
    experiment: Experiment, chosen: SearchSettings, text: str, price: float, out: Path
) -> dict[str, Any]:
    """C and D of what was found, at the search's price, by `evaluate` in a directory of its own.

    Args:
        experiment: the problem.
        chosen: settings of the search.
        text: of the schedule.
        price: of the mean cost n of a step, in units of J.
        out: the directory, which has the whole evaluation then.

    Returns:
        ``{"seeds", "C", "D", "trusted"}``, or ``{"seeds", "failed"}`` where the criterion is not finite.
    """
    seeds = list(chosen.judge_seeds[:_SEEDS])
    spec = experiment.spec(chosen.controller_of(text), seeds[0])
    problem = {f.name: getattr(chosen, f.name) for f in fields(Problem)}
    result = evaluate(
        out,
        **problem,
        schedules=[text],
        seeds=seeds,
        gamma=price / (spec.price(1.0) * spec.epochs * spec.batches_per_epoch),
        terminal=chosen.terminal,
        attacks=chosen.attacks,
        max_steps=chosen.max_steps,
        jobs=chosen.jobs,
    )
    full = result["schedules"][0]["summary"]["full"]
    if "failed" in full:
        return {"seeds": seeds, "failed": full["failed"]}
    ends = {"C": full["horizons"][-1]["mean"], "D": full["certificate"]["mean"]}
    return {"seeds": seeds, **ends, "trusted": not full["uncalibrated"]}
