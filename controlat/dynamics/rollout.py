"""Roll-outs of the controlled system: one outer step after the other, under the control of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.feedback import forget_epoch
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.methods import Batch
from controlat.models.frozen.view import FrozenModel

__all__ = ["arrivals", "check_parameters", "check_rows", "rollout"]


def rollout(
    driver: Driver,
    spec: RunSpec,
    *,
    epoch: int = 0,
    batch: int = 0,
    until: int | None = None,
    record: Callable[[int, State], None] | None = None,
    stride: int = 1,
    begun: bool = False,
) -> Iterator[Step]:
    """Run the system under the plan's controller, one `Step` at a time.

    Args:
        driver: holds the state, which moves as the iterator is consumed.
        spec: data, controller, rates.
        epoch: where to start.
        batch: where to start in that epoch.
        until: epoch to stop before; the plan's end by default.
        record: called with (step number, snapshot of the state BEFORE that step) at every `stride`-th step
            from the first on; a snapshot has the rows that the steps up to the next one touch.
        stride: see `record`.
        begun: the first epoch has begun already: its hook is not called again, as at a recorded state.
    """
    first = epoch * spec.batches_per_epoch + batch
    driver.model.train()  # what is recorded are the weights of training mode
    for number, b in arrivals(driver, spec, epoch, batch, until=until, begun=begun):
        if record is not None and (number - first) % stride == 0:
            touched = spec.indices(number, number + stride) if driver.rows else None
            record(number, driver.snapshot(touched))
        step = driver.step(b, spec.control(b, driver), spec.learning_rate(b.epoch, b.number))
        spec.observe(step, driver)
        yield step


def check_parameters(driver: Driver, step: Step) -> None:
    """Refuse parameters that a step made infinite, whose loss was still finite: the next one would show it.

    Raises:
        NonFiniteError: one is not finite; the message names epoch, batch and control.
    """
    if not all(bool(torch.isfinite(p).all()) for p in driver.parameters):
        where = f"epoch {step.epoch}, batch {step.batch}, {step.control}"
        raise NonFiniteError(f"a parameter is not finite after the step ({where})")


def check_rows(driver: Driver, x: Tensor, rows: int, what: str, cure: str) -> None:
    """Raise ValueError where BatchNorm cannot be trained on so few rows, as one forward pass shows.

    Over images of more than one pixel BatchNorm can take the statistics of one sample, over features it
    cannot.
    """
    norms = nn.modules.batchnorm._NormBase
    if rows > 1 or not any(isinstance(m, norms) for m in driver.model.modules()):
        return
    try:
        view = FrozenModel(
            driver.model, "train", channels_last=driver.channels_last, autocast=driver.autocast
        )
        with rng.scoped(driver.seed, "rows", device=driver.device), view:
            view.logits(x[:1].to(driver.device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(f"{what}, on which BatchNorm cannot be trained: {cure}") from error


def _check_smallest(driver: Driver, spec: RunSpec) -> None:
    """Refuse a plan whose smallest batch, or share of one, BatchNorm cannot be trained on."""
    n, size, processes = len(spec.data), spec.batch_size, spec.world.size
    last = (n - 1) % size + 1
    if last >= 2 * processes:
        return
    x, _ = next(iter(spec.data.stream([torch.tensor([0])])))
    what = f"{n} training samples in batches of {size} leave {last} for the last batch"
    what += f" of {processes} processes" if processes > 1 else ""
    check_rows(driver, x, last // processes, what, "choose another batch_size or number of training samples")


def arrivals(
    driver: Driver, spec: RunSpec, epoch: int, batch: int, *, until: int | None = None, begun: bool = False
) -> Iterator[tuple[int, Batch]]:
    """(number, batch) of every step from one on, with the driver at the state before it.

    The consumer takes the step; hooks between epochs are called here.

    Args:
        driver: holds the state.
        spec: data and number of epochs.
        epoch: where to start.
        batch: where to start in that epoch; the number of its batches where only its last hook is to come.
        until: epoch to stop before; the plan's end by default.
        begun: the first epoch has begun already.
    """
    _check_smallest(driver, spec)
    for e in range(epoch, spec.epochs if until is None else until):
        start = batch if e == epoch else 0
        if start == 0 and not (begun and e == epoch):
            if driver.stopped:
                return
            forget_epoch(driver)
            driver.start_epoch(spec, e)
        for b in spec.batches(e, start):
            yield e * spec.batches_per_epoch + b.number, b
        driver.end_epoch(spec, e)
