"""A recorded roll-out: any of its steps can be visited again, forward or backward, with the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from controlat.control import Control
from controlat.dynamics import Driver, Step, arrivals, rollout
from controlat.methods import Batch
from controlat.network import Meter
from controlat.plan import Plan
from controlat.state import Snapshot

__all__ = ["Recording", "Visit"]

GIBI = 2**30


class Visit(NamedTuple):
    """A step of a recorded roll-out, with the driver at the state before it.

    Args:
        number: of the step, from 0 at the beginning of the plan.
        batch: what it is trained on.
        control: u_t.
        rate: eta_t.
    """

    number: int
    batch: Batch
    control: Control
    rate: float


@dataclass
class Recording:
    """A roll-out of steps first, ..., last - 1 with the state before every `stride`-th of them.

    Between stored states the steps are taken again, which gives the same bits; at most one stretch of states
    is held beside the stored ones. Of what samples carry, only the rows that are touched are stored.

    Args:
        driver: runs the system; visits move it, and `put_back` leaves it at the end of the roll-out.
        plan: data, schedule, rates.
        first: first step.
        last: the step before which the roll-out ends.
        stride: steps from one stored state to the next.
        stored: states by the number of the step that they precede.
        end: the state after the last step.
        steps: what happened in every step.
        events: what the method did with networks that it keeps, in order: (number of the step that follows,
            ``"save"`` or ``"reload"``, name).
        spent: what taking steps again has cost so far.
    """

    driver: Driver
    plan: Plan
    first: int
    last: int
    stride: int
    stored: dict[int, Snapshot]
    end: Snapshot
    steps: list[Step]
    events: list[tuple[int, str, str]] = field(default_factory=list)
    spent: Meter = field(default_factory=Meter)

    @classmethod
    def of(
        cls,
        driver: Driver,
        plan: Plan,
        *,
        first: int = 0,
        last: int | None = None,
        stride: int | None = None,
        limit: float = 2 * GIBI,
        progress: Callable[[Step], object] | None = None,
    ) -> Recording:
        """Run the system from the driver's present state, and record it.

        Args:
            driver: at the state before step `first`; afterwards at the end of the roll-out.
            plan: data, schedule, rates.
            first: number of the first step.
            last: stop before this step; the end of the plan by default, after its last hook.
            stride: states are stored at every `stride`-th step; as often as `limit` allows by default.
            limit: bytes that states may take.
            progress: called after every step.

        Raises:
            ValueError: not a window of the plan, or states that do not fit within `limit`.
            NonFiniteError: training diverged.
        """
        total = plan.epochs * plan.batches_per_epoch
        last = total if last is None else last
        if not 0 <= first < last <= total:
            raise ValueError(f"steps must be within 0..{total}, first below last, got {first} and {last}")
        if plan.world.size > 1:
            raise ValueError("a roll-out is recorded by one process; start it without torchrun")
        if driver.stopped and first % plan.batches_per_epoch == 0:
            raise ValueError(f"the method has ended training ({driver.stopped}): there is nothing to record")
        stride = _stride(_size(driver, plan, first), last - first, limit) if stride is None else stride
        if stride < 1:
            raise ValueError(f"stride must be >= 1, got {stride}")
        stored: dict[int, Snapshot] = {}

        made: list[Step] = []
        events: list[tuple[int, str, str]] = []
        before = driver.notice

        def notice(what: str, name: str) -> None:
            events.append((first + len(made), what, name))
            if before is not None:
                before(what, name)

        driver.notice = notice
        try:
            for step in _steps(driver, plan, first, last, stored, stride=stride):
                made.append(step)
                if progress is not None:
                    progress(step)
        finally:
            driver.notice = before
        last = first + len(made)  # fewer where the method ended training
        return cls(driver, plan, first, last, stride, stored, driver.snapshot(), made, events)

    def at(self, number: int) -> Visit:
        """Put the driver at the state before one step."""
        if not self.first <= number < self.last:
            raise ValueError(f"the roll-out has the steps {self.first}..{self.last - 1}, not {number}")
        start = number - (number - self.first) % self.stride
        state = self._states(start, number + 1)[number]
        self.driver.restore(state)
        return self._visit(number)

    def _visit(self, number: int) -> Visit:
        batch = next(self.plan.batches(*divmod(number, self.plan.batches_per_epoch)))
        rate = self.plan.learning_rate(batch.epoch, batch.number)
        return Visit(number, batch, self.plan.control(batch), rate)

    def forward(self) -> Iterator[Visit]:
        """Every step in order, with the driver at the state before it."""
        for start, stop in self._stretches():
            states = self._states(start, stop)
            for number in range(start, stop):
                self.driver.restore(states[number])
                yield self._visit(number)

    def backward(self, until: int | None = None) -> Iterator[Visit]:
        """Every step from the last back to `until` (by default the first), with the driver before it."""
        least = self.first if until is None else until
        for start, stop in reversed([s for s in self._stretches() if s[1] > least]):
            states = self._states(start, stop)
            for number in reversed(range(max(start, least), stop)):
                self.driver.restore(states.pop(number))
                yield self._visit(number)

    def again(self, driver: Driver) -> Iterator[Step]:
        """The steps of the roll-out once more by a driver that is at its first state, nothing recorded."""
        return _steps(driver, self.plan, self.first, self.last, begun=True, ended=bool(self.end.stopped))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Leave the driver at the end of the roll-out, and its meter as it was."""
        meter = self.driver.meter
        try:
            yield
        finally:
            self.driver.restore(self.end)
            self.driver.meter = meter

    def _stretches(self) -> Iterator[tuple[int, int]]:
        for start in range(self.first, self.last, self.stride):
            yield start, min(start + self.stride, self.last)

    def _states(self, start: int, stop: int) -> dict[int, Snapshot]:
        """The states before the steps start, ..., stop - 1, made by taking the steps between them again."""
        states, plan, driver = {start: self.stored[start]}, self.plan, self.driver
        if stop - start == 1:
            return states
        driver.restore(states[start])
        meter, driver.meter = driver.meter, self.spent
        try:
            for number, b in arrivals(driver, plan, start, begun=True):
                if number > start:
                    touched = plan.indices(number, number + 1) if driver.rows else None
                    states[number] = driver.snapshot(touched)
                if number == stop - 1:
                    break
                driver.step(b, plan.control(b), plan.learning_rate(b.epoch, b.number))
        finally:
            driver.meter = meter
        return states


