"""Schedules t -> u: one curve per knob, piecewise constant in training time t (epochs).

A schedule is written as a short text (`controlat.control.schedule_text`) or as JSON
(`controlat.control.schedule_json`). Both describe curves: a family such as ``amata`` and a schedule that was
derived, recorded or searched for are objects of the same class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from controlat._util.checks import instance, number, whole
from controlat._util.files import read_json, write_json
from controlat._util.texts import short
from controlat.control.curves import SLACK, Curve
from controlat.control.knobs import dithered_knobs, mean_values, real_values, step_values, values_of_steps
from controlat.control.schedule_json import fields_from_json, to_json
from controlat.control.space import Control, ControlSpace

if TYPE_CHECKING:
    from controlat.control.controller import Moment

__all__ = ["Curve", "Schedule", "load_schedule"]

_MAX_PIECES = 1_000_000


@dataclass(frozen=True)
class Schedule:
    """A control u(t) over a run of T epochs.

    Called with a time t >= 0 in epochs, it returns u(t), a frozen mapping from knob to value. u is constant
    on pieces of `resolution` epochs: the value at the start of the piece; for t > T, that of the last piece.
    A dithered knob has its real value in u(t), and a whole number in the control of a step, which `at` gives.

    Args:
        curves: knob to `Curve`.
        epochs: T, length of the run.
        resolution: length of a piece, in epochs.
        text: a label for tables: the short text it was read from, or any other.
        defaults: constant values of knobs without a curve; `bound` takes them from a method.

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
    _pieces: tuple[Control, ...] = field(init=False, repr=False, compare=False)
    _steps_of: dict[tuple[int, int], tuple[Control, ...]] = field(init=False, repr=False, compare=False)

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
            self, "curves", MappingProxyType({k: self._fitted(k, c) for k, c in self.curves.items()})
        )
        if twice := sorted(set(self.curves) & set(self.defaults)):
            raise ValueError(f"{', '.join(twice)} cannot have both a curve and a default")
        object.__setattr__(self, "defaults", MappingProxyType(dict(Control(**self.defaults))))
        shared: dict[tuple[float, ...], Control] = {}  # up to a million pieces take few different controls
        object.__setattr__(self, "_pieces", tuple(self._piece(i, shared) for i in range(self.pieces)))
        object.__setattr__(self, "_steps_of", {})

    def _fitted(self, knob: str, curve: Curve) -> Curve:
        """The curve of a knob; a ``table`` gets the epochs `at` which its values change."""
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

    def _piece(self, piece: int, shared: dict[tuple[float, ...], Control]) -> Control:
        """The control of a piece; pieces of equal values take one object from `shared`."""
        t = piece * self.resolution
        try:
            values = tuple(mean_values(self.curves, self._real(t)))
            if values not in shared:
                shared[values] = self._control(dict(zip(self.curves, values, strict=True)))
        except ValueError as error:
            raise ValueError(f"{error} at epoch {t:g} of {short(self.text)!r}") from None
        return shared[values]

    def _real(self, t: float) -> dict[str, float]:
        """The value of every curve at time t before rounding."""
        return real_values(self.curves, t, self.epochs)

    def _control(self, value: dict[str, float]) -> Control:
        """The control with these values and the defaults.

        Raises:
            ValueError: steps or alpha is negative, or steps is not whole and not dithered.
        """
        steps = value.get("steps", 0)
        if steps != int(steps) and self.curves["steps"].rounding != "dither":
            raise ValueError(f"steps without rounding=dither must be a whole number, got {steps:g}")
        for knob in ("steps", "alpha"):
            if value.get(knob, 0) < 0:
                raise ValueError(f"{knob} must be >= 0, got {value[knob]:g}")
        return Control(**self.defaults, **value)

    def _piece_at(self, t: float) -> int:
        """The index of the piece that time t is in."""
        return int(min(t / self.resolution + SLACK, self.pieces - 1))

    def __call__(self, t: float) -> Control:
        """u(t), t in epochs since the start of training; real where a knob is dithered.

        Raises:
            ValueError: t is negative or not finite.
        """
        t = number(t, "t")
        if t < 0:
            raise ValueError(f"a schedule starts at t = 0, got t = {t:g}")
        return self._pieces[self._piece_at(t)]

    def at(self, epoch: int, batch: int, batches: int) -> Control:
        """The control of one step, u(epoch + batch/batches), with dithered knobs rounded to whole numbers.

        Over any consecutive steps of an epoch the sum of a dithered knob differs from the sum of its real
        values by less than 1 (`controlat.control.curves.dithered`). The initial remainder of an epoch is a
        multiple of the golden ratio modulo 1, so that over the epochs each position in the epoch is rounded
        up equally often. A ``ratio`` divides by the rounded number, or by the real one if its curve says so.

        Args:
            epoch: epoch, from 0.
            batch: position of the step in its epoch, from 0.
            batches: steps per epoch.

        Returns:
            The control: for PGD the keyword arguments alpha and steps of `controlat.pgd`.

        Raises:
            ValueError: epoch or batch is negative, or batch is not below `batches`.

        >>> from controlat import parse_schedule
        >>> s = parse_schedule("pgd:steps=2.5,alpha=0.1,rounding=dither", epochs=2)
        >>> [s.at(0, batch, 6)["steps"] for batch in range(6)], s(0)["steps"]
        ([3, 2, 3, 2, 3, 2], 2.5)
        """
        epoch, batches = whole(epoch, "epoch", 0), whole(batches, "batches", 1)
        batch = whole(batch, "batch", 0)
        if batch >= batches:
            raise ValueError(f"batch must be below the {batches} batches of an epoch, got {batch}")
        if not dithered_knobs(self.curves):
            return self(epoch + batch / batches)
        cache = self._steps_of
        if (epoch, batches) not in cache:
            while len(cache) > 1:  # two epochs are enough for steps that are asked for in order
                cache.pop(next(iter(cache)))
            cache[epoch, batches] = self._steps(epoch, batches)
        return cache[epoch, batches][batch]

    def _steps(self, epoch: int, batches: int) -> tuple[Control, ...]:
        """The controls of all steps of an epoch, with dithered knobs rounded."""
        pieces = [self._piece_at(epoch + batch / batches) for batch in range(batches)]
        at = {piece: self._real(piece * self.resolution) for piece in dict.fromkeys(pieces)}
        real = {knob: [at[piece][knob] for piece in pieces] for knob in self.curves}
        return tuple(map(self._control, values_of_steps(self.curves, real, epoch)))

    @property
    def controls(self) -> tuple[Control, ...]:
        """The different controls that steps take; with a dithered knob, its floor and its ceiling.

        >>> from controlat import parse_schedule
        >>> parse_schedule("table:steps=2.5:3,alpha=0.1,rounding=dither", 2).controls
        (Control(alpha=0.1, steps=2), Control(alpha=0.1, steps=3))
        """
        if not dithered_knobs(self.curves):
            return tuple(dict.fromkeys(self._pieces))
        controls: dict[Control, None] = {}  # an ordered set
        for piece in range(self.pieces):
            values = step_values(self.curves, self._real(piece * self.resolution))
            controls |= dict.fromkeys(map(self._control, values))
        return tuple(controls)

    def control(self, now: Moment, z: object = None) -> Control:
        """The control of a step, whatever the state z: a schedule is an open loop."""
        return self.at(now.epoch, now.batch, now.batches)

    def bound(self, space: ControlSpace) -> Schedule:
        """This schedule with the method's defaults for the knobs that have no curve.

        Args:
            space: the method's admissible set G.

        Raises:
            ValueError: a knob is not the method's, a knob without a default has no curve, or a control is
                not in G.

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
        """Epochs of a ``step`` or of the end of a ``ramp`` that have no effect in a run of this length.

        A change has no effect after the last piece begins, or where another follows within the same piece.

        Returns:
            Knob to those epochs; knobs without any are left out.

        >>> from controlat import parse_schedule
        >>> replace(parse_schedule("step:steps=0:2:10,at=3:8,alpha=0.1", epochs=12), epochs=5).unreached()
        {'steps': (8.0,)}
        """
        starts = [piece * self.resolution for piece in range(self.pieces)]
        late = {knob: curve.unreached(starts, self.epochs) for knob, curve in self.curves.items()}
        return {knob: at for knob, at in late.items() if at}

    def __hash__(self) -> int:
        mappings = frozenset(self.curves.items()), frozenset(self.defaults.items())
        return hash((*mappings, self.epochs, self.resolution, self.text))

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy: a mapping proxy supports neither
        return Schedule.from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        """The JSON form; `Schedule.from_json` reads it back to an equal schedule."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: object) -> Schedule:
        """Build a schedule from its JSON form.

        Raises:
            ValueError: `data` is not a schedule, or one of another version; the message says what is allowed.
        """
        return cls(**fields_from_json(data))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the JSON form.

        Raises:
            FileExistsError: the file exists and `overwrite` is false.
        """
        if Path(path).exists() and not overwrite:
            raise FileExistsError(f"{path} exists; give another name or overwrite=True")
        write_json(path, self.to_json())


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule from a JSON file.

    Args:
        path: a file that `Schedule.save` or a command wrote.

    Returns:
        The schedule; where its knobs are those of PGD, ``pgd(..., **schedule(epoch))`` attacks under it.

    Raises:
        ValueError: the file is missing, not JSON, or not a schedule; the message names the file.

    >>> import tempfile, os
    >>> from controlat import parse_schedule
    >>> file = os.path.join(tempfile.mkdtemp(), "amata.json")
    >>> parse_schedule("amata:min=2,max=10,tau=20/255", epochs=100).save(file)
    >>> dict(load_schedule(file)(0))
    {'alpha': 0.0392156862745098, 'steps': 2}
    """
    data = read_json(path)
    try:
        return Schedule.from_json(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
