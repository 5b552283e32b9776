"""Roll-outs of the controlled system z_{t+1} = S(z_t, u_t)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.watch import Watch
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.feedback import forget_epoch
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.step import When
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
    before: Callable[[int], object] | None = None,
    begun: bool = False,
    decided: bool = False,
) -> Iterator[Step]:
    """Run the system under the controller of `spec`, and yield the record of each step.

    Args:
        driver: holds the state, which changes as the iterator is consumed.
        spec: data, controller, rates.
        epoch: epoch of the first step.
        batch: position of the first step in its epoch.
        until: epoch before which to end; by default the end of the run.
        before: called with the number of every step, with the driver at the state before it.
        begun: the `start_epoch` hook of the first epoch has been called already, as at a recorded state.
        decided: the control of the first step, which begins its epoch, has been asked for already.
    """
    driver.model.train()  # recorded states have the parameters of training mode
    for number, b in arrivals(driver, spec, epoch, batch, until=until, begun=begun, decided=decided):
        if before is not None:
            before(number)
        if not spec.open_loop:  # the controller reads the state
            driver.watch.look()
        step = driver.step(b, spec.control(b, driver), spec.learning_rate(b.epoch, b.number))
        spec.observe(step, driver)
        yield step


def check_parameters(driver: Driver, step: Step) -> None:
    """Check the parameters after a step: its loss, computed before the update, may still be finite.

    Raises:
        NonFiniteError: a parameter is not finite; the message names epoch, batch and control.
    """
    watch = Watch()
    watch.place = When(step.epoch, step.batch, step.control)
    norms = torch._foreach_norm([p.detach() for p in driver.parameters if p.numel()], torch.inf)
    watch.finite(torch.stack(norms), "a parameter is not finite after the step")


def check_rows(driver: Driver, x: Tensor, rows: int, what: str, cure: str) -> None:
    """Raise ValueError if BatchNorm cannot be trained on so few rows, which one forward pass shows.

    With one row, BatchNorm has statistics over the pixels of feature maps, but none over single features.
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
    """Raise ValueError if BatchNorm cannot be trained on a process's rows of the smallest batch."""
    n, size, processes = len(spec.data), spec.batch_size, spec.world.size
    last = (n - 1) % size + 1
    if last >= 2 * processes:
        return
    x, _ = next(iter(spec.data.stream([torch.tensor([0])])))
    what = f"{n} training samples in batches of {size} leave {last} for the last batch"
    what += f" of {processes} processes" if processes > 1 else ""
    check_rows(driver, x, last // processes, what, "choose another batch_size or number of training samples")


def arrivals(
    driver: Driver,
    spec: RunSpec,
    epoch: int,
    batch: int,
    *,
    until: int | None = None,
    begun: bool = False,
    decided: bool = False,
) -> Iterator[tuple[int, Batch]]:
    """Yield (number, batch) of each step, with the driver at the state before it.

    The consumer takes the step; this function calls the hooks between epochs.

    Args:
        driver: holds the state.
        spec: data and number of epochs.
        epoch: epoch of the first step.
        batch: position of the first step in its epoch; the number of batches per epoch if only the
            `end_epoch` hook of that epoch is left to call.
        until: epoch before which to end; by default the end of the run.
        begun: the `start_epoch` hook of the first epoch has been called already.
        decided: the control of the first step, which begins its epoch, has been asked for already.
    """
    _check_smallest(driver, spec)
    for e in range(epoch, spec.epochs if until is None else until):
        start = batch if e == epoch else 0
        if start == 0 and not (begun and e == epoch):
            if driver.stopped:
                return
            if not (decided and e == epoch):
                forget_epoch(driver)
            driver.start_epoch(spec, e)
        for b in spec.batches(e, start):
            yield e * spec.batches_per_epoch + b.number, b
        driver.end_epoch(spec, e)
