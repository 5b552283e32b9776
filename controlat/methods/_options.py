"""Checks of options, shared by several methods."""

from __future__ import annotations

import math
from typing import Any

from controlat._util.checks import choice, flag, number, whole
from controlat.models.frozen.contexts import MODES

__all__ = ["check_choice", "check_flag", "check_mode", "check_number", "check_whole"]


def check_number(method: Any, name: str, low: float, high: float = math.inf) -> None:
    """Make an option a number in [low, high], or raise ValueError."""
    value = number(getattr(method, name), name)
    object.__setattr__(method, name, value)
    if not low <= value <= high:
        allowed = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {allowed}, got {value:g}")


def check_whole(method: Any, name: str, low: int) -> None:
    """Make an option a whole number >= low, or raise ValueError."""
    object.__setattr__(method, name, whole(getattr(method, name), name, low))


def check_flag(method: Any, name: str) -> None:
    """Raise ValueError unless an option is true or false."""
    flag(getattr(method, name), name)


def check_choice(method: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an option is one of the choices."""
    choice(getattr(method, name), name, choices)


def check_mode(mode: str) -> None:
    """Raise ValueError unless an attack can run in this mode."""
    choice(mode, "attack_mode", MODES)
