"""Closed loops u_t = pi(t, z) by name, one file of this folder each.

A file defines a function ``build(method, ball, ...)``, whose other keyword arguments are the options, each
with a default, as texts; those of the parameters that name knobs of the method are passed on as ``knobs``. It
returns a `controlat.control.controller.Controller`. The file's name is the name of the controller, and the
first line of the docstring of ``build`` describes it.
"""

from __future__ import annotations

import inspect
from typing import Any

from controlat._util import registry
from controlat._util.texts import only, short, split
from controlat.attacks.balls import Ball
from controlat.control.controller import Controller
from controlat.methods import Method

__all__ = ["build", "describe", "names"]

_GIVEN = "method", "ball", "knobs"  # what a function `build` takes beside its options


def names() -> tuple[str, ...]:
    """The names of the closed loops in this folder.

    >>> names()
    ('greedy', 'horizon', 'ratio')
    """
    return registry.names(__name__)


def build(text: str, *, method: Method, ball: Ball) -> Controller:
    """A closed loop from its short text, ``name`` or ``name:option=value,...``.

    Beside the options, knobs of the method can be named, as for schedules.

    Args:
        text: as above.
        method: the training system.
        ball: the perturbation set.

    Raises:
        ValueError: unknown name or option, a number out of range, or nothing to choose: eps = 0, or a method
            without the knobs.

    >>> from controlat.methods import build as method_of
    >>> loop = build("ratio:threshold=1.1,most=6", method=method_of("pgd_at"), ball=Ball(0.1))
    >>> loop.most_expensive
    Control(alpha=0.05, steps=6)
    """
    name, parameters = split(text)
    factory = registry.member(__name__, name).build
    options, space = _options(name), method.controls
    only(parameters, (), {*options, *space}, f"controller {name!r}")
    if ball.eps == 0:
        raise ValueError(f"controller {name!r} chooses attacks, and eps = 0 allows none: give eps > 0")
    given: dict[str, Any] = {key: value for key, value in parameters.items() if key in options}
    knobs = {key: value for key, value in parameters.items() if key not in options}
    try:
        return factory(method, ball, **given, knobs=knobs)  # type: ignore[no-any-return]
    except ValueError as error:
        raise ValueError(f"controller {short(text)!r}: {error}") from None


def describe() -> list[dict[str, str]]:
    """Name, description and options, with their defaults, of every closed loop in this folder.

    >>> [entry["options"] for entry in describe() if entry["name"] == "greedy"]
    ['gamma (0.04), every (1), probe (512)']
    """
    entries = []
    for name in names():
        docstring = inspect.getdoc(registry.member(__name__, name).build) or ""
        options = [f"{key} ({value})" if value else key for key, value in _options(name).items()]
        what = docstring.partition("\n\n")[0].replace("\n", " ")
        source = docstring.partition("Source:\n")[2].strip().partition("\n\n")[0]
        entry = {"name": name, "what": what, "options": ", ".join(options)}
        entries.append(entry | {"source": " ".join(source.split()).rstrip(".")})
    return entries


def _options(name: str) -> dict[str, str]:
    """The options of a closed loop with their defaults, from the signature of its function `build`."""
    parameters = inspect.signature(registry.member(__name__, name).build).parameters
    return {key: p.default for key, p in parameters.items() if key not in _GIVEN}
