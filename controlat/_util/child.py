"""A Python of its own at the other end of a pipe.

It is neither forked (threads of torch would be copied in the middle of something) nor spawned by
multiprocessing (that runs the user's main script again, which only scripts with a guard survive).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["Child", "import_path"]

_NONE: Mapping[str, str] = MappingProxyType({})


def import_path() -> list[str]:
    """Where this process imports from, as `sys.path` of another one."""
    root = str(Path(__file__).resolve().parents[2])
    # An empty entry is the folder that this process was in when it imported this, and found root there.
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    return path if root in map(os.path.realpath, path) else [root, *path]


class Child(NamedTuple):
    """A process, and the parent's end of its pipe, which nobody else holds.

    When the parent ends, whatever the reason, the child reads the end of the pipe.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection

    @classmethod
    def start(cls, module: str, environment: Mapping[str, str] = _NONE, stdout: int | None = None) -> Child:
        """Start a process that calls ``module.serve(pipe)``; it imports from where this one does.

        Args:
            module: its full name.
            environment: variables beside those of this process.
            stdout: descriptor that takes the place of its standard output.
        """
        ours, theirs = Pipe()
        connection = f"multiprocessing.connection.Connection({theirs.fileno()})"
        code = (
            f"import sys; sys.path[:] = {import_path()!r}; "
            f"import multiprocessing.connection, {module} as m; m.serve({connection})"
        )
        with theirs, _ctrl_c_blocked():
            # -P: the folder that the user is in is no place to import from, unless the parent does, too.
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
            )
        return cls(process, ours)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def end(self) -> int:
        """Kill the process; its exit code, minus the signal where one ended it."""
        self.process.kill()
        code = self.process.wait()
        self.pipe.close()
        return code


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """A process that is started inside is deaf to Ctrl-C, which the parent handles for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
