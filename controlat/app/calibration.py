"""The inner problem of a finished run, epoch by epoch: what a one-dimensional landscape is calibrated to.

A run is trained again, in memory, and `controlat.attacks.inner_problem` is measured on a fixed probe of
training samples, at theta_t at the start of every epoch and at the end.

Steps have lengths in pixels, as the knob alpha has in training; a landscape multiplies its gradient instead.
Convergence and curvature rise and fall with |l_xx| = 1/alpha*, each in its own proportion. The secant does
not: cross-entropy is convex along a direction in which it rises, so that a trained network has no maximum
along a line, and a secant below 0; one long step falls short because the direction turns. Nor does the
landscape begin with the untrained network: K is large there, falls until something has been learnt, and rises
from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.files import JSON_LIMIT, open_file, write_json
from controlat._util.parallel import World
from controlat._util.progress import progress_bar
from controlat.app.experiment import Experiment
from controlat.app.runs import environment
from controlat.app.session import shares_held_out
from controlat.app.settings import EvaluateSettings
from controlat.app.trainer import load_checkpoint
from controlat.attacks.inner_problem import (
    BUDGET,
    MEASURES,
    SHARE,
    InnerProblem,
    check_inner_problem,
    inner_problem,
)
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import same_bits
from controlat.models.frozen.contexts import MODES
from controlat.records import Calibrated, read_record

__all__ = ["calibration"]

_PROBED, _FINEST = 512, 20  # training samples, and K of the finest ascent, if nothing is said
_KEPT, _VERSION = "calibration.json", 1  # where a calibration stays with its run, and the form of its key
_PROBE = "probe"  # the random order that the criterion takes its probe from


def calibration(
    run: str | Path,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    probe: int = _PROBED,
    steps: int = _FINEST,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a finished run again, in memory, and measure its inner problem before every epoch and at the end.

    What an earlier call left in the run's directory is returned, if all that decides it is the same.

    The probe is that of the criterion: the same training samples, not augmented, in float32; BatchNorm and
    dropout as in the ascent of the run's method (its attack_mode, "eval" where it has none). The loss is the
    cross-entropy, whatever the method's. Training is not touched by it, to the last bit.

    Args:
        run: directory of a finished `controlat train`.
        data_dir: folder of the data files; that of the run if left out.
        device: auto, cpu, cuda, ...
        threads: CPU threads; those of the run if left out, where there are as many cores.
        probe: training samples.
        steps: K of the finest ascent.
        progress: show a progress bar (on a terminal).

    Returns:
        Plain data: ``run``, ``schedule``, ``seed``, ``times`` [0, ..., E] in epochs, ``epochs`` E (fewer than
        planned where the method ended training), ``measures`` by name, each ``{"what", "values": one per time
        (None where the loss does not rise), "marks": one text per time, empty where the value is no mere
        bound}``, ``losses`` (E + 1, steps + 1), ``probe`` (its samples), ``mode``, ``eps``, ``alpha`` and
        ``steps`` of the finest ascent, ``budget`` tau in pixels, ``gradients`` and ``forwards`` of measuring,
        in samples, ``training_gradients``, ``seconds`` of measuring, ``training_seconds``, ``same`` (whether
        training ended with the run's bits), ``warning`` (why not; None if it did), ``environment``, and
        ``key``, what decided it: digests of the run's checkpoint, settings, schedule and training data,
        probe, steps, budget, share, device, threads, versions.

    Raises:
        ValueError: not a run of `controlat train`, unfinished, data that is missing, a number out of range.
        NonFiniteError: a loss is not finite; says at which epoch.
    """
    run = Path(run)
    settings, theirs = _read(run, data_dir, device, threads, probe, progress)
    check_inner_problem(settings.ball, steps)
    key = _key(run, settings, theirs["threads"], steps)
    if (run / _KEPT).exists():
        open_file(run / _KEPT, JSON_LIMIT).close()  # what is no file of ours is refused, not replaced
    with contextlib.suppress(ValueError):  # missing, damaged, or of an earlier form
        kept = dict(read_record(run / _KEPT, Calibrated))
        if kept["key"] == key:
            return kept
    fresh = _measured(run, settings, steps, theirs) | {"key": key}
    with contextlib.suppress(OSError):  # a run that may not be written to is measured anew each time
        write_json(run / _KEPT, fresh)
    return fresh


