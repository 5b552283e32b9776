"""Processes of their own, forked from one that has imported the package: an import takes seconds."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from helpers import GUARD

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["controlat.app.cli", "controlat.app.jobs", "pytest", "torch._dynamo"])


def forked(work: Callable[..., object], *given: Any) -> int | None:
    """Call a function of a test module in a process of its own; its exit code, minus the signal of a kill."""
    process = _CONTEXT.Process(target=work, args=given)
    process.start()
    process.join(GUARD)
    return process.exitcode
