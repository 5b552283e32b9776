"""Tasks for workers of any kind: how they are sent, what is done with them there, and what comes of them.

Tasks and results are pickles. Unpickling runs what it is told to, which is safe here: both ends are processes
of this package, which nobody else sends anything.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

__all__ = ["Lines", "Task", "Work", "WorkerDied", "perform", "pickled"]

_LIVES = 2  # how often a task is begun at most, where its process dies


class WorkerDied(RuntimeError):
    """The process of a task ended without an answer, and so did the next one; the message names the task."""


class RemoteTraceback(Exception):
    """The traceback of an error in a worker, as a text: the `__cause__` of the error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Task(NamedTuple):
    """A piece of work for a worker.

    Args:
        name: what it is, for messages.
        function: a function of a module that workers can import; it is sent by its name.
        arguments: plain data; copied by pickle, as the result is.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


# ------------------------------------------------------------------------------------------------- the parent


def pickled(task: Task) -> bytes:
    """A task as it is sent; made only then, as the data that come with it may be large."""
    return pickle.dumps((task.function, task.arguments))


class Work:
    """Tasks under way: which are waiting, and what has come of the others.

    Args:
        tasks: all of them.
        done: called with the number and the result of each as it ends.

    Raises:
        ValueError: the function of a task is defined in the program itself.
    """

    def __init__(self, tasks: Sequence[Task], done: Callable[[int, Any], object]) -> None:
        for function in (task.function for task in tasks):
            if function.__module__ == "__main__":
                raise ValueError(
                    f"{function.__qualname__} is defined in the program itself, which workers do not import; "
                    "put it in a module"
                )
        self.done = done
        self.tasks, self.waiting = tasks, list(range(len(tasks)))
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.deaths: Counter[int] = Counter()
        self.states: dict[int, str] = {}

    def outcome(self) -> list[Any]:
        """The results of all tasks, where none failed; else the error of the first that did is raised."""
        if self.errors:
            raise self.errors[self.end]
        return [self.results[i] for i in range(len(self.tasks))]

    @property
    def end(self) -> int:
        """The first task that failed; those from there on are no longer wanted."""
        return min(self.errors, default=len(self.tasks))

    def next(self) -> int | None:
        """The first task that waits and is still wanted, which waits no longer; None where there is none."""
        return self.waiting.pop(0) if self.waiting and self.waiting[0] < self.end else None

    def take(self, number: int, kind: str, *content: Any) -> bool:
        """Take in a message from a task; whether it was the last one."""
        if kind == "line":
            stream, text = content
            tqdm.write(text, file=getattr(sys, stream))
        elif kind == "state":
            (self.states[number],) = content
        elif kind == "result":
            (self.results[number],) = content
            self.done(number, self.results[number])
        else:
            self._fail(number, _error(*content))
        return kind in ("result", "error")

    def died(self, number: int, how: str, cure: str = "") -> None:
        """Begin a task once more whose process died, or give it up.

        Args:
            number: of the task.
            how: it died, for messages: "its process was killed".
            cure: what to do about it where it dies again.
        """
        self.states.pop(number, None)
        self.deaths[number] += 1
        if self.deaths[number] < _LIVES:
            told = f"controlat: warning: {self._named(number)}: {how}; begun once more"
            tqdm.write(told, sys.stderr)
            bisect.insort(self.waiting, number)
            return
        self._fail(number, WorkerDied(f"{self._named(number)}: {how}, {_LIVES} times{cure}"))

    def _fail(self, number: int, error: BaseException) -> None:
        self.errors[number] = error
        before = [i for i in range(number) if i not in self.results | self.errors]
        if before and number == self.end:
            told = f"failed ({error}); waiting for the {len(before)} before it"
            tqdm.write(f"controlat: {self._named(number)} {told}", sys.stderr)

    def _named(self, number: int) -> str:
        return self.tasks[number].name

    def display(self, bar: Any) -> None:
        """Show how many tasks are done, and where the others are."""
        at = {i: text for i, text in sorted(self.states.items()) if i not in self.results | self.errors}
        told = (f"{i + 1} {text.removeprefix(self._named(i)).strip()}" for i, text in at.items())
        bar.update(len(self.results) - bar.n)
        bar.set_postfix_str("; ".join(told))


def _error(sent: bytes | None, told: str, text: str) -> BaseException:
    """The error of a worker, caused by its traceback; a RuntimeError of its text where it cannot be sent."""
    error: BaseException = RuntimeError(told)
    if sent is not None:
        with contextlib.suppress(Exception):  # its class is the worker's only, or takes other arguments
            error = pickle.loads(sent)
    error.__cause__ = RemoteTraceback(text)
    return error


# -------------------------------------------------------------------------------------------------- a worker


class Lines(io.TextIOBase):
    """A standard stream of a worker: what is printed goes to the parent, line by line."""

    def __init__(self, stream: str, send: Callable[..., None]) -> None:
        self.stream, self.send, self.rest = stream, send, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (self.rest + text).split("\n")
        self.rest = _overwritten(rest)
        for line in lines:
            self.send("line", self.stream, _overwritten(line.rstrip("\r")))
        return len(text)


def _overwritten(line: str) -> str:
    """What a terminal shows of a line in which a bar has been drawn again and again."""
    return line.rpartition("\r")[2]


def perform(task: bytes, send: Callable[..., None]) -> None:
    """Compute a task, and send its result or its error."""
    try:
        function, arguments = pickle.loads(task)
        send("result", function(*arguments))
    except BaseException as error:
        try:
            sent = pickle.dumps(error)
        except Exception:
            sent = None
        send("error", sent, f"{type(error).__name__}: {error}", traceback.format_exc())
