"""Curves: one knob as a function of time, and how its real values are rounded to whole numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from controlat._util.checks import number
from controlat._util.texts import short

__all__ = ["CURVES", "ROUNDINGS", "SLACK", "Curve", "dithered"]

SLACK = 1e-9  # so that 0.1 * 3 falls into piece 3 and a K of 2.4999999999 rounds as 2.5


def _between(values: tuple[float, ...], share: float) -> float:
    """The piecewise linear function through values at evenly spaced points of [0, 1]."""
    place = share * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (place - left)


# Kind to the curve's real value at time t of a run of T epochs.
CURVES: Mapping[str, Callable[[Curve, float, float], float]] = MappingProxyType(
    {
        "constant": lambda c, t, T: c.values[0],
        "linear": lambda c, t, T: c.values[0] + (c.values[1] - c.values[0]) * t / T,
        "exponential": lambda c, t, T: c.values[0] * (c.values[1] / c.values[0]) ** (t / T),
        "cosine": lambda c, t, T: (
            c.values[0] + (c.values[1] - c.values[0]) * (1 - math.cos(math.pi * t / T)) / 2
        ),
        "knots": lambda c, t, T: _between(c.values, t / T),
        "ramp": lambda c, t, T: c.values[0] + (c.values[1] - c.values[0]) * min(t / c.at[0], 1.0),
        "step": lambda c, t, T: c.values[c.place(t)],
        "table": lambda c, t, T: c.values[min(c.place(t), len(c.values) - 1)],
        "ratio": lambda c, t, T: c.values[0],
    }
)
_LENGTHS = {"constant": 1, "linear": 2, "exponential": 2, "cosine": 2, "ramp": 2, "ratio": 1}


def _real(v: float) -> float:
    """v itself, which is the mean of the dithered numbers; an int where it is whole."""
    return round(v) if abs(v - round(v)) < SLACK else v


ROUNDINGS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "half_up": lambda v: math.floor(v + 0.5 + SLACK),
        "floor": lambda v: math.floor(v + SLACK),
        "dither": _real,
    }
)


def dithered(values: Iterable[float], phase: float = 0.0) -> Iterator[int]:
    """Round real numbers v_i to whole numbers k_i, each to its floor or its ceiling, by error diffusion.

    The remainder is carried to the next number: r_0 = phase in [0, 1), k_i = floor(v_i + r_i) and
    r_{i+1} = v_i + r_i - k_i. All r_i are in [0, 1), so that the sum of consecutive k_i differs from the sum
    of the same v_i by less than 1. Comparing v_i with a fixed low-discrepancy sequence, such as the multiples
    of the golden ratio, has no such bound: its error grows with the logarithm of the number of terms.

    Args:
        values: the v_i.
        phase: r_0.

    Yields:
        The k_i.

    Source:
        Floyd and Steinberg (1976), error diffusion; for a constant v the k are a Sturmian sequence, Morse and
        Hedlund (1940). Chattering between controls: Warga (1962).

    >>> list(dithered([2.5] * 4)), list(dithered([0.25] * 8, phase=0.5))
    ([2, 3, 2, 3], [0, 1, 0, 0, 0, 1, 0, 0])
    """
    remainder = phase
    for v in values:
        low = math.floor(v + SLACK)
        remainder += v - low
        up = remainder >= 1 - SLACK
        remainder -= up
        yield low + up


@dataclass(frozen=True)
class Curve:
    """One knob as a function of time.

    Args:
        kind: ``constant``, ``linear``, ``exponential``, ``cosine``, ``knots`` (linear between values at
            evenly spaced times from 0 to T), ``ramp`` (linear up to the epoch `at`, then constant), ``step``
            (changes at the epochs `at`), ``table`` (one value per piece of the schedule) or ``ratio`` (tau
            over the knob `of`, and 0 where that is 0).
        values: the numbers that the kind takes: one value (``constant``); start and end (``linear``,
            ``exponential``, ``cosine``, ``ramp``); the listed values (``knots``, ``step``, ``table``); tau
            (``ratio``).
        at: increasing epochs at which a ``step`` changes, or the one at which a ``ramp`` ends; the schedule
            fills it in for a ``table``.
        rounding: of an integer knob: ``half_up``, ``floor``, or ``dither`` (down in some steps and up in
            others, so that the mean is the real value); None for a real knob.
        of: for a ``ratio``, the knob in the denominator.
        rounded: for a ``ratio``, whether the denominator is that knob's rounded value, so that the product is
            exactly tau, or its real value.

    Raises:
        ValueError: unknown kind, or numbers that do not fit it.
    """

    kind: str
    values: tuple[float, ...]
    at: tuple[float, ...] = ()
    rounding: str | None = None
    of: str | None = None
    rounded: bool = True

    def __post_init__(self) -> None:
        if self.kind not in CURVES:
            raise ValueError(f"a curve is one of {', '.join(CURVES)}, got {self.kind!r}")
        object.__setattr__(
            self, "values", tuple(number(v, f"value of a {self.kind} curve") for v in self.values)
        )
        object.__setattr__(self, "at", tuple(number(v, "epoch of a step") for v in self.at))
        wanted = _LENGTHS.get(self.kind, len(self.at) + 1 if self.kind == "step" else len(self.values))
        if len(self.values) != wanted or not self.values:
            raise ValueError(f"a {self.kind} curve takes {wanted or 'some'} values, got {len(self.values)}")
        if self.kind == "knots" and len(self.values) < 2:
            raise ValueError("a knots curve takes two values or more, at the ends of the run, got 1")
        if self.at and self.kind not in ("step", "table", "ramp"):
            raise ValueError(
                f"only a step changes at given epochs, but a {self.kind} curve got at = {short(self.at)}"
            )
        if self.kind == "ramp" and len(self.at) != 1:
            raise ValueError(f"a ramp curve ends at one epoch, got at = {short(self.at)}")
        if self.kind == "exponential" and min(self.values) <= 0:
            raise ValueError(f"an exponential curve needs start and end > 0, got {self.values}")
        for a, b in zip((0.0, *self.at), self.at, strict=False):
            if b <= a:
                raise ValueError(f"a step changes at increasing epochs > 0, got {b:g} after {a:g}")
        if self.rounding is not None and self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if (self.kind == "ratio") != (self.of is not None):
            raise ValueError("a ratio curve, and only that, names the knob it divides by (of)")
        if self.kind == "ratio" and self.rounding == "dither":
            raise ValueError("a ratio curve cannot have rounding dither: give it to the knob it divides by")

    def place(self, t: float) -> int:
        """The number of epochs in `at` that are <= t. By bisection: a table may have a million."""
        return bisect_right(self.at, t, key=lambda edge: edge - SLACK)

    def unreached(self, starts: Iterable[float], epochs: float) -> tuple[float, ...]:
        """The epochs in `at` without effect on the values at the times `starts`, in a run of T = `epochs`."""
        if self.kind == "step":
            reached = {self.place(t) for t in starts}
            return tuple(e for i, e in enumerate(self.at, start=1) if i not in reached)
        return self.at if self.kind == "ramp" and self.at[0] > epochs + SLACK else ()

    def __call__(self, t: float, epochs: float) -> float:
        """The value at time t, before rounding, in a run of T = `epochs`; tau for a ``ratio``."""
        return CURVES[self.kind](self, t, epochs)

    def over(self, real: float, rounded: float) -> float:
        """The value of a ``ratio``, from the real and the rounded value of the knob `of`."""
        divisor = rounded if self.rounded else real
        return self.values[0] / divisor if rounded and divisor else 0.0

    def round(self, value: float, knob: str = "value") -> float:
        """A value of this curve rounded as `rounding` says; with ``dither`` it stays real.

        Raises:
            ValueError: the value is not finite; the message names the knob.
        """
        if not math.isfinite(value):
            raise ValueError(f"{knob} must be finite, got {value}")
        return ROUNDINGS[self.rounding](value) if self.rounding else value

    def to_json(self) -> dict[str, Any]:
        """The fields that this kind has, as plain data."""
        data: dict[str, Any] = {"curve": self.kind, "values": list(self.values)}
        if self.kind in ("step", "ramp"):
            data["at"] = list(self.at)
        if self.rounding:
            data["rounding"] = self.rounding
        if self.of is not None:
            data |= {"of": self.of, "rounded": self.rounded}
        return data
