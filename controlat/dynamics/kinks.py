"""Clips on which a carried perturbation lies exactly: kinks of the outer step, where slopes are one-sided."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from controlat.dynamics.driver import Driver
from controlat.dynamics.state import State

__all__ = ["Kinks", "inward"]

_ULPS = 16  # of 1: how far inside carried perturbations are kept, beyond the rounding of pixels


@contextlib.contextmanager
def inward(driver: Driver, margin: float | None = None) -> Iterator[None]:
    """Carried perturbations off the edge of their set in the block, by a hair where no margin is given."""
    before = driver.margin
    driver.margin = before or margin or _ULPS * torch.finfo(driver.parameters[0].dtype).eps
    try:
        yield
    finally:
        driver.margin = before


@dataclass
class Kinks:
    """Where a perturbation that depends on the state lies on a clip: slope 1 on one side, 0 on the other.

    Products take 1. Where the perturbation may move to either side, no linear product describes both: the
    difference that slope 0 makes to the costates of what is carried is added up.

    Args:
        missing: sum of squares of the difference between costates with either slope.
        whole: sum of squares of the costates.
        met: whether anything lay on a clip in the last block of `watched`.
        closed: whether the slope there is 0, not 1.
    """

    missing: float = 0.0
    whole: float = 0.0
    met: bool = field(default=False, init=False)
    closed: bool = field(default=False, init=False)

    def names(self) -> tuple[str, ...]:
        """What is dropped, with its share."""
        share = (self.missing / self.whole) ** 0.5 if self.missing else 0.0
        told = f"the other slope where carried perturbations lie on a clip ({share:.1%} of their costate)"
        return (told,) if share > 1e-9 else ()

    @contextlib.contextmanager
    def watched(self, driver: Driver) -> Iterator[None]:
        """Notice clips in the block; `closed` sets the slope of those on which something lies, 1 or 0."""
        plain, kinks, near = driver.ball, self, driver.margin / 4
        kind: Any = type(plain)

        class Watching(kind):  # type: ignore[misc]
            def project(self, x: Tensor, x0: Tensor) -> Tensor:
                return plain.project(kinks._noted(x, x - x0, self.bounds(x0), near), x0)

            def shrink(self, delta: Tensor, *radius: float) -> Tensor:
                return plain.shrink(kinks._noted(delta, delta, self.bounds(), near), *radius)

            def box(self, x: Tensor) -> Tensor:
                return plain.box(kinks._noted(x, x, (0.0, 1.0), near))

        self.met, driver.ball = False, Watching(plain.eps, plain.norm)
        try:
            yield
        finally:
            driver.ball = plain

    def _noted(
        self, t: Tensor, place: Tensor, bounds: tuple[Tensor | float, Tensor | float], near: float
    ) -> Tensor:
        """t, whose gradient is 0 while `closed` where its place lies on a bound."""
        if not t.requires_grad:
            return t
        low, high = bounds
        on = ((place - low).abs() <= near) | ((place - high).abs() <= near)
        if bool(on.any()):
            self.met, t = True, t.view_as(t)
            t.register_hook(lambda g: g.masked_fill(on, 0) if self.closed else g)
        return t

    def compare(self, costate: State, pull: Callable[[], State]) -> None:
        """Add what a step would make of the same costate with slope 0, which `pull` finds."""
        if not self.met:
            return
        self.closed = True
        try:
            other = pull()
        finally:
            self.closed = False
        *_, memory, rows = costate.parts()
        *_, other_memory, other_rows = other.parts()
        for mine, theirs in ((memory, other_memory), (rows, other_rows)):
            self.missing += sum(float((q - theirs[name]).square().sum()) for name, q in mine.items())
            self.whole += sum(float(q.square().sum()) for q in mine.values())
