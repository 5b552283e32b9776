"""The trainer: a roll-out of the controlled system with checkpoints, resume, progress and logs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.files import append_json_line, plain, write_text
from controlat.app import checkpoints
from controlat.app.checkpoints import check_optimizer, check_weights, load_checkpoint, read_checkpoint
from controlat.app.runs import environment
from controlat.control.cost import Meter
from controlat.data import Samples, Split
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.rollout import check_parameters, rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.models.frozen.layout import channels_last
from controlat.models.frozen.view import runs_channels_last
from controlat.records import LogLine, missing, read_epochs
from controlat.robust_accuracy import parse_attack
from controlat.robust_accuracy.robust import measure

__all__ = ["Tally", "deterministic", "fit", "load_checkpoint", "place", "read_log", "validation_cost"]

LAST, BEST, LOG, SCHEDULE = "last.pt", "best.pt", "log.jsonl", "schedule.json"
VALIDATION = "pgd-10"  # what picks the best checkpoint


@dataclass
class Tally:
    """Where a run stands and what it has spent, hooks of the method included; stored in every checkpoint.

    Args:
        epoch: epoch to go on with, from 0.
        batch: batch of that epoch to go on with.
        gradients: gradient evaluations of training so far, in samples.
        forwards: forward passes of training so far.
        layers: passes through the first layer alone so far (YOPO).
        seconds: wall time of training so far, without validation.
        loss: sum of the losses of the present epoch, by samples.
        samples: samples of the present epoch so far.
        epoch_gradients: evaluations of the present epoch so far.
        epoch_seconds: wall time of the present epoch so far.
        best: best robust accuracy on held-out data so far, -1 before the first.
        best_epoch: its epoch.
        dropped: smooth dependences on theta that the method detached.
        evaluations: sum over the steps so far of n, gradient evaluations per sample; None in a run that was
            begun before it was counted.
    """

    epoch: int = 0
    batch: int = 0
    gradients: int = 0
    forwards: int = 0
    layers: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    samples: int = 0
    epoch_gradients: int = 0
    epoch_seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = -1
    dropped: list[str] = field(default_factory=list)
    evaluations: float | None = 0.0

    def add(self, step: Step) -> None:
        """Count one outer step."""
        self.batch = step.batch + 1
        self.loss += step.loss * step.samples
        self.samples += step.samples
        if self.evaluations is not None:
            self.evaluations += step.evaluations
        self.dropped = sorted({*self.dropped, *step.dropped})

    def spend(self, spent: Meter, seconds: float) -> None:
        """Count evaluations and time, of steps or of hooks."""
        self.gradients += spent.gradients
        self.forwards += spent.forwards
        self.layers += spent.layers
        self.seconds += seconds
        self.epoch_gradients += spent.gradients
        self.epoch_seconds += seconds

    def next_epoch(self) -> None:
        """Begin a new epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss, self.samples, self.epoch_gradients, self.epoch_seconds = 0.0, 0, 0, 0.0


