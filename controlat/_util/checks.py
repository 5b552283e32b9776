"""Checks of user input: numbers, choices and types; each error names the value and the cure."""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import TypeVar

__all__ = ["brief", "choice", "flag", "instance", "number", "whole"]

T = TypeVar("T")


_MANY = 1e9  # limit for counts of steps, samples or epochs
_HUGE = re.compile(r"[eE][+-]?\d{4,}")  # exponents for which Fraction would compute a huge power of 10


def number(value: object, name: str = "number") -> float:
    """Read a finite number; a text may be a fraction, and is rounded only once.

    Args:
        value: an int, a float, or a text such as ``"8/255"``, ``"0.3"``, ``"1e-3"``.
        name: name of the number in the error message.

    Returns:
        The nearest float.

    Raises:
        ValueError: it is not a number, or not finite.

    >>> number("2/255") == 2 / 255
    True
    """
    try:
        if isinstance(value, (bool, bytes, bytearray)):
            raise ValueError
        if isinstance(value, str) and _HUGE.search(value):
            raise ValueError
        result = float(Fraction(value.strip())) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{name} must be a number such as 0.3, 1e-3 or 8/255, got {value!r}") from None
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return result


def whole(value: object, name: str, low: float = -math.inf) -> int:
    """Read a whole number: a count from `low` to 1e9, or without `low` any whole number, such as a seed.

    Raises:
        ValueError: it is not one.

    >>> whole(3.0, "steps", 0)
    3
    """
    result: int | None = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            real = isinstance(value, float) and value.is_integer()
            result = int(value) if real else operator.index(value)  # type: ignore[arg-type,call-overload]
    most = _MANY if low > -math.inf else math.inf
    if result is None or not low <= result <= most:
        beyond = result is not None and result > most
        allowed = f" in [{low:g}, {most:g}]" if beyond else f" >= {low:g}" * (low > -math.inf)
        raise ValueError(f"{name} must be a whole number{allowed}, got {brief(value)}")
    return result


def flag(value: object, name: str) -> bool:
    """Read true or false.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {brief(value)}")
    return value


def choice(value: object, name: str, choices: Iterable[str]) -> str:
    """Read one of the given choices.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")
    return value


def instance(value: T, kind: type | tuple[type, ...], name: str, cure: str = "") -> T:
    """Return an object if it is an instance of the given type or types.

    Raises:
        TypeError: it is of another type.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} must be a {expected}, got {brief(value)}" + f": {cure}" * bool(cure))
    return value


def brief(value: object) -> str:
    """A value in an error message: a tensor by its type and shape, other values in one short line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
