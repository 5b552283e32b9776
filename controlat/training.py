"""The trainer: a roll-out of the controlled system with checkpoints, resume, progress and logs."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from controlat import rng
from controlat.data import Samples
from controlat.dynamics import Driver, Step, rollout
from controlat.evaluation.robust import measure
from controlat.files import append_json_line, read_json_lines, write, write_text
from controlat.network import Meter, NonFiniteError, channels_last
from controlat.parallel import World
from controlat.plan import Plan
from controlat.runs import environment
from controlat.state import Snapshot

__all__ = ["Tally", "deterministic", "fit", "load_checkpoint", "place"]

FORMAT, VERSION = "controlat checkpoint", 1
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

    def add(self, step: Step) -> None:
        """Count one outer step."""
        self.batch = step.batch + 1
        self.loss += step.loss * step.samples
        self.samples += step.samples
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


def place(model: nn.Module, device: torch.device | str, nhwc: bool = True) -> nn.Module:
    """Move a model to its device and, where `nhwc`, its convolution weights to NHWC layout."""
    model = model.to(device)
    if nhwc:
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


def save_checkpoint(
    path: Path, driver: Driver, plan: Plan, tally: Tally, settings: Mapping[str, Any]
) -> None:
    """Write everything that a run consists of between two batches."""
    state = driver.snapshot()._asdict() | {
        "format": FORMAT,
        "version": VERSION,
        "schedule": plan.schedule.to_json(),
        "tally": asdict(tally),
        "settings": dict(settings),
        "environment": environment(driver.device),
    }
    buffer = io.BytesIO()  # torch hides a full disk behind an error of its own when it writes itself
    torch.save(state, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", content: bytes | None = None
) -> dict[str, Any]:
    """Read a checkpoint without unpickling code.

    Args:
        path: ``last.pt`` or ``best.pt`` of a run directory.
        device: where its tensors go.
        content: what is in it, where that was read already.

    Returns:
        ``model``, ``optimizer``, ``memory``, ``schedule``, ``tally``, ``settings``, ``environment``.

    Raises:
        ValueError: the file is missing, damaged or not a checkpoint of controlat.
    """
    if content is None and not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        source = path if content is None else io.BytesIO(content)
        found = torch.load(source, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged or not a checkpoint ({_reason(error)})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of controlat")
    if found["version"] != VERSION:
        raise ValueError(f"{path} has checkpoint version {found['version']}; this release reads {VERSION}")
    return found


def _reason(error: Exception) -> str:
    """What went wrong, without torch's advice to unpickle code, in one line."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("\n")[0]
    return text.partition(" Please ")[0].strip() or type(error).__name__


def _resume(driver: Driver, directory: Path, world: World) -> Tally:
    """Put the driver where the last checkpoint left it, and the log with it: the first process reads."""
    last = directory / LAST
    if not world.tell(last.exists()):
        tally = Tally()
    else:
        content = world.tell_bytes(last.read_bytes() if world.first else b"")
        found = load_checkpoint(last, driver.device, content)
        before = found["environment"].get("processes", 1)
        if before != world.size and world.first:
            told = f"this run was begun by {before} processes; with {world.size} it ends with other bits"
            tqdm.write(f"controlat: warning: {told}", file=sys.stderr)
        driver.restore(Snapshot(**{name: found[name] for name in Snapshot._fields if name in found}))
        tally = Tally(**found["tally"])
    if world.first:
        _cut_log(directory, tally)
    return tally


def _cut_log(directory: Path, tally: Tally) -> None:
    """Drop lines of epochs that the checkpoint does not know of."""
    lines = (directory / LOG).read_text().splitlines(True) if (directory / LOG).exists() else []
    done = read_json_lines(directory / LOG)[: tally.epoch]
    if len(lines) != len(done):
        write_text(directory / LOG, "".join(lines[: len(done)]))


def _validate(driver: Driver, held_out: Samples | None) -> dict[str, Any]:
    """Clean and PGD-10 accuracy on the held-out slice."""
    if held_out is None:
        return {"clean": None, "robust": None, "validation_gradients": 0, "validation_seconds": 0.0}
    found = measure(driver.model, held_out, driver.ball, attacks=[VALIDATION], seed=driver.seed)
    return {
        "clean": found.clean.value,
        "robust": found.robust.value,
        "validation_gradients": found.spent.gradients,
        "validation_seconds": found.seconds,
    }


