"""Checks that the options of several methods share."""

from __future__ import annotations

import math
from typing import Any

from controlat.control import number
from controlat.network import MODES

__all__ = ["check_choice", "check_flag", "check_mode", "check_number", "check_whole"]


def check_number(method: Any, name: str, low: float, high: float = math.inf) -> None:
    """Make an option a number in [low, high], or raise ValueError."""
    value = number(getattr(method, name), name)
    object.__setattr__(method, name, value)
    if not low <= value <= high:
        allowed = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {allowed}, got {value:g}")


def check_whole(method: Any, name: str, low: int) -> None:
    """Raise ValueError unless an option is a whole number >= low."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")


def check_flag(method: Any, name: str) -> None:
    """Raise ValueError unless an option is true or false."""
    if not isinstance(value := getattr(method, name), bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_choice(method: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an option is one of the choices."""
    if (value := getattr(method, name)) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_mode(mode: str) -> None:
    """Raise ValueError unless an attack can run in this mode."""
    if mode not in MODES:
        raise ValueError(f"attack_mode must be one of {', '.join(MODES)}, got {mode!r}")
