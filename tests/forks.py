"""Processes of their own, forked from one that has imported the package: an import takes seconds."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from helpers import GUARD

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["controlat.app.cli", "controlat.app.jobs", "pytest", "torch._dynamo"])


def started(work: Callable[..., object], *given: Any) -> BaseProcess:
    """A process that calls a function of a test module."""
    process = _CONTEXT.Process(target=work, args=given)
    process.start()
    return process


def forked(work: Callable[..., object], *given: Any) -> int | None:
    """The exit code of such a process, minus the signal where it was killed."""
    process = started(work, *given)
    process.join(GUARD)
    return process.exitcode
