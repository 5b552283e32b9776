"""Progress bars: on a terminal, or in a line of the process that gave the work out (`_util.pool`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar", "send_to"]

_send: Callable[[str], object] | None = None


def send_to(send: Callable[[str], object]) -> None:
    """Let the bars of this process show nothing, and send what they have come to, as a text."""
    global _send
    _send = send


class _Sent(tqdm):  # type: ignore[type-arg]
    """A bar that sends its text instead of showing it."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Send label and percentage; nothing for an empty text, which would clear the bar."""
        if msg is None and _send is not None:
            part = f"{self.n / self.total:.0%}" if self.total else f"{self.n}"
            _send(f"{self.desc.rstrip(': ')} {part}".strip())


def progress_bar(total: float | None, unit: str, show: bool, label: str = "", **options: Any) -> Any:
    """A progress bar that is there while it is needed, on a terminal only.

    Args:
        total: what it counts to; None if that is not known.
        unit: what it counts, after a space.
        show: whether it is wanted.
        label: its description.
        options: as of `tqdm.tqdm`.
    """
    options |= {"total": total, "unit": unit, "desc": label, "leave": False, "mininterval": 0.5}
    if _send is not None:
        return _Sent(disable=not show, file=io.StringIO(), **options)
    return tqdm(disable=None if show else True, **options)
