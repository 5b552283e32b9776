"""Ctrl-C, SIGTERM and closed streams: a command ends with one line, whatever it is doing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ["Terminated", "discard", "ending", "open_streams", "terminated"]


@contextlib.contextmanager
def ending(told: str) -> Iterator[None]:
    """End the process at Ctrl-C inside the block, with one line: modules may swallow exceptions."""

    def end(number: int, frame: object) -> NoReturn:
        os.write(2, f"{told}\n".encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # signals are heard there only


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Raise Terminated on SIGTERM inside the block, where nobody else waits for the signal.

    Under torchrun it comes when another process ended; one that waits in native code hears it as soon as the
    connection breaks, and torchrun kills it after 30 seconds if not.
    """

    def end(number: int, frame: object) -> NoReturn:
        raise Terminated

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_streams() -> None:
    """What a terminal cannot show is replaced, and what is written to a closed stream is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def discard(stream: Any) -> None:
    """Let what is left in a stream's buffer go, or Python complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
