"""What other controls would have been worth along a run: differences of the Hamiltonian, as plain data.

Along the run's own trajectory, with costates from its end, the candidate v in place of u_t lowers J by

    DeltaH_t(v) = p_{t+1} . (S_t(z_t, v) - S_t(z_t, u_t)) - gamma eta (n(v) - n(u_t))

to first order. The part of Phi and n(v) are kept apart, so that they serve any price of n.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.pmp.candidates import Candidates
from controlat.pmp.examination import examine
from controlat.pmp.full_criterion import Criterion
from controlat.pmp.hamiltonian import Gains
from controlat.pmp.objective import Outcome, evaluations, outcome_at
from controlat.pmp.terminal import Terminal

__all__ = ["LOOKS", "STEP_SIZES", "examined", "surface_of"]

# On the digits a training with its surface costs three to eight times one without, with these.
STEP_SIZES = 4  # of the candidates, spaced logarithmically in [eps/40, 2 eps]; K takes every value
LOOKS = 2  # steps of each epoch at which the candidates are scored: more seeds pay more than more steps


def examined(
    driver: Driver, spec: RunSpec, terminal: Terminal, max_steps: int, until: int | None = None
) -> tuple[Outcome, dict[str, Any]]:
    """Train, with J as `controlat.pmp.objective.objective` gives it, and look back along the trajectory.

    Args:
        driver: the system at its initial state; it is left at the end of training.
        spec: data, controller, learning rate, seed.
        terminal: Phi.
        max_steps: largest K of the candidates.
        until: epochs that are trained, Phi being taken then; all by default.

    Returns:
        Phi, sum n and what all of it took, as ``training_gradients``; and the surface of `surface_of`, which
        is {"failed": reason} where a costate is not finite.

    Raises:
        ValueError: the method is not controlled by alpha and steps.
        NonFiniteError: training diverged, or Phi is not finite; the message names the step.
    """
    if missing := {"alpha", "steps"} - set(driver.method.controls):
        raise ValueError(f"a surface is over alpha and steps, but the method has no {', '.join(missing)}")
    candidates = Candidates.default(driver.ball.eps, max_steps, STEP_SIZES)
    began, before, meter = time.perf_counter(), driver.meter.copy(), Meter()
    last = None if until is None else until * spec.batches_per_epoch
    recording = Recording.of(driver, spec, last=last)
    training = driver.meter.since(before).gradients
    try:
        criterion = examine(recording, terminal, candidates, gamma=0.0, looks=LOOKS, meter=meter)
        outcome = Outcome(phi=criterion.phi, evaluations=criterion.evaluations)
        spent = criterion.spent
        surface = surface_of(criterion, spec.epochs * spec.batches_per_epoch)
    except NonFiniteError as error:
        outcome = outcome_at(driver, terminal, evaluations(recording.steps))  # it may be what is not finite
        spent = meter.gradients + outcome.terminal_gradients
        surface = {"failed": str(error)}
    spent += training + recording.spent.gradients
    seconds = time.perf_counter() - began
    return replace(outcome, training_gradients=spent, terminal_gradients=0, seconds=seconds), surface


def surface_of(criterion: Criterion, steps: int) -> dict[str, Any]:
    """The gains of all candidates in every block of a run, as plain data rounded to 6 digits.

    Args:
        criterion: of the run.
        steps: T, the number of steps of a full run.

    Returns:
        ``candidates``, [alpha, K] of each; ``evaluations``, n of each, mean over the run; ``blocks``, each
        with ``t`` (its middle, the run going from 0 to 1), ``share`` (its length), ``own`` ([alpha, K] of
        the steps that were looked at), and ``gains``: for each candidate T times the mean of
        p_{t+1} . (S_t(z_t, v) - S_t(z_t, u_t)), the gain in Phi per unit of t.
    """
    tables = [_table(g) for g in criterion.looked]
    common = [v for v in tables[0] if all(v in table for table in tables)]
    horizon = criterion.horizons[-1]
    numbers = np.arange(len(criterion.blocks)) + criterion.first
    blocks = []
    for index in dict.fromkeys(criterion.blocks):
        members = numbers[np.array(criterion.blocks) == index]
        pairs = zip(criterion.looked, tables, strict=True)
        inside = [(g, table) for g, table in pairs if g.number in members]
        gains = np.mean([[g.rewards[horizon][table[v]] for v in common] for g, table in inside], axis=0)
        blocks.append(
            {
                "t": _digits((members[0] + members[-1] + 1) / (2 * steps)),
                "share": _digits(len(members) / steps),
                "own": [list(_key(g.controls[0])) for g, _ in inside],
                "gains": [_digits(steps * gain) for gain in gains],
            }
        )
    pairs = zip(criterion.looked, tables, strict=True)
    n = np.mean([[g.evaluations[table[v]] for v in common] for g, table in pairs], axis=0)
    return {"candidates": [list(v) for v in common], "evaluations": list(map(_digits, n)), "blocks": blocks}


def _key(u: Control) -> tuple[float, int]:
    """(alpha, K); without an attack alpha has no effect."""
    return (_digits(u["alpha"]), int(u["steps"])) if u["steps"] else (0.0, 0)


def _table(g: Gains) -> dict[tuple[float, int], int]:
    """Where each candidate stands, by (alpha, K)."""
    return {_key(v): i for i, v in reversed(list(enumerate(g.controls)))}


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
