"""What values the settings may have: one table of numbers for the check before any work and for the help.

A range is wide enough for whatever somebody means, and narrow enough that nothing overflows on the way.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from controlat._util.checks import brief, number

__all__ = ["RANGES", "Range", "check_kinds", "check_ranges", "range_of"]


@dataclass(frozen=True)
class Range:
    """The numbers between two ends.

    Args:
        low: smallest number.
        high: largest number.
        whole: whether only whole numbers are meant.
        open_low: whether `low` itself is left out.
        open_high: whether `high` itself is left out.

    >>> str(Range(1, 1000, whole=True)), str(Range(0, 2, open_low=True))
    ('a whole number from 1 to 1000', 'above 0, at most 2')
    """

    low: float
    high: float
    whole: bool = False
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        kind = "a whole number " * self.whole
        if not (self.open_low or self.open_high):
            return f"{kind}from {_shown(self.low)} to {_shown(self.high)}"
        least = f"{'above' if self.open_low else 'at least'} {_shown(self.low)}"
        return f"{kind}{least}, {'below' if self.open_high else 'at most'} {_shown(self.high)}"

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless a number, or a text such as 8/255, lies in the range.

        >>> Range(0, 1).check("peak", "3/2")
        Traceback (most recent call last):
        ValueError: peak must be <= 1, got 3/2
        """
        x = number(value, name)
        too_low = x < self.low or (self.open_low and x == self.low)
        if too_low or (self.whole and x % 1):
            allowed = f"{'>' if self.open_low else '>='} {_shown(self.low)}"
        elif x > self.high or (self.open_high and x == self.high):
            allowed = f"{'<' if self.open_high else '<='} {_shown(self.high)}"
        else:
            return
        raise ValueError(f"{name} must be {'a whole number ' * self.whole}{allowed}, got {value}")


def _shown(end: float) -> str:
    return f"{end:.10g}"


_COUNT = Range(1, 10**9, whole=True)  # samples, points
_PIXELS = Range(0, 1000)  # lengths in [0, 1]^n: the diagonal of an image of 577 x 577 pixels is 1000
_NUMBER = Range(-(10**6), 10**6)
_POSITIVE = Range(1e-6, 10**6)

# By the name of the setting: a number of one name means the same in every command.
RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "alphas": Range(0, 1000, open_low=True),
        "autoattack": Range(0, 10**9, whole=True),
        "batch_size": Range(1, 10**6, whole=True),
        "branch": Range(0, 1000, whole=True),
        "checkpoint_minutes": Range(0, 10**6, open_low=True),
        "checks": Range(0, 10**9, whole=True),
        "epochs": Range(1, 10**5, whole=True),
        "eps": _PIXELS,
        "gamma": Range(0, 10**6),
        "held_out": _COUNT,
        "horizon": _POSITIVE,
        "horizons": Range(1, 10**9, whole=True),
        "jobs": Range(1, 1024, whole=True),
        "judge_seeds": Range(0, 2**32 - 1, whole=True),
        "k_max": Range(0, 10**5),
        "k_min": Range(0, 10**5),
        "looks": Range(1, 10**6, whole=True),
        "lr": Range(0, 10**6, open_low=True),
        "max_steps": Range(1, 10**5, whole=True),
        "memory": Range(0, 10**6, open_low=True),
        "momentum": Range(0, 1, open_high=True),
        "num_classes": Range(2, 10**5, whole=True),
        "order": Range(1, 12, whole=True),
        "overshoot": Range(1, 2, open_low=True, open_high=True),
        "points": _COUNT,
        "probe": Range(2, 10**6, whole=True),
        "resolution": Range(0.001, 10**5),
        "seconds": _POSITIVE,
        "seed": Range(0, 2**32 - 1, whole=True),
        "seeds": Range(0, 2**32 - 1, whole=True),
        "since": Range(0, 10**5),
        "tau": _POSITIVE,
        "tau_net": Range(0, 1000, open_low=True),
        "test_points": _COUNT,
        "theta0": _NUMBER,
        "theta_range": _NUMBER,
        "threads": Range(1, 1024, whole=True),
        "train_points": _COUNT,
        "trials": Range(1, 10**6, whole=True),
        "weight": Range(0, 10**6, open_low=True),
        "weight_decay": Range(0, 100),
        "x0": _NUMBER,
        "x_range": _NUMBER,
    }
)


def range_of(field: Field[Any]) -> Range | None:
    """The range of a field of a settings dataclass; None where it is no number."""
    return None if field.type in (bool, "bool") else RANGES.get(field.name)


def check_kinds(settings: Any, objects: Collection[str] = ()) -> None:
    """Check that every field of a settings dataclass holds a value of the kind that its annotation says.

    What numbers are is left to `check_ranges`, and what is in lists of them.

    Args:
        settings: the dataclass.
        objects: fields that may hold another object than a text, and are checked elsewhere.

    Raises:
        ValueError: one does not; the message says what it must be.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if name in objects or (value is None and type(None) in get_args(hint)):
            continue
        kinds = [kind for kind in get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if kinds == [bool]:
            wanted, fits = "true or false", isinstance(value, bool)
        elif get_origin(kinds[0]) is dict:
            wanted, fits = "a dictionary", isinstance(value, Mapping)
        elif get_args(kinds[0]) == (str,):
            wanted, fits = "a list of texts", listed and all(isinstance(one, str) for one in value)
        elif get_args(kinds[0]):
            wanted, fits = "a list of numbers", listed
        elif kinds == [str]:
            wanted, fits = "a text", isinstance(value, (str, os.PathLike))
        else:
            wanted, fits = "a number", not listed and not isinstance(value, (Mapping, bytes, type(None)))
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {brief(value)}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def check_ranges(settings: Any, texts: Collection[str] = ()) -> None:
    """Check every number of a settings dataclass, those in lists one by one; None is left out.

    Args:
        settings: the dataclass.
        texts: fields that may be another text than a number, and are checked elsewhere.

    Raises:
        ValueError: one is no number, or out of its range.
    """
    for field in fields(settings):
        value, allowed = getattr(settings, field.name), range_of(field)
        if allowed is not None and value is not None and field.name not in texts:
            for one in value if isinstance(value, (list, tuple)) else (value,):
                allowed.check(field.name, one)
