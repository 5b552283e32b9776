"""Tasks in processes of their own: results in the order of the tasks, whatever the order in which they end.

Why not `concurrent.futures.ProcessPoolExecutor`: started by spawn, its workers run the user's main script
again, which only scripts with a guard survive; when one worker dies every task under way fails, and it is not
known which one was at fault; what runs cannot be stopped; and its workers outlive a parent that is killed.
So each worker is a Python of its own at the end of a pipe, with one task at a time.

Tasks and results are pickles. Unpickling runs what it is told to, which is safe here: both ends are processes
of this module, and nobody else holds the socket between them.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from tqdm import tqdm

from controlat._util.child import Child
from controlat._util.progress import progress_bar, send_to

__all__ = ["InProcess", "Pool", "Task", "WorkerDied"]

_PULSE = 5.0  # seconds between looks at processes that ended while a child of theirs holds their pipe
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


class _Worker:
    """A process, and the number of the task that it works on."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.task: int | None = None
        self.child = Child.start(__name__, environment)

    def give(self, number: int, task: bytes) -> None:
        """Let it work on a task."""
        self.task = number
        with contextlib.suppress(OSError):  # it has died: there will be no answer
            self.child.pipe.send_bytes(task)

    def answer(self) -> tuple[Any, ...] | None:
        """Its next message; None where it has died."""
        try:
            if self.child.pipe.poll():
                return pickle.loads(self.child.pipe.recv_bytes())  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return None
        return None


