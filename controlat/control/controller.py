"""Controllers u_t = pi(t, z), which give the control of every outer step.

An open-loop controller depends on time only: a schedule, or any function t -> u. A closed-loop controller
also reads the state z of training, through the driver (`controlat.dynamics`) before the step. The control of
every step is recorded. `Recorded` replays such controls, so that a closed loop can be analysed like an open
one, and `as_schedule` turns them into a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from controlat._util.checks import brief
from controlat.control.curves import Curve
from controlat.control.schedules import Schedule
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
    """The time of an outer step: its epoch, and its batch in the epoch.

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
        """t, time at the start of the step, in epochs."""
        return self.epoch + self.batch / self.batches

    @property
    def number(self) -> int:
        """The number of steps before this one since the beginning of training."""
        return self.epoch * self.batches + self.batch


@runtime_checkable
class Controller(Protocol):
    """A controller pi, which gives u_t = pi(t, z).

    Four members are optional:

    - ``for_run(spec)`` returns the controller for a run, a `controlat.dynamics.run_spec.RunSpec`: what it
      measures may then use the training data, the learning rates and the seed;
    - ``observe(step, z)`` is called after each step, with its loss, cost and control (a
      `controlat.dynamics.driver.Step`) and the state after it;
    - ``most_expensive`` is the control with the most gradient evaluations that it may give: for planning, an
      upper bound of the cost;
    - ``decision_cost`` is an upper bound of the gradient evaluations that its decisions take in the run.

    A controller must leave the network as it was. It keeps what it remembers in ``z.controller_memory``, not
    in its own attributes: that is part of the state and is saved in checkpoints. It is a dictionary of plain
    data (numbers, strings, lists, dictionaries with string keys); keys with a leading underscore are reserved
    for the roll-out. Gradient evaluations that the controller spends are counted on ``z.meter``. Random
    numbers come from torch's global generator, which is seeded for each step. In training with several
    processes, the controller runs in the first and its control is sent to the others.
    """

    def control(self, now: Moment, z: Any) -> Mapping[str, float]:
        """The control u_t of the step that comes next.

        Args:
            now: the time t.
            z: the driver, at the state before the step. At the first step of an epoch that is the state
                before the method's ``start_epoch``, which is called with this control.
        """


@dataclass(frozen=True)
class OpenLoop:
    """The open-loop controller of a function t -> u.

    Args:
        plan: the function; t in epochs.
    """

    plan: Callable[[float], Control]

    def __call__(self, t: float) -> Control:
        """u(t)."""
        return self.plan(t)

    def control(self, now: Moment, z: object = None) -> Control:
        """u(t) at the start of the step, for any state."""
        return self.plan(now.t)


@dataclass(frozen=True)
class Recorded:
    """The open-loop controller that replays recorded controls.

    Args:
        controls: the controls of the steps first, first + 1, ...
        first: number of the first recorded step.
        opening: control of the first step of the epoch that `first` is in, where the recording begins later:
            the method's ``end_epoch`` is called with it.

    >>> replay = Recorded((Control(steps=1), Control(steps=2)))
    >>> replay.control(Moment(0, 1, 4))
    Control(steps=2)
    """

    controls: Sequence[Control]
    first: int = 0
    opening: Control | None = None

    def control(self, now: Moment, z: object = None) -> Control:
        """The recorded control of the step, for any state.

        Raises:
            ValueError: that step was not recorded.
        """
        index = now.number - self.first
        if 0 <= index < len(self.controls):
            return self.controls[index]
        if self.opening is not None and now.batch == 0 and now.epoch == self.first // now.batches:
            return self.opening
        last = self.first + len(self.controls) - 1
        raise ValueError(f"controls of steps {self.first}..{last} were recorded, not of step {now.number}")


def as_controller(policy: object) -> Controller:
    """The controller itself, or the open-loop controller of a function t -> u.

    Raises:
        TypeError: `policy` is neither.
    """
    if isinstance(policy, type) and hasattr(policy, "control"):
        raise TypeError(f"controller must be an object, got the class {policy.__name__}: call it")
    if isinstance(policy, Controller) and callable(policy.control):
        return policy
    if callable(policy):
        return OpenLoop(policy)
    raise TypeError(
        "controller must be a schedule (see parse_schedule), a function of t, or have a method "
        f"control(now, z), got {brief(policy)}"
    )


def is_open(controller: Controller) -> TypeGuard[Schedule | OpenLoop | Recorded]:
    """Whether a controller is open-loop, so that its controls are known before training."""
    return isinstance(controller, (Schedule, OpenLoop, Recorded))


def nominal(controller: Schedule | OpenLoop | Recorded, now: Moment) -> Control:
    """u(t) of an open-loop controller, before dithering: an integer knob may be a real number in it."""
    return controller.control(now) if isinstance(controller, Recorded) else controller(now.t)


def run_lengths(controls: Iterable[Control]) -> list[list[Any]]:
    """The controls of an epoch in run-length form: [first batch, {knob: value}] for each run of equal ones.

    >>> run_lengths([Control(steps=1), Control(steps=1), Control(steps=2)])
    [[0, {'steps': 1}], [2, {'steps': 2}]]
    """
    runs: list[list[Any]] = []
    for batch, u in enumerate(controls):
        if not runs or runs[-1][1] != dict(u):
            runs.append([batch, dict(u)])
    return runs


def unrolled(runs: Sequence[Sequence[Any]], batches: int) -> list[Control]:
    """The control of each batch of an epoch, from the form of `run_lengths`.

    >>> unrolled([[0, {"steps": 1}], [2, {"steps": 2}]], 3)
    [Control(steps=1), Control(steps=1), Control(steps=2)]
    """
    ends = [*(first for first, _ in runs[1:]), batches]
    return [
        u for (first, knobs), end in zip(runs, ends, strict=True) for u in [Control(**knobs)] * (end - first)
    ]


def as_schedule(controls: Sequence[Control], batches_per_epoch: int, epochs: int, text: str = "") -> Schedule:
    """The schedule with these controls, at the coarsest resolution that represents them exactly.

    Args:
        controls: the control of every step from the beginning of training; fewer than all steps where the
            method stopped early.
        batches_per_epoch: steps per epoch.
        epochs: T, length of training.
        text: label of the schedule.

    Raises:
        ValueError: there are no controls, more than steps, or controls with different knobs.

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
    divisors = (k for k in range(batches_per_epoch, 0, -1) if batches_per_epoch % k == 0)
    length = next(k for k in divisors if not any(n % k for n in changes))  # of a piece, in steps
    pieces = controls[::length]
    curves = {knob: _as_curve(tuple(u[knob] for u in pieces)) for knob in pieces[0]}
    return Schedule(curves, epochs, resolution=length / batches_per_epoch, text=text)


def _as_curve(values: tuple[float, ...]) -> Curve:
    """The curve with these values on the pieces of a schedule."""
    rounding = "half_up" if all(type(v) is int for v in values) else None
    if len(set(values)) == 1:
        return Curve("constant", values[:1], rounding=rounding)
    return Curve("table", values, rounding=rounding)
