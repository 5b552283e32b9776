"""Controllers u_t = pi(t, z): what decides the control of every outer step.

An open loop needs the time alone: a schedule, or any function t -> u. A closed loop looks at the state z of
training, which is the driver (`controlat.dynamics`) before the step. The control that was taken is recorded
with every step: what is analysed afterwards replays it (`Recorded`), and `as_schedule` makes it a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from controlat._util.checks import brief
from controlat.control.schedules import Curve, Schedule
from controlat.control.space import Control

__all__ = [
    "Controller",
    "Moment",
    "OpenLoop",
    "Recorded",
    "as_controller",
    "as_schedule",
    "is_open",
    "nominal",
    "run_lengths",
    "unrolled",
]


class Moment(NamedTuple):
    """The place of an outer step in training.

    Args:
        epoch: epoch, from 0.
        batch: position of the batch in its epoch, from 0.
        batches: batches per epoch.

    >>> Moment(2, 1, 4).t, Moment(2, 1, 4).number
    (2.25, 9)
    """

    epoch: int
    batch: int
    batches: int

    @property
    def t(self) -> float:
        """Training time at the start of the step, in epochs."""
        return self.epoch + self.batch / self.batches

    @property
    def number(self) -> int:
        """The step's number, from 0 at the beginning of training."""
        return self.epoch * self.batches + self.batch


@runtime_checkable
class Controller(Protocol):
    """pi: decides u_t from the moment t and the state z.

    It may have two things more:

    - ``observe(step, z)`` is called after each step with what happened in it (loss, cost, control: a
      `controlat.dynamics.driver.Step`) and the state after it;
    - ``dearest`` is the control that costs most of those it takes, which planning uses as an upper bound.

    What it measured and remembers is part of the state and belongs into ``z.controller_memory``, a dictionary
    of plain data (numbers, texts, lists, dictionaries with texts for keys), not into its own attributes: then
    checkpoints carry it. Names that begin with an underscore are the roll-out's own. Gradient evaluations
    that it spends are counted on ``z.meter``. Random numbers come from torch's generator, which is seeded
    with the moment. It leaves the network as it is. Where several processes train together, the first one
    decides.
    """

    def control(self, now: Moment, z: Any) -> Mapping[str, float]:
        """u_t.

        Args:
            now: t.
            z: the driver at the state before the step; at the first step of an epoch, before the method's
                hook at the beginning of the epoch, which gets this control too.
        """


@dataclass(frozen=True)
class OpenLoop:
    """A function t -> u as a controller."""

    plan: Callable[[float], Control]

    def __call__(self, t: float) -> Control:
        """u(t), t in epochs."""
        return self.plan(t)

    def control(self, now: Moment, z: object = None) -> Control:
        """u at the start of the step."""
        return self.plan(now.t)


@dataclass(frozen=True)
class Recorded:
    """The controls that were taken, as an open loop.

    Args:
        controls: of the steps first, first + 1, ...
        first: number of the first step.
        opening: control of the first step of that epoch, where `first` comes later in it: hooks at the end of
            the epoch are given it.

    >>> replay = Recorded((Control(steps=1), Control(steps=2)))
    >>> replay.control(Moment(0, 1, 4))
    Control(steps=2)
    """

    controls: Sequence[Control]
    first: int = 0
    opening: Control | None = None

    def control(self, now: Moment, z: object = None) -> Control:
        """The control that was taken.

        Raises:
            ValueError: that step was not recorded.
        """
        place = now.number - self.first
        if 0 <= place < len(self.controls):
            return self.controls[place]
        if self.opening is not None and now.batch == 0 and now.epoch == self.first // now.batches:
            return self.opening
        last = self.first + len(self.controls) - 1
        raise ValueError(f"controls of steps {self.first}..{last} were recorded, not of step {now.number}")