def place(
    model: nn.Module,
    device: torch.device | str,
    nhwc: bool = True,
    in_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Move a model to its device and, where `nhwc`, its convolution weights to NHWC layout.

    Where the shape of its inputs is given, it is tried first whether the model runs in that layout.
    """
    model = model.to(device)
    if nhwc and (in_shape is None or runs_channels_last(model, in_shape)):
        for p in model.parameters():
            p.data = channels_last(p.data)
    return model


@contextlib.contextmanager
def deterministic(threads: int | None = None) -> Iterator[None]:
    """Deterministic kernels, and a number of CPU threads, inside the block only."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


def read_log(directory: str | Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The lines of log.jsonl, one for each epoch from 0 on; no more than so many, where they are known.

    Raises:
        ValueError: a line is malformed, or comes out of order; names it.
    """
    path = Path(directory) / LOG
    try:
        return read_epochs(path, LogLine, epochs)
    except ValueError as error:
        raise ValueError(
            f"{error}; where it is deleted, training on (--resume) writes it from {LAST}"
        ) from None


def _resume(
    driver: Driver, spec: RunSpec, directory: Path, data: Mapping[str, str | None]
) -> tuple[Tally, list[dict[str, Any]]]:
    """Put the driver where the last checkpoint left it, and the log with it: the first process reads."""
    last, world = directory / LAST, spec.world
    tally, kept = Tally(), None
    if world.broadcast(last.exists()):
        content = world.broadcast_bytes(read_checkpoint(last) if world.first else b"")
        found = load_checkpoint(last, driver.device, content)
        world.once(lambda: _compare_data(found.get("data", {}), data, spec, str(last)))
        _put_back(driver, spec, found, str(last))
        before = found["environment"].get("processes", 1)
        if before != world.size and world.first:
            _warn(f"this run was begun by {before} processes; with {world.size} it ends with other bits")
        tally, kept = Tally(**({"evaluations": None} | found["tally"])), found.get("log")
    return tally, world.once(lambda: _mended_log(directory, tally, kept))


def _warn(text: str) -> None:
    tqdm.write(f"controlat: warning: {text}", file=sys.stderr)


def _compare_data(
    there: Mapping[str, str | None], here: Mapping[str, str | None], spec: RunSpec, where: str
) -> None:
    """Refuse data that changed since the run was begun; only warn where pictures may have been copied."""
    for name, mark in here.items():
        if None in (mark, there.get(name)) or mark == there[name]:  # not known: of before, or a user's own
            continue
        told = f"{name} samples are not those that {where} was made with"
        if isinstance(spec.data, Split):
            raise ValueError(f"{told}; put the data of before in their place, or train into a new directory")
        _warn(f"{told}, by names, sizes and times of files; if more than the times differ, train anew")


def _put_back(driver: Driver, spec: RunSpec, found: Mapping[str, Any], where: str) -> None:
    """Put the driver where a checkpoint left it, if it is one of this driver's and this plan's."""
    for part in (found, *found.get("kept", {}).values()):
        check_weights(driver.model, part["model"], where)
        check_optimizer(driver.sgd, part["optimizer"], where)
    for name, rows in found.get("rows", {}).items():
        values, seen = rows["values"], rows["seen"]
        fits = seen.dtype == torch.bool and seen.dim() == 1 and values.shape[:1] == seen.shape
        if not fits or len(seen) > len(spec.data):
            raise ValueError(f"{where}: rows.{name} are not of the {len(spec.data)} training samples")
    epoch, batch = found["tally"]["epoch"], found["tally"]["batch"]
    if epoch + (batch > 0) > spec.epochs or batch >= spec.batches_per_epoch:
        raise ValueError(f"{where}: tally is at epoch {epoch}, batch {batch}, which this run does not have")
    driver.restore(State.from_dict(found, driver.names))


def _mended_log(directory: Path, tally: Tally, kept: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The log up to where the checkpoint stands; the file is made to agree, from the checkpoint's copy."""
    path = directory / LOG
    done = [line for line in read_log(directory, tally.epoch) if line["epoch"] < tally.epoch]
    if kept is None:  # a checkpoint of before has no copy
        if lost := missing(done, tally.epoch):
            raise ValueError(f"{path} lacks epoch {lost[0]}; {LAST} has no copy; train in a new directory")
        kept = done
    whole = list(kept)
    if [line["epoch"] for line in whole] != list(range(tally.epoch)):
        raise ValueError(f"{directory / LAST}: log should have the epochs before {tally.epoch}, each once")
    for line in done:
        if line != whole[line["epoch"]]:
            raise ValueError(
                f"{path}: epoch {line['epoch']} is not as {LAST} has it; delete the file, and training on "
                "(--resume) writes it again"
            )
    if len(done) < len(whole):
        _warn(f"{path} lacked {len(whole) - len(done)} of {len(whole)} epochs; written again from {LAST}")
    text = "".join(json.dumps(line) + "\n" for line in whole)
    if (path.exists() and path.read_text() != text) or (text and not path.exists()):
        write_text(path, text)
    return whole


def _validate(driver: Driver, held_out: Samples | None) -> dict[str, Any]:
    """Clean and PGD-10 accuracy on the held-out slice."""
    spent = {"validation_gradients": 0, "validation_seconds": 0.0}
    if held_out is None:
        return {"clean": None, "robust": None, "validation_points": 0} | spent
    how: dict[str, Any] = {
        "attacks": [VALIDATION],
        "seed": driver.seed,
        "channels_last": driver.channels_last,
    }
    found = measure(driver.model, held_out, driver.ball, **how)
    return {
        "clean": found.clean.value,
        "robust": found.robust.value,
        "validation_points": found.clean.points,
        "validation_gradients": found.spent.gradients,
        "validation_seconds": found.seconds,
    }


def validation_cost(points: int) -> float:
    """Gradient evaluations of one validation at most, in samples."""
    return parse_attack(VALIDATION).cost() * points


def _bar(spec: RunSpec, driver: Driver, tally: Tally, label: str, show: bool) -> Any:
    """A progress bar over planned gradient evaluations: Amata's late epochs cost more than its early ones."""
    per_epoch = spec.batches_per_epoch
    steps = (spec.schedule(e + b / per_epoch) for e in range(spec.epochs) for b in range(per_epoch))
    cost = sum(driver.method.controls.cost(u) for u in steps) * len(spec.data) / per_epoch
    return tqdm(
        total=round(cost),
        initial=tally.gradients,
        desc=label,
        unit=" grad",
        unit_scale=True,
        disable=None if show else True,
        leave=False,
        mininterval=0.5,
    )


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
) -> Tally:
    """Train under the plan's schedule, going on from the directory's last checkpoint if there is one.

    Stopped at any moment and called again, it ends with the same bits as undisturbed (one device, one number
    of threads and processes). The directory gets ``log.jsonl`` (one line per epoch), ``last.pt``, ``best.pt``
    (largest PGD-10 accuracy on `held_out`) and ``schedule.json``.

    Args:
        driver: the system at its initial state.
        spec: data, schedule, rates, and the processes: the first alone writes, validates and scores.
        directory: the run directory.
        held_out: samples for validation, never trained on; Phi has others.
        settings: plain data to store in checkpoints.
        at_epoch: called with each epoch's number before its first step, in the first process.
        checkpoint_minutes: longest time between checkpoints within an epoch.
        tensorboard: write event files too.
        progress: show a progress bar (on a terminal).
        label: its description.

    Returns:
        The final `Tally`.

    Raises:
        ValueError: a checkpoint or log that is damaged, or of other data; names the file.
        NonFiniteError: a loss or gradient is not finite; names epoch, batch, control and the last checkpoint.
    """
    directory, world = Path(directory), spec.world
    data = {}
    if world.first:
        data = {"training": _fingerprint(spec.data), "held-out": _fingerprint(held_out)}
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / SCHEDULE).exists():
            spec.schedule.save(directory / SCHEDULE)
    tally, log = _resume(driver, spec, directory, data)

    def save(name: str) -> None:
        state = _state(driver, spec, tally, settings or {}) | {"log": log, "data": data}
        checkpoints.save(directory / name, state)

    writer = _writer(directory) if tensorboard and world.first else None
    with _bar(spec, driver, tally, label, progress and world.first) as bar:
        while tally.epoch < spec.epochs and not (driver.stopped and tally.batch == 0):
            if tally.batch == 0 and at_epoch is not None and world.first:
                at_epoch(tally.epoch)
            bar.unpause()  # time spent on validation and scoring is not training speed
            try:
                _epoch(driver, spec, tally, save, checkpoint_minutes, bar)
                world.check(driver.fingerprint())
                if not world.first:
                    tally.next_epoch()
                    continue
                record = plain(_record(driver, spec, tally, held_out))
            except NonFiniteError as error:
                kept = directory / LAST
                where = (
                    f"the last good checkpoint is {kept}"
                    if kept.exists()
                    else "no checkpoint was written yet"
                )
                raise NonFiniteError(f"{error}; {where}; try a smaller learning rate") from None
            append_json_line(directory / LOG, record)
            log.append(record)
            better = record["robust"] is not None and record["robust"] > tally.best
            if better:
                tally.best, tally.best_epoch = record["robust"], tally.epoch
            tally.next_epoch()
            for name in (BEST, LAST) if better else (LAST,):
                save(name)
            if writer is not None:
                _write_scalars(writer, record)
    if writer is not None:
        writer.close()
    return Tally(**world.broadcast(asdict(tally)))


