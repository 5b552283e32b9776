"""The objective of one controller under one seed, as a Python call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from controlat._util.checks import number, whole
from controlat._util.progress import progress_bar
from controlat.app.experiment import Experiment
from controlat.app.ranges import RANGES
from controlat.app.settings import Problem, settings_from
from controlat.control.controller import Controller
from controlat.pmp import described

__all__ = ["objective"]


def objective(
    schedule: str | os.PathLike[str] | Controller | Callable[..., Any],
    *,
    seed: int = 0,
    gamma: str | float = "0.04",
    terminal: str = "adversarial",
    **settings: Any,
) -> dict[str, Any]:
    """Train under a schedule or controller, in memory, and tell J = Phi(theta_T) + gamma eta sum_t n(u_t).

    This is the J that `controlat.evaluate` reports at the same gamma. Phi is taken on held-out samples that
    nothing which is decided during training sees.

    Args:
        schedule: short text, JSON file, or a controller as `controlat.dynamics.run_spec.RunSpec` takes it.
        seed: of initial weights, order of samples and random starts.
        gamma: price of one gradient evaluation per sample, in units of the squared gradient norm.
        terminal: Phi, as `controlat.app.settings.EvaluateSettings` reads it.
        **settings: the fields of `controlat.app.settings.Problem`; data, model and method may be objects
            (`controlat.app.settings.objects`).

    Returns:
        ``J``, its parts ``phi``, ``evaluations`` (sum over steps of n, per sample) and ``price`` (gamma eta),
        what it cost: ``gradients`` of ``training`` and of ``Phi``, in samples, and ``seconds``; ``terminal``,
        Phi in words.

    Raises:
        ValueError: bad settings.
        NonFiniteError: training diverged; the message names the step.

    Source:
        Ye et al. (2021), equation 6.

    >>> result = objective("pgd:steps=3,alpha=0.06", epochs=1, train_points=200, progress=False)
    >>> result["evaluations"], result["gradients"]  # 3 steps of n = 4; Phi: PGD-20 on 10 samples
    (12.0, {'training': 720, 'Phi': 200})
    >>> result["J"] == result["phi"] + result["price"] * result["evaluations"]
    True
    """
    chosen = settings_from(Problem, settings, "objective")
    seed, gamma = whole(seed, "seed"), number(gamma, "gamma")
    RANGES["seed"].check("seed", seed)
    RANGES["gamma"].check("gamma", gamma)
    controller = chosen.controller_of(schedule)
    experiment = Experiment.of(chosen)
    spec = experiment.spec(controller, seed)
    steps = spec.epochs * spec.batches_per_epoch
    with experiment.running(), progress_bar(steps, " steps", chosen.progress, "objective") as bar:
        outcome = experiment.objective(controller, seed, terminal, progress=bar.update)
    result = outcome.to_json(spec.price(gamma))
    return result | {"terminal": described(experiment.terminal(seed, terminal))}
