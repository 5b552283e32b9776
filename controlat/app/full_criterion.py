"""The full criterion of a finished run: recorded or rolled out again, with costates from its end backward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from controlat._util.checks import number
from controlat._util.errors import NonFiniteError
from controlat._util.parallel import World
from controlat.app.experiment import Experiment
from controlat.app.settings import EvaluateSettings
from controlat.control.controller import Controller
from controlat.control.schedules import Schedule
from controlat.dynamics.recording import GIBI, Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import same_bits
from controlat.methods import Method
from controlat.pmp import (
    HALVINGS,
    LAMBDAS,
    Candidates,
    Criterion,
    Evaluations,
    Trust,
    described,
    examine,
    looked_at,
    rollout_cost,
    trust,
)

__all__ = ["full_criterion", "full_criterion_cost", "report_payload"]


def full_criterion(
    experiment: Experiment,
    settings: EvaluateSettings,
    controller: Controller,
    seed: int,
    candidates: Candidates,
    gamma: float,
    trained: nn.Module | None = None,
    recording: Recording | None = None,
    bar: Callable[[str, int], AbstractContextManager[Any]] = lambda what, total: nullcontext(),
) -> dict[str, Any]:
    """The criterion over all horizons, and what its size means, for one controller under one seed.

    Args:
        experiment: the problem with its data.
        settings: horizons, looks, memory.
        controller: decides u_t; what is looked back upon are the controls that it took.
        seed: of the run.
        candidates: what is searched.
        gamma: price of one gradient evaluation per sample.
        trained: the network at the end of the run, to see whether the recorded roll-out ends there.
        recording: of the training itself; without it the run is rolled out again.
        bar: makes a progress bar (tqdm's) of what is done and the number of its steps; none by default.

    Returns:
        Plain data: ``criterion``, ``calibration``, ``terminal`` (Phi in words), ``same`` (whether the
        roll-out ended with the bits of `trained`; None without it), ``stride``, ``gradients`` by part,
        ``seconds``. Where a costate is not finite, ``failed`` alone, which says at which step.
    """
    began, terminal = time.perf_counter(), experiment.terminal(seed, settings.terminal)
    if recording is None:
        recording = _rolled_out(experiment, settings, controller, seed, bar)
    spec, ours = recording.spec, recording.driver.model.state_dict()
    same = None if trained is None else same_bits(ours, trained.state_dict())
    steps = recording.last - recording.first
    try:
        with bar("costates", steps) as b:
            criterion = examine(
                recording,
                terminal,
                candidates,
                gamma=gamma,
                horizons=settings.horizons or [1, spec.batches_per_epoch],
                looks=settings.looks,
                progress=_told(b),
            )
    except NonFiniteError as error:
        return {"failed": str(error)}
    with bar("relaxed roll-outs", (len(LAMBDAS) + HALVINGS) * steps) as b:  # mostly fewer
        trusted = trust(recording, criterion, terminal, progress=_told(b))
    return {
        "criterion": criterion.to_json(),
        "calibration": trusted.to_json(),
        "terminal": described(terminal),
        "same": same,
        "stride": recording.stride,
        "gradients": _gradients(recording, criterion, trusted),
        "seconds": time.perf_counter() - began,
    }


def _rolled_out(
    experiment: Experiment,
    settings: EvaluateSettings,
    controller: Controller,
    seed: int,
    bar: Callable[[str, int], AbstractContextManager[Any]],
) -> Recording:
    """The run once more, recorded."""
    driver, spec = experiment.driver(seed), replace(experiment.spec(controller, seed), world=World())
    with bar("roll-out", spec.epochs * spec.batches_per_epoch) as b:
        return Recording.of(driver, spec, limit=settings.memory * GIBI, progress=_told(b))


def _gradients(recording: Recording, criterion: Criterion, trusted: Trust) -> dict[str, int]:
    """Gradient evaluations by part, in samples; of the roll-out also where it was the training itself."""
    return {
        "roll-out": sum(step.spent.gradients for step in recording.steps),
        "steps again": criterion.replayed,
        "costates and scores": criterion.spent,
        "calibration": trusted.spent,
    }


def full_criterion_cost(
    settings: EvaluateSettings,
    spec: RunSpec,
    method: Method,
    candidates: Candidates,
    phi: Evaluations,
    replays: int,
) -> float:
    """An upper bound of the gradient evaluations of `full_criterion`, in samples, for planning.

    Args:
        settings: horizons and looks.
        spec: of the run.
        method: its method; a loss of up to three passes is reckoned with.
        candidates: what is searched.
        phi: of the terminal cost.
        replays: how often steps are taken again at most.
    """
    per_epoch, n = spec.batches_per_epoch, len(spec.data)
    steps = spec.epochs * per_epoch
    controls = spec.plan()
    rolled = rollout_cost(spec, method)
    looked = looked_at(spec.blocks(0, steps), settings.looks)
    horizons = {min(h, steps) for h in (settings.horizons or [1, per_epoch])} | {steps}
    windows = sum(min(-(-steps // h), len(looked)) for h in horizons)
    pulled = rolled + 2 * 3 * len(horizons) * spec.epochs * n
    scored = sum(candidates.cost(method, controls[number]) for number in looked) * spec.batch_size
    most_expensive = max(method.controls.cost(v) for v in candidates.around(method, controls[0]))
    relaxed = (len(LAMBDAS) + HALVINGS) * (rolled + most_expensive * spec.epochs * n + phi.value)
    return (1 + replays) * rolled + pulled + scored + windows * phi.gradient + phi.value + relaxed


def _told(bar: Any) -> Callable[..., object] | None:
    """What moves a progress bar by one, whatever it is called with."""
    return None if bar is None else lambda *_: bar.update()


def _thinned(norms: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """About a hundred of the costate's norms, evenly spaced, the first and the last among them."""
    stride = max(1, len(norms) // 100)
    last = norms[-1:] if (len(norms) - 1) % stride else ()  # where growth is counted from
    return (*norms[::stride], *last)


def report_payload(stored: Mapping[str, Any], schedule: Schedule, surfaces: bool = True) -> dict[str, Any]:
    """What a report needs of `full_criterion`'s data: C by horizon, block and price, costates, trust.

    Args:
        stored: that data.
        schedule: of the run; the control of a block is u(t), real where a knob is dithered.
        surfaces: with the Hamiltonian over all candidates, in an early, a middle and a late block.
    """
    if "failed" in stored:
        return dict(stored)
    criterion, rho = Criterion.from_json(stored["criterion"]), stored["calibration"]["rho"]
    gamma, blocks = number(criterion.gamma, "gamma"), _blocks(criterion, schedule)
    return {
        "horizons": [_horizon(criterion, h) for h in criterion.horizons],
        "blocks": blocks,
        "surfaces": _surfaces(criterion, blocks) if surfaces else [],
        "cosine": float(np.mean(criterion.cosines())),
        "growth": criterion.growth if math.isfinite(criterion.growth) else None,
        "C_rho": None if rho is None else criterion.value(rho=rho),
        "prices": [
            {"gamma": g, "value": replace(criterion, gamma=g).value()} for g in (gamma / 4, 4 * gamma)
        ],
        "steps": criterion.steps,
        "looked": len(criterion.looked),
        "phi": criterion.phi,
        "evaluations": criterion.evaluations,
        "norms": [list(pair) for pair in _thinned(criterion.norms)],
        "dropped": list(criterion.dropped),
        **{name: stored[name] for name in ("calibration", "same", "stride", "gradients", "seconds")},
    }


def _horizon(criterion: Criterion, h: int) -> dict[str, Any]:
    """C over one horizon."""
    return {
        "steps": h,
        "value": criterion.value(h),
        "interval": criterion.interval(h),
        "per_step": float(criterion.per_step(h).mean()),
        "blocks": criterion.per_block(h),
    }


def _blocks(criterion: Criterion, schedule: Schedule) -> list[dict[str, Any]]:
    """When every block begins, its control, the maximiser, and what that would gain."""
    begins = {index: i for i, index in reversed(list(enumerate(criterion.blocks)))}
    per_epoch = criterion.steps / max(1, len({g.epoch for g in criterion.looked}))
    blocks: list[dict[str, Any]] = []
    for b, cosine in zip(criterion.best(), criterion.cosines(), strict=True):
        t = begins[b.index] / per_epoch
        u = dict(schedule(t))
        v = dict(b.maximiser) if b.gain > 0 else u
        blocks.append({"t": t, "control": u, "maximiser": v, "gain": b.gain, "cosine": cosine})
    return blocks


def _surfaces(criterion: Criterion, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gain of every candidate in an early, a middle and a late block."""
    best = criterion.best()
    drawn: list[dict[str, Any]] = []
    for i in sorted({0, len(best) // 2, len(best) - 1}):
        (_, own), *others = criterion.surface(best[i].index)
        scored = [(blocks[i]["control"], own), *others]
        drawn.append(blocks[i] | {"candidates": [{"control": dict(v), "gain": gain} for v, gain in scored]})
    return drawn
