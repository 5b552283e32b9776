"""The settings of `train`, and a finished run as the settings of other jobs read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlat._util.checks import whole
from controlat.app.settings.problem import Problem, from_json
from controlat.app.settings.schedules import default_schedules
from controlat.control.schedules import Schedule
from controlat.records import LogLine, Settings, missing, read_epochs, read_record

__all__ = ["TrainSettings", "finished_run"]


@dataclass
class TrainSettings(Problem):
    """Train one network under one schedule.

    Args:
        schedule: Short text such as amata:min=2,max=10,tau=20/255, or a JSON file. amata from 1 to 10 steps
            with tau = 2 eps if left out.
        seed: Of initial weights, order of samples and random starts.
        checkpoint_minutes: Longest time between two checkpoints within an epoch.
        tensorboard: Write TensorBoard event files too.
    """

    schedule: str | None = None
    seed: int = 0
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            self.schedule = default_schedules(self.eps or 0)[3]
        self.planned  # noqa: B018  (raises)
        self.seed = whole(self.seed, "seed")

    @property
    def planned(self) -> Schedule:
        """The schedule."""
        assert self.schedule is not None
        return self.schedule_of(self.schedule)

    def to_json(self) -> dict[str, Any]:
        """What decides the results; the schedule in full, so that an edited file is noticed."""
        return super().to_json() | {"schedule": self.planned.to_json()}


def finished_run(run: Path) -> dict[str, Any]:
    """The settings of a finished `controlat train`; an error says what the directory is instead."""
    if not (run / "settings.json").exists():
        raise ValueError(f"{run} is not the directory of a controlat train: it has no settings.json")
    stored: dict[str, Any] = read_record(run / "settings.json", Settings)
    if stored.get("command") != "train":
        raise ValueError(f"{run} is not the directory of a controlat train")
    from_json(TrainSettings, stored, str(run / "settings.json"))
    if lost := missing(read_epochs(run / "log.jsonl", LogLine), stored["epochs"]):
        told = f"{stored['epochs'] - len(lost)} of {stored['epochs']} epochs"
        raise ValueError(f"{run} has {told}; finish it with --resume (epoch {lost[0]} is not in log.jsonl)")
    return stored
