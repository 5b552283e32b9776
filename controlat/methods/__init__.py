"""Adversarial-training systems, one file each; the folder is the registry, and file names are method names.

Each file defines a class with the protocol `Method` and assigns it to `METHOD`; the arguments of its
constructor are the options of the method.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from controlat._util import registry
from controlat._util.checks import brief, instance
from controlat.control.space import ControlSpace
from controlat.methods._base import (
    Batch,
    Context,
    Epoch,
    Hooks,
    Method,
    Prefixes,
    Rows,
    Update,
    Updates,
)

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
    "check_method",
    "describe",
    "manual",
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
    instance(name, str, "the name of a method")
    kind = registry.import_path(name) if ":" in name else registry.member(__name__, name).METHOD
    if not callable(kind):
        raise ValueError(f"method {name!r} is not a class or factory")
    instance(options, (Mapping, type(None)), f"options of method {name!r}")
    try:
        inspect.signature(kind).bind(**(options or {}))
    except TypeError as error:
        takes = ", ".join(inspect.signature(kind).parameters) or "none"
        unknown = [option for option in options or {} if option not in inspect.signature(kind).parameters]
        near = registry.meant(unknown[0], inspect.signature(kind).parameters) if unknown else ""
        raise ValueError(
            f"method {name!r}: {error}; {near}its options: {takes}{_misplaced(kind, options)}"
        ) from None
    return check_method(kind(**(options or {})), repr(name))


def check_method(method: Any, name: str = "") -> Method:
    """Return an object if it has the protocol `Method`.

    Raises:
        ValueError: it lacks `updates` or `controls`.
    """
    if not hasattr(method, "updates") or not isinstance(getattr(method, "controls", None), ControlSpace):
        raise ValueError(
            f"method {name or brief(method)} must have `updates` and a ControlSpace `controls`; see "
            "controlat.methods.Method"
        )
    return method  # type: ignore[no-any-return]


def _misplaced(kind: Any, options: Mapping[str, Any] | None) -> str:
    """A cure for options that are controls of the method: they belong in the schedule."""
    try:
        controls = kind().controls
    except Exception:  # a user's class may raise anything
        return ""
    misplaced = [name for name in options or {} if name in controls]
    return "".join(
        f"; {name} is a control: give it in the schedule, such as {name}=1..6" for name in misplaced
    )


def manual(name: str) -> str:
    """The manual of a method: its docstring, and its controls with their bounds and defaults.

    >>> print(manual("fast").splitlines()[-2])
      start: size of the start, in units of eps (>= 0; default 1)
    """
    kind = registry.import_path(name) if ":" in name else registry.member(__name__, name).METHOD
    lines = [inspect.getdoc(kind) or name, "", "Controls, for schedules:"]
    for key, knob in build(name).controls.items():
        bounds = f">= {knob.low:g}" if math.isinf(knob.high) else f"{knob.low:g} to {knob.high:g}"
        default = "" if knob.default is None else f"; default {knob.default:g}"
        lines.append(f"  {key}: {knob.meaning} ({bounds}{default})")
    return "\n".join(lines)


def describe() -> list[dict[str, Any]]:
    """The table of the methods: name, first line of the docstring, controls, cost, and source.

    Cost and source are read from the docstrings of `controls` and of the class.

    >>> [entry["controls"] for entry in describe() if entry["name"] == "pgd_at"]
    ['alpha, steps']
    """
    entries = []
    for name in names():
        method = build(name)
        kind = type(method)
        text = inspect.getdoc(kind) or ""
        knobs = [
            key if knob.default is None else f"{key} ({knob.default:g})"
            for key, knob in method.controls.items()
            if knob.low < knob.high
        ]
        cost = (inspect.getdoc(kind.controls) or "").partition(", at ")[2]
        entries.append(
            {
                "name": name,
                "what": text.partition("\n\n")[0].replace("\n", " "),
                "controls": ", ".join(knobs),
                "cost": " ".join(cost.split()).partition(". ")[0].rstrip("."),
                "sweep": isinstance(method, Prefixes),
                "source": text.partition("Source:\n")[2].strip().partition("\n")[0].strip().rstrip("."),
            }
        )
    return entries