def _measured(run: Path, settings: EvaluateSettings, steps: int, theirs: dict[str, Any]) -> dict[str, Any]:
    """The inner problem before every epoch and at the end, and whether training ended with the run's bits."""
    began = time.perf_counter()
    experiment, seed = Experiment.of(settings, shares_held_out(run)), settings.seeds[0]
    with experiment.running(experiment.threads(theirs["threads"])):
        schedule = settings.schedule_of(settings.schedules[0])
        spec = replace(experiment.spec(schedule, seed), world=World())
        driver, meter = experiment.driver(seed), Meter()
        order = torch.randperm(len(experiment.training), generator=rng.generator(0, _PROBE))
        samples = order[: settings.probe]
        look = _Look(*experiment.training.take(samples), _mode(driver), spec.batch_size, steps, meter)
        total = spec.epochs * spec.batches_per_epoch
        with progress_bar(total, " steps", settings.progress, "calibrate") as bar:
            looks = [look(driver, epoch) for epoch in _epochs(driver, spec, bar.update)]
        trained = load_checkpoint(run / "last.pt", driver.device)["model"]
        ours, same = environment(driver.device), same_bits(driver.model.state_dict(), trained)
    seconds = sum(taken for _, taken in looks)
    return {
        "run": str(run),
        "schedule": schedule.text,
        "seed": seed,
        **_series([inner for inner, _ in looks]),
        "probe": len(samples),
        "mode": look.mode,
        "eps": settings.ball.eps,
        "alpha": BUDGET * settings.ball.eps / steps,
        "steps": steps,
        "budget": BUDGET * settings.ball.eps,
        "gradients": meter.gradients,
        "forwards": meter.forwards,
        "training_gradients": driver.meter.gradients,
        "seconds": seconds,
        "training_seconds": time.perf_counter() - began - seconds,
        "same": same,
        "warning": None if same else _warning(theirs, ours),
        "environment": ours,
    }


def _key(run: Path, settings: EvaluateSettings, threads: int, steps: int) -> dict[str, Any]:
    """All that decides a measurement, as plain data."""
    files = ("last.pt", "settings.json", "schedule.json")
    experiment = Experiment.of(settings)
    with experiment.running(experiment.threads(threads)):
        there = environment(experiment.device)
    return {
        "version": _VERSION,
        "files": {name: _digest(run / name) for name in files},
        "data": experiment.training.fingerprint(),
        "probe": settings.probe,
        "steps": steps,
        "budget": BUDGET,
        "share": SHARE,
        **{name: there[name] for name in ("controlat", "torch", "device", "hardware", "threads")},
    }


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Look:
    """What is looked at in every epoch alike: samples, mode, batch size in mode "train", steps."""

    x: Tensor
    y: Tensor
    mode: str
    batch_size: int
    steps: int
    meter: Meter

    def __call__(self, driver: Driver, epoch: int) -> tuple[InnerProblem, float]:
        """The inner problem at the driver's present state, and the seconds that it took."""
        began = time.perf_counter()
        try:
            inner = inner_problem(
                driver.model,
                self.x,
                self.y,
                driver.ball,
                steps=self.steps,
                mode=self.mode,
                batch_size=self.batch_size,
                channels_last=driver.channels_last,
                seed=driver.seed,
                meter=self.meter,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (inner problem at t = {epoch})") from None
        return inner, time.perf_counter() - began


def _epochs(driver: Driver, spec: RunSpec, told: Callable[[], object]) -> Iterator[int]:
    """0, ..., E, with the driver at the start of that epoch; it trains in between, `told` of every step."""
    for epoch in range(spec.epochs):
        yield epoch
        for _ in rollout(driver, spec, epoch=epoch, until=epoch + 1):
            told()
        if driver.stopped:
            break
    yield epoch + 1


def _read(
    run: Path, data_dir: str | None, device: str, threads: int | None, probe: int, progress: bool
) -> tuple[EvaluateSettings, dict[str, Any]]:
    """Problem, schedule and seed of a finished run, as `evaluate --run` reads them, and its environment.

    Raises:
        ValueError: it is no such run.
    """
    given: dict[str, Any] = {"data_dir": data_dir, "device": device, "progress": progress}
    settings = EvaluateSettings(run=str(run), probe=probe, threads=threads, **given)
    stored = load_checkpoint(run / "last.pt")
    done = stored["tally"]["epoch"]
    if done < settings.epochs and not stored["stopped"]:
        raise ValueError(
            f"{run} has a checkpoint of {done} of {settings.epochs} epochs; finish it with --resume"
        )
    theirs: dict[str, Any] = stored["environment"]
    if data_dir is None:
        settings.data_dir = stored["settings"].get("data_dir")
    return settings, theirs


def _mode(driver: Driver) -> str:
    """BatchNorm and dropout as the criterion has them on its probe: as the method attacks."""
    mode = getattr(driver.method, "attack_mode", "eval")
    return mode if mode in MODES else "eval"


def _series(inner_problems: list[InnerProblem]) -> dict[str, Any]:
    """The measures by name, each over time."""
    measures = {
        name: {
            "what": what,
            "values": [getattr(inner, name) for inner in inner_problems],
            "marks": [inner.marks.get(name, "") for inner in inner_problems],
        }
        for name, what in MEASURES.items()
    }
    epochs = len(inner_problems) - 1
    losses = [list(inner.losses) for inner in inner_problems]
    return {"times": list(range(epochs + 1)), "epochs": epochs, "measures": measures, "losses": losses}


def _warning(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Why training did not end with the bits of the run, as far as the two environments tell."""
    names = ("controlat", "torch", "system", "device", "hardware", "threads", "processes")
    told = [f"{n} {theirs.get(n)} there, {ours.get(n)} here" for n in names if theirs.get(n) != ours.get(n)]
    why = "; ".join(told) if told else "the environments agree: was the data or the user's own code changed?"
    return (
        f"training did not end with the bits of the run ({why}); what is measured belongs to a sibling of it"
    )
