"""The trainer: a roll-out of the controlled system with checkpoints, resume, progress and logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controlat._util.errors import NonFiniteError
from controlat._util.files import append_json_line, plain
from controlat._util.progress import progress_bar
from controlat.app import checkpoints
from controlat.app.checkpoints import load_checkpoint
from controlat.app.resume import LAST, LOG, read_log, resume, warn
from controlat.app.runs import environment
from controlat.app.tally import Tally
from controlat.control.controller import as_schedule, is_open, nominal, unrolled
from controlat.control.schedules import Schedule
from controlat.data import Samples
from controlat.dynamics.driver import Driver
from controlat.dynamics.feedback import forget_epoch
from controlat.dynamics.recording import Recorder
from controlat.dynamics.rollout import check_parameters, rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.robust_accuracy import parse_attack
from controlat.robust_accuracy.robust import run_attacks

__all__ = ["Tally", "fit", "load_checkpoint", "read_log", "validation_cost"]

BEST, SCHEDULE = "best.pt", "schedule.json"
VALIDATION = "pgd-10"  # what picks the best checkpoint


def _validate(driver: Driver, held_out: Samples | None) -> dict[str, Any]:
    """Clean and PGD-10 accuracy on the held-out slice."""
    if held_out is None:
        spent = {"validation_gradients": 0, "validation_seconds": 0.0}
        return {"clean": None, "robust": None, "validation_points": 0} | spent
    how: dict[str, Any] = {
        "attacks": [VALIDATION],
        "seed": driver.seed,
        "channels_last": driver.channels_last,
    }
    accuracy = run_attacks(driver.model, held_out, driver.ball, **how)
    return {
        "clean": accuracy.clean.value,
        "robust": accuracy.robust.value,
        "validation_points": accuracy.clean.points,
        "validation_gradients": accuracy.spent.gradients,
        "validation_seconds": accuracy.seconds,
    }


def validation_cost(points: int) -> float:
    """Gradient evaluations of one validation at most, in samples."""
    return parse_attack(VALIDATION).cost() * points


def _bar(spec: RunSpec, driver: Driver, tally: Tally, label: str, show: bool) -> Any:
    """A progress bar over planned gradient evaluations: Amata's late epochs cost more than its early ones.

    What a closed loop will spend is not known: its bar has no end.
    """
    total = None
    if spec.open_loop:
        cost = sum(map(driver.method.controls.cost, spec.plan()))
        total = round(cost * len(spec.data) / spec.batches_per_epoch)
    return progress_bar(total, " grad", show, label, initial=tally.gradients, unit_scale=True)


def fit(
    driver: Driver,
    spec: RunSpec,
    directory: str | Path,
    *,
    held_out: Samples | None = None,
    settings: Mapping[str, Any] | None = None,
    at_epoch: Callable[[int], object] | None = None,
    checkpoint_minutes: float = 10.0,
    tensorboard: bool = False,
    progress: bool = True,
    label: str = "train",
    name: str = "",
    recorder: Recorder | None = None,
) -> Tally:
    """Train under the plan's controller, going on from the directory's last checkpoint if there is one.

    Stopped at any moment and called again, it ends with the same bits as undisturbed (one device, one number
    of threads and processes). The directory gets ``log.jsonl`` (one line per epoch), ``last.pt``, ``best.pt``
    (largest PGD-10 accuracy on `held_out`) and ``schedule.json``: of a closed loop the schedule that was
    taken, once training has ended.

    Args:
        driver: the system at its initial state.
        spec: data, controller, rates, and the processes: the first alone writes, validates and scores.
        directory: the run directory.
        held_out: samples for validation, never trained on; Phi has others.
        settings: plain data to store in checkpoints.
        at_epoch: called with each epoch's number before its first step, whose control has been decided, in
            the first process.
        checkpoint_minutes: longest time between checkpoints within an epoch.
        tensorboard: write event files too.
        progress: show a progress bar (on a terminal).
        label: its description.
        name: the controller's, for the schedule that was taken.
        recorder: records the training, which is begun here. The time that it takes is not training's.

    Returns:
        The final `Tally`.

    Raises:
        ValueError: a checkpoint or log that is damaged, or of other data; names the file.
        NonFiniteError: a loss or gradient is not finite; names epoch, batch, control and the last checkpoint.
    """
    directory, world = Path(directory), spec.world
    data = _begin(spec, directory, held_out) if world.first else {}
    tally, log = resume(driver, spec, directory, data)

    def save(file: str) -> None:
        state = _state(driver, spec, tally, settings or {}) | {"log": log, "data": data}
        checkpoints.save(directory / file, state)

    scalars = _scalars(directory if tensorboard and world.first else None)
    shown = _bar(spec, driver, tally, label, progress and world.first)
    listening = contextlib.nullcontext() if recorder is None else recorder.listening()
    with scalars as write_scalars, shown as bar, listening:
        while tally.epoch < spec.epochs and not (driver.stopped and tally.batch == 0):
            if tally.batch == 0:
                with _with_cure(directory / LAST):
                    _decide(driver, spec, tally)
                if at_epoch is not None and world.first:
                    at_epoch(tally.epoch)
            bar.unpause()  # time spent on validation and scoring is not training speed
            with _with_cure(directory / LAST):
                _epoch(driver, spec, tally, save, checkpoint_minutes, bar, recorder)
                record = plain(_record(driver, spec, tally, held_out)) if world.first else {}
            better = tally.next_epoch(record.get("robust"))
            if world.first:
                append_json_line(directory / LOG, record)
                log.append(record)
                for file in (BEST, LAST) if better else (LAST,):
                    save(file)
                write_scalars(record)
    if world.first and not (directory / SCHEDULE).exists():
        _save_taken(log, spec, directory / SCHEDULE, name)
    return Tally(**world.broadcast(asdict(tally)))


def _begin(spec: RunSpec, directory: Path, held_out: Samples | None) -> dict[str, str | None]:
    """Make the run directory, with the schedule of an open loop; what tells the run's data from others."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(spec.controller, Schedule) and not (directory / SCHEDULE).exists():
        spec.controller.save(directory / SCHEDULE)
    return {"training": _fingerprint(spec.data), "held-out": _fingerprint(held_out)}


