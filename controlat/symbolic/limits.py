"""Symbolic work that ends: a function of `controlat.symbolic` runs in a child process, under a time limit.

sympy can take forever, or all memory, on a harmless-looking question, and nothing inside one process can stop
it. So one child process answers question after question, and is killed when the time is over; the next
question starts another. It is neither forked (threads of torch would be copied in the middle of something)
nor spawned by multiprocessing (that runs the user's main script again).

What is computed in this process ends, too: `within` sets a deadline, and `check`, which every evaluation of a
landscape calls, raises once it has passed.

Questions and answers are pickles behind their length, over two pipes. Unpickling runs what it is told to,
which is safe here: both ends are processes of this module, and nobody else holds the pipes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import math
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "LATE",
    "SECONDS",
    "NotFound",
    "TimeLimit",
    "apply",
    "check",
    "close",
    "limited",
    "remaining",
    "serve",
    "unhurried",
    "within",
]

SECONDS = 60.0  # of a derivation in all
LATE = "the time limit was over"
_START = 120.0  # seconds for the child to import sympy, on a busy machine with a cold disk
_MEMORY = 4 << 30  # bytes of address space of the child
_HOME = "controlat.symbolic"
_LENGTH = struct.Struct(">Q")
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
    ...     0 < remaining() <= 60
    True
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


def remaining() -> float:
    """Seconds to the deadline; infinite without one."""
    return _deadline.get() - time.monotonic()


def check() -> None:
    """Raise TimeLimit if the deadline has passed."""
    if time.monotonic() > _deadline.get():
        raise TimeLimit(LATE)


def limited(function: Callable[..., Result], *args: object, seconds: float = SECONDS) -> Result:
    """function(*args), computed in the child process.

    Args:
        function: a module-level function of a module of `controlat.symbolic`; it is sent by its name.
        args: its arguments; they and the result are copied by pickle.
        seconds: the time limit; the deadline of `within`, where it comes earlier.

    Returns:
        What the function returns.

    Raises:
        ValueError: the function is not one of `controlat.symbolic`, or seconds is not a positive number.
        TimeLimit: the time is over; the work has ended.
        NotFound: the function raised an exception (its text is the message), or its process was killed.

    >>> limited(apply, "factorint", 2**67 - 1)
    {193707721: 1, 761838257287: 1}
    """
    name = _name(function)
    if not (0 < seconds < math.inf):
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    check()
    seconds = min(seconds, max(remaining(), 1e-3))
    question = pickle.dumps((name, args, seconds))
    with _lock:
        status, result = _ask(question, ".".join(name), seconds)
    if status != "answer":
        raise NotFound(result)
    return result  # type: ignore[no-any-return]


def apply(name: str, *args: object) -> Any:
    """sympy's function `name` of `args`: what `limited` is given where one call of sympy is all it takes.

    Raises:
        ValueError: sympy has no such function.

    >>> apply("gcd", 12, 18)
    6
    """
    import sympy  # here, because a parent that never asks needs no sympy

    if name not in sympy.__all__:
        raise ValueError(f"sympy has no function {name!r}")
    return getattr(sympy, name)(*args)


def _name(function: Callable[..., object]) -> tuple[str, str]:
    """Module and name under which the child finds the function."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError(f"only functions of {_HOME} run under a time limit, got {function!r}")
    if (
        not f"{module}.".startswith(f"{_HOME}.")
        or getattr(sys.modules.get(module), name, None) is not function
    ):
        raise ValueError(f"only functions of a module of {_HOME} run under a time limit, got {module}.{name}")
    return module, name


# ------------------------------------------------------------------------------------------------- the parent


class _Child:
    """The child process, ready for questions once constructed."""

    def __init__(self) -> None:
        # -P: the folder that the user is in is no place to import from, unless the parent does, too.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._out, self._in = self.process.stdin, self.process.stdout
        os.set_blocking(self._out.fileno(), False)  # a child that does not read must not hold up the limit
        try:
            self.receive(min(time.monotonic() + _START, _deadline.get()))
        except BaseException:
            self.kill()
            raise

    def send(self, message: bytes, deadline: float) -> None:
        """Write a message; TimeoutError at the deadline, OSError when the child is gone."""
        left = memoryview(_LENGTH.pack(len(message)) + message)
        while left:
            _wait(self._out.fileno(), select.POLLOUT, deadline)
            left = left[os.write(self._out.fileno(), left) :]

    def receive(self, deadline: float) -> Any:
        """Read a message; TimeoutError at the deadline, EOFError when the child is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        return pickle.loads(self._read(length, deadline))

    def _read(self, length: int, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < length:
            _wait(self._in.fileno(), select.POLLIN, deadline)
            part = os.read(self._in.fileno(), min(length - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def kill(self) -> None:
        """End the process and leave nothing open."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close this side of the pipes."""
        self._out.close()
        self._in.close()


def _wait(file: int, event: int, deadline: float) -> None:
    """Until a pipe is ready; TimeoutError at the deadline."""
    poll = select.poll()  # select() itself fails where a process has more than 1024 files open
    poll.register(file, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(math.ceil(1e3 * min(left, 1e6))):
        raise TimeoutError


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
        _child.send(question, deadline)
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
    """A fork of the parent has no child: it leaves the pipes to the parent, and the lock as it finds it."""
    global _child, _lock
    _lock = threading.Lock()
    if _child is not None:
        _child.process.poll()  # "not mine": or its destructor would warn that it still runs
        _child.forget()
        _child = None


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -------------------------------------------------------------------------------------------------- the child


def serve() -> None:
    """What the child does: answer questions until the parent closes the pipe."""
    # The pipes move to numbers that nobody knows: what a function prints goes to stderr, and what it reads is
    # empty.
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    importlib.import_module("sympy")  # before the first question, whose time is counted
    _put(answers, ("ready", None))
    while len(head := questions.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        _put(answers, _answer(questions.read(length)))
        signal.alarm(0)


def _put(answers: Any, message: tuple[str, Any]) -> None:
    """Write a message; one that cannot be pickled becomes an error."""
    try:
        data = pickle.dumps(message)
    except Exception as error:
        data = pickle.dumps(("error", f"the answer cannot be sent ({type(error).__name__}: {error})"))
    answers.write(_LENGTH.pack(len(data)) + data)
    answers.flush()


def _answer(question: bytes) -> tuple[str, Any]:
    """What comes of one question: ("answer", result), or ("error" or "exhausted", a text)."""
    try:
        (module, name), args, seconds = pickle.loads(question)
        # Should the parent be killed, nobody would end this process while it computes.
        signal.alarm(math.ceil(min(seconds, 1e6)) + 2)
        if not f"{module}.".startswith(f"{_HOME}."):
            raise ValueError(f"{module} is no module of {_HOME}")
        return "answer", getattr(importlib.import_module(module), name)(*args)
    except (MemoryError, RecursionError) as error:
        return "exhausted", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def _limit_memory() -> None:
    """At most 4 GiB of address space, where the system can limit it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        resource = importlib.import_module("resource")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
