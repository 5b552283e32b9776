"""Schedules as settings: their short texts and files, and those of the demo."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from fractions import Fraction

from controlat._util.checks import number
from controlat._util.files import expanded
from controlat.control.schedule_text import FAMILIES, parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Knob
from controlat.pmp import controllers

__all__ = ["default_schedules", "names_controller", "names_factory", "read_schedule"]


def default_schedules(eps: str | float) -> tuple[str, ...]:
    """The schedules of the demo, with step sizes in proportion to eps: alpha K = 2 eps where K varies.

    >>> default_schedules("8/255")[1:4]
    ('fgsm:alpha=8/255', 'pgd:steps=10,alpha=2/255', 'amata:min=1,max=10,tau=16/255')
    >>> default_schedules(0.15)[2]
    'pgd:steps=10,alpha=0.0375'
    """
    one, quarter, twice = (_times(eps, factor) for factor in (Fraction(1), Fraction(1, 4), Fraction(2)))
    return (
        "none",
        f"fgsm:alpha={one}",
        f"pgd:steps=10,alpha={quarter}",
        f"amata:min=1,max=10,tau={twice}",
        f"exponential:min=1,max=10,tau={twice}",
        f"cosine:min=0,max=6,tau={twice}",
    )


def _times(eps: str | float, factor: Fraction) -> str:
    """A multiple of eps as one would write it: a fraction stays one."""
    if "/" not in str(eps):
        return f"{number(eps, 'eps') * factor:.12g}"
    product, below = Fraction(str(eps).strip()) * factor, str(eps).partition("/")[2].strip()
    whole = below.isdigit() and (product * int(below)).denominator == 1
    return f"{product * int(below)}/{below}" if whole else str(product)


def read_schedule(text: str, epochs: float, knobs: Mapping[str, Knob] | None = None) -> Schedule:
    """A schedule from its short text, or from a JSON file whose name ends in .json.

    Raises:
        ValueError: as `parse_schedule` and `load_schedule`.
    """
    path = expanded(text.strip())
    if os.path.isfile(path / "schedule.json"):  # False too for a text that is too long for a name
        raise ValueError(f"{text} is a directory; its schedule is {path / 'schedule.json'}")
    if path.suffix == ".json":
        return load_schedule(path)
    with warnings.catch_warnings():  # commands note what training never comes to, of files too
        warnings.simplefilter("ignore")
        return parse_schedule(text, epochs, knobs)


def names_factory(text: str) -> bool:
    """Whether a text names the user's own controller, package.module:factory, rather than a schedule.

    >>> names_factory("my_rules:rule"), names_factory("pgd:steps"), names_factory("run:schedule.json")
    (True, False, False)
    """
    module, _, name = text.strip().partition(":")
    parts = [*module.split("."), *name.split(".")]
    return all(map(str.isidentifier, parts)) and module not in FAMILIES and parts[-1] != "json"


def names_controller(text: str) -> bool:
    """Whether a text names a closed loop, one of controlat or the user's own, rather than a schedule.

    >>> names_controller("greedy:gamma=0.01"), names_controller("my_rules:rule"), names_controller("none")
    (True, True, False)
    """
    return names_factory(text) or text.partition(":")[0].strip() in controllers.names()