@contextlib.contextmanager
def _with_cure(last: Path) -> Iterator[None]:
    """Add to the error of a step that diverged what is left of the run, and a cure."""
    try:
        yield
    except NonFiniteError as error:
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
        raise NonFiniteError(f"{error}; {kept}; try a smaller learning rate") from None


def _fingerprint(samples: Samples | None) -> str | None:
    """What tells these samples from others; None where there are none, or a user's own cannot say."""
    of = getattr(samples, "fingerprint", None)
    return None if of is None else str(of())


def _save_taken(log: Sequence[Mapping[str, Any]], spec: RunSpec, path: Path, name: str) -> None:
    """Write the schedule that a closed loop has taken."""
    controls = [u for line in log for u in unrolled(line["controls"], spec.batches_per_epoch)]
    try:
        as_schedule(controls, spec.batches_per_epoch, spec.epochs, name).save(path)
    except ValueError as error:
        warn(f"{path} was not written: {error}; the controls are in {LOG}")


def _state(driver: Driver, spec: RunSpec, tally: Tally, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the run consists of between two batches."""
    planned = {"schedule": spec.controller.to_json()} if isinstance(spec.controller, Schedule) else {}
    return driver.snapshot().to_dict() | {
        **planned,
        "tally": asdict(tally),
        "settings": dict(settings),
        "environment": environment(driver.device),
    }


def _decide(driver: Driver, spec: RunSpec, tally: Tally) -> None:
    """The control of an epoch's first step, which a closed loop decides by the state before the epoch."""
    if spec.open_loop:
        return
    began, before = time.perf_counter(), driver.meter.copy()
    driver.watch.look()
    forget_epoch(driver)
    spec.control_at(tally.epoch, 0, driver)
    tally.spend(driver.meter.since(before), time.perf_counter() - began)


def _epoch(
    driver: Driver,
    spec: RunSpec,
    tally: Tally,
    save: Callable[[str], None],
    minutes: float,
    bar: Any,
    recorder: Recorder | None,
) -> None:
    """Train to the end of an epoch; after it, all processes hold the same bits."""
    began = saved = time.perf_counter()
    before = driver.meter.copy()

    def record(number: int) -> None:
        nonlocal began
        if recorder is not None:
            driver.watch.look()  # what a GPU still has to do of the last step is training
            paused = time.perf_counter()
            recorder.before(number)
            began += time.perf_counter() - paused

    keep = None if recorder is None else record
    for step in rollout(
        driver,
        spec,
        epoch=tally.epoch,
        batch=tally.batch,
        until=tally.epoch + 1,
        before=keep,
        decided=True,
    ):
        now = time.perf_counter()
        tally.add(step)
        if recorder is not None:
            recorder.add(step)
        tally.spend(driver.meter.since(before), now - began)
        before = driver.meter.copy()
        bar.update(step.spent.gradients)
        if spec.world.first and now - saved > 60 * minutes and tally.batch < spec.batches_per_epoch:
            check_parameters(driver, step)  # none that are infinite in a checkpoint
            tally.read_losses()
            save(LAST)
            saved = time.perf_counter()
        began = time.perf_counter()
    check_parameters(driver, step)
    tally.read_losses()
    tally.spend(driver.meter.since(before), time.perf_counter() - began)
    spec.world.check(driver.fingerprint())


def _record(driver: Driver, spec: RunSpec, tally: Tally, held_out: Samples | None) -> dict[str, Any]:
    """The line of the log: `control` is u(t) as the epoch began, `controls` what every step took."""
    first = spec.moment(tally.epoch * spec.batches_per_epoch)
    u = nominal(spec.controller, first) if is_open(spec.controller) else tally.controls[0][1]
    return {
        "epoch": tally.epoch,
        "control": dict(u),
        "controls": tally.controls,
        "lr": spec.mean_rate(tally.epoch),
        "loss": tally.loss / tally.samples,
        "gradients": tally.epoch_gradients,
        "layers": tally.layers,
        "carried": _numbers(driver),
        "seconds": tally.epoch_seconds,
        "total_gradients": tally.gradients,
        "total_evaluations": tally.evaluations,
        "total_seconds": tally.seconds,
        "dropped": tally.dropped,
        "stopped": driver.stopped,
        **_validate(driver, held_out),
    }


def _numbers(driver: Driver) -> dict[str, float]:
    """Single numbers that the method carries, such as the strength of CAT."""
    return {name: float(t) for name, t in driver.memory.items() if t.dim() == 0}


@contextlib.contextmanager
def _scalars(directory: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes a line of the log for TensorBoard into a run directory; nothing where there is none."""
    if directory is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'controlat[tensorboard]'") from None
    with SummaryWriter(str(directory / "tensorboard")) as writer:

        def write(record: Mapping[str, Any]) -> None:
            values = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "epoch"}
            values |= {f"control/{k}": v for k, v in record["control"].items()}
            for name, value in values.items():
                writer.add_scalar(name, value, record["epoch"])

        yield write
