"""What `test_runs` lets processes do to one run directory: be killed at every line, and start together."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from controlat.app.runs import claimed

SETTINGS = {"command": "train", "lr": 0.1}
SOURCES = ("runs.py", "files.py")


def traced(at_line: Callable[[int], object]) -> None:
    """Call a function with the number of every line of `SOURCES` that this process comes to."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if Path(frame.f_code.co_filename).name not in SOURCES:
            return None
        if event == "line":
            at_line(count)
            count += 1
        return trace

    sys.settrace(trace)


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def begin(folder: Path) -> None:
    """Start a run, which writes its schedule and then finds that there is no data."""
    with claimed(folder, SETTINGS):
        (folder / "schedule.json").write_text("{}")
        raise RuntimeError("no data")


def killed(folder: Path) -> dict[str, Any]:
    """Kill a start at its first line, its second, ..., each in a new directory; then start there again."""
    kills, refused, left = 0, [], []
    for number in range(10_000):
        out = folder / str(number)

        def at_line(n: int, number: int = number) -> None:
            if n == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(out: Path = out, at_line: Callable[[int], object] = at_line) -> None:
            traced(at_line)
            begin(out)

        _, status = os.waitpid(in_child(work), 0)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        try:
            with claimed(out, SETTINGS):
                names = {p.name for p in out.iterdir()} - {"schedule.json"}
                if names != {".lock", "settings.json"}:
                    left.append(f"line {number}: {sorted(names)}")
        except ValueError as error:
            refused.append(f"line {number}: {error}")
    return {"kills": kills, "refused": refused, "left": left}


def raced(folder: Path, races: int = 10, starts: int = 3) -> list[list[str]]:
    """What starts at the same time in one new directory come to, with pauses between their lines."""
    found = []
    for race in range(races):
        out, go = folder / f"race{race}", time.monotonic() + 0.02
        told = [folder / f"told{race}-{i}" for i in range(starts)]

        def work(i: int, out: Path = out, go: float = go, told: list[Path] = told, race: int = race) -> None:
            draw = random.Random(race * starts + i)
            time.sleep(max(0.0, go - time.monotonic()))
            traced(lambda _: time.sleep(draw.choice((0, 0, 1e-4, 1e-3))))
            try:
                with claimed(out, SETTINGS) as known:
                    sys.settrace(None)
                    (out / "schedule.json").touch()
                    told[i].write_text(f"held, known: {known}")
                    while not all(t.exists() for t in told):
                        time.sleep(0.001)
            except ValueError as error:
                sys.settrace(None)
                told[i].write_text(str(error))

        pids = [in_child(lambda i=i: work(i)) for i in range(starts)]  # type: ignore[misc]
        for pid in pids:
            os.waitpid(pid, 0)
        found.append([t.read_text() for t in told])
    return found


if __name__ == "__main__":
    os.fsync = lambda handle: None  # a kill loses nothing that was written; the disk is slow
    where = Path(sys.argv[1])
    answer: dict[str, Any] = {
        "killed": killed(where / "killed"),
        "races": raced(where),
    }
    json.dump(answer, sys.stdout)
