"""A controller of your own: one more step of PGD whenever the training loss of the last batches is low.

Run it as it is: python examples/own_controller.py (half a minute at most, on the bundled digits). The
commands take it by its name from this folder, as they take any factory that can be imported:

    controlat train --out run --controller own_controller:rule
    controlat evaluate --out results --schedules own_controller:rule amata:min=1,max=10,tau=0.3
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import controlat
from controlat.control.controller import Moment
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, Step


@dataclass(frozen=True)
class Rule:
    """K grows by one, up to `most`, when the mean loss of the last `window` batches is below `bound`.

    What the rule remembers is a part of the state z: the driver carries it, checkpoints store it.
    """

    alpha: float
    most: int = 6
    bound: float = 0.8
    window: int = 5

    @property
    def most_expensive(self) -> Control:
        """An upper bound, with which `--dry-run` and progress can reckon. It may be left out."""
        return Control(alpha=self.alpha, steps=self.most)

    def control(self, now: Moment, z: Driver) -> Control:
        """u of the step at time t = now.t, in epochs, at the state z."""
        return Control(alpha=self.alpha, steps=z.controller_memory.get("steps", 0))

    def observe(self, step: Step, z: Driver) -> None:
        """Called after every step. It may be left out."""
        memory: dict[str, Any] = z.controller_memory
        losses = [*memory.get("losses", []), step.loss][-self.window :]
        if len(losses) == self.window and sum(losses) / self.window < self.bound:
            memory["steps"] = min(self.most, memory.get("steps", 0) + 1)
            losses = []  # the next window is of the new K alone
        memory["losses"] = losses


def rule(ball: controlat.Ball) -> Rule:
    """The factory: it is offered epochs, ball and controls (the admissible set), and takes what it needs."""
    return Rule(alpha=ball.eps / 2)


if __name__ == "__main__":
    few: dict[str, Any] = {"epochs": 12, "threads": 1, "progress": False}
    with tempfile.TemporaryDirectory() as out:
        run = controlat.train(f"{out}/run", controller="__main__:rule", **few)
        taken = controlat.load_schedule(Path(out) / "run" / "schedule.json")
        again = controlat.train(f"{out}/again", schedule=f"{out}/run/schedule.json", **few)
    for e in run["epochs"]:
        steps = ", ".join(f"{u['steps']} from batch {batch} on" for batch, u in e["controls"])
        print(f"epoch {e['epoch']}: K = {steps}; loss={e['loss']:.3f}, robust (PGD-10) {e['robust']:.1%}")
    print(f"schedule.json has {taken.pieces} pieces; the same losses under it:", end=" ")
    print([e["loss"] for e in again["epochs"]] == [e["loss"] for e in run["epochs"]])
