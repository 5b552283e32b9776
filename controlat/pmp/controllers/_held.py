"""What the closed loops share: a control that is decided at the start of epochs and held, and its texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from controlat._util.checks import number, whole
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Method
from controlat.pmp.candidates import Candidates

__all__ = ["Held", "at_least", "cheapest", "most_expensive", "searched"]

_CONTROL = "control"  # key in the controller's memory
_MOST_STEPS = 10  # K of the candidates, unless they are named


@dataclass(frozen=True, kw_only=True)
class Held:
    """A closed loop whose control is decided at the start of every `every`-th epoch, and held until the next.

    Args:
        method: the training system.
        every: epochs from one decision to the next.
        run: the run in which it controls; `RunSpec` sets it.

    Raises:
        ValueError: `every` is below 1.
    """

    method: Method
    every: int = 1
    run: RunSpec | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", whole(self.every, "every", 1))

    @property
    def first(self) -> Control:
        """The control before the first decision."""
        raise NotImplementedError

    def decide(self, now: Moment, z: Driver, u: Control) -> Control:
        """The control to hold from now on, where u was held until now; evaluations are counted on z.meter."""
        raise NotImplementedError

    def decision_evaluations(self, run: RunSpec) -> float:
        """Gradient evaluations of one decision, in samples, at most."""
        raise NotImplementedError

    def for_run(self, run: RunSpec) -> Self:
        """The controller for a run."""
        return replace(self, run=run)

    def control(self, now: Moment, z: Driver) -> Control:
        """u_t; in the memory it stays the same between decisions."""
        held = z.controller_memory.get(_CONTROL)
        u = self.first if held is None else Control(**held)
        if held is None or (now.batch == 0 and now.epoch % self.every == 0):
            u = self.decide(now, z, u)
            z.controller_memory[_CONTROL] = dict(u)
        return u

    @property
    def decision_cost(self) -> float:
        """Gradient evaluations of all decisions in the run, in samples, at most."""
        return -(-self.running.epochs // self.every) * self.decision_evaluations(self.running)

    @property
    def running(self) -> RunSpec:
        """The run.

        Raises:
            ValueError: there is none yet.
        """
        if self.run is None:
            raise ValueError(
                f"{type(self).__name__} measures on the samples of its run: give it to a RunSpec"
            )
        return self.run


def searched(knobs: Mapping[str, str], method: Method, ball: Ball) -> Candidates:
    """The candidates of a closed loop: the knobs that are named, and alpha and steps as far as there are any.

    Args:
        knobs: knob to ``a`` (held at this value), ``a:b:c`` or ``a..b``, as `Candidates.read` reads it. alpha
            and steps take its default values, K up to 10, if they are left out.
        method: the training system.
        ball: the perturbation set.

    Raises:
        ValueError: a value is not admissible, or there is nothing to search.
    """
    space = method.controls
    texts = [f"{name}={values}" for name, values in knobs.items()]
    texts += [name for name in ("alpha", "steps") if name in space and name not in knobs]
    varying = ", ".join(name for name, knob in space.items() if knob.low < knob.high)
    if not texts:
        raise ValueError(f"the method has neither alpha nor steps: name what to search, of {varying}")
    candidates = Candidates.read(texts, space, eps=ball.eps, max_steps=_MOST_STEPS)
    cheapest(method, candidates)  # raises
    if len(candidates.around(method, cheapest(method, candidates))) < 2:
        raise ValueError(f"there is one candidate only: give several values, a:b or a..b, of {varying}")
    return candidates


def cheapest(method: Method, candidates: Candidates) -> Control:
    """The candidate with the smallest value of every knob that is searched; the others at their defaults.

    Raises:
        ValueError: a knob that is not searched has no default.

    >>> from controlat.methods import build
    >>> cheapest(build("trades"), Candidates({"alpha": (0.1, 0.2), "steps": range(1, 4)}))
    Control(alpha=0.1, beta=6, steps=1)
    """
    space = method.controls
    least = {name: float(values[0]) for name, values in candidates.within(space).items()}
    for name, knob in space.items():
        if name not in least and knob.default is None:
            raise ValueError(f"{name} has no default: give a value, {name}=a, or several, {name}=a:b")
    return space.check(least)


def most_expensive(method: Method, candidates: Candidates) -> Control:
    """The candidate with the most gradient evaluations."""
    every = candidates.around(method, cheapest(method, candidates))
    return max(every, key=method.controls.cost)


def at_least(value: object, name: str, low: float) -> float:
    """A number that is at least `low`.

    Raises:
        ValueError: it is none, or below.
    """
    result = number(value, name)
    if result < low:
        raise ValueError(f"{name} must be >= {low:g}, got {result:g}")
    return result
