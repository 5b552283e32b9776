"""The settings of `train`, and a finished run as the settings of other jobs read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlat._util.checks import whole
from controlat._util.texts import short
from controlat.app.settings.problem import Problem, from_json
from controlat.app.settings.schedules import default_schedules, names_controller
from controlat.control.controller import Controller
from controlat.pmp import controllers
from controlat.records import LogLine, Settings, missing, read_epochs, read_record

__all__ = ["TrainSettings", "finished_run"]


@dataclass
class TrainSettings(Problem):
    """Train one network under one schedule, or under a controller that looks at the state of training.

    Args:
        schedule: Short text such as amata:min=2,max=10,tau=20/255, or a JSON file. amata from 1 to 10 steps
            with tau = 2 eps if left out.
        controller: In place of a schedule, a closed loop such as greedy:gamma=0.04, horizon or
            ratio:threshold=1.1, or your own package.module:factory of (epochs, ball, controls) returning a
            controller (controlat.control.controller); the schedule that it took is saved.
        seed: Of initial weights, order of samples and random starts.
        checkpoint_minutes: Longest time between two checkpoints within an epoch.
        tensorboard: Write TensorBoard event files too.
    """

    schedule: str | None = None
    controller: str | None = None
    seed: int = 0
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controller is not None:
            if self.schedule is not None:
                raise ValueError(
                    f"give schedule or controller, not both: got {short(self.schedule)!r} and "
                    f"{short(self.controller)!r}"
                )
            if not names_controller(self.controller):
                raise ValueError(
                    "controller must read 'package.module:factory', such as 'my_rules:rule', or begin with "
                    f"one of {', '.join(controllers.names())}, got {short(self.controller)!r}; a schedule is "
                    "given as schedule"
                )
        elif self.schedule is None:
            self.schedule = default_schedules(self.eps or 0)[3]
        elif names_controller(self.schedule):
            raise ValueError(f"schedule {short(self.schedule)!r} is a closed loop: give it as controller")
        self.planned  # noqa: B018  (raises)
        self.seed = whole(self.seed, "seed")

    @property
    def text(self) -> str:
        """What was written: the schedule or the controller."""
        return self.schedule or self.controller or ""

    @property
    def planned(self) -> Controller:
        """The schedule, or a new controller."""
        return self.controller_of(self.text)

    def to_json(self) -> dict[str, Any]:
        """What decides the results; the schedule in full, so that an edited file is noticed."""
        plain = super().to_json()
        if self.controller is not None:
            return {name: value for name, value in plain.items() if name != "schedule"}
        return plain | {"schedule": self.schedule_of(self.text).to_json()}


def finished_run(run: Path, named: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a finished `controlat train`; an error says what the directory is instead.

    Args:
        run: the directory.
        named: names that carry their objects, which take the place of equal ones there.
    """
    if not (run / "settings.json").exists():
        raise ValueError(f"{run} is not the directory of a controlat train: it has no settings.json")
    stored: dict[str, Any] = read_record(run / "settings.json", Settings)
    if stored.get("command") != "train":
        raise ValueError(f"{run} is not the directory of a controlat train")
    objects = {name: name for name in named}
    stored = {k: objects.get(v, v) if isinstance(v, str) else v for k, v in stored.items()}
    from_json(TrainSettings, stored, str(run / "settings.json"))
    if lost := missing(read_epochs(run / "log.jsonl", LogLine), stored["epochs"]):
        told = f"{stored['epochs'] - len(lost)} of {stored['epochs']} epochs"
        raise ValueError(f"{run} has {told}; finish it with --resume (epoch {lost[0]} is not in log.jsonl)")
    return stored
