"""A recorded roll-out: its steps can be visited forward or backward, at the same states to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from controlat.control.controller import Recorded
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import arrivals
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.dynamics.step import Step
from controlat.dynamics.strides import GIBI
from controlat.dynamics.window import check_window, unobserved, window_steps
from controlat.methods import Batch

__all__ = ["GIBI", "Recorder", "Recording", "Visit"]


class Visit(NamedTuple):
    """A step of a recorded roll-out, with the driver at the state before it.

    Args:
        number: of the step, counted from 0 at the beginning of the run.
        batch: its batch.
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

    To visit a step between stored states, the steps before it are taken again under the recorded controls,
    which gives the same bits; a closed-loop controller is not called again. This is checkpointing with nested
    strides (`controlat.dynamics.strides`): within the stretch that is being visited, states are held at the
    next finer stride, and so on recursively. Of the rows of the samples, a stored state has only those that
    the steps up to the next stored state use.

    Args:
        driver: runs the system; visits change its state, and `put_back` returns it to the end.
        spec: data, controller, rates; a closed loop is replaced by its recorded controls.
        first: number of the first step.
        last: number of the step before which the roll-out ends.
        stride: steps from one stored state to the next.
        stored: states, by the number of the step that follows.
        end: the state after the last step.
        steps: the record of every step.
        events: what the method did between epochs, in order: (number of the step that follows, what, name),
            where what and name are the arguments of `Driver.notice`.
        spent: evaluations that taking steps again has cost so far.
        finer: the strides within a stretch, decreasing to 1.
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
            last: number of the step before which to end; by default the end of the run, with its last hook.
            stride: store every `stride`-th state, and hold all states of one stretch during a visit, whatever
                the limit; by default the fewest nested strides that fit within `limit`.
            limit: bytes that states may take, without networks that the method saves from now on.
            progress: called after every step.

        Raises:
            ValueError: no such steps in the run, or states that do not fit within `limit`.
            NonFiniteError: training diverged.
        """
        recorder = Recorder.of(driver, spec, first=first, last=last, stride=stride, limit=limit)
        last = spec.epochs * spec.batches_per_epoch if last is None else last
        with recorder.listening():
            for step in window_steps(driver, spec, first, last, recorder.before):
                recorder.add(step)
                if progress is not None:
                    progress(step)
        return recorder.recording()

    check = staticmethod(check_window)

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
        """Take the steps of the roll-out again with a driver at its first state, without recording."""
        ended = bool(self.end.stopped)
        return window_steps(driver, self.spec, self.first, self.last, begun=True, ended=ended)

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

        A stack of stretches: each is cut at the stride of its level, and its parts are pushed on the stack.
        """
        strides, states = (self.stride, *self.finer), dict(self.stored)
        stretches = [(self.first, self.last, 0)] if first < last else []
        while stretches:
            start, stop, level = stretches.pop()
            if stop - start == 1:
                self.driver.restore(states.pop(start))  # frees the state as soon as it is visited
                yield self._visit(start)
                continue
            stride = strides[level]
            parts = [(n, min(n + stride, stop), level + 1) for n in range(start, stop, stride)]
            parts = [(n, end, below) for n, end, below in parts if n < last and end > first]
            self._compute(states, start, {n: end for n, end, _ in parts if n not in states})
            stretches += parts if backward else reversed(parts)

    def _compute(self, states: dict[int, State], start: int, wanted: dict[int, int]) -> None:
        """Take the steps from `start` on again, and add the wanted states to `states`.

        Args:
            states: states by the number of the step that follows.
            start: number of a step whose state is in `states`.
            wanted: {number of the step that follows the wanted state: number of the step before which the
                next state is stored}; the state has the rows that the steps between them use.
        """
        if not wanted:
            return
        spec, driver = self.spec, self.driver
        driver.restore(states[start])
        with unobserved(driver, self.spent):
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


@dataclass
class Recorder:
    """Records a roll-out while it is under way, whoever takes its steps: `Recording.of`, or the trainer.

    Args:
        driver: runs the system.
        spec: data, controller, rates.
        first: number of the first step.
        strides: steps from one stored state to the next, and the finer strides.
    """

    driver: Driver
    spec: RunSpec
    first: int
    strides: tuple[int, ...]
    _stored: dict[int, State] = field(default_factory=dict, init=False)
    _steps: list[Step] = field(default_factory=list, init=False)
    _events: list[tuple[int, str, str]] = field(default_factory=list, init=False)
    _opening: Control | None = field(default=None, init=False)

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
    ) -> Recorder:
        """A recorder of the steps first, ..., last - 1: arguments and errors are those of `Recording.of`."""
        strides = check_window(driver, spec, first=first, last=last, stride=stride, limit=limit)
        return cls(driver, spec, first, strides)

    def listening(self) -> AbstractContextManager[None]:
        """Inside the block, in which the steps are taken, the actions of hooks are recorded, too."""
        return _noticed(self.driver, self._notice)

    def _notice(self, what: str, name: str) -> None:
        self._events.append((self.first + len(self._steps), what, name))

    def before(self, number: int) -> None:
        """Store the state before a step, if it is one of every `stride`-th: call it before each."""
        stride = self.strides[0]
        if (number - self.first) % stride == 0:
            touched = self.spec.indices(number, number + stride) if self.driver.rows else None
            self._stored[number] = self.driver.snapshot(touched)

    def add(self, step: Step) -> None:
        """Record a step: call it after each."""
        self._opening = self._opening or self.spec.control_at(step.epoch, 0, self.driver)
        self._steps.append(step)

    def recording(self) -> Recording:
        """The roll-out up to the driver's present state."""
        spec = self.spec
        if not spec.open_loop:
            controls = Recorded([step.control for step in self._steps], self.first, self._opening)
            spec = replace(spec, controller=controls)
        return Recording(
            driver=self.driver,
            spec=spec,
            first=self.first,
            last=self.first + len(self._steps),  # before the last of the plan where the method ended training
            stride=self.strides[0],
            stored=self._stored,
            end=self.driver.snapshot(),
            steps=self._steps,
            events=self._events,
            finer=self.strides[1:],
        )


@contextmanager
def _noticed(driver: Driver, listen: Callable[[str, str], object]) -> Iterator[None]:
    """Inside the block `listen` is called with all that `driver.notice` is called with, and before it."""
    before = driver.notice

    def notice(what: str, name: str) -> None:
        listen(what, name)
        if before is not None:
            before(what, name)

    driver.notice = notice
    try:
        yield
    finally:
        driver.notice = before
