"""Tasks in processes of their own: results in the order of the tasks, whatever the order in which they end.

Why not `concurrent.futures.ProcessPoolExecutor`: started by spawn, its workers run the user's main script
again, which only scripts with a guard survive; when one worker dies every task under way fails, and it is not
known which one was at fault; what runs cannot be stopped; and its workers outlive a parent that is killed.
So each worker is a Python of its own at the end of a pipe, with one task at a time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from controlat._util.child import Child
from controlat._util.progress import progress_bar, send_to
from controlat._util.tasks import Lines, Task, Work, WorkerDied, perform, pickled

__all__ = ["InProcess", "Pool", "Task", "WorkerDied"]

_PULSE = 5.0  # seconds between looks at processes that ended while a child of theirs holds their pipe


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
        work = Work(tasks, done)
        bar_format = f"{{n_fmt}}/{{total_fmt}} {self.unit}, {{elapsed}}{{postfix}}"
        try:
            with progress_bar(len(tasks), "", self.show, bar_format=bar_format) as bar:
                while self._hand_out(work):
                    self._listen(work)
                    work.display(bar)
        except BaseException:  # Ctrl-C, too: what is under way is of no use any more
            self.close()
            raise
        return work.outcome()

    def _hand_out(self, work: Work) -> bool:
        """Give waiting tasks to workers that are free; whether any worker is busy."""
        for place, worker in enumerate(self._places):
            if worker is not None and worker.task is not None and worker.task >= work.end:
                self._end(worker)  # an earlier task has failed
            free = (worker := self._places[place]) is None or worker.task is None
            if free and (number := work.next()) is not None:
                self._ready(place).give(number, pickled(work.tasks[number]))
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

    def _listen(self, work: Work) -> None:
        """Wait for messages of the workers, and take them in."""
        busy = [w for w in self._places if w is not None and w.task is not None]
        ready = wait([w.child.pipe for w in busy], timeout=_PULSE)
        for worker in busy:
            if worker.child.pipe not in ready and not worker.child.ended:
                continue
            assert worker.task is not None
            if (message := worker.answer()) is None:
                code = self._end(worker)
                cure = "; where memory is short, give fewer jobs" * (code == -signal.SIGKILL)
                work.died(worker.task, f"its process {_end_of(code)}", cure)
            elif work.take(worker.task, *message):
                worker.task = None

    def _end(self, worker: _Worker) -> int:
        self._places[self._places.index(worker)] = None
        return worker.child.end()


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


def _end_of(code: int) -> str:
    """How a process ended, by its exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


# -------------------------------------------------------------------------------------------------- a worker


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
    sys.stdout, sys.stderr = Lines("stdout", send), Lines("stderr", send)
    send_to(lambda state: send("state", state))
    while True:
        perform(tasks.get(), send)


def _receive(pipe: Connection, tasks: queue.SimpleQueue[bytes]) -> None:
    """Take in tasks; where the parent is gone, whatever became of it, end at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv_bytes())
    os._exit(1)
