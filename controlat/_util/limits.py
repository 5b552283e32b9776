"""Work that ends: a function runs in a child process, under a limit of time and of memory.

sympy can take forever, or all memory, on a harmless-looking question, and nothing inside one process can stop
it. So one child process answers question after question, and is killed when the time is over; the next
question starts another.

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
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from controlat._util.child import Child

__all__ = ["LATE", "SECONDS", "NotFound", "TimeLimit", "check", "close", "limited", "unhurried", "within"]

SECONDS = 60.0  # of a derivation in all
LATE = "the time limit was over"
_START = 120.0  # seconds for the child to import sympy or the like, on a busy machine with a cold disk
_MEMORY = 4 << 30  # bytes of address space of the child

Result = TypeVar("Result")


class TimeLimit(Exception):
    """The time was over before the answer came."""


class NotFound(Exception):
    """There is no answer: the question raised an error, or ran out of memory, or its process was killed."""


_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # of `time.monotonic`


@contextlib.contextmanager
def _until(deadline: float) -> Iterator[None]:
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def within(seconds: float) -> contextlib.AbstractContextManager[None]:
    """End what is done inside, questions to the child included, by TimeLimit when the time is over.

    >>> with within(60):
    ...     check()
    """
    return _until(min(_deadline.get(), time.monotonic() + seconds))


def unhurried() -> contextlib.AbstractContextManager[None]:
    """Suspend the deadline of `within`."""
    return _until(math.inf)


def check() -> None:
    """Raise TimeLimit if the deadline has passed."""
    if time.monotonic() > _deadline.get():
        raise TimeLimit(LATE)


def limited(function: Callable[..., Result], *args: object, seconds: float = SECONDS) -> Result:
    """function(*args), computed in the child process.

    Args:
        function: a function of a module; it is sent by its name, and the module imported before its time
            begins.
        args: its arguments; they and the result are copied by pickle.
        seconds: the time limit; the deadline of `within`, where it comes earlier.

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
    name = f"{function.__module__}.{function.__qualname__}"
    with _lock:
        try:
            answered, result = _ask(function.__module__, question, seconds)
        except TimeoutError:
            raise TimeLimit(f"{name} took longer than {seconds:g} seconds") from None
        except Exception as error:
            raise NotFound(f"the process that computes {name} ended without an answer ({error})") from error
        if not answered and result.startswith("MemoryError"):
            close()  # its memory is full: the next question starts afresh
    if not answered:
        raise NotFound(result)
    return result  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- the parent


_child: Child | None = None
_lock = threading.RLock()
# A fork waits for the answer. It has no child of its own: to `poll` the one of its parent has ended.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _ask(module: str, question: bytes, seconds: float) -> tuple[bool, Any]:
    """Put one question to the child, a new one if need be: the result, or why there is none.

    The child imports the module of the function first, which is no part of its time.
    """
    global _child
    try:
        if _child is None or _child.ended:
            close()
            # Its sets have one order, and so sympy one answer; what a function prints goes to stderr.
            _child = Child.start(__name__, {"PYTHONHASHSEED": "0"}, stdout=2)
        _child.pipe.send(module)
        _receive(_child, _START)
        _child.pipe.send_bytes(question)
        return _receive(_child, seconds)  # type: ignore[no-any-return]
    except BaseException:  # Ctrl-C, too: an answer left in the pipe would be taken for the next one
        close()
        raise


def _receive(child: Child, seconds: float) -> Any:
    """The next message; TimeoutError when the time is over, EOFError or OSError when the child is gone."""
    if not child.pipe.poll(min(seconds, max(_deadline.get() - time.monotonic(), 0.0), 1e6)):
        raise TimeoutError
    return child.pipe.recv()


@atexit.register
def close() -> None:
    """End the child process; the next question starts another."""
    global _child
    with _lock:
        if _child is not None:
            gone, _child = _child, None
            gone.end()


# -------------------------------------------------------------------------------------------------- the child


def serve(pipe: Connection) -> None:
    """What the child does: answer questions until the parent closes the pipe."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # where the system has no limit, or a lower one
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(EOFError, OSError):
        while True:
            _imported(pipe.recv())
            pipe.send("ready")
            pipe.send_bytes(_answer(pipe.recv_bytes()))
            signal.alarm(0)


def _imported(module: str) -> None:
    """Import the module of a function; if it fails, then with the question again, which says why."""
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def _answer(question: bytes) -> bytes:
    """What comes of one question, pickled: (True, result), or (False, the error as text)."""
    try:
        function, args, seconds = pickle.loads(question)
        # Should the parent be killed, nobody would end this process while it computes.
        signal.alarm(math.ceil(min(seconds, 1e6)) + 2)
        return pickle.dumps((True, function(*args)))
    except Exception as error:
        return pickle.dumps((False, f"{type(error).__name__}: {error}".removesuffix(": ")))
