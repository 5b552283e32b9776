"""What a job says before it trains: what a schedule never comes to, and step sizes far above the ball."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tqdm import tqdm

from controlat._util.texts import short
from controlat.app.settings import Problem
from controlat.attacks.balls import Ball
from controlat.control.schedules import Schedule
from controlat.robust_accuracy.attack import read_attacks

__all__ = ["alphas", "note", "note_step_size", "note_unreached", "step_sizes"]


def note(text: str) -> None:
    """Print a note beside the progress bars."""
    tqdm.write(f"controlat: note: {text}", file=sys.stderr)


def note_unreached(chosen: Problem, schedules: Mapping[str, Schedule]) -> None:
    """Say where a schedule was made for another number of epochs, and what training never comes to."""
    epochs, told = chosen.epochs, []
    for text, schedule in ((short(text), schedule) for text, schedule in schedules.items()):
        if schedule.epochs != epochs:
            what = (
                "only its beginning is used" if schedule.epochs > epochs else "then it holds its last value"
            )
            told.append(f"{text} was made for {schedule.epochs:g} epochs, training has {epochs}: {what}")
        for at, knobs in _by_value(schedule.unreached()).items():
            reach, times = "reach" if len(knobs) > 1 else "reaches", ", ".join(f"{t:g}" for t in at)
            pieces = f"it has {schedule.epochs:g} epochs, in pieces of {schedule.resolution:g}"
            told.append(
                f"{text}: {', '.join(knobs)} never {reach} the value of epoch {short(times)}; {pieces}"
            )
    if late := [f"{t:g}" for t in chosen.rate.at if t >= epochs]:
        when = short(", ".join(late))
        told.append(f"lr {chosen.lr}: never changes at epoch {when}, as training has {epochs} epochs")
    for line in told:
        note(line)


def _by_value(times: Mapping[str, tuple[float, ...]]) -> dict[tuple[float, ...], list[str]]:
    names: dict[tuple[float, ...], list[str]] = {}
    for name, value in times.items():
        names.setdefault(value, []).append(name)
    return names


def note_step_size(what: str, alphas: Iterable[float], ball: Ball) -> None:
    """Say where a step size is far above the width of the ball."""
    if told := ball.step_size_warning(max(alphas, default=0.0)):
        note(f"{what}: {told}")


def alphas(schedule: Schedule) -> Iterator[float]:
    """The step sizes that a schedule may take."""
    return (u.get("alpha", 0.0) for u in schedule.controls)


def step_sizes(attacks: Sequence[str]) -> Iterator[float]:
    """The step sizes that attacks name."""
    return (a.alpha for a in read_attacks(attacks) if a.alpha is not None)
