"""Schedules t -> u: one curve per knob, piecewise constant in training time t (epochs).

A schedule is written as a short text (`controlat.control.schedule_text`) or as JSON (`Schedule.save`,
`load_schedule`).
Every text is shorthand for curves, so that a found or derived schedule and a named one are the same object.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from controlat._util.checks import instance, number, whole
from controlat._util.files import read_json, write_json
from controlat._util.texts import only, short
from controlat.control.curves import SLACK, Curve, dithered
from controlat.control.space import Control, ControlSpace

if TYPE_CHECKING:
    from controlat.control.controller import Moment

__all__ = ["Curve", "Schedule", "load_schedule"]

FORMAT, VERSION = "controlat schedule", 1
_MAX_PIECES = 1_000_000
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Schedule:
    """A control u(t) over a run of T epochs.

    Called with a real t >= 0 it returns the frozen mapping u(t): constant on pieces of `resolution` epochs
    (its value at the start of the piece), and the last piece's value beyond the end. Where a knob is dithered
    u(t) has its real value; the control of a step, in whole numbers, is that of `at`.

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
        object.__setattr__(self, "_epochs", {})

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
        return max(1, math.ceil(self.epochs / self.resolution - SLACK))

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
        real = self._real(t)
        for knob, curve in self.curves.items():
            if curve.of is not None:
                divided = self.curves[curve.of]
                taken = divided.round(real[curve.of], curve.of)
                if divided.rounding == "dither" and 0 < taken < 1:
                    taken = 1  # in the steps that take it at all
                real[knob] = curve.over(real[curve.of], taken)
            yield curve.round(real[knob], knob)

    def _real(self, t: float) -> dict[str, float]:
        """The value of every curve at time t, before it is rounded or divided by."""
        return {knob: curve(t, self.epochs) for knob, curve in self.curves.items()}

    def _control(self, value: dict[str, float]) -> Control:
        steps = value.get("steps", 0)
        if steps != int(steps) and self.curves["steps"].rounding != "dither":
            raise ValueError(f"steps without rounding=dither must be a whole number, got {steps:g}")
        for knob in ("steps", "alpha"):
            if value.get(knob, 0) < 0:
                raise ValueError(f"{knob} must be >= 0, got {value[knob]:g}")
        return Control(**self.defaults, **value)

    def _piece(self, t: float) -> int:
        return int(min(t / self.resolution + SLACK, self.pieces - 1))

    def __call__(self, t: float) -> Control:
        """u(t), t in epochs since the start of training; real where a knob is dithered.

        Raises:
            ValueError: t is negative or not finite.
        """
        t = number(t, "t")
        if t < 0:
            raise ValueError(f"a schedule starts at t = 0, got t = {t:g}")
        pieces: tuple[Control, ...] = self._pieces  # type: ignore[attr-defined]
        return pieces[self._piece(t)]

    def at(self, epoch: int, batch: int, batches: int) -> Control:
        """The control of one step, u(epoch + batch/batches), in whole numbers where a knob is dithered.

        Over any consecutive steps of an epoch the sum of a dithered knob differs from that of its real values
        by less than 1 (`controlat.control.curves.dithered`). Each epoch begins at another phase, the
        multiples of the golden ratio, so that the first step of an epoch takes the ceiling as often as
        others. A ``ratio`` divides by the number that the step takes, or by the real one.

        Args:
            epoch: epoch, from 0.
            batch: position of the step in its epoch, from 0.
            batches: steps per epoch.

        Returns:
            The control, such as the keyword arguments of `controlat.pgd`.

        Raises:
            ValueError: there is no such step.

        >>> from controlat import parse_schedule
        >>> s = parse_schedule("pgd:steps=2.5,alpha=0.1,rounding=dither", epochs=2)
        >>> [s.at(0, batch, 6)["steps"] for batch in range(6)], s(0)["steps"]
        ([3, 2, 3, 2, 3, 2], 2.5)
        """
        epoch, batches = whole(epoch, "epoch", 0), whole(batches, "batches", 1)
        batch = whole(batch, "batch", 0)
        if batch >= batches:
            raise ValueError(f"batch must be below the {batches} batches of an epoch, got {batch}")
        if not self._dithered:
            return self(epoch + batch / batches)
        known: dict[tuple[int, int], tuple[Control, ...]] = self._epochs  # type: ignore[attr-defined]
        if (epoch, batches) not in known:
            while len(known) > 1:  # consecutive steps are asked for, also around the end of an epoch
                known.pop(next(iter(known)))
            known[epoch, batches] = self._steps(epoch, batches)
        return known[epoch, batches][batch]

    @property
    def _dithered(self) -> tuple[str, ...]:
        """The knobs that are dithered, by name."""
        return tuple(sorted(knob for knob, curve in self.curves.items() if curve.rounding == "dither"))

    def _steps(self, epoch: int, batches: int) -> tuple[Control, ...]:
        """The controls of all steps of an epoch."""
        pieces = [self._piece(epoch + batch / batches) for batch in range(batches)]
        at = {piece: self._real(piece * self.resolution) for piece in dict.fromkeys(pieces)}
        real = {knob: [at[piece][knob] for piece in pieces] for knob in self.curves}
        # Several knobs take multiples of several irrationals: over the epochs they meet in all ways.
        phases = {k: (epoch + 1) * i * _GOLDEN % 1 for i, k in enumerate(self._dithered, start=1)}
        taken: dict[str, Sequence[float]] = {
            knob: list(dithered(real[knob], phases[knob]))
            if knob in phases
            else [curve.round(v, knob) for v in real[knob]]
            for knob, curve in self.curves.items()
            if curve.of is None
        }
        return tuple(map(self._with_ratios, _rows(real), _rows(taken)))

    def _with_ratios(self, real: Mapping[str, float], taken: Mapping[str, float]) -> Control:
        """The control of what the knobs take, with those that divide by one of them."""
        ratios = {
            knob: curve.round(curve.over(real[curve.of], taken[curve.of]), knob)
            for knob, curve in self.curves.items()
            if curve.of is not None
        }
        return self._control({**taken, **ratios})

    @property
    def controls(self) -> tuple[Control, ...]:
        """Every control that a step may take, once: floor and ceiling of what is dithered.

        >>> from controlat import parse_schedule
        >>> parse_schedule("table:steps=2.5:3,alpha=0.1,rounding=dither", 2).controls
        (Control(alpha=0.1, steps=2), Control(alpha=0.1, steps=3))
        """
        if not self._dithered:
            return tuple(dict.fromkeys(self._pieces))  # type: ignore[attr-defined]
        found: dict[Control, None] = {}
        for piece in range(self.pieces):
            real = self._real(piece * self.resolution)
            ways = {
                knob: {math.floor(v := curve.round(real[knob], knob)), math.ceil(v)}
                if curve.rounding == "dither"
                else {curve.round(real[knob], knob)}
                for knob, curve in self.curves.items()
                if curve.of is None
            }
            for values in itertools.product(*map(sorted, ways.values())):
                found[self._with_ratios(real, dict(zip(ways, values, strict=True)))] = None
        return tuple(found)

    def control(self, now: Moment, z: object = None) -> Control:
        """The control of a step, whatever the state z: a schedule is an open loop."""
        return self.at(now.epoch, now.batch, now.batches)

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
        for u in plain.controls:
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
                taken = {curve.place(t) for t in starts}
                found[knob] = tuple(e for i, e in enumerate(curve.at, start=1) if i not in taken)
            elif curve.kind == "ramp" and curve.at[0] > self.epochs + SLACK:
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


def _rows(columns: Mapping[str, Sequence[float]]) -> Iterable[dict[str, float]]:
    """The values of all knobs, step by step."""
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


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
