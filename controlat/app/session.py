"""What every job that trains works in: its processes and its directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from controlat._util.parallel import World, joined
from controlat.app.checkpoints import load_checkpoint
from controlat.app.resume import LAST
from controlat.app.runs import SETTINGS, claimed
from controlat.app.settings import Problem
from controlat.records import Settings, read_record

__all__ = ["Session", "begun_threads", "session", "shares_held_out"]

# In settings.json of every run; in those of release 0.1, which have no such line, one slice serves for both.
HELD_OUT = {"held_out_parts": ["validation", "phi"]}


class Session(NamedTuple):
    """The processes of a job, and what is known of its directory.

    Args:
        world: the processes.
        known: whether the directory already was one of these settings.
        shared: whether it was begun when validation and Phi shared all held-out samples, and goes on so.
    """

    world: World
    known: bool
    shared: bool


@contextlib.contextmanager
def session(
    out: Path, settings: Mapping[str, Any], chosen: Problem, run: str | None = None
) -> Iterator[Session]:
    """Hold a directory in all processes.

    Args:
        out: the directory.
        settings: plain data that decides the results.
        chosen: the device.
        run: a finished run that is taken up, where there is one.

    Raises:
        ValueError: the directory holds something else.
    """
    with joined(chosen.device) as world:
        shared = world.once(lambda: shares_held_out(out, *([] if run is None else [run])))
        written = dict(settings) if shared else {**settings, **HELD_OUT}
        with claimed(out, written, world) as known:
            yield Session(world, known, shared)


def shares_held_out(*directories: str | Path) -> bool:
    """Whether the first of some directories that holds a run has one held-out slice for both parts."""
    for path in (Path(directory) / SETTINGS for directory in directories):
        if path.exists():
            return not HELD_OUT.items() <= read_record(path, Settings).items()
    return False


def begun_threads(*directories: str | Path) -> int | None:
    """CPU threads of what was begun in the first of some directories that has a checkpoint; None without one.

    The bits of a run depend on them: it goes on with as many.
    """
    for directory in map(Path, directories):
        for path in (directory / LAST, *sorted(directory.glob(f"runs/*/{LAST}"))):
            if path.exists():
                return int(load_checkpoint(path)["environment"]["threads"])
    return None
