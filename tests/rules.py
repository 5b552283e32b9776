"""Closed loops for tests: the control of a step follows what was seen in the step before."""

import os
import signal
from dataclasses import dataclass, field
from typing import Any

from systems import Case, sample

from controlat.control.controller import Moment
from controlat.control.space import Control, ControlSpace
from controlat.dynamics.driver import Step


@dataclass
class Follow:
    """The step size of any method grows with the last loss, and a step is added where the loss fell.

    No two step sizes are the same, and no one step size is that of a piece of a schedule by chance.
    """

    case: Case
    asked: list[Moment] = field(default_factory=list)

    def control(self, now: Moment, z: Any) -> Control:
        self.asked.append(now)
        loss, fell = z.controller_memory.get("seen", [1.0, False])
        more = {"steps": 2 + fell} if "steps" in self.case.method().controls else {}
        return self.case.control(alpha=0.007 + 0.0011 * now.t + 0.0003 * loss, **more)

    def observe(self, step: Step, z: Any) -> None:
        before = z.controller_memory.get("seen", [1.0, False])[0]
        z.controller_memory["seen"] = [step.loss, step.loss < before]


@dataclass
class Anything:
    """What `Follow` needs of a case, of any method by its controls."""

    controls: ControlSpace

    def method(self) -> Any:
        return self

    def control(self, **knobs: float) -> Control:
        return sample(self, **knobs)  # type: ignore[arg-type]


@dataclass
class Rising:
    """K of PGD rises by one, up to 3, after every two steps whose loss was below a bound."""

    bound: float = 2.3
    most_expensive: Any = field(default_factory=lambda: {"alpha": 0.05, "steps": 3})

    def control(self, now: Moment, z: Any) -> dict[str, float]:
        if os.environ.get("KILL") == f"{now.epoch} {now.batch}":
            os.kill(os.getpid(), signal.SIGKILL)
        z.meter.forwards += 1
        return {"alpha": 0.05, "steps": min(3, z.controller_memory.get("below", 0) // 2)}

    def observe(self, step: Step, z: Any) -> None:
        z.controller_memory["below"] = z.controller_memory.get("below", 0) + (step.loss < self.bound)


def rising(controls: ControlSpace, epochs: int) -> Rising:
    assert {"alpha", "steps"} <= set(controls)
    assert epochs > 0
    return Rising()


def following(controls: ControlSpace) -> Follow:
    return Follow(Anything(controls))  # type: ignore[arg-type]


def unbounded() -> Rising:
    return Rising(most_expensive=None)


def nothing() -> None:
    return None