def _steps(
    driver: Driver,
    plan: Plan,
    first: int,
    last: int,
    states: dict[int, Snapshot] | None = None,
    *,
    stride: int = 1,
    begun: bool = False,
    ended: bool = False,
) -> Iterator[Step]:
    """Steps first, ..., last - 1; hooks after the last one only where training ends."""
    epoch, batch = divmod(first, plan.batches_per_epoch)
    record = None if states is None else states.__setitem__
    ended = ended or last == plan.epochs * plan.batches_per_epoch
    until = last // plan.batches_per_epoch if ended else None
    steps = rollout(
        driver, plan, epoch=epoch, batch=batch, until=until, record=record, stride=stride, begun=begun
    )
    return steps if ended else islice(steps, last - first)


def _size(driver: Driver, plan: Plan, first: int) -> int:
    """Bytes of a state once a step has been taken: with momentum buffers, and rows for all samples."""
    before, meter = driver.snapshot(), driver.meter
    driver.meter = Meter()
    try:
        for _ in _steps(driver, plan, first, first + 1):
            pass
        after = driver.snapshot()
    finally:
        driver.restore(before)
        driver.meter = meter
    rows = sum(_bytes(found) // len(found["seen"]) for found in after.rows.values()) * len(plan.data)
    return max(_bytes(before), _bytes(after._replace(rows={})) + rows)


def _stride(size: int, steps: int, limit: float) -> int:
    """The smallest stride with which stored states and those of one stretch fit."""
    fits = int(limit // size)
    for stride in range(1, math.isqrt(steps) + 2):
        held = -(-steps // stride) + (stride if stride > 1 else 0)
        if held + 1 <= fits:
            return stride
    least = (2 * math.isqrt(steps) + 3) * size
    raise ValueError(
        f"{steps} states of {size / GIBI:.3g} GiB do not fit in {limit / GIBI:.3g} GiB, not even with "
        f"stretches taken again; allow {1.05 * least / GIBI:.2g} GiB, or look at a shorter window"
    )


def _bytes(value: Any) -> int:
    """Bytes of all tensors of a nested structure."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