def as_controller(given: object) -> Controller:
    """A controller as it is; a function t -> u as an open loop.

    Raises:
        TypeError: neither.
    """
    if isinstance(given, type) and hasattr(given, "control"):
        raise TypeError(f"controller must be an object, got the class {given.__name__}: call it")
    if isinstance(given, Controller) and callable(given.control):
        return given
    if callable(given):
        return OpenLoop(given)
    raise TypeError(
        "controller must be a schedule (see parse_schedule), a function of t, or have a method "
        f"control(now, z), got {brief(given)}"
    )


def is_open(controller: Controller) -> TypeGuard[Schedule | OpenLoop | Recorded]:
    """Whether a controller needs the time alone, so that its controls are known ahead."""
    return isinstance(controller, (Schedule, OpenLoop, Recorded))


def nominal(controller: Schedule | OpenLoop | Recorded, now: Moment) -> Control:
    """u(t) of an open loop, which a step's control may differ from where a schedule rounds by turns."""
    return controller.control(now) if isinstance(controller, Recorded) else controller(now.t)


def run_lengths(controls: Iterable[Control]) -> list[list[Any]]:
    """Controls of an epoch as [[first batch, {knob: value}], ...], one entry where they change.

    >>> run_lengths([Control(steps=1), Control(steps=1), Control(steps=2)])
    [[0, {'steps': 1}], [2, {'steps': 2}]]
    """
    runs: list[list[Any]] = []
    for batch, u in enumerate(controls):
        if not runs or runs[-1][1] != dict(u):
            runs.append([batch, dict(u)])
    return runs


def unrolled(runs: Sequence[Sequence[Any]], batches: int) -> list[Control]:
    """The control of each of the batches that `run_lengths` described.

    >>> unrolled([[0, {"steps": 1}], [2, {"steps": 2}]], 3)
    [Control(steps=1), Control(steps=1), Control(steps=2)]
    """
    ends = [*(first for first, _ in runs[1:]), batches]
    return [
        u for (first, knobs), end in zip(runs, ends, strict=True) for u in [Control(**knobs)] * (end - first)
    ]


def as_schedule(controls: Sequence[Control], batches_per_epoch: int, epochs: int, text: str = "") -> Schedule:
    """The schedule that takes these controls, at the coarsest resolution that does.

    Args:
        controls: of every step from the beginning of training; fewer than all where a method ended it.
        batches_per_epoch: steps of an epoch.
        epochs: T, length of training.
        text: its label.

    Raises:
        ValueError: no controls, more than there are steps, or controls of different knobs.

    >>> u, v = Control(alpha=0.1, steps=1), Control(alpha=0.1, steps=2)
    >>> s = as_schedule([u, u, v, v, v, v, u, u], 4, 2)
    >>> s.resolution, [s(t / 4)["steps"] for t in range(8)]
    (0.5, [1, 1, 2, 2, 2, 2, 1, 1])
    """
    steps = epochs * batches_per_epoch
    if not 0 < len(controls) <= steps:
        raise ValueError(f"a schedule of {steps} steps needs 1 to {steps} controls, got {len(controls)}")
    if len({tuple(u) for u in controls}) > 1:
        raise ValueError(f"controls of a schedule have the same knobs, got {controls[0]} and others")
    changes = [n for n in range(1, len(controls)) if controls[n] != controls[n - 1]]
    lengths = (k for k in range(batches_per_epoch, 0, -1) if batches_per_epoch % k == 0)
    length = next(k for k in lengths if not any(n % k for n in changes))
    pieces = controls[::length]
    curves = {}
    for knob in pieces[0]:
        values = tuple(u[knob] for u in pieces)
        rounding = "half_up" if all(type(v) is int for v in values) else None
        constant = len(set(values)) == 1
        curves[knob] = Curve(
            "constant" if constant else "table", values[:1] if constant else values, (), rounding
        )
    return Schedule(curves, epochs, length / batches_per_epoch, text)