def _fingerprint(samples: Samples | None) -> str | None:
    """What tells these samples from others; None where there are none, or a user's own cannot say."""
    of = getattr(samples, "fingerprint", None)
    return None if of is None else str(of())


def _state(driver: Driver, spec: RunSpec, tally: Tally, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the run consists of between two batches."""
    return driver.snapshot().to_dict() | {
        "schedule": spec.schedule.to_json(),
        "tally": asdict(tally),
        "settings": dict(settings),
        "environment": environment(driver.device),
    }


def _epoch(
    driver: Driver, spec: RunSpec, tally: Tally, save: Callable[[str], None], minutes: float, bar: Any
) -> None:
    began = saved = time.perf_counter()
    before = driver.meter.copy()
    for step in rollout(driver, spec, epoch=tally.epoch, batch=tally.batch, until=tally.epoch + 1):
        now = time.perf_counter()
        tally.add(step)
        tally.spend(driver.meter.since(before), now - began)
        before = driver.meter.copy()
        bar.update(step.spent.gradients)
        if spec.world.first and now - saved > 60 * minutes and tally.batch < spec.batches_per_epoch:
            check_parameters(driver, step)  # none that are infinite in a checkpoint
            save(LAST)
            saved = time.perf_counter()
        began = time.perf_counter()
    check_parameters(driver, step)
    tally.spend(driver.meter.since(before), time.perf_counter() - began)


def _record(driver: Driver, spec: RunSpec, tally: Tally, held_out: Samples | None) -> dict[str, Any]:
    return {
        "epoch": tally.epoch,
        "control": dict(spec.schedule(tally.epoch)),
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


def _writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'controlat[tensorboard]'") from None
    return SummaryWriter(str(directory / "tensorboard"))


def _write_scalars(writer: Any, record: Mapping[str, Any]) -> None:
    values = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "epoch"}
    values |= {f"control/{k}": v for k, v in record["control"].items()}
    for name, value in values.items():
        writer.add_scalar(name, value, record["epoch"])


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with initial weights that are a function of the seed."""
    with rng.scoped(seed, "model"):
        return build()
