"""Adversarial-training systems. The folder is the registry: a file here is a method by its name.

Each file defines one class in the form of `Method` and names it `METHOD`; its constructor's arguments are
its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlat import registry
from controlat.methods._base import Batch, Context, Epoch, Hooks, Method, Prefixes, Rows, Update, Updates

__all__ = [
    "Batch",
    "Context",
    "Epoch",
    "Hooks",
    "Method",
    "Prefixes",
    "Rows",
    "Update",
    "Updates",
    "build",
    "names",
]


def names() -> tuple[str, ...]:
    """The methods in this folder."""
    return registry.names(__name__)


def build(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Make a method: by its file name, or the user's own class by ``package.module:Class``.

    Args:
        name: such as ``"pgd_at"``.
        options: keyword arguments of its constructor.

    Raises:
        ValueError: unknown method, or an option that it does not take; the message lists what it takes.

    >>> build("pgd_at", {"random_start": False}).controls["steps"].kind
    'integer'
    """
    found = registry.import_path(name) if ":" in name else registry.member(__name__, name).METHOD
    if not callable(found):
        raise ValueError(f"method {name!r} is not a class or factory")
    try:
        method = found(**(options or {}))
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
    if not hasattr(method, "updates") or not hasattr(method, "controls"):
        raise ValueError(f"method {name!r} must have `controls` and `updates`, got {type(method).__name__}")
    return method  # type: ignore[no-any-return]
