"""The trials of a search as its result file has them: J, spent budget, the Pareto front, what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from controlat.schedule_search.space import Parameter

__all__ = [
    "Explained",
    "at_prices",
    "explained",
    "failed",
    "front",
    "full_length",
    "is_whole",
    "means",
    "objective",
    "spent_after",
]

Result = Mapping[str, Any]
Trial = Mapping[str, Any]
PRICES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of n, in units of that of the search


def failed(trial: Trial) -> bool:
    """Whether a training failed under any seed."""
    return any(run["phi"] is None for run in trial["runs"])


def is_whole(result: Result, trial: Trial) -> bool:
    """Whether its runs were trained to the end, at full length and on all samples."""
    return (trial["epochs"], trial["points"], trial["until"]) == (result["settings"]["epochs"], None, None)


def means(trial: Trial) -> tuple[float, float]:
    """(n, Phi) of a trial that did not fail, means over its seeds."""
    return tuple(float(np.mean([run[key] for run in trial["runs"]])) for key in ("mean_cost", "phi"))  # type: ignore[return-value]


def objective(trial: Trial, price: float) -> float:
    """Mean J = Phi + price n; nan where a training failed."""
    n, phi = (np.nan, np.nan) if failed(trial) else means(trial)
    return phi + price * n


def spent_after(result: Result) -> list[float]:
    """Gradient evaluations that were spent once each trial had ended, each training counted once."""
    known, out, total = set[tuple[Any, ...]](), list[float](), 0.0
    for trial in result["trials"]:
        for run in trial["runs"]:
            fidelity = (run.get("surface"), trial["epochs"], trial["points"], trial["until"])
            key = (trial["schedule"], run["seed"], *fidelity)
            total += 0.0 if key in known else run["gradients"]
            known.add(key)
        out.append(total)
    return out


def full_length(result: Result) -> list[Trial]:
    """Trials of whole runs on all samples that did not fail, each schedule once: under the most seeds."""
    good = [t for t in result["trials"] if is_whole(result, t) and not failed(t)]
    every = sorted(good, key=lambda t: len(t["runs"]))
    return list({t["schedule"]: t for t in every}.values())


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: places of the points that no other is as good as in both and better in one.

    Both coordinates are costs. Ordered by the first; of equal points the first counts.

    >>> front([(1, 5), (2, 3), (3, 4), (4, 1), (4, 2)])
    [0, 1, 3]
    """
    out, least = list[int](), np.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < least:
            out.append(i)
            least = points[i][1]
    return out


def at_prices(result: Result) -> list[tuple[float, Trial]]:
    """(price, the trial of full length of lowest Phi + price n) for some prices; none without trials."""
    trials = full_length(result)
    prices = [factor * result["price"] for factor in PRICES]
    return [(p, min(trials, key=lambda t: objective(t, p))) for p in prices] if trials else []


class Explained(NamedTuple):
    """What the parameters of a space explain of the order of its trials.

    Args:
        space: name.
        trials: how many there are at the fidelity that most of them have.
        degree: 2 for parabolas, 1 for straight lines, 0 where trials are too few to tell anything.
        shares: {parameter: share of the variance of the ranks of J that is lost without it}.
        chance: the share that a parameter of no effect exceeds in one of twenty cases.
        rest: the share that no parameter explains.
    """

    space: str
    trials: int
    degree: int
    shares: dict[str, float]
    chance: float
    rest: float


def explained(result: Result) -> list[Explained]:
    """For every space, which parameters the order of its trials by J depends on.

    Model, by least squares: rank of J = a sum over the parameters of b z + c z^2, z their coordinates in the
    unit cube. It goes without c where there are fewer than two trials for each coefficient, and nothing is
    told where that is too much as well. A parameter's share is the rise of the sum of squared residuals
    without its terms, over the total; `chance` is the 95 % quantile of that share under no effect, by the F
    distribution.
    """
    return [_explained(result, space) for space in result["spaces"]]


def _explained(result: Result, space: Mapping[str, Any]) -> Explained:
    parameters = [Parameter(**p) for p in space["parameters"]]
    trials = _largest_group([t for t in result["trials"] if t["space"] == space["name"] and not failed(t)])
    n, p = len(trials), len(parameters)
    z = np.array([[q.share(t["point"][q.name]) - 0.5 for q in parameters] for t in trials]).reshape(n, p)
    y = stats.rankdata([objective(t, result["price"]) for t in trials])
    degree = next((d for d in (2, 1) if n >= 2 * (d * p + 1)), 0)
    varied = [bool(n and np.ptp(z[:, j]) > 0) for j in range(p)]
    if degree == 0 or np.ptp(y) == 0:
        return Explained(space["name"], n, 0, {}, 1.0, 1.0)
    total = float(((y - y.mean()) ** 2).sum())
    rest = _residual(z[:, varied], y, degree)
    kept = [[v and i != j for i, v in enumerate(varied)] for j in range(p)]
    lost = [_residual(z[:, columns], y, degree) - rest for columns in kept]
    free = n - degree * sum(varied) - 1
    chance = float(stats.f.ppf(0.95, degree, free) * degree * rest / free)
    shares = {q.name: max(loss, 0.0) / total for q, loss in zip(parameters, lost, strict=True)}
    return Explained(space["name"], n, degree, shares, min(chance / total, 1.0), rest / total)


def _largest_group(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of the one fidelity that most of them have, each schedule once."""
    groups: dict[tuple[Any, ...], dict[str, Trial]] = {}
    for t in trials:
        fidelity = (t["epochs"], t["points"], t["until"], len(t["runs"]))
        groups.setdefault(fidelity, {})[t["schedule"]] = t
    return list(max(groups.values(), key=len, default={}).values())


def _residual(z: Any, y: Any, degree: int) -> float:
    """Sum of squared residuals of y by an additive polynomial of the columns of z."""
    design = np.column_stack([np.ones(len(y)), *(z**d for d in range(1, degree + 1))])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - fitted) ** 2).sum())
