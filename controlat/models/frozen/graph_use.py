"""Whether CUDA graphs are used, and what came of it: for a block, a run, a record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from controlat._util.checks import choice
from controlat.models.frozen import capture
from controlat.models.frozen.parts import Parts

__all__ = ["MODES", "USE", "Use", "status", "using"]

MODES = ("auto", "off")


@dataclass
class Use:
    """Whether graphs are used, and what came of it."""

    mode: str = "auto"
    tell: Callable[[str], object] = logging.getLogger("controlat").info
    captured: int = 0
    reasons: list[str] = field(default_factory=list)

    def note(self, parts: Parts, reason: str) -> None:
        """Say once why a network runs without graphs."""
        reason = f"{type(parts.model).__name__}: {reason}"
        if reason not in self.reasons:
            self.reasons.append(reason)
            self.tell(f"no CUDA graphs for {reason}")


USE: ContextVar[Use] = ContextVar("controlat_cuda_graphs", default=Use())  # noqa: B039  (one per process)


@contextmanager
def using(mode: str, tell: Callable[[str], object] | None = None) -> Iterator[None]:
    """Whether CUDA graphs are used inside the block: ``"auto"`` or ``"off"``.

    Args:
        mode: ``"auto"`` captures what can be captured, on CUDA devices.
        tell: called once with each reason why something runs without a graph; by default it is logged.

    >>> with using("off"):
    ...     status("cuda")
    'off'
    """
    use = Use(choice(mode, "cuda_graphs", MODES))
    if tell is not None:
        use.tell = tell
    token = USE.set(use)
    try:
        yield
    finally:
        USE.reset(token)


def status(device: torch.device | str) -> str:
    """Whether graphs are on, and for what they are not, for the record of a run.

    >>> status("cpu")
    'off (no CUDA device)'
    """
    use, reasons = USE.get(), "; ".join(USE.get().reasons)
    if use.mode == "off":
        return "off"
    if capture.backend_of(torch.device(device)) is None:
        return "off (no CUDA device)"
    if not reasons:
        return "on"
    return f"on (not for {reasons})" if use.captured else f"off ({reasons})"
