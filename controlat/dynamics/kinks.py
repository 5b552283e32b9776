"""Kinks of the outer step: carried perturbations exactly on a clip, where derivatives are one-sided."""

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

_ULPS = 16  # distance of carried perturbations from the edge, in units of eps of the dtype: beyond rounding


@contextlib.contextmanager
def inward(driver: Driver, margin: float | None = None) -> Iterator[None]:
    """Inside the block carried perturbations are kept off the edge of their set, by `margin` or 16 ulp."""
    before = driver.margin
    driver.margin = before or margin or _ULPS * torch.finfo(driver.parameters[0].dtype).eps
    try:
        yield
    finally:
        driver.margin = before


@dataclass
class Kinks:
    """Perturbations that depend on the state and lie on a clip: slope 1 on one side, 0 on the other.

    Vector-Jacobian products take slope 1. If the perturbation may move to either side, no linear product
    describes both; `compare` sums the difference that slope 0 makes to the costates of carried perturbations.

    Args:
        missing: sum of squares of the difference between the costates with slope 1 and slope 0.
        whole: sum of squares of the costates.
        met: whether a perturbation lay on a clip in the last block of `watched`.
        closed: whether to take slope 0 in place of 1.
    """

    missing: float = 0.0
    whole: float = 0.0
    met: bool = field(default=False, init=False)
    closed: bool = field(default=False, init=False)

    def names(self) -> tuple[str, ...]:
        """The name of the dropped dependence, with its share of the costate; empty if nothing is dropped."""
        share = (self.missing / self.whole) ** 0.5 if self.missing else 0.0
        name = f"the other slope where carried perturbations lie on a clip ({share:.1%} of their costate)"
        return (name,) if share > 1e-9 else ()

    @contextlib.contextmanager
    def watched(self, driver: Driver) -> Iterator[None]:
        """Detect perturbations on a clip in the block; in backward passes `closed` selects their slope."""
        plain, kinks, tolerance = driver.ball, self, driver.margin / 4
        kind: Any = type(plain)

        class Watching(kind):  # type: ignore[misc]
            def project(self, x: Tensor, x0: Tensor, eps: float | Tensor | None = None) -> Tensor:
                return plain.project(kinks._with_slope(x, x - x0, self.bounds(x0), tolerance), x0, eps)

            def shrink(self, delta: Tensor, *radius: float) -> Tensor:
                return plain.shrink(kinks._with_slope(delta, delta, self.bounds(), tolerance), *radius)

            def box(self, x: Tensor) -> Tensor:
                return plain.box(kinks._with_slope(x, x, (0.0, 1.0), tolerance))

        self.met, driver.ball = False, Watching(plain.eps, plain.norm)
        try:
            yield
        finally:
            driver.ball = plain

    def _with_slope(
        self, t: Tensor, value: Tensor, bounds: tuple[Tensor | float, Tensor | float], tolerance: float
    ) -> Tensor:
        """t, with gradient 0 where `value` lies on a bound if `closed` is set during the backward pass."""
        if not t.requires_grad:
            return t
        low, high = bounds
        on = ((value - low).abs() <= tolerance) | ((value - high).abs() <= tolerance)
        if bool(on.any()):
            self.met, t = True, t.view_as(t)
            t.register_hook(lambda g: g.masked_fill(on, 0) if self.closed else g)
        return t

    def compare(self, costate: State, pull: Callable[[], State]) -> None:
        """Add the difference between the costate with slope 1 and that with slope 0, from `pull`."""
        if not self.met:
            return
        self.closed = True
        try:
            other = pull()
        finally:
            self.closed = False
        *_, memory, rows = costate.parts()
        *_, other_memory, other_rows = other.parts()
        for part, other_part in ((memory, other_memory), (rows, other_rows)):
            self.missing += sum(float((q - other_part[name]).square().sum()) for name, q in part.items())
            self.whole += sum(float(q.square().sum()) for q in part.values())
