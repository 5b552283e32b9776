"""Terminal costs Phi(theta_T), the objective of training apart from its cost; one file of this folder each.

A file defines a function ``build``, which takes those of the arguments x, y, ball and seed that it needs and
returns a `Terminal`. The file's name is the name of the terminal cost; the first line of the docstring of
``build`` describes it.
"""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor

from controlat._util import registry
from controlat._util.checks import number
from controlat.attacks.balls import Ball
from controlat.pmp.terminal._base import (
    Evaluations,
    Terminal,
    check_terminal,
    described,
    differentiated,
)
from controlat.pmp.terminal._trial import terminal_evaluations, try_terminal
from controlat.pmp.terminal._weighted import Weighted
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = [
    "AdversarialLoss",
    "Evaluations",
    "Terminal",
    "Weighted",
    "build_terminal",
    "check_terminal",
    "describe",
    "described",
    "differentiated",
    "names",
    "parse_terminal",
    "terminal_evaluations",
    "try_terminal",
]

_WEIGHT, _NAME = r"[\d.]+(?:[eE][+-]?\d+)?(?:/\d+)?", r"[^\W\d][\w.:]*"
_TERM = re.compile(rf"\s*([+-]?)\s*(?:({_WEIGHT})\s*\*\s*)?({_NAME})\s*")


def names() -> tuple[str, ...]:
    """The names of the terminal costs in this folder.

    >>> names()
    ('adversarial', 'clean', 'margin')
    """
    return registry.names(__name__)


def describe() -> list[dict[str, str]]:
    """Name, description and gradient evaluations of every terminal cost in this folder.

    >>> [entry["gradients"] for entry in describe() if entry["name"] == "adversarial"]
    ['20 for its value, 21 for its gradient']
    """
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    entries = []
    for name in names():
        docstring = inspect.getdoc(registry.member(__name__, name).build) or ""
        what = docstring.partition("\n\n")[0].replace("\n", " ")
        declared = getattr(_named(name, x, y, Ball(0), 0), "evaluations", None)
        spent = "counted in a trial"
        if isinstance(declared, Evaluations):
            spent = f"{declared.value} for its value, {declared.gradient} for its gradient"
        entries.append({"name": name, "what": what, "gradients": spent})
    return entries


def parse_terminal(text: str) -> tuple[tuple[float, str], ...]:
    """The weights and names of a sum of terminal costs.

    Args:
        text: terms ``name`` or ``weight*name``, joined by + or -. A name is one of this folder, or
            ``package.module:factory`` for the user's own.

    Returns:
        (weight, name) of each term.

    Raises:
        ValueError: the text has another form, or a name is unknown.

    >>> parse_terminal("adversarial + 0.1*clean - 1/2*margin")
    ((1.0, 'adversarial'), (0.1, 'clean'), (-0.5, 'margin'))
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"terminal must be a text such as adversarial+0.1*clean, got a {kind}")
    parts: list[tuple[float, str]] = []
    position = 0
    while position < len(text) or not parts:
        term = _TERM.match(text, position)
        if term is None or (parts and not term[1]):
            raise ValueError(
                f"terminal {text!r} cannot be read from {text[position:]!r} on; it must be a name or a sum "
                "of them with weights in front, such as adversarial+0.1*clean"
            )
        sign, weight, name = term.groups()
        magnitude = number(weight or "1", f"a weight of terminal {text!r}")
        parts.append((-magnitude if sign == "-" else magnitude, _known(name)))
        position = term.end()
    return tuple(parts)


def _known(name: str) -> str:
    """The name itself, if it is in this folder or can be imported.

    Raises:
        ValueError: it is unknown, or not something to call.
    """
    if ":" not in name and name not in names():
        raise ValueError(
            f"unknown terminal cost {name!r}; {registry.meant(name, names())}choose from: "
            f"{', '.join(names())}, or give your own as package.module:factory"
        )
    if ":" in name and not callable(factory := registry.import_path(name)):
        kind = type(factory).__name__
        raise ValueError(f"terminal {name!r} is a {kind}; it must be a function or class to call")
    return name


def build_terminal(text: str, x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> Terminal:
    """The terminal cost of a text, such as ``adversarial+0.1*clean``.

    Args:
        text: as `parse_terminal` reads it. A factory of the user's is called with those of the keyword
            arguments x, y, ball and seed that it takes.
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        seed: seed of random starts.

    Raises:
        ValueError: the text cannot be read, or a factory returns no `Terminal`.

    >>> import torch
    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
    >>> build_terminal("0.1*clean", x, y, Ball("8/255")).describe()
    '0.1 * (clean cross-entropy on 8 held-out points)'
    """
    parts = tuple((weight, _named(name, x, y, ball, seed)) for weight, name in parse_terminal(text))
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Weighted(parts)


def _named(name: str, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Terminal:
    """The terminal cost of one name."""
    factory = name if ":" in name else f"{__name__}.{name}:build"
    terminal = registry.call_factory(factory, {"x": x, "y": y, "ball": ball, "seed": seed})
    check_terminal(terminal, f"what terminal {name!r} returns")
    return terminal  # type: ignore[return-value]
