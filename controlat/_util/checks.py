"""Checks of what users give: numbers, choices and kinds; each error has the value and the cure."""

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


_MANY = 1e9  # no count of steps, samples or epochs is larger


_HUGE = re.compile(r"[eE][+-]?\d{4,}")  # Fraction would compute 10 to that power


def number(value: object, name: str = "number") -> float:
    """Read a finite number; text may be a fraction, and is exact until the last rounding.

    Args:
        value: an int, a float, or a text such as ``"8/255"``, ``"0.3"``, ``"1e-3"``.
        name: what the number is, for the error.

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
    """Read a whole number: a count from `low` to 1e9, or any, such as a seed.

    Raises:
        ValueError: it is not one.

    >>> whole(3.0, "steps", 0)
    3
    """
    found: int | None = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            real = isinstance(value, float) and value.is_integer()
            found = int(value) if real else operator.index(value)  # type: ignore[arg-type,call-overload]
    most = _MANY if low > -math.inf else math.inf
    if found is None or not low <= found <= most:
        beyond = found is not None and found > most
        allowed = f" in [{low:g}, {most:g}]" if beyond else f" >= {low:g}" * (low > -math.inf)
        raise ValueError(f"{name} must be a whole number{allowed}, got {brief(value)}")
    return found


def flag(value: object, name: str) -> bool:
    """Read true or false.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {brief(value)}")
    return value


def choice(value: object, name: str, choices: Iterable[str]) -> str:
    """Read one of some texts.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")
    return value


def instance(value: T, kind: type | tuple[type, ...], name: str, cure: str = "") -> T:
    """Return an object of some kind.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} must be a {wanted}, got {brief(value)}" + f": {cure}" * bool(cure))
    return value


def brief(value: object) -> str:
    """A value for an error: a tensor by its type and shape, everything else in one short line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
