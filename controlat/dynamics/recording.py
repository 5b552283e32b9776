"""A recorded roll-out: any of its steps can be visited again, forward or backward, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from controlat._util.checks import instance
from controlat.control.controller import Recorded
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.rollout import arrivals, rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.dynamics.strides import GIBI, fitting
from controlat.methods import Batch

__all__ = ["GIBI", "Recording", "Visit"]


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

    Between stored states the steps are taken again under the controls that were recorded, which gives the
    same bits; a closed loop is not asked again. Of the stretch in question, states at the next finer stride
    are held; of one of its parts, those at the stride after that; and so on.
    Of what samples carry, only the rows that are touched are stored.

    Args:
        driver: runs the system; visits move it, and `put_back` leaves it at the end of the roll-out.
        spec: data, controller, rates; in place of a closed loop the controls that it took.
        first: first step.
        last: the step before which the roll-out ends.
        stride: steps from one stored state to the next.
        stored: states by the number of the step that they precede.
        end: the state after the last step.
        steps: what happened in every step.
        events: what the method did between epochs, in order: (number of the step that follows, what, name),
            as the driver's `notice` is told.
        spent: what taking steps again has cost so far.
        finer: steps from one state to the next where steps are taken again: ever fewer, 1 at last.
    """

    driver: Driver
    spec: RunSpec
    first: int
    last: int
    stride: int
    stored: dict[int, State]
    end: State
    steps: list[Step]
    events: list[tuple[int, str, str]] = field(default_factory=list)
    spent: Meter = field(default_factory=Meter)
    finer: tuple[int, ...] = (1,)

    @classmethod
    def of(
        cls,
        driver: Driver,
        spec: RunSpec,
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
            spec: data, controller, rates.
            first: number of the first step.
            last: stop before this step; the end of the plan by default, after its last hook.
            stride: states are stored at every `stride`-th step, and all states of one stretch are held at
                once, whatever the limit. By default strides are nested as little as `limit` allows.
            limit: bytes that states may take; networks that the method puts aside from now on come on top.
            progress: called after every step.

        Raises:
            ValueError: not a window of the plan, or states that do not fit within `limit`.
            NonFiniteError: training diverged.
        """
        strides = cls.check(driver, spec, first=first, last=last, stride=stride, limit=limit)
        last = spec.epochs * spec.batches_per_epoch if last is None else last
        stored: dict[int, State] = {}

        made: list[Step] = []
        events: list[tuple[int, str, str]] = []
        opening: Control | None = None
        before = driver.notice

        def notice(what: str, name: str) -> None:
            events.append((first + len(made), what, name))
            if before is not None:
                before(what, name)

        driver.notice = notice
        try:
            for step in _steps(driver, spec, first, last, stored, stride=strides[0]):
                opening = opening or spec.control_at(step.epoch, 0, driver)
                made.append(step)
                if progress is not None:
                    progress(step)
        finally:
            driver.notice = before
        last = first + len(made)  # fewer where the method ended training
        if not spec.open_loop:
            taken = Recorded([step.control for step in made], first, opening)
            spec = replace(spec, controller=taken)
        return cls(
            driver=driver,
            spec=spec,
            first=first,
            last=last,
            stride=strides[0],
            stored=stored,
            end=driver.snapshot(),
            steps=made,
            events=events,
            finer=strides[1:],
        )

    @staticmethod
    def check(
        driver: Driver,
        spec: RunSpec,
        *,
        first: int = 0,
        last: int | None = None,
        stride: int | None = None,
        limit: float = 2 * GIBI,
    ) -> tuple[int, ...]:
        """The strides with which `of` would record, or its ValueError, without running the plan.

        One step is taken to see how large a state is; the driver is put back. The steps of the roll-out are
        taken again less than once for every stride after the first.

        Args:
            driver: as in `of`, like all the others.
            spec: data, controller, rates.
            first: number of the first step.
            last: stop before this step.
            stride: of stored states.
            limit: bytes that states may take.

        Raises:
            ValueError: not a window of the plan, or states that do not fit within `limit`.
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
            return fitting(_size(driver, spec, first), last - first, limit)
        if stride < 1:
            raise ValueError(f"stride must be >= 1, got {stride}")
        return stride, 1

    def at(self, number: int) -> Visit:
        """Put the driver at the state before one step."""
        if not self.first <= number < self.last:
            raise ValueError(f"the roll-out has the steps {self.first}..{self.last - 1}, not {number}")
        return next(self._walk(number, number + 1))

    def forward(self) -> Iterator[Visit]:
        """Every step in order, with the driver at the state before it."""
        return self._walk(self.first, self.last)

    def backward(self, until: int | None = None) -> Iterator[Visit]:
        """Every step from the last back to `until` (by default the first), with the driver before it."""
        return self._walk(self.first if until is None else until, self.last, backward=True)

    def again(self, driver: Driver) -> Iterator[Step]:
        """The steps of the roll-out once more by a driver that is at its first state, nothing recorded."""
        return _steps(driver, self.spec, self.first, self.last, begun=True, ended=bool(self.end.stopped))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Leave the driver at the end of the roll-out, and its meter as it was."""
        meter = self.driver.meter
        try:
            yield
        finally:
            self.driver.restore(self.end)
            self.driver.meter = meter

    def _walk(self, first: int, last: int, *, backward: bool = False) -> Iterator[Visit]:
        """The steps first, ..., last - 1 in order, or backward, with the driver at the state before each.

        A stretch is cut at the next finer stride, and each part, when its turn comes, at the one after that.
        """
        strides, states = (self.stride, *self.finer), dict(self.stored)
        stretches = [(self.first, self.last, 0)] if first < last else []
        while stretches:
            start, stop, level = stretches.pop()
            if stop - start == 1:
                self.driver.restore(states.pop(start))  # a state is given up as soon as it is visited
                yield self._visit(start)
                continue
            stride = strides[level]
            parts = [(n, min(n + stride, stop), level + 1) for n in range(start, stop, stride)]
            parts = [(n, end, below) for n, end, below in parts if n < last and end > first]
            self._make(states, start, {n: end for n, end, _ in parts if n not in states})
            stretches += parts if backward else reversed(parts)

    def _make(self, states: dict[int, State], start: int, wanted: dict[int, int]) -> None:
        """Take the steps from `start` on again, and add the states that are wanted.

        Args:
            states: by the number of the step that they precede.
            start: number of a step whose state is there.
            wanted: by the number of the step that a state precedes, the number of the step up to which it
                serves: it has the rows that the steps between touch.
        """
        if not wanted:
            return
        spec, driver = self.spec, self.driver
        driver.restore(states[start])
        with _aside(driver, self.spent):
            for number, b in arrivals(driver, spec, *divmod(start, spec.batches_per_epoch), begun=True):
                if number in wanted:
                    end = wanted.pop(number)
                    states[number] = driver.snapshot(spec.indices(number, end) if driver.rows else None)
                    if not wanted:
                        return
                driver.step(b, spec.control(b), spec.learning_rate(b.epoch, b.number))

    def _visit(self, number: int) -> Visit:
        epoch, i = divmod(number, self.spec.batches_per_epoch)
        batch = next(self.spec.batches(epoch, i, i + 1))
        rate = self.spec.learning_rate(batch.epoch, batch.number)
        return Visit(number, batch, self.spec.control(batch), rate)


def _steps(
    driver: Driver,
    spec: RunSpec,
    first: int,
    last: int,
    states: dict[int, State] | None = None,
    *,
    stride: int = 1,
    begun: bool = False,
    ended: bool = False,
) -> Iterator[Step]:
    """Steps first, ..., last - 1; hooks after the last one only where training ends."""
    epoch, batch = divmod(first, spec.batches_per_epoch)
    record = None if states is None else states.__setitem__
    ended = ended or last == spec.epochs * spec.batches_per_epoch
    until = last // spec.batches_per_epoch if ended else None
    steps = rollout(
        driver, spec, epoch=epoch, batch=batch, until=until, record=record, stride=stride, begun=begun
    )
    return steps if ended else islice(steps, last - first)


@contextmanager
def _aside(driver: Driver, meter: Meter) -> Iterator[None]:
    """Count on another meter, and let nobody notice what the method does, inside the block."""
    before = driver.meter, driver.notice
    driver.meter, driver.notice = meter, None
    try:
        yield
    finally:
        driver.meter, driver.notice = before


def _size(driver: Driver, spec: RunSpec, first: int) -> int:
    """Bytes of a state once a step has been taken: with momentum buffers, and rows for all samples."""
    before = driver.snapshot()
    try:
        with _aside(driver, Meter()):
            for _ in _steps(driver, spec, first, first + 1):
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