class Pool:
    """Processes that work on tasks, one at a time each; they end with the `with` block, or with this process.

    Args:
        workers: number of processes; they are started as they are needed.
        environments: environment variables beside those of this process, for the workers in turn.
        show: show a bar on a terminal, with what every worker is at. What tasks print is always printed.
        unit: what a task is, in the plural.

    >>> import math
    >>> with Pool(2) as pool:
    ...     pool.map([Task("a", math.gcd, (12, 18)), Task("b", math.factorial, (5,))])
    [6, 120]
    """

    def __init__(
        self,
        workers: int,
        *,
        environments: Sequence[Mapping[str, str]] = ({},),
        show: bool = False,
        unit: str = "tasks",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        self.environments, self.show, self.unit = environments, show, unit
        self._places: list[_Worker | None] = [None] * workers

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        workers = [w for w in self._places if w is not None]
        for w in workers:
            w.child.process.kill()  # all of them first: this may be interrupted
        for w in workers:
            self._end(w)

    def map(
        self, tasks: Sequence[Task], done: Callable[[int, Any], object] = lambda i, result: None
    ) -> list[Any]:
        """The results of tasks, in their order; done(i, result) is called as the i-th of them ends.

        A task whose process dies (killed by the system where memory is short, say) is begun once more. Where
        a task raises an error, tasks after it are stopped, those before it end first, and the error of the
        first one is raised: the same as where they are done one after the other.

        Raises:
            WorkerDied: the process of a task died, twice.
            ValueError: a function cannot be sent to workers.
        """
        for task in tasks:
            _check_function(task)
        work = _Work(tasks, done)
        bar_format = f"{{n_fmt}}/{{total_fmt}} {self.unit}, {{elapsed}}{{postfix}}"
        try:
            with progress_bar(len(tasks), "", self.show, bar_format=bar_format) as bar:
                while self._hand_out(work):
                    self._listen(work)
                    work.display(bar)
        except BaseException:  # Ctrl-C, too: what is under way is of no use any more
            self.close()
            raise
        if work.errors:
            raise work.errors[work.end]
        return [work.results[i] for i in range(len(tasks))]

    def _hand_out(self, work: _Work) -> bool:
        """Give waiting tasks to workers that are free; whether any worker is busy."""
        for place, worker in enumerate(self._places):
            if worker is not None and worker.task is not None and worker.task >= work.end:
                self._end(worker)  # an earlier task has failed
            free = (worker := self._places[place]) is None or worker.task is None
            if free and work.waiting and work.waiting[0] < work.end:
                number = work.waiting.pop(0)
                task = work.tasks[number]  # pickled only now: the data that come with them may be large
                self._ready(place).give(number, pickle.dumps((task.function, task.arguments)))
        return any(w is not None and w.task is not None for w in self._places)

    def _ready(self, place: int) -> _Worker:
        """The worker of a place, which has no task; a new one, if need be."""
        worker = self._places[place]
        if worker is not None and worker.child.ended:
            self._end(worker)
            worker = None
        if worker is None:
            worker = _Worker(self.environments[place % len(self.environments)])
            self._places[place] = worker
        return worker

    def _listen(self, work: _Work) -> None:
        """Wait for messages of the workers, and take them in."""
        busy = [w for w in self._places if w is not None and w.task is not None]
        ready = wait([w.child.pipe for w in busy], timeout=_PULSE)
        for worker in busy:
            if worker.child.pipe not in ready and not worker.child.ended:
                continue
            assert worker.task is not None
            if (message := worker.answer()) is None:
                work.died(worker.task, self._end(worker))
            elif work.take(worker.task, *message):
                worker.task = None

    def _end(self, worker: _Worker) -> int:
        self._places[self._places.index(worker)] = None
        return worker.child.end()


def _check_function(task: Task) -> None:
    if task.function.__module__ == "__main__":
        raise ValueError(
            f"{task.function.__qualname__} is defined in the program itself, which workers do not import; "
            "put it in a module"
        )


class InProcess:
    """In the place of a `Pool`: tasks are done by this process, one after the other, and nothing is sent.

    >>> import math
    >>> with InProcess() as pool:
    ...     pool.map([Task("a", math.gcd, (12, 18)), Task("b", math.factorial, (5,))])
    [6, 120]
    """

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(
        self, tasks: Sequence[Task], done: Callable[[int, Any], object] = lambda i, result: None
    ) -> list[Any]:
        """The results of tasks, in their order; done(i, result) is called as the i-th of them ends."""
        results = []
        for i, task in enumerate(tasks):
            results.append(task.function(*task.arguments))
            done(i, results[-1])
        return results


class _Work:
    """Tasks under way: which are waiting, and what has come of the others."""

    def __init__(self, tasks: Sequence[Task], done: Callable[[int, Any], object]) -> None:
        self.done = done
        self.tasks, self.waiting = tasks, list(range(len(tasks)))
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.deaths: Counter[int] = Counter()
        self.states: dict[int, str] = {}

    @property
    def end(self) -> int:
        """The first task that failed; those from there on are no longer wanted."""
        return min(self.errors, default=len(self.tasks))

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

    def died(self, number: int, code: int) -> None:
        """Begin a task once more whose process died, or give it up."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.states.pop(number, None)
        self.deaths[number] += 1
        if self.deaths[number] < _LIVES:
            told = f"{self._named(number)}: its process {how}; begun once more"
            tqdm.write(f"controlat: warning: {told}", sys.stderr)
            bisect.insort(self.waiting, number)
            return
        cure = "; where memory is short, give fewer jobs" * (code == -signal.SIGKILL)
        self._fail(number, WorkerDied(f"{self._named(number)}: its process {how}, {_LIVES} times{cure}"))

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


class _Lines(io.TextIOBase):
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


def serve(pipe: Connection) -> None:
    """What a worker does: task after task, until the parent closes the pipe."""
    os.set_inheritable(pipe.fileno(), False)  # its own children would keep the pipe open after its end
    lock = threading.Lock()
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def send(*message: Any) -> None:
        content = pickle.dumps(message)
        with lock:
            pipe.send_bytes(content)

    threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
    sys.stdout, sys.stderr = _Lines("stdout", send), _Lines("stderr", send)
    send_to(lambda state: send("state", state))
    while True:
        _perform(tasks.get(), send)


def _receive(pipe: Connection, tasks: queue.SimpleQueue[bytes]) -> None:
    """Take in tasks; where the parent is gone, whatever became of it, end at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv_bytes())
    os._exit(1)


def _perform(task: bytes, send: Callable[..., None]) -> None:
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
