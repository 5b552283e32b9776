"""Controls u and the admissible set G.

A control is a point of G: a value for every knob of a method, such as (alpha, K) for PGD training. The
running cost is R(u) = gamma n(u), with n(u) the gradient evaluations (forward and backward passes) per sample
of one outer step: K + 1 for PGD-K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from controlat._util.checks import brief, choice, instance, number
from controlat._util.registry import meant

__all__ = ["Control", "ControlSpace", "Knob"]


class Control(Mapping[str, Any]):
    """A control u: an immutable mapping from knob to value, which can be passed on as ``**u``.

    With ``steps = 0`` there is no attack, and the step size has no effect: ``alpha`` is set to 0, so that
    controls of equal effect compare equal.

    Args:
        knobs: values by name; a whole value of ``steps`` becomes an int.

    Raises:
        ValueError: a value is not a finite number.

    >>> u = Control(alpha=0.01, steps=10)
    >>> dict(u)
    {'alpha': 0.01, 'steps': 10}
    >>> Control(alpha=0.3, steps=0) == Control(alpha=0, steps=0)
    True
    """

    __slots__ = ("_knobs",)

    def __init__(self, /, **knobs: float) -> None:
        values = {name: v if type(v) is int else number(v, name) for name, v in knobs.items()}
        if float(values.get("steps", 0.5)).is_integer():
            values["steps"] = int(values["steps"])
        if values.get("steps") == 0 and "alpha" in values:
            values["alpha"] = 0.0
        self._knobs = dict(sorted(values.items()))

    def __getitem__(self, name: str) -> Any:  # Any, so that `**u` type-checks for int and float parameters
        if name not in self._knobs:
            raise KeyError(f"{name!r} is no control; there are {', '.join(self._knobs) or 'none'}")
        return self._knobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._knobs)

    def __len__(self) -> int:
        return len(self._knobs)

    def __hash__(self) -> int:
        return hash(tuple(self._knobs.items()))

    def __repr__(self) -> str:
        return "Control(" + ", ".join(f"{name}={value:g}" for name, value in self.items()) + ")"


@dataclass(frozen=True)
class Knob:
    """One coordinate of u.

    Args:
        kind: ``"real"`` or ``"integer"``.
        low: smallest admissible value.
        high: largest admissible value; infinity for no bound.
        meaning: description in one line.
        default: value where a schedule has no curve for the knob; None if a curve is required.

    Raises:
        ValueError: unknown kind, low > high, or a default that is not admissible.
    """

    kind: str
    low: float
    high: float = math.inf
    meaning: str = ""
    default: float | None = None

    def __post_init__(self) -> None:
        choice(self.kind, "Knob.kind", ("real", "integer"))
        instance(self.meaning, str, "Knob.meaning")
        for name in ("low", "high"):
            instance(getattr(self, name), (int, float), f"Knob.{name}")
        if not self.low <= self.high:
            raise ValueError(f"Knob needs low <= high, got [{self.low}, {self.high}]")
        if self.default is not None:
            self.check("Knob.default", number(self.default, "Knob.default"))

    def check(self, name: str, value: float) -> None:
        """Raise ValueError unless `value` is admissible; the message says what is."""
        if self.kind == "integer" and not float(value).is_integer():
            cure = "of a schedule with rounding=dither take schedule.at(epoch, batch, batches)"
            raise ValueError(f"{name} must be an integer, got {value:g} ({cure})")
        if not self.low <= value <= self.high:
            allowed = f">= {self.low:g}" if math.isinf(self.high) else f"in [{self.low:g}, {self.high:g}]"
            raise ValueError(f"{name} must be {allowed}, got {value:g}")


@dataclass(frozen=True)
class ControlSpace(Mapping[str, Knob]):
    """The admissible set G of a method, and the cost n(u) of an outer step.

    Args:
        knobs: name to `Knob`.
        cost: n(u), gradient evaluations per sample of one outer step; an upper bound where the number depends
            on the data. It is used to plan ahead; results state the evaluations that were counted.
    """

    knobs: Mapping[str, Knob]
    cost: Callable[[Control], float]

    def __post_init__(self) -> None:
        instance(self.knobs, Mapping, "knobs of a ControlSpace")
        for name, knob in self.knobs.items():
            instance(knob, Knob, f"knob {name!r} of a ControlSpace")
        if not callable(self.cost):
            raise TypeError(
                f"cost of a ControlSpace must be a function of the control, got {brief(self.cost)}"
            )

    def __getitem__(self, name: str) -> Knob:
        return self.knobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.knobs)

    def __len__(self) -> int:
        return len(self.knobs)

    def check(self, control: Mapping[str, float]) -> Control:
        """The `Control` with these values, and the defaults of knobs that are not given.

        Raises:
            ValueError: a knob is unknown, missing without a default, of the wrong kind or out of bounds.
        """
        instance(control, Mapping, "control", "such as {'alpha': 0.01, 'steps': 10}")
        defaults = {name: knob.default for name, knob in self.knobs.items() if knob.default is not None}
        values = defaults | dict(control)
        if set(values) != set(self.knobs):
            raise ValueError(
                f"a control of this method has {', '.join(sorted(self.knobs))}; "
                f"got {', '.join(sorted(control)) or 'nothing'} ({self._wrong_names(values)})"
            )
        for name, knob in self.knobs.items():
            knob.check(name, number(values[name], name))
        return Control(**{n: int(v) if self.knobs[n].kind == "integer" else v for n, v in values.items()})

    def _wrong_names(self, values: Mapping[str, float]) -> str:
        """Which names are unknown, with the knob that was probably meant, and which are missing."""
        unknown, missing = sorted(set(values) - set(self.knobs)), sorted(set(self.knobs) - set(values))
        hints = [f"{n}{', ' * bool(hint := meant(n, self.knobs))}{hint}".strip() for n in unknown]
        parts = [f"not {', '.join(hints)}"] * bool(unknown)
        parts += [f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"] * bool(missing)
        return "; ".join(parts)
