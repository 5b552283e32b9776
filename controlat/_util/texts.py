"""Texts of the form ``family:name=value,...``, as for schedules, and the formatting of numbers and tables."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence

from controlat._util.checks import number
from controlat._util.registry import meant

__all__ = ["count", "duration", "numbers", "only", "short", "speaker", "split", "table"]


def split(text: str) -> tuple[str, dict[str, str]]:
    """Split a text into its family and its parameters.

    Raises:
        ValueError: a part is not name=value, or a name comes twice.

    >>> split("pgd:steps=10,alpha=2/255")
    ('pgd', {'steps': '10', 'alpha': '2/255'})
    """
    family, _, rest = text.strip().partition(":")
    parameters: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        name, sign, value = (part.strip() for part in item.partition("="))
        if not (name and sign and value):
            raise ValueError(f"expected name=value, got {item!r} in {text!r}")
        if name in parameters:
            raise ValueError(f"{name} is given twice in {text!r}")
        parameters[name] = value
    return family.strip(), parameters


def only(given: Mapping[str, object], required: Iterable[str], optional: Iterable[str], what: str) -> None:
    """Raise ValueError unless the given names are all the required ones, and optional ones."""
    required, optional = set(required), set(optional)
    if unknown := sorted(set(given) - required - optional):  # first: a misspelt name is missing, too
        allowed = ", ".join(sorted(required | optional)) or "nothing"
        near = meant(unknown[0], required | optional)
        raise ValueError(f"{what} does not take {', '.join(unknown)}; {near}it takes {allowed}")
    if missing := sorted(required - set(given)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def numbers(text: str, name: str) -> tuple[float, ...]:
    """A list of numbers separated by colons.

    Not by commas, which separate parameters, nor by bars or semicolons, which the shell interprets.

    >>> numbers("0:1:5/2", "steps")
    (0.0, 1.0, 2.5)
    """
    return tuple(number(part, name) for part in text.split(":"))


def short(value: object, length: int = 100) -> str:
    """A value as a text, with the middle left out if it is long: a schedule may list a million numbers.

    >>> short("table:steps=0:1:2:3:4:5,tau=0.3", length=20)
    'table:steps...au=0.3'
    """
    text = str(value)
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 3]}...{text[-end:]}"


def count(value: float) -> str:
    """A large number with its unit.

    >>> count(1_234_567), count(950)
    ('1.23 M', '950')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours.

    >>> duration(30), duration(600), duration(7200)
    ('30 seconds', '10 minutes', '2.0 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def speaker() -> str:
    """A prefix for messages: the number of this process, empty for the first or only one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" or os.environ.get("WORLD_SIZE", "1") == "1" else f"[process {rank}]"


def table(heads: Sequence[str], cells: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """An aligned table, which is also valid Markdown: columns of `words` to the left, others to the right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---|
    | x | 1 |
    """
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(heads), rule, *map(line, cells)])
