"""Symbolic work that ends: a function runs in a child process, under a limit of time and of memory.

sympy can take forever, or all memory, on a harmless-looking question, and nothing inside one process can stop
it. So one child process answers question after question, and is killed when the time is over; the next
question starts another. It is neither forked (threads of torch would be copied in the middle of something)
nor spawned by multiprocessing (that runs the user's main script again).

What is computed in this process ends, too: `within` sets a deadline, and `check`, which every evaluation of a
landscape calls, raises once it has passed.

Questions and answers are pickles. Unpickling runs what it is told to, which is safe here: both ends are
processes of this module, and nobody else holds the socket between them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["LATE", "SECONDS", "NotFound", "TimeLimit", "check", "close", "limited", "unhurried", "within"]

SECONDS = 60.0  # of a derivation in all
LATE = "the time limit was over"
_START = 120.0  # seconds for the child to import sympy, on a busy machine with a cold disk
_MEMORY = 4 << 30  # bytes of address space of the child
# SIGINT first: a Ctrl-C during the imports is the parent's to handle, too.
_CODE = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import {__name__} as m; m.serve()"

Result = TypeVar("Result")


class TimeLimit(Exception):
    """The time was over before the answer came."""


class NotFound(Exception):
    """There is no answer: the question raised an error, or ran out of memory, or its process was killed."""


_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # of `time.monotonic`


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """End what is done inside, questions to the child included, by TimeLimit when the time is over.

    >>> with within(60):
    ...     check()
    """
    token = _deadline.set(min(_deadline.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Suspend the deadline of `within`."""
    token = _deadline.set(math.inf)
    try:
        yield
    finally:
        _deadline.reset(token)


def check() -> None:
    """Raise TimeLimit if the deadline has passed."""
    if time.monotonic() > _deadline.get():
        raise TimeLimit(LATE)


def limited(function: Callable[..., Result], *args: object, seconds: float = SECONDS) -> Result:
    """function(*args), computed in the child process.

    Args:
        function: a function of a module; it is sent by its name.
        args: its arguments; they and the result are copied by pickle.
        seconds: the time limit; the deadline of `within`, where it comes earlier.

    Returns:
        What the function returns.

    Raises:
        ValueError: seconds is not a positive number.
        TimeLimit: the time is over; the work has ended.
        NotFound: the function raised an exception (its text is the message), or its process was killed.

    >>> limited(math.gcd, 12, 18)
    6
    """
    if not (0 < seconds < math.inf):
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    check()
    seconds = min(seconds, max(_deadline.get() - time.monotonic(), 1e-3))
    question = pickle.dumps((function, args, seconds))
    with _lock:
        status, result = _ask(question, f"{function.__module__}.{function.__qualname__}", seconds)
    if status != "answer":
        raise NotFound(result)
    return result  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- the parent


class _Child:
    """The child process, ready for questions once constructed."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            # -P: the folder that the user is in is no place to import from, unless the parent does, too.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a function prints goes to stderr
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        try:
            self.receive(min(time.monotonic() + _START, _deadline.get()))
        except BaseException:
            self.kill()
            raise

    def receive(self, deadline: float) -> Any:
        """Read a message; TimeoutError at the deadline, EOFError or OSError when the child is gone."""
        if not self.pipe.poll(max(0.0, min(deadline - time.monotonic(), 1e6))):
            raise TimeoutError
        return self.pipe.recv()

    def kill(self) -> None:
        """End the process and leave nothing open."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def _environment() -> dict[str, str]:
    """The child imports from where the parent does; its sets have one order, and so sympy one answer."""
    root = str(Path(__file__).resolve().parents[2])
    # An empty entry is the folder that the parent was in when it imported this, and found root there.
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    if root not in map(os.path.realpath, path):
        path.insert(0, root)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"}


_lock = threading.Lock()
_child: _Child | None = None


def _ask(question: bytes, name: str, seconds: float) -> tuple[str, Any]:
    """Put one question to the child, a new one if need be. The lock is held."""
    global _child
    try:
        if _child is None or _child.process.poll() is not None:
            _end()
            _child = _Child()
        deadline = min(time.monotonic() + seconds, _deadline.get())
        _child.pipe.send_bytes(question)
        status, result = _child.receive(deadline)
    except BaseException as error:  # Ctrl-C, too: an answer left in the pipe would be taken for the next one
        _end()
        if isinstance(error, TimeoutError):
            raise TimeLimit(f"{name} took longer than {seconds:g} seconds") from None
        if isinstance(error, Exception):
            kind = f" ({type(error).__name__}: {error})" if str(error) else ""
            raise NotFound(f"the process that computes {name} ended without an answer{kind}") from error
        raise
    if status == "exhausted":
        _end()  # its memory is full: the next question starts afresh
    return status, result


def _end() -> None:
    """Kill the child, if there is one. The lock is held."""
    global _child
    if _child is not None:
        gone, _child = _child, None
        gone.kill()


def close() -> None:
    """End the child process; the next question starts another."""
    with _lock:
        _end()


def _after_fork() -> None:
    """A fork of the parent has no child: it leaves the pipe to the parent, and the lock as it finds it."""
    global _child, _lock
    _lock = threading.Lock()
    if _child is not None:
        _child.process.poll()  # "not mine": or its destructor would warn that it still runs
        _child.pipe.close()
        _child = None


atexit.register(close)
os.register_at_fork(after_in_child=_after_fork)


# -------------------------------------------------------------------------------------------------- the child


def serve() -> None:
    """What the child does: answer questions until the parent closes the pipe."""
    pipe = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    importlib.import_module("sympy")  # before the first question, whose time is counted
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))
            signal.alarm(0)


def _answer(question: bytes) -> bytes:
    """What comes of one question, pickled: ("answer", result), or ("error" or "exhausted", a text)."""
    try:
        function, args, seconds = pickle.loads(question)
        # Should the parent be killed, nobody would end this process while it computes.
        signal.alarm(math.ceil(min(seconds, 1e6)) + 2)
        return pickle.dumps(("answer", function(*args)))
    except Exception as error:
        status = "exhausted" if isinstance(error, MemoryError) else "error"
        return pickle.dumps((status, f"{type(error).__name__}: {error}".removesuffix(": ")))


def _limit_memory() -> None:
    """At most 4 GiB of address space, where the system can limit it."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
