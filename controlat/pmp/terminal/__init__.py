"""Terminal costs Phi(theta_T): what training is for. A file of this folder is one, by its name.

Each file defines ``build(x, y, ball, seed)``, or with those of these arguments that it needs, which returns a
`Terminal`. The first line of its docstring says what the cost is.
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
    Price,
    Terminal,
    check_terminal,
    described,
    differentiated,
)
from controlat.pmp.terminal._trial import price, try_terminal
from controlat.pmp.terminal._weighted import Weighted
from controlat.pmp.terminal.adversarial import AdversarialLoss

__all__ = [
    "AdversarialLoss",
    "Price",
    "Terminal",
    "Weighted",
    "build_terminal",
    "check_terminal",
    "describe",
    "described",
    "differentiated",
    "names",
    "parse_terminal",
    "price",
    "try_terminal",
]

_WEIGHT, _NAME = r"[\d.]+(?:[eE][+-]?\d+)?(?:/\d+)?", r"[^\W\d][\w.:]*"
_TERM = re.compile(rf"\s*([+-]?)\s*(?:({_WEIGHT})\s*\*\s*)?({_NAME})\s*")


def names() -> tuple[str, ...]:
    """The terminal costs in this folder.

    >>> names()
    ('adversarial', 'clean', 'margin')
    """
    return registry.names(__name__)


def describe() -> list[dict[str, str]]:
    """Every terminal cost of this folder: its name, what it is, and what a call of it spends.

    >>> [entry["gradients"] for entry in describe() if entry["name"] == "adversarial"]
    ['20 for its value, 21 for its gradient']
    """
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    every = []
    for name in names():
        what = inspect.getdoc(registry.member(__name__, name).build) or ""
        declared = getattr(_named(name, x, y, Ball(0), 0), "price", None)
        spent = "counted in a trial"
        if isinstance(declared, Price):
            spent = f"{declared.value} for its value, {declared.gradient} for its gradient"
        every.append({"name": name, "what": what.partition("\n\n")[0].replace("\n", " "), "gradients": spent})
    return every


def parse_terminal(text: str) -> tuple[tuple[float, str], ...]:
    """Weights and names of a sum of terminal costs.

    Args:
        text: names of this folder or the user's own package.module:factory, each with a weight before it or
            without, joined by + or -.

    Raises:
        ValueError: it has another form, or a name is unknown.

    >>> parse_terminal("adversarial + 0.1*clean - 1/2*margin")
    ((1.0, 'adversarial'), (0.1, 'clean'), (-0.5, 'margin'))
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"terminal must be a text such as adversarial+0.1*clean, got a {kind}")
    parts: list[tuple[float, str]] = []
    at = 0
    while at < len(text) or not parts:
        term = _TERM.match(text, at)
        if term is None or (parts and not term[1]):
            raise ValueError(
                f"terminal {text!r} cannot be read from {text[at:]!r} on; it must be a name or a sum of them "
                "with weights in front, such as adversarial+0.1*clean"
            )
        sign, weight, name = term.groups()
        size = number(weight or "1", f"a weight of terminal {text!r}")
        parts.append((-size if sign == "-" else size, _known(name)))
        at = term.end()
    return tuple(parts)


def _known(name: str) -> str:
    """A name that `build_terminal` can do something with."""
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
    """Make the terminal cost that a text names.

    Args:
        text: as `parse_terminal` reads it. The user's own factory is called with those of the keywords x, y,
            ball and seed that it takes.
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        seed: of random starts.

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
    """One terminal cost by its name."""
    factory = name if ":" in name else f"{__name__}.{name}:build"
    made = registry.call_factory(factory, {"x": x, "y": y, "ball": ball, "seed": seed})
    check_terminal(made, f"what terminal {name!r} returns")
    return made  # type: ignore[return-value]
