"""The values of all knobs at one time, from a curve each: rounding, error diffusion, ratios of knobs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from controlat.control.curves import Curve, dithered

__all__ = ["dithered_knobs", "mean_values", "real_values", "step_values", "values_of_steps"]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Curves = Mapping[str, Curve]


def dithered_knobs(curves: Curves) -> tuple[str, ...]:
    """The knobs that are dithered, by name."""
    return tuple(sorted(knob for knob, curve in curves.items() if curve.rounding == "dither"))


def real_values(curves: Curves, t: float, epochs: float) -> dict[str, float]:
    """The value of every curve at time t before rounding; of a ratio, its tau."""
    return {knob: curve(t, epochs) for knob, curve in curves.items()}


def mean_values(curves: Curves, real: Mapping[str, float]) -> Iterator[float]:
    """The value of every knob in u(t), in the order of the curves: rounded, but real where it is dithered.

    Args:
        curves: of the knobs.
        real: their `real_values`.
    """
    for knob, curve in curves.items():
        value = real[knob]
        if curve.of is not None:
            divisor = curves[curve.of]
            rounded = divisor.round(real[curve.of], curve.of)
            if divisor.rounding == "dither" and 0 < rounded < 1:
                rounded = 1  # a step takes 0 or 1 then, and the ratio is that of the steps with 1
            value = curve.over(real[curve.of], rounded)
        yield curve.round(value, knob)


def values_of_steps(
    curves: Curves, real: Mapping[str, Sequence[float]], epoch: int
) -> Iterator[dict[str, float]]:
    """The values of the knobs in each step of an epoch, with dithered knobs rounded to whole numbers.

    Each dithered knob has an initial remainder of its own, a multiple of the golden ratio: over the epochs,
    roundings occur in all combinations.

    Args:
        curves: of the knobs.
        real: the real value of each knob in every step.
        epoch: from 0.
    """
    remainders = {
        knob: (epoch + 1) * i * _GOLDEN_RATIO % 1 for i, knob in enumerate(dithered_knobs(curves), start=1)
    }
    rounded: dict[str, Sequence[float]] = {
        knob: list(dithered(real[knob], remainders[knob]))
        if knob in remainders
        else [curve.round(v, knob) for v in real[knob]]
        for knob, curve in curves.items()
        if curve.of is None
    }
    for row, rounded_row in zip(_rows(real), _rows(rounded), strict=True):
        yield rounded_row | _ratios(curves, row, rounded_row)


def step_values(curves: Curves, real: Mapping[str, float]) -> Iterator[dict[str, float]]:
    """All combinations of values that a step may take; a dithered knob has its floor or its ceiling.

    Args:
        curves: of the knobs.
        real: their `real_values`.
    """
    choices = {
        knob: {math.floor(v := curve.round(real[knob], knob)), math.ceil(v)}
        if curve.rounding == "dither"
        else {curve.round(real[knob], knob)}
        for knob, curve in curves.items()
        if curve.of is None
    }
    for values in itertools.product(*map(sorted, choices.values())):
        rounded = dict(zip(choices, values, strict=True))
        yield rounded | _ratios(curves, real, rounded)


def _ratios(curves: Curves, real: Mapping[str, float], rounded: Mapping[str, float]) -> dict[str, float]:
    """The values of the ratios, from the real and the rounded values of the other knobs."""
    return {
        knob: curve.round(curve.over(real[curve.of], rounded[curve.of]), knob)
        for knob, curve in curves.items()
        if curve.of is not None
    }


def _rows(columns: Mapping[str, Sequence[float]]) -> Iterable[dict[str, float]]:
    """The values of all knobs at each step, from the values of each knob at all steps."""
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
