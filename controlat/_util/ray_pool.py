"""Tasks on Ray (Moritz et al., 2018): results as from processes of this machine, from a whole cluster.

Whoever may use a cluster can run code in its workers, and so in what they send back: Ray is for networks of
people who trust each other.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from controlat._util.child import import_path
from controlat._util.cores import available_cores
from controlat._util.tasks import Lines, Task, Work, perform, pickled

__all__ = ["RayPool"]

_ANSWER = 30.0  # seconds that a cluster has to answer
# While a Ray is started: it sends no statistics, and no note on GPUs of tasks that have none.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayPool:
    """Workers of Ray, which take one task at a time on a core each, in the place of a `Pool`.

    A Ray that is started here ends with the `with` block; one that the program or a cluster had before stays.

    Args:
        workers: tasks that are under way at a time; if left out, as many as Ray has cores for.
        address: host:port of a cluster, or auto for that of this machine; None starts a Ray of its own,
            unless the program is connected to one.
        gpu_share: part of a GPU that each task has, where there are GPUs.

    Raises:
        ModuleNotFoundError: Ray is not installed; the message says how.
    """

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, gpu_share: float = 0.0
    ) -> None:
        try:
            # Not by `import`: type checkers would read all of Ray.
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the engine ray needs Ray: pip install 'controlat[ray]', or take processes"
            ) from error
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        self.workers, self.address, self.gpu_share = workers, address, gpu_share
        self._ours = False

    def __enter__(self) -> RayPool:
        if not self._ray.is_initialized():
            self._connect()
            self._ours = True
        elif self.address is not None:
            raise ValueError(
                f"this program is connected to a Ray already; leave out address {self.address!r}"
            )
        share = self.gpu_share if self._ray.cluster_resources().get("GPU", 0) else 0
        # No process of its own for every task that has a GPU (max_calls); a task that dies is begun again
        # by `Work`, which says so.
        options = self._ray.remote(num_cpus=1, num_gpus=share, max_retries=0, max_calls=0)
        self._begin = options(_beginning(import_path(), os.getcwd()))
        return self

    def _connect(self) -> None:
        """Start a Ray, or connect to the cluster.

        Raises:
            ValueError: there is no cluster at the address.
        """
        if ":" in (self.address or ""):
            self._knock()
        cores = {} if self.address else {"num_cpus": self.workers or available_cores()}
        with _environment(_QUIET), _signals_kept():
            try:
                self._ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    logging_level="ERROR",
                    log_to_driver=False,
                    **cores,
                )
            except (ConnectionError, ValueError) as error:
                if self.address is None:
                    raise
                raise self._no_cluster(error) from error

    def _knock(self) -> None:
        """Refuse an address where nobody listens: Ray would go on trying for minutes."""
        host, _, port = str(self.address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
        except (OSError, ValueError, OverflowError) as error:
            raise self._no_cluster(error) from error

    def _no_cluster(self, error: Exception) -> ValueError:
        return ValueError(
            f"no Ray cluster answers at address {self.address!r} ({error}); give the host:port that "
            "`ray start --head` names, or auto on a machine of the cluster. One that asks for a token needs "
            "RAY_AUTH_MODE=token in the environment"
        )

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def map(
        self, tasks: Sequence[Task], done: Callable[[int, Any], object] = lambda i, result: None
    ) -> list[Any]:
        """The results of tasks, in their order, as `Pool.map` gives them: with its retries and its errors.

        What a task prints is printed when it ends.

        Raises:
            WorkerDied: the worker of a task was lost, twice.
            RuntimeError: a worker cannot begin: it has not this package, or another version, say.
        """
        work = Work(tasks, done)
        numbers: dict[Any, int] = {}  # of tasks under way
        try:
            while self._hand_out(work, numbers):
                (ended, *_), _ = self._ray.wait(list(numbers))
                self._take(work, numbers.pop(ended), ended)
        finally:  # Ctrl-C, too: what is under way is of no use any more
            self._cancel(numbers)
        return work.outcome()

    def _hand_out(self, work: Work, numbers: dict[Any, int]) -> bool:
        """Give waiting tasks to Ray, as many as may be under way; whether any is."""
        late = [task for task, number in numbers.items() if number >= work.end]  # an earlier one has failed
        self._cancel(late)
        for task in late:
            del numbers[task]
        # No more than there are cores: what waits in Ray holds its data there.
        cores = self._ray.cluster_resources().get("CPU", 1)
        while len(numbers) < (self.workers or cores):
            if (number := work.next()) is None:
                break
            numbers[self._begin.remote(pickled(work.tasks[number]))] = number
        return bool(numbers)

    def _take(self, work: Work, number: int, ended: Any) -> None:
        """Take in what has come of a task."""
        errors = self._ray.exceptions
        try:
            messages = self._ray.get(ended)
        except errors.RayTaskError as error:  # those of the task itself are among its messages
            raise RuntimeError(f"a worker of Ray cannot begin {work.tasks[number].name}: {error}") from error
        except errors.RayError as error:
            how = str(error).strip().partition("\n")[0].rstrip(".")
            work.died(number, f"its worker was lost ({how})", "; where memory is short, give fewer jobs")
            return
        for message in messages:
            work.take(number, *pickle.loads(message))

    def _cancel(self, tasks: Sequence[Any] | dict[Any, int]) -> None:
        """End tasks, whatever they are doing."""
        for task in tasks:
            self._ray.cancel(task, force=True)


def _beginning(path: Sequence[str], folder: str) -> Callable[[bytes], list[bytes]]:
    """What a worker does with a task: it imports from where this process does, and works in its folder."""

    def begin(task: bytes) -> list[bytes]:
        """Its messages; this function is sent as code, so that it can find this package."""
        import contextlib
        import os
        import sys

        sys.path[:0] = [entry for entry in path if entry not in sys.path]
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        from controlat._util.ray_pool import messages_of

        return messages_of(task)

    return begin


def messages_of(task: bytes) -> list[bytes]:
    """Compute a task, in a worker: all that it prints, and its result or its error."""
    messages: list[bytes] = []

    def send(*message: Any) -> None:
        messages.append(pickle.dumps(message))

    with contextlib.redirect_stdout(Lines("stdout", send)), contextlib.redirect_stderr(Lines("stderr", send)):
        perform(task, send)
    return messages


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables inside the block only."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM does after the block what it did before; Ray would take it over."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
