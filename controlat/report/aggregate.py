"""The runs of every schedule taken together: means, intervals, and what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlat.pmp import FORMS, interval
from controlat.robust_accuracy import wilson

__all__ = ["assemble"]

FORMAT, VERSION = "controlat evaluation", 1


def assemble(**parts: Any) -> dict[str, Any]:
    """The result file: the given parts, and beside the runs of every schedule what they come to.

    Args:
        **parts: settings, environment, sizes, grid, and so on, as `controlat.records.Result` has them;
            ``schedules`` without their summaries.
    """
    schedules = [s | {"summary": _summarise(s["runs"])} for s in parts.pop("schedules")]
    return {"format": FORMAT, "version": VERSION, **parts, "schedules": schedules}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """A value per seed, their mean and their deviation."""
    return {
        "mean": statistics.fmean(values),
        "sd_over_seeds": statistics.stdev(values) if len(values) > 1 else None,
        "per_seed": list(values),
    }


def _accuracy(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds, and Wilson's interval there for ONE set of test points: the seeds share them."""
    spread, points = _spread([a["value"] for a in per_seed]), per_seed[0]["points"]
    return spread | {"points": points, "interval": list(wilson(round(spread["mean"] * points), points))}


def _criterion(runs: Sequence[Mapping[str, Any]], form: str) -> dict[str, Any]:
    """C: mean over epochs, then seeds; interval over probe batches, which all epochs and seeds share."""
    per_run = [[epoch[form] for epoch in run["criterion"]] for run in runs]
    c = _spread([statistics.fmean(g["value"] for g in gaps) for gaps in per_run])
    every = [gap for gaps in per_run for gap in gaps]
    left_out = np.mean([gap["jackknife"] for gap in every], axis=0)
    for name in ("unbiased", "cross_fitted"):
        values = [gap[name] for gap in every]
        c[name] = None if None in values else statistics.fmean(values)
    c["prices"] = [
        {
            "gamma": price["gamma"],
            "mean": statistics.fmean(e["prices"][i][form] for run in runs for e in run["criterion"]),
        }
        for i, price in enumerate(runs[0]["criterion"][0]["prices"])
    ]
    c["dropped"] = sorted({d for gap in every for d in gap["dropped"]})
    doubt = statistics.fmean(gap["doubt"] for gap in every)
    return c | {"interval": interval(c["mean"], list(left_out), least=0.0, more=doubt)}


def _summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of one schedule come to."""
    evaluations = [run["evaluation"] for run in runs]
    return {
        "criterion": {form: _criterion(runs, form) for form in FORMS},
        "clean": _accuracy([e["clean"] for e in evaluations]),
        "robust": _accuracy([e["robust"] for e in evaluations]),
        "after": {
            name: _accuracy([e["after"][name] for e in evaluations]) for name in evaluations[0]["after"]
        },
        "gradients": _spread([run["gradients"] for run in runs]),
        "seconds": _spread([run["seconds"] for run in runs]),
        **_extras(runs),
        **({"objective": _spread([run["objective"]["J"] for run in runs])} if "objective" in runs[0] else {}),
        **({"full": _full(runs)} if "full" in runs[0] else {}),
        "criterion_gradients": sum(e["gradients"] for run in runs for e in run["criterion"]),
        "evaluation_gradients": sum(e["gradients"] for e in evaluations),
        "dropped": sorted({d for run in runs for e in run["epochs"] for d in e["dropped"]}),
    }


def _full(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The full criterion by horizon, and its trust, over seeds; what failed where it is not finite."""
    failed = [f"seed {run['seed']}: {run['full']['failed']}" for run in every if "failed" in run["full"]]
    if failed:
        return {"failed": "; ".join(failed)}
    runs = [run["full"] for run in every]
    trusts = [run["calibration"] for run in runs]
    horizons = [
        _spread([h["value"] for h in seeds])
        | {"steps": seeds[0]["steps"], "interval": _together([(h["value"], h["interval"]) for h in seeds])}
        for seeds in zip(*(run["horizons"] for run in runs), strict=True)
    ]
    parts = dict.fromkeys(p for c in trusts for p in c["reliability"])  # 1/8 where it was needed
    return {
        "horizons": horizons,
        "objective": _spread([c["objective"] for c in trusts]),
        "certificate": _spread([c["certificate"] for c in trusts]),
        "kappa": _known([c["kappa"] for c in trusts]),
        "reliability": {p: _known([c["reliability"].get(p) for c in trusts]) for p in parts},
        "uncalibrated": sum(not c["calibrated"] for c in trusts),
        "reach": min((c["reach"] or 0.0 for c in trusts if c["gain"] > 0), default=None),
        "gain": _spread([c["gain"] for c in trusts]),
        "model_gain": _spread([c["model_gain"] for c in trusts]),
        **{name: _known([run[name] for run in runs]) for name in ("C_rho", "cosine", "growth")},
        "prices": [
            {"gamma": seeds[0]["gamma"], "mean": statistics.fmean(p["value"] for p in seeds)}
            for seeds in zip(*(run["prices"] for run in runs), strict=True)
        ],
        "same": all(run["same"] is not False for run in runs),
        "dropped": sorted({name for run in runs for name in run["dropped"]}),
        "gradients": sum(sum(run["gradients"].values()) for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
    }


def _known(values: Sequence[Any]) -> dict[str, Any] | None:
    """Mean and spread of the values that are numbers; None without any (r means nothing where G is 0)."""
    numbers = [float(v) for v in values if v is not None]
    return _spread(numbers) if numbers else None


def _together(values: Sequence[tuple[float, Sequence[float] | None]]) -> list[float] | None:
    """The interval of a mean of independent values, from the interval of each, one side at a time."""
    known = [(value, *interval) for value, interval in values if interval is not None]
    if len(known) < len(values):
        return None
    mean = statistics.fmean(value for value, _, _ in known)
    below = sum((value - low) ** 2 for value, low, _ in known) ** 0.5 / len(known)
    above = sum((high - value) ** 2 for value, _, high in known) ** 0.5 / len(known)
    return [mean - below, mean + above]


def _extras(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AutoAttack and transfer where they ran, and warnings with the seeds that they were given for."""
    extras: dict[str, Any] = {}
    for name in ("autoattack", "transfer"):
        parts = [run["evaluation"][name] for run in runs if name in run["evaluation"]]
        if parts:
            extras[name] = _accuracy([part["robust"] for part in parts])
    warned: dict[str, list[int]] = {}
    for run in runs:
        for text in run["evaluation"]["warnings"]:
            warned.setdefault(text, []).append(run["seed"])
    return extras | {"warnings": [{"text": text, "seeds": seeds} for text, seeds in warned.items()]}
