"""Errors of numerical computations."""

from __future__ import annotations

__all__ = ["NonFiniteError"]


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a parameter is not finite."""
