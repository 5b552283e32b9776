"""The steps first, ..., last - 1 of a run that are to be recorded, and the strides with which states fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from controlat._util.checks import instance
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.step import Step
from controlat.dynamics.strides import GIBI, fitting

__all__ = ["check_window", "state_bytes", "unobserved", "window_steps"]


def check_window(
    driver: Driver,
    spec: RunSpec,
    *,
    first: int = 0,
    last: int | None = None,
    stride: int | None = None,
    limit: float = 2 * GIBI,
) -> tuple[int, ...]:
    """The nested strides with which `Recording.of` would store states, without running the roll-out.

    One step is taken to find the size of a state; the driver is restored. A visit to all steps takes every
    step of the roll-out again less than once per stride after the first.

    Args:
        driver: at the state before step `first`.
        spec: data, controller, rates.
        first: number of the first step.
        last: number of the step before which the roll-out ends; the end of the run by default.
        stride: steps between stored states; by default the strides follow from `limit`.
        limit: bytes that states may take.

    Raises:
        ValueError: no such steps in the run, or states that do not fit within `limit`.
        NonFiniteError: the first step diverges.
    """
    instance(driver, Driver, "driver")
    instance(spec, RunSpec, "spec")
    total = spec.epochs * spec.batches_per_epoch
    last = total if last is None else last
    for name, value in {"first": first, "last": last, "stride": 1 if stride is None else stride}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise ValueError(f"limit must be a positive number of bytes, got {limit!r}")
    if not 0 <= first < last <= total:
        raise ValueError(f"steps must be within 0..{total}, first below last, got {first} and {last}")
    if spec.world.size > 1:
        raise ValueError("a roll-out is recorded by one process; start it without torchrun")
    if driver.stopped and first % spec.batches_per_epoch == 0:
        raise ValueError(f"the method has ended training ({driver.stopped}): there is nothing to record")
    if stride is None:
        return fitting(state_bytes(driver, spec, first), last - first, limit)
    if stride < 1:
        raise ValueError(f"stride must be >= 1, got {stride}")
    return stride, 1


def window_steps(
    driver: Driver,
    spec: RunSpec,
    first: int,
    last: int,
    before: Callable[[int], object] | None = None,
    *,
    begun: bool = False,
    ended: bool = False,
) -> Iterator[Step]:
    """Take the steps first, ..., last - 1; the hook after the last one is called only where training ends.

    Args:
        driver: at the state before step `first`.
        spec: data, controller, rates.
        first: number of the first step.
        last: number of the step before which to end.
        before: called with the number of every step, with the driver at the state before it.
        begun: the hook at the beginning of the first epoch has been called already.
        ended: the method ended training after the last step.
    """
    epoch, batch = divmod(first, spec.batches_per_epoch)
    ended = ended or last == spec.epochs * spec.batches_per_epoch
    until = last // spec.batches_per_epoch if ended else None
    steps = rollout(driver, spec, epoch=epoch, batch=batch, until=until, before=before, begun=begun)
    yield from steps if ended else islice(steps, last - first)
    driver.watch.look()


@contextmanager
def unobserved(driver: Driver, meter: Meter) -> Iterator[None]:
    """Inside the block evaluations are counted on another meter, and `driver.notice` is not called."""
    before = driver.meter, driver.notice
    driver.meter, driver.notice = meter, None
    try:
        yield
    finally:
        driver.meter, driver.notice = before


def state_bytes(driver: Driver, spec: RunSpec, first: int) -> int:
    """Bytes of a state after a step, i.e. with momentum buffers, and with rows for all samples."""
    before = driver.snapshot()
    try:
        with unobserved(driver, Meter()):
            for _ in window_steps(driver, spec, first, first + 1):
                pass
        after = driver.snapshot(spec.indices(first, first + 1))
    finally:
        driver.restore(before)
    rows = sum(_bytes(part) // len(part.seen) for part in after.rows.values()) * len(spec.data)
    return max(_bytes(before), _bytes(replace(after, rows={})) + rows)


def _bytes(value: Any) -> int:
    """Bytes of all tensors of a nested structure."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
