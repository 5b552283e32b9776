"""Schedules t -> u: one curve per knob, piecewise constant in training time t (epochs).

A schedule is written as a short text (`controlat.control.schedule_text`) or as JSON (`Schedule.save`,
`load_schedule`).
Every text is shorthand for curves, so that a found or derived schedule and a named one are the same object.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from controlat._util.checks import instance, number
from controlat._util.files import read_json, write_json
from controlat._util.texts import only, short
from controlat.control.space import Control, ControlSpace

if TYPE_CHECKING:
    from controlat.control.controller import Moment

__all__ = ["CURVES", "Curve", "Schedule", "load_schedule"]

FORMAT, VERSION = "controlat schedule", 1
_MAX_PIECES = 1_000_000
_ULP = 1e-9  # so that 0.1 * 3 falls into piece 3 and a K of 2.4999999999 rounds as 2.5


def _place(c: Curve, t: float) -> int:
    """How many of the epochs `at` have come by time t; a bisection, as there may be a million of them."""
    return bisect_right(c.at, t, key=lambda edge: edge - _ULP)


# kind -> value at time t of a run of T epochs, from the curve's numbers.
CURVES: Mapping[str, Callable[[Curve, float, float], float]] = MappingProxyType(
    {
        "constant": lambda c, t, T: c.values[0],
        "linear": lambda c, t, T: c.values[0] + (c.values[1] - c.values[0]) * t / T,
        "exponential": lambda c, t, T: c.values[0] * (c.values[1] / c.values[0]) ** (t / T),
        "cosine": lambda c, t, T: (
            c.values[0] + (c.values[1] - c.values[0]) * (1 - math.cos(math.pi * t / T)) / 2
        ),
        "ramp": lambda c, t, T: c.values[0] + (c.values[1] - c.values[0]) * min(t / c.at[0], 1.0),
        "step": lambda c, t, T: c.values[_place(c, t)],
        "table": lambda c, t, T: c.values[min(_place(c, t), len(c.values) - 1)],
        "ratio": lambda c, t, T: c.values[0],
    }
)
_LENGTHS = {"constant": 1, "linear": 2, "exponential": 2, "cosine": 2, "ramp": 2, "ratio": 1}
ROUNDINGS: Mapping[str, Callable[[float], int]] = MappingProxyType(
    {"half_up": lambda v: math.floor(v + 0.5 + _ULP), "floor": lambda v: math.floor(v + _ULP)}
)


@dataclass(frozen=True)
class Curve:
    """One knob as a function of time.

    Args:
        kind: ``constant`` (value), ``linear``, ``exponential`` or ``cosine`` (start, end), ``ramp`` (start,
            end: linear up to the epoch `at`), ``step`` (values, changing at the epochs `at`), ``table`` (one
            value per piece of the schedule; `at` is filled in), ``ratio`` (tau; the value is tau over the
            knob `of`, and 0 where that is 0).
        values: the numbers of that kind.
        at: epochs at which a ``step`` changes, increasing; the one epoch at which a ``ramp`` ends.
        rounding: ``half_up`` or ``floor`` for integer knobs, None for real ones.
        of: for ``ratio``: the knob divided by.
        rounded: for ``ratio``: divide by that knob's rounded value (then tau is kept exactly) or by its
            real one.

    Raises:
        ValueError: unknown kind, or numbers that do not fit it.
    """

    kind: str
    values: tuple[float, ...]
    at: tuple[float, ...] = ()
    rounding: str | None = None
    of: str | None = None
    rounded: bool = True

    def __post_init__(self) -> None:
        if self.kind not in CURVES:
            raise ValueError(f"a curve is one of {', '.join(CURVES)}, got {self.kind!r}")
        object.__setattr__(
            self, "values", tuple(number(v, f"value of a {self.kind} curve") for v in self.values)
        )
        object.__setattr__(self, "at", tuple(number(v, "epoch of a step") for v in self.at))
        wanted = _LENGTHS.get(self.kind, len(self.at) + 1 if self.kind == "step" else len(self.values))
        if len(self.values) != wanted or not self.values:
            raise ValueError(f"a {self.kind} curve takes {wanted or 'some'} values, got {len(self.values)}")
        if self.at and self.kind not in ("step", "table", "ramp"):
            raise ValueError(
                f"only a step changes at given epochs, but a {self.kind} curve got at = {short(self.at)}"
            )
        if self.kind == "ramp" and len(self.at) != 1:
            raise ValueError(f"a ramp curve ends at one epoch, got at = {short(self.at)}")
        if self.kind == "exponential" and min(self.values) <= 0:
            raise ValueError(f"an exponential curve needs start and end > 0, got {self.values}")
        for a, b in zip((0.0, *self.at), self.at, strict=False):
            if b <= a:
                raise ValueError(f"a step changes at increasing epochs > 0, got {b:g} after {a:g}")
        if self.rounding is not None and self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if (self.kind == "ratio") != (self.of is not None):
            raise ValueError("a ratio curve, and only that, names the knob it divides by (of)")

    def round(self, value: float, knob: str = "value") -> float:
        """The value as the knob takes it: rounded where the curve says so.

        Raises:
            ValueError: it is not finite; names the knob.
        """
        if not math.isfinite(value):
            raise ValueError(f"{knob} must be finite, got {value}")
        return ROUNDINGS[self.rounding](value) if self.rounding else value

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        found: dict[str, Any] = {"curve": self.kind, "values": list(self.values)}
        if self.kind in ("step", "ramp"):
            found["at"] = list(self.at)
        if self.rounding:
            found["rounding"] = self.rounding
        if self.of is not None:
            found |= {"of": self.of, "rounded": self.rounded}
        return found


@dataclass(frozen=True)
class Schedule:
    """A control u(t) over a run of T epochs.

    Called with a real t >= 0 it returns the frozen mapping u(t): constant on pieces of `resolution` epochs
    (its value at the start of the piece), and the last piece's value beyond the end.

    Args:
        curves: knob to `Curve`.
        epochs: T, the length of the run that it was made for.
        resolution: length of a piece, in epochs.
        text: what the user wrote, for tables; any label.
        defaults: constant values of knobs that have no curve, as `bound` takes them from a method.

    Raises:
        ValueError: a number is out of range, a knob has a curve and a default, or the control is not
            admissible somewhere (steps a whole number >= 0, alpha >= 0).

    >>> from controlat import parse_schedule
    >>> s = parse_schedule("amata:min=5,max=40,tau=0.4", epochs=7)
    >>> [s(t)["steps"] for t in range(7)]
    [5, 10, 15, 20, 25, 30, 35]
    >>> s(0.99) == s(0), s(100) == s(6)
    (True, True)
    """

    curves: Mapping[str, Curve]
    epochs: float
    resolution: float = 1.0
    text: str = ""
    defaults: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        instance(self.curves, Mapping, "curves", "a Curve for every knob")
        instance(self.text, str, "text")
        object.__setattr__(self, "epochs", number(self.epochs, "epochs"))
        object.__setattr__(self, "resolution", number(self.resolution, "resolution"))
        if self.epochs <= 0:
            raise ValueError(f"epochs must be > 0, got {self.epochs:g}")
        if not 0 < self.resolution <= self.epochs:
            raise ValueError(
                f"resolution must be > 0 and at most the {self.epochs:g} epochs, got {self.resolution:g}"
            )
        if self.epochs / self.resolution > _MAX_PIECES:
            raise ValueError(
                f"{self.epochs:g} epochs at a resolution of {self.resolution:g} have more than "
                f"{_MAX_PIECES:,} pieces; take a coarser resolution"
            )
        if not self.curves:
            raise ValueError("a schedule needs at least one knob")
        object.__setattr__(
            self, "curves", MappingProxyType({k: self._bound(k, c) for k, c in self.curves.items()})
        )
        if twice := sorted(set(self.curves) & set(self.defaults)):
            raise ValueError(f"{', '.join(twice)} cannot have both a curve and a default")
        object.__setattr__(self, "defaults", MappingProxyType(dict(Control(**self.defaults))))
        known: dict[tuple[float, ...], Control] = {}  # most pieces share their control with others
        object.__setattr__(self, "_pieces", tuple(self._at(i, known) for i in range(self.pieces)))

    def _bound(self, knob: str, curve: Curve) -> Curve:
        if curve.of is not None and (curve.of not in self.curves or self.curves[curve.of].of is not None):
            raise ValueError(f"{knob} divides by {curve.of!r}, which has no curve of its own here")
        if curve.kind != "table":
            return curve
        if len(curve.values) > self.pieces:
            raise ValueError(
                f"a table for {knob} has {len(curve.values)} values, but {self.epochs:g} epochs at a "
                f"resolution of {self.resolution:g} have {self.pieces} pieces"
            )
        edges = tuple(self.resolution * i for i in range(1, len(curve.values)))
        return curve if curve.at == edges else replace(curve, at=edges)

    @property
    def pieces(self) -> int:
        """Number of pieces on which u is constant."""
        return max(1, math.ceil(self.epochs / self.resolution - _ULP))

    def _at(self, piece: int, known: dict[tuple[float, ...], Control]) -> Control:
        t = piece * self.resolution
        try:
            values = tuple(self._values(t))
            if values not in known:
                known[values] = self._control(dict(zip(self.curves, values, strict=True)))
        except ValueError as error:
            raise ValueError(f"{error} at epoch {t:g} of {short(self.text)!r}") from None
        return known[values]

    def _values(self, t: float) -> Iterable[float]:
        """The value of every knob at time t, in the order of the curves."""
        real = {knob: CURVES[c.kind](c, t, self.epochs) for knob, c in self.curves.items()}
        for knob, curve in self.curves.items():
            if curve.of is not None:
                below = self.curves[curve.of].round(real[curve.of], curve.of)
                divisor = below if curve.rounded else real[curve.of]
                real[knob] = curve.values[0] / divisor if below and divisor else 0.0
            yield curve.round(real[knob], knob)

    def _control(self, value: dict[str, float]) -> Control:
        steps = value.get("steps", 0)
        if steps != int(steps):
            raise ValueError(f"steps must be a whole number, got {steps:g}")
        for knob in ("steps", "alpha"):
            if value.get(knob, 0) < 0:
                raise ValueError(f"{knob} must be >= 0, got {value[knob]:g}")
        return Control(**self.defaults, **value)

    def __call__(self, t: float) -> Control:
        """u(t), t in epochs since the start of training.

        Raises:
            ValueError: t is negative or not finite.
        """
        t = number(t, "t")
        if t < 0:
            raise ValueError(f"a schedule starts at t = 0, got t = {t:g}")
        pieces: tuple[Control, ...] = self._pieces  # type: ignore[attr-defined]
        return pieces[int(min(t / self.resolution + _ULP, self.pieces - 1))]

    def control(self, now: Moment, z: object = None) -> Control:
        """u at the start of a step, whatever the state z: a schedule is an open loop."""
        return self(now.t)

    def bound(self, space: ControlSpace) -> Schedule:
        """This schedule for a method: knobs without a curve take the method's defaults.

        Raises:
            ValueError: the method has no such knob, lacks one, or does not admit a control.

        >>> from controlat import parse_schedule
        >>> from controlat.methods import build
        >>> dict(parse_schedule("fgsm:alpha=0.1", 5).bound(build("fast").controls)(0))
        {'alpha': 0.1, 'random': 1.0, 'start': 1.0, 'steps': 1}
        """
        plain = replace(self, defaults={}) if self.defaults else self
        for u in dict.fromkeys(plain._pieces):  # type: ignore[attr-defined]
            space.check(u)
        curves = {
            name: replace(c, rounding="half_up")  # of whole numbers, so that they come as int
            if c.rounding is None and name != "steps" and space[name].kind == "integer"
            else c
            for name, c in self.curves.items()
        }
        defaults = {
            name: int(knob.default) if knob.kind == "integer" else knob.default
            for name, knob in space.items()
            if name not in curves and knob.default is not None
        }
        if not defaults and curves == self.curves:
            return plain
        return replace(plain, curves=curves, defaults=defaults)

    def unreached(self) -> dict[str, tuple[float, ...]]:
        """Epochs at which a knob would change, or its ramp end, but which no piece within `epochs` reaches.

        Returns:
            Knob to those epochs, none where all are reached. Between two changes within one piece the first
            is not reached.

        >>> from controlat import parse_schedule
        >>> replace(parse_schedule("step:steps=0:2:10,at=3:8,alpha=0.1", epochs=12), epochs=5).unreached()
        {'steps': (8.0,)}
        """
        starts = [piece * self.resolution for piece in range(self.pieces)]
        found = {}
        for knob, curve in self.curves.items():
            if curve.kind == "step":
                taken = {_place(curve, t) for t in starts}
                found[knob] = tuple(e for i, e in enumerate(curve.at, start=1) if i not in taken)
            elif curve.kind == "ramp" and curve.at[0] > self.epochs + _ULP:
                found[knob] = curve.at
        return {knob: at for knob, at in found.items() if at}

    def __hash__(self) -> int:
        held = frozenset(self.curves.items()), frozenset(self.defaults.items())
        return hash((*held, self.epochs, self.resolution, self.text))

    def __reduce__(self) -> tuple[Any, ...]:  # pickles and deep copies, which a mapping proxy refuses
        return Schedule.from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        """The JSON form; `Schedule.from_json` reads it back to an equal schedule."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "text": self.text,
            "epochs": self.epochs,
            "resolution": self.resolution,
            "knobs": {knob: curve.to_json() for knob, curve in self.curves.items()},
            **({"defaults": dict(self.defaults)} if self.defaults else {}),
        }

    @classmethod
    def from_json(cls, found: object) -> Schedule:
        """Build a schedule from its JSON form.

        Raises:
            ValueError: it is not one, or of another version; the message says what is allowed.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f'not a schedule: expected an object with "format": "{FORMAT}"')
        if found.get("version") != VERSION:
            raise ValueError(
                f"schedule version {found.get('version')!r}; this release reads version {VERSION}"
            )
        optional = {"resolution", "defaults"}
        only(found, {"format", "version", "text", "epochs", "knobs"}, optional, "a schedule")
        knobs = found["knobs"]
        if not isinstance(knobs, dict) or not all(isinstance(c, dict) for c in knobs.values()):
            raise ValueError('"knobs" must map each knob to a curve')
        curves = {}
        for knob, c in knobs.items():
            only(c, {"curve", "values"}, {"at", "rounding", "of", "rounded"}, f"the curve of {knob}")
            if not isinstance(c["values"], list) or not isinstance(c.get("at", []), list):
                raise ValueError(f"the curve of {knob}: values and at must be lists of numbers")
            _plain_numbers((*c["values"], *c.get("at", ())), f"the curve of {knob}")
            if not isinstance(c.get("rounded", True), bool):
                raise ValueError(f"the curve of {knob}: rounded is true or false, got {c['rounded']!r}")
            options = {k: c[k] for k in ("rounding", "of", "rounded") if k in c}
            curves[knob] = Curve(c["curve"], tuple(c["values"]), tuple(c.get("at", ())), **options)
        _plain_numbers((found["epochs"], found.get("resolution", 1.0)), "epochs and resolution")
        if not isinstance(found["text"], str):
            raise ValueError(f"text must be a string, got {found['text']!r}")
        defaults = found.get("defaults", {})
        if not isinstance(defaults, dict):
            raise ValueError('"defaults" must map each knob to a number')
        _plain_numbers(defaults.values(), "defaults")
        return cls(curves, found["epochs"], found.get("resolution", 1.0), found["text"], defaults)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the JSON form.

        Raises:
            FileExistsError: the file exists and `overwrite` is false.
        """
        if Path(path).exists() and not overwrite:
            raise FileExistsError(f"{path} exists; give another name or overwrite=True")
        write_json(path, self.to_json())


def _plain_numbers(values: Iterable[object], what: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{what}: expected plain numbers, got {value!r}")


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule from its JSON file, for the trainer or for your own loop.

    Args:
        path: a file that `Schedule.save` or a command wrote.

    Returns:
        The schedule; ``schedule(epoch)`` gives the keyword arguments of `controlat.pgd`.

    Raises:
        ValueError: the file is missing, not JSON, or not a schedule; the message names it.

    >>> import tempfile, os
    >>> from controlat import parse_schedule
    >>> file = os.path.join(tempfile.mkdtemp(), "amata.json")
    >>> parse_schedule("amata:min=2,max=10,tau=20/255", epochs=100).save(file)
    >>> dict(load_schedule(file)(0))
    {'alpha': 0.0392156862745098, 'steps': 2}
    """
    found = read_json(path)
    try:
        return Schedule.from_json(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
