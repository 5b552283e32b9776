"""Processes of their own, forked from one that has imported the package: an import takes seconds."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from helpers import GUARD

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["controlat.app.cli", "controlat.app.train", "pytest", "torch._dynamo"])


def started(work: Callable[..., object], *given: Any) -> BaseProcess:
    """A process that calls a function of a test module."""
    process = _CONTEXT.Process(target=work, args=given)
    process.start()
    return process


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    code: int | None
    output: str
    error: str


def talking(work: Callable[..., object], *given: Any, cwd: Path, **environment: str) -> Callable[[], Ended]:
    """Start a program, such as `cli.main`, in a folder; what waits for its end."""
    folder = Path(tempfile.mkdtemp(dir=cwd.parent))
    process = started(_talk, folder, cwd, environment, work, given)

    def end() -> Ended:
        process.join(GUARD)
        return Ended(process.exitcode, *((folder / name).read_text() for name in ("out", "err")))

    return end


def _talk(
    folder: Path, cwd: Path, environment: dict[str, str], work: Callable[..., object], given: tuple[Any, ...]
) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    with (folder / "out").open("w") as sys.stdout, (folder / "err").open("w") as sys.stderr:
        sys.exit(work(*given))  # type: ignore[arg-type]


def forked(work: Callable[..., object], *given: Any) -> int | None:
    """The exit code of such a process, minus the signal where it was killed."""
    process = started(work, *given)
    process.join(GUARD)
    return process.exitcode
