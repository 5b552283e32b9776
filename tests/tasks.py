"""What `test_pool` lets workers do. They import this module: it imports nothing that takes time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlat._util.files import write_text
from controlat._util.progress import progress_bar

GUARD = 600.0  # seconds, as in `helpers`


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + GUARD
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process exists, and is no zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def meet(mine: Path, other: Path) -> str:
    """Ends after `other` was written by a task that runs at the same time."""
    mine.touch()
    until(other.exists)
    return mine.name


def after(path: Path, value: Any) -> Any:
    until(path.exists)
    return value


def leave(path: Path, value: Any) -> Any:
    path.touch()
    return value


def fail(path: Path, error: Exception) -> None:
    until(path.exists)
    raise error


def fail_after_the_end_of(path: Path) -> None:
    """Raises when the process whose number is in a file has ended."""
    until(path.exists)
    until(lambda: not alive(int(path.read_text())))
    error = ValueError("the first")
    error.add_note("a note")
    raise error


class TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fail_awkwardly() -> None:
    raise TwoArguments(1, 2)


def hang(path: Path, child: bool = False) -> None:
    """Leave the number of this process, and that of a child of its own, in a file."""
    from controlat._util.limits import limited

    write_text(path, f"{os.getpid()} {limited(os.getpid) if child else ''}")
    threading.Event().wait()


def die(path: Path, times: int, signal_: int = signal.SIGKILL) -> str:
    """Kill this process the first few times."""
    with path.open("a") as file:
        file.write(".")
    if len(path.read_text()) <= times:
        os.kill(os.getpid(), signal_)
    return path.read_text()


def quit_(code: int) -> None:
    os._exit(code)


def alone(path: Path) -> bool:
    """Whether no other task of this folder runs at the same time."""
    path.touch(exist_ok=False)
    time.sleep(0.1)
    path.unlink()
    return True


def talk() -> None:
    print("said", end=" ")
    print("so")
    print("\rbar 1%\rbar 2%\nmourned", file=sys.stderr)


def interrupt() -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def ask_a_child() -> tuple[int, int]:
    from controlat._util.limits import limited

    return limited(abs, -6), limited(os.getppid)


def half(path: Path) -> None:
    with progress_bar(10, " x", True, "half way") as bar:
        bar.update(4)
        time.sleep(0.6)
        bar.update()
        until(path.exists)


def variable(name: str) -> str | None:
    return os.environ.get(name)
