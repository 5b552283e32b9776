"""What the two tables of Amata share: rows that are worked on within so many minutes, and go on anywhere.

A row is one strategy under one seed, in a directory of its own below --work. What is finished is kept; a row
in progress goes on from its checkpoint, on this machine or on another that the directory was copied to.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from controlat import NonFiniteError, report
from controlat._util.files import read_json, write_json, write_text
from controlat.app.experiment import pick_device
from controlat.app.runs import environment
from controlat.robust_accuracy import wilson

MACHINES, FAILED, LOCK = "machines.json", "failed.json", ".lock"
SAME = ("hardware", "torch", "threads", "controlat")  # what tells one machine from another


class OutOfTime(KeyboardInterrupt):
    """The minutes are over; ends the work as Ctrl-C does, with its checkpoints in place."""


@contextlib.contextmanager
def deadline(minutes: float | None) -> Iterator[None]:
    """Raise OutOfTime inside the block once so many minutes have passed; never without a number."""

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    if minutes is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Row(Protocol):
    """One strategy under one seed.

    Attributes:
        name: the strategy.
        seed: the seed.
        directory: where the row is worked on.
    """

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def directory(self) -> Path: ...

    def finished(self) -> bool:
        """Whether all of its results are there."""

    def work(self) -> None:
        """Go on from what is there to the end."""

    def state(self) -> str:
        """How far an unfinished row is, in words; empty where it was not begun."""


class Outcome(NamedTuple):
    """Where a table stands.

    Args:
        finished: rows whose results are there.
        unfinished: for each other row its name, seed and state.
    """

    finished: list[Row]
    unfinished: list[dict[str, Any]]


def outcome(rows: Sequence[Row]) -> Outcome:
    """What is finished now, and how far the others are."""
    finished = [row for row in rows if row.finished()]
    left = [
        {"name": row.name, "seed": row.seed, "state": failure(row) or row.state() or "not begun"}
        for row in rows
        if row not in finished
    ]
    return Outcome(finished, left)


def finished(stands: Outcome) -> int:
    """The exit status of a script: 0 where every row is finished, 3 where the same command goes on."""
    return 3 if stands.unfinished else 0


def failure(row: Row) -> str | None:
    """Why the row has no result; None where it may still get one."""
    path = row.directory / FAILED
    return str(read_json(path)["error"]) if path.exists() else None


def fill(
    rows: Sequence[Row], minutes: float | None, device: str, write: Callable[[Outcome], None]
) -> Outcome:
    """Work on rows in turn until all are finished or the minutes are over; write the table after each.

    A row that diverges is named in the table, and not tried again until its failed.json is deleted. Rows that
    another process works on are left to it: several may share --work.
    """
    with contextlib.suppress(OutOfTime), deadline(minutes):
        for i, row in enumerate(rows, start=1):
            if row.finished() or failure(row):
                continue
            with _held(row.directory) as ours:
                if not ours:
                    continue
                print(f"[{i}/{len(rows)}] {row.name}, seed {row.seed}", file=sys.stderr, flush=True)
                _sign(row.directory, device)
                try:
                    row.work()
                except NonFiniteError as error:
                    write_json(row.directory / FAILED, {"error": str(error)})
            write(outcome(rows))
    stands = outcome(rows)
    write(stands)
    return stands


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Hold a row inside the block; yields whether it is ours, and not another process's."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _sign(directory: Path, device: str) -> None:
    """Note that this machine works on a row: seconds of different machines do not compare."""
    here, known = environment(pick_device(device)), machines(directory)
    if all(any(here[k] != there[k] for k in SAME) for there in known):
        write_json(directory / MACHINES, {"machines": [*known, here]})


def machines(directory: Path) -> list[dict[str, Any]]:
    """The machines that worked on a row, in turn."""
    path = directory / MACHINES
    return list(read_json(path)["machines"]) if path.exists() else []


def hardware(rows: Sequence[Row]) -> list[str]:
    """The names of the machines that worked on any of the rows, each once."""
    return list(dict.fromkeys(str(m["hardware"]) for row in rows for m in machines(row.directory)))


# ----------------------------------------------------------------------------------------------- figures


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values by seed, their mean, and its standard error, which one seed does not have."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "standard_error": None if deviation is None else deviation / len(values) ** 0.5,
        "per_seed": list(values),
    }


def accuracy(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies by seed, and Wilson's interval of their mean for ONE set of points: the seeds share them."""
    share, points = spread([a["value"] for a in per_seed]), per_seed[0]["points"]
    return share | {"points": points, "interval": list(wilson(round(share["mean"] * points), points))}


def percent(share: Mapping[str, Any] | None) -> str:
    """mean [low, high] ± standard error over seeds, in %; empty without a value."""
    if share is None:
        return ""
    low, high = share["interval"]
    text = f"{100 * share['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    error = share["standard_error"]
    return text if error is None else f"{text} ±{100 * error:.1f}"


def pending(unfinished: Sequence[Mapping[str, Any]]) -> str:
    """The rows that have no result yet, and how far they are; empty if there are none."""
    if not unfinished:
        return ""
    cells = [[u["name"], str(u["seed"]), u["state"]] for u in unfinished]
    return report.table(["not finished", "seed", "state"], cells)


def written(folder: Path, table: Mapping[str, Any], text: str) -> None:
    """table.json and table.md."""
    write_json(folder / "table.json", dict(table))
    write_text(folder / "table.md", text)


# ------------------------------------------------------------------------------------------ command line


def minutes(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def parser(description: str | None, scales: Sequence[str], scale: str, name: str) -> argparse.ArgumentParser:
    """The options that both tables have."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--data-dir", help="folder of the data files")
    made.add_argument("--scale", choices=scales, default=scale, help=f"how large; {scale} by default")
    made.add_argument("--seeds", type=int, nargs="+", help="other seeds than those of the scale")
    made.add_argument("--minutes", type=minutes, help="stop after so long; the same command goes on")
    made.add_argument("--work", type=Path, help=f"rows; {name}-SCALE by default. Copy it to go on elsewhere")
    made.add_argument("--out", type=Path, help=f"results; analysis/{name.replace('-', '_')}/SCALE by default")
    made.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    made.add_argument("--threads", type=int, help="CPU threads")
    return made