def _bar(plan: Plan, driver: Driver, tally: Tally, label: str, show: bool) -> Any:
    """A progress bar over planned gradient evaluations: Amata's late epochs cost more than its early ones."""
    per_epoch = plan.batches_per_epoch
    steps = (plan.schedule(e + b / per_epoch) for e in range(plan.epochs) for b in range(per_epoch))
    cost = sum(driver.method.controls.cost(u) for u in steps) * len(plan.data) / per_epoch
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
    plan: Plan,
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
        plan: data, schedule, rates, and the processes: the first alone writes, validates and scores.
        directory: the run directory.
        held_out: samples for validation, never trained on.
        settings: plain data to store in checkpoints.
        at_epoch: called with each epoch's number before its first step, in the first process.
        checkpoint_minutes: longest time between checkpoints within an epoch.
        tensorboard: write event files too.
        progress: show a progress bar (on a terminal).
        label: its description.

    Returns:
        The final `Tally`.

    Raises:
        NonFiniteError: a loss or gradient is not finite; names epoch, batch, control and the last checkpoint.
    """
    directory, world = Path(directory), plan.world
    settings = settings or {}
    if world.first:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / SCHEDULE).exists():
            plan.schedule.save(directory / SCHEDULE)
    tally = _resume(driver, directory, world)
    writer = _writer(directory) if tensorboard and world.first else None
    with _bar(plan, driver, tally, label, progress and world.first) as bar:
        while tally.epoch < plan.epochs and not (driver.stopped and tally.batch == 0):
            if tally.batch == 0 and at_epoch is not None and world.first:
                at_epoch(tally.epoch)
            bar.unpause()  # time spent on validation and scoring is not training speed
            try:
                _epoch(driver, plan, directory, tally, settings, checkpoint_minutes, bar)
                world.check(driver.fingerprint())
                if not world.first:
                    tally.next_epoch()
                    continue
                record = _record(driver, plan, tally, held_out)
            except NonFiniteError as error:
                kept = directory / LAST
                where = (
                    f"the last good checkpoint is {kept}"
                    if kept.exists()
                    else "no checkpoint was written yet"
                )
                raise NonFiniteError(f"{error}; {where}; try a smaller learning rate") from None
            append_json_line(directory / LOG, record)
            better = record["robust"] is not None and record["robust"] > tally.best
            if better:
                tally.best, tally.best_epoch = record["robust"], tally.epoch
            tally.next_epoch()
            for name in (BEST, LAST) if better else (LAST,):
                save_checkpoint(directory / name, driver, plan, tally, settings)
            if writer is not None:
                _write_scalars(writer, record)
    if writer is not None:
        writer.close()
    return Tally(**world.tell(asdict(tally)))


def _epoch(
    driver: Driver,
    plan: Plan,
    directory: Path,
    tally: Tally,
    settings: Mapping[str, Any],
    minutes: float,
    bar: Any,
) -> None:
    began = saved = time.perf_counter()
    before = driver.meter.copy()
    for step in rollout(driver, plan, epoch=tally.epoch, batch=tally.batch, until=tally.epoch + 1):
        now = time.perf_counter()
        tally.add(step)
        tally.spend(driver.meter.since(before), now - began)
        before = driver.meter.copy()
        bar.update(step.spent.gradients)
        if plan.world.first and now - saved > 60 * minutes and tally.batch < plan.batches_per_epoch:
            _check_parameters(driver, step)
            save_checkpoint(directory / LAST, driver, plan, tally, settings)
            saved = time.perf_counter()
        began = time.perf_counter()
    _check_parameters(driver, step)
    tally.spend(driver.meter.since(before), time.perf_counter() - began)


def _check_parameters(driver: Driver, step: Step) -> None:
    """Keep parameters that the last step made infinite out of checkpoints; its loss was still finite."""
    if not all(bool(torch.isfinite(p).all()) for p in driver.parameters):
        where = f"epoch {step.epoch}, batch {step.batch}, {step.control}"
        raise NonFiniteError(f"a parameter is not finite after the step ({where})")


def _record(driver: Driver, plan: Plan, tally: Tally, held_out: Samples | None) -> dict[str, Any]:
    return {
        "epoch": tally.epoch,
        "control": dict(plan.schedule(tally.epoch)),
        "lr": plan.mean_rate(tally.epoch),
        "loss": tally.loss / tally.samples,
        "gradients": tally.epoch_gradients,
        "layers": tally.layers,
        "carried": _numbers(driver),
        "seconds": tally.epoch_seconds,
        "total_gradients": tally.gradients,
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
