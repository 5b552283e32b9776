"""Search spaces: the text of a schedule or closed loop in which some numbers are ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.stats.qmc import Sobol

from controlat._util.checks import instance, number
from controlat._util.registry import meant
from controlat._util.texts import short
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule
from controlat.control.space import Knob

__all__ = ["CLOSED_LOOPS", "SCALES", "SPACES", "Parameter", "Point", "Space", "named_space"]

Point = Mapping[str, float]
SCALES = ("linear", "log", "root", "whole")
_RANGE = re.compile(r"([^~:,=]+~[^:,=]*)")  # not braces or brackets, which the shell interprets
_DIGITS = 4  # of a number in a schedule's text


@dataclass(frozen=True)
class Parameter:
    """A free number of a search space.

    Args:
        name: such as ``"steps"``, or ``"steps[0]"`` where a value has several free numbers.
        low: its smallest value.
        high: its largest value.
        scale: ``linear``, ``log`` (searched on a logarithmic scale), ``root`` (on that of square roots: more
            of the small values) or ``whole`` (a whole number).

    Raises:
        ValueError: the range is empty, or its bounds do not fit the scale.
    """

    name: str
    low: float
    high: float
    scale: str = "linear"

    def __post_init__(self) -> None:
        written = f"{self.low:g}~{self.high:g}~{self.scale}"
        if self.scale not in SCALES:
            raise ValueError(f"{self.name}: a range is one of {', '.join(SCALES)}, got {written}")
        if not self.low < self.high:
            raise ValueError(f"{self.name}: a range goes from a number to a larger one, got {written}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"{self.name}: a range on a log scale starts above 0, got {written}")
        if self.scale == "whole" and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"{self.name}: whole numbers range between whole numbers, got {written}")

    def value(self, share: float) -> float:
        """The value at a share of the range, 0 to 1, as it stands in a schedule's text."""
        share = min(max(share, 0.0), 1.0)
        if self.scale == "whole":
            return min(math.floor(self.low + share * (self.high - self.low + 1)), self.high)
        if self.scale == "log":
            return self._rounded(self.low * (self.high / self.low) ** share)
        if self.scale == "root":
            share = share**2
        return self._rounded(self.low + share * (self.high - self.low))

    def share(self, value: float) -> float:
        """The share of the range at which a value lies: the inverse of `value`, up to rounding."""
        if self.scale == "whole":
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        share = (value - self.low) / (self.high - self.low)
        return math.sqrt(share) if self.scale == "root" else share

    def _rounded(self, value: float) -> float:
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Space:
    """A set of schedules or closed loops: the text of one, with ranges ``low~high`` in place of some numbers.

    ``low~high~log`` is searched on a logarithmic scale, ``low~high~root`` on that of square roots,
    ``low~high~whole`` over whole numbers. A point of the space is {name of a parameter: value}; in the unit
    cube each parameter goes from 0 to 1. Bounds may be fractions such as ``2/255``.

    Args:
        text: as above.
        epochs: length of a run.
        knobs: the method's controls.
        starts: what is tried first, a number for each parameter.

    Raises:
        ValueError: the text has no range, a range cannot be read, or the schedules at its ends are refused.

    >>> space = Space("anneal:steps=0~4:2~8,alpha=0.01~0.1~log", 12)
    >>> [p.name for p in space.parameters]
    ['steps[0]', 'steps[1]', 'alpha']
    >>> space.text_of(space.point([0.5, 1, 0.5]))
    'anneal:steps=2:8,alpha=0.03162'
    """

    text: str
    epochs: int
    knobs: Mapping[str, Knob] | None = None
    starts: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        instance(self.text, str, "the text of a search space")
        if not self.parameters:
            raise ValueError(
                f"a search space needs a range, such as 0~8 or 0.01~0.3~log, got {short(self.text)!r}"
            )
        if self.open_loop:
            for share in (0.0, 1.0):
                self.schedule(self.point([share] * len(self.parameters)))

    @property
    def open_loop(self) -> bool:
        """Whether it consists of schedules; closed loops are for who knows method and eps to check."""
        return self.text.partition(":")[0].strip() not in CLOSED_LOOPS

    @cached_property
    def _pieces(self) -> list[str]:
        """The text around the ranges, and the ranges, in turn."""
        return _RANGE.split(self.text)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The free numbers, in the order of the text."""
        before, ranges = self._pieces[::2], self._pieces[1::2]
        owners = [re.findall(r"(\w+)=", "".join(before[: i + 1]))[-1:] or ["?"] for i in range(len(ranges))]
        names = [owner for (owner,) in owners]
        numbered = [
            f"{name}[{names[:i].count(name)}]" if names.count(name) > 1 else name
            for i, name in enumerate(names)
        ]
        return tuple(map(_parameter, numbered, ranges))

    def point(self, shares: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
        """The point at these coordinates of the unit cube."""
        return {p.name: p.value(float(share)) for p, share in zip(self.parameters, shares, strict=True)}

    def shares(self, point: Point) -> list[float]:
        """The coordinates of a point in the unit cube."""
        return [p.share(point[p.name]) for p in self.parameters]

    def design(self, seed: int) -> Iterator[dict[str, float]]:
        """Points to begin with, without end: `starts`, then a scrambled Sobol sequence, uniform on the cube.

        Source:
            Sobol (1967); Owen (1998), scrambling.
        """
        for values in self.starts:
            pairs = zip(self.parameters, values, strict=True)
            yield {p.name: p.value(p.share(min(max(v, p.low), p.high))) for p, v in pairs}
        sobol = Sobol(len(self.parameters), rng=np.random.default_rng(seed))
        while True:
            yield self.point(sobol.random()[0])

    def text_of(self, point: Point) -> str:
        """The text of the schedule at a point."""
        values = [f"{point[p.name]:.{_DIGITS + 2}g}" for p in self.parameters]
        return "".join(a + b for a, b in zip(self._pieces[::2], [*values, ""], strict=True))

    def schedule(self, point: Point) -> Schedule:
        """The schedule at a point."""
        return parse_schedule(self.text_of(point), self.epochs, self.knobs)


def _parameter(name: str, text: str) -> Parameter:
    """The parameter of a range ``low~high`` or ``low~high~scale``."""
    low, high, *scale = (part.strip() for part in text.split("~"))
    if len(scale) > 1:
        raise ValueError(f"{name}: a range is low~high or low~high~scale, got {short(text)!r}")
    return Parameter(name, number(low, name), number(high, name), *scale)


# Named spaces, of eps, the largest K and the length T of a run; alpha from a tenth of eps to 2 eps.
_ALPHA = "{fine:.4g}~{coarse:.4g}~log"
_STEPS = "{least}~{most}~root"
SPACES: Mapping[str, str] = MappingProxyType(
    {
        "anneal": f"anneal:steps={_STEPS}:{_STEPS},alpha={_ALPHA}:{_ALPHA}",
        "knots": f"anneal:steps={':'.join([_STEPS] * 4)},alpha={_ALPHA}:{_ALPHA}",
        "constant": f"anneal:steps={_STEPS},alpha={_ALPHA}",
        "amata": f"amata:start={_STEPS},end={_STEPS},tau={{eps:.4g}}~{{tau:.4g}}~log,rounding=dither",
        "exponential": "exponential:start={little}~{most}~log,end={little}~{most}~log,"
        "tau={eps:.4g}~{tau:.4g}~log,rounding=dither",
        "delayed": f"delayed:steps=1~{{most}}~whole,alpha={_ALPHA},since=0.01~{{late:.4g}}",
        "stages": f"step:steps={':'.join([_STEPS] * 4)},alpha={':'.join([_ALPHA] * 4)},"
        "at={changes},rounding=dither",
    }
)
# One for every closed loop of controlat/pmp/controllers.
CLOSED_LOOPS: Mapping[str, str] = MappingProxyType(
    {
        "ratio": "ratio:threshold=1.01~2~log,most={most},tau={eps:.4g}~{tau:.4g}~log",
        "greedy": "greedy:gamma=0.0003~3~log,steps={least}..{most}",
        "horizon": "horizon:gamma=0.00003~0.03~log,steps={least}..{most}",
    }
)

_LEAST_EPOCHS = {"delayed": 2, "stages": 4}  # in which all changes of the controls take place


def _starts(name: str, eps: float, most: float, epochs: int) -> list[list[float]]:
    """What is tried first in a named space: what the literature trains with, and plain ramps up from 0."""
    alpha, ends = eps / 1.5, (0.3 * most, 0.5 * most, most)
    return {
        "anneal": [[0, end, alpha, alpha] for end in ends],
        "knots": [[0, end / 3, 2 * end / 3, end, alpha, alpha] for end in ends],
        "constant": [[most / 5, alpha]],
        "amata": [[1, most, 2 * eps]],
        "delayed": [[most, 2.5 * eps / most, 0.4 * epochs]],
        "ratio": [[1.1, 2 * eps]],
        "greedy": [[0.04]],
    }.get(name, [])


def named_space(
    name: str, *, eps: float, max_steps: int, epochs: int, knobs: Mapping[str, Knob] | None = None
) -> Space:
    """A space of `SPACES` or `CLOSED_LOOPS` by its name, or of its own text if that has ranges.

    A range of a named space that holds one number, such as that of K where a method takes one step, is that
    number.

    Args:
        name: a name, or a text as `Space` takes it.
        eps: radius, in pixel units.
        max_steps: largest K; that of the method where it takes fewer.
        epochs: length of a run.
        knobs: the method's controls.

    Raises:
        ValueError: there is no such space, the method does not take its schedules, or a run is too short for
            them.

    >>> named_space("amata", eps=0.1, max_steps=10, epochs=12).parameters[2]
    Parameter(name='tau', low=0.1, high=2.0, scale='log')
    """
    if "~" in name:
        return Space(name, epochs, knobs)
    named = {**SPACES, **CLOSED_LOOPS}
    if name not in named:
        raise ValueError(
            f"unknown space {short(name)!r}; {meant(name, named)}it is one of {', '.join(named)}, or the "
            "text of a schedule or closed loop with ranges, such as pgd:steps=1~10~whole,alpha=0.01~0.3~log"
        )
    if epochs < (needed := _LEAST_EPOCHS.get(name, 1)):
        raise ValueError(f"{name} needs runs of at least {needed} epochs, got {epochs}; take another space")
    steps = (knobs or {}).get("steps")
    least, most = (0, max_steps) if steps is None else (steps.low, min(max_steps, steps.high))
    text = named[name].format(
        eps=eps,
        least=f"{least:g}",
        little=f"{max(least, 0.1):g}",
        fine=eps / 10,
        coarse=2 * eps,
        tau=2 * most * eps,
        most=f"{most:g}",
        late=min(0.9 * epochs, epochs - 1),  # a change in the last epoch would come too late
        changes=":".join(f"{i * epochs / 4:g}" for i in (1, 2, 3)),
    )
    pieces = _RANGE.split(text)
    free = [len(set(written.split("~")[:2])) > 1 for written in pieces[1::2]]
    pieces[1::2] = [w if f else w.partition("~")[0] for w, f in zip(pieces[1::2], free, strict=True)]
    starts = dict.fromkeys(tuple(compress(values, free)) for values in _starts(name, eps, most, epochs))
    return Space("".join(pieces), epochs, knobs, tuple(starts))
