"""The finite part of G over which the Hamiltonian is maximised: values of any knobs of a method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from controlat._util.checks import brief, instance, number, whole
from controlat._util.registry import meant
from controlat._util.texts import numbers, short
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods import Method, Prefixes

__all__ = ["Candidates", "Values"]

Values: TypeAlias = range | tuple[float, ...]
_PGD_KNOBS = "alpha", "steps"  # varied by default, and left out where a method lacks one
_DENSE = 8  # up to this, `around` takes every whole number of a range
_COUNT = 5  # default number of values of a real knob


@dataclass(frozen=True)
class Candidates:
    """The candidate controls around u: all combinations of given values of some knobs, the others as in u.

    Args:
        values: knob to its values, a list or a `range` of whole numbers. alpha and steps are ignored for a
            method that lacks them.

    Raises:
        ValueError: the values of a knob are empty or not numbers, or a step size is not > 0.

    >>> from controlat.methods import build
    >>> candidates = Candidates({"alpha": (0.1, 0.2), "steps": range(3), "beta": (1, 6)})
    >>> u = build("trades").controls.check({"alpha": 0.05, "steps": 4, "beta": 3})
    >>> len(candidates.around(build("trades"), u))  # K = 0: one for each beta; K = 1, 2: 2 * 2 * 2
    10
    """

    values: Mapping[str, Values]

    def __post_init__(self) -> None:
        instance(self.values, Mapping, "values", "such as {'alpha': (0.1, 0.2), 'steps': range(6)}")
        checked = {name: _checked(name, values) for name, values in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(checked))

    def __hash__(self) -> int:
        return hash(frozenset(self.values.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy: a mapping proxy supports neither
        return Candidates, (dict(self.values),)

    @classmethod
    def of(cls, alphas: Iterable[float | str], max_steps: int, **others: Values) -> Candidates:
        """The candidates with these step sizes, K = 0, ..., max_steps, and these values of other knobs.

        >>> Candidates.of((0.3, 0.1), 10).values["alpha"]
        (0.1, 0.3)
        """
        steps = range(whole(max_steps, "max_steps", 1) + 1)
        return cls({**others, "alpha": alphas, "steps": steps})  # type: ignore[dict-item]

    @classmethod
    def default(cls, eps: float, max_steps: int, count: int = _COUNT) -> Candidates:
        """`count` step sizes, spaced logarithmically in [eps/40, 2 eps], and K = 0, ..., max_steps.

        >>> Candidates.default(eps=0.4, max_steps=10).values["alpha"][::4]
        (0.01, 0.8)
        """
        eps, count = number(eps, "eps"), whole(count, "count", 1)
        if eps <= 0:
            raise ValueError(f"the default step sizes need eps > 0, got {eps:g}; give alphas")
        return cls.of(_spaced(eps / 40, 2 * eps, count), max_steps)

    @classmethod
    def read(
        cls,
        texts: Sequence[str] | None,
        space: ControlSpace,
        *,
        eps: float,
        max_steps: int,
        alphas: Sequence[float | str] | None = None,
    ) -> Candidates:
        """Read the knobs to vary, each written ``name``, ``name=a:b:c`` or ``name=a..b``.

        ``a..b`` stands for all whole numbers from a to b, or for five real ones, spaced logarithmically if
        a > 0. A name alone takes default values: for alpha `alphas`, or the step sizes of `default`; for
        steps 0, ..., `max_steps`; for another knob values between its bounds or, without bounds, multiples of
        its default (1/4, 1/2, 1, 2 and 4 times for a real knob, up to twice for an integer).

        Args:
            texts: as above; None for alpha and steps, as far as the method has them.
            space: the method's admissible set G.
            eps: radius, for the default step sizes.
            max_steps: largest K.
            alphas: step sizes.

        Raises:
            ValueError: the method has no such knob, a value is out of its bounds, or a knob has neither
                bounds nor a default.

        >>> from controlat.methods import build
        >>> space = build("trades").controls
        >>> dict(Candidates.read(["steps", "beta=1:3"], space, eps=0.1, max_steps=2).values)
        {'steps': range(0, 3), 'beta': (1.0, 3.0)}
        """
        usual = cls.default(eps, max_steps) if alphas is None else cls.of(alphas, max_steps)
        if texts is None:
            return cls({name: values for name, values in usual.values.items() if name in space})
        chosen: dict[str, Values] = {}
        for text in texts:
            name, sign, listed = (part.strip() for part in text.partition("="))
            if name not in space:
                raise ValueError(
                    f"knobs: {short(text)!r} is no knob of this method; {meant(name, space)}it has "
                    f"{', '.join(sorted(space))}"
                )
            if name in chosen or (sign and name == "alpha" and alphas is not None):
                raise ValueError(f"{name} is given twice among what is searched")
            if sign:
                chosen[name] = _read(listed, name, space[name])
            else:
                chosen[name] = usual.values[name] if name in usual.values else _default(name, space[name])
        if not chosen:
            raise ValueError(f"knobs must name one or more of {', '.join(sorted(space))}, got none")
        return cls(chosen)

    def within(self, space: Mapping[str, Knob]) -> dict[str, Values]:
        """The values of every knob that a method has, ordered so that steps varies fastest.

        A range is cut to the knob's bounds.

        Raises:
            ValueError: the method has no such knob, or does not admit a listed value.
        """
        if unknown := sorted(set(self.values) - set(space) - set(_PGD_KNOBS)):
            raise ValueError(
                f"{', '.join(unknown)} cannot be searched: the method has {', '.join(sorted(space))}"
            )
        order = [name for name in self.values if name not in _PGD_KNOBS] + list(_PGD_KNOBS)
        axes: dict[str, Values] = {}
        for name in (name for name in order if name in self.values and name in space):
            values, knob = self.values[name], space[name]
            if isinstance(values, range):
                low = max(values[0], math.ceil(knob.low))
                knob.check(name, low)
                axes[name] = range(low, max(low, int(min(values[-1], knob.high))) + 1)
                continue
            for value in values:
                knob.check(name, value)
            axes[name] = tuple(map(int, values)) if knob.kind == "integer" else values
        return axes

    def around(self, method: Method, u: Control) -> list[Control]:
        """The candidates around u, without repetitions.

        A range of K is taken whole where the method scores all K on one trajectory (`Prefixes`). Otherwise
        every candidate costs a trajectory: of a range of whole numbers those up to 8, four per octave above,
        and the last are taken.
        """
        axes = self.within(method.controls)
        for name, values in axes.items():
            if isinstance(values, range) and not (name == "steps" and isinstance(method, Prefixes)):
                axes[name] = tuple(v for v in values if v == values[-1] or _on_scale(v))
        return list(dict.fromkeys(_combinations(u, axes)))

    def cost(self, method: Method, u: Control) -> float:
        """Gradient evaluations per sample of a sweep: scoring u and all candidates around it."""
        cost = method.controls.cost
        if not isinstance(method, Prefixes):
            return sum(map(cost, self.around(method, u))) + cost(u)
        axes = self.within(method.controls)
        steps = axes.pop("steps", (u["steps"],))
        alphas = len(axes.pop("alpha", (0.0,)))
        return math.prod(map(len, axes.values())) * (alphas * 2 * steps[-1] + (0 in steps)) + cost(u)

    def mean_cost(self, method: Method, u: Control) -> float:
        """Mean gradient evaluations per sample of a candidate; TPE begins with uniform draws."""
        costs = list(map(method.controls.cost, _combinations(u, self.within(method.controls))))
        return sum(costs) / len(costs)


def replaced(u: Control, values: Mapping[str, float]) -> Control:
    """u with these values of its knobs; values of other knobs are ignored."""
    return Control(**{name: values.get(name, value) for name, value in u.items()})


def _combinations(u: Control, axes: Mapping[str, Values]) -> Iterable[Control]:
    """u with all combinations of values of the knobs in `axes`."""
    points = itertools.product(*axes.values())
    return (replaced(u, dict(zip(axes, point, strict=True))) for point in points)


def _on_scale(k: int) -> bool:
    """Whether k is at most 8 or one of the four numbers per octave 8, 10, 12, 14, 16, 20, 24, 28, 32, ..."""
    return k <= _DENSE or k % 2 ** (k.bit_length() - 3) == 0


def _checked(name: str, values: object) -> Values:
    """The values of a knob, sorted and without repetitions; a range stays a range.

    Raises:
        ValueError: they are not numbers, none, or step sizes that are not > 0.
    """
    what = "step sizes > 0" if name == "alpha" else f"values of {name}"
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of {what}, got {brief(values)}")
    if isinstance(values, range):
        if values and values.step == 1:
            return values
        raise ValueError(f"a range of {name} must have steps of 1 and not be empty, got {values}")
    checked = tuple(sorted({number(value, f"a value of {name}") for value in values}))
    if not checked:
        raise ValueError(f"{name} must be a list of {what}, got none")
    if name == "alpha" and checked[0] <= 0:
        raise ValueError(f"the step sizes that are searched must be > 0, got {checked}")
    return checked


def _spaced(low: float, high: float, count: int = _COUNT) -> tuple[float, ...]:
    """Values from `low` to `high`, spaced logarithmically if low > 0, else linearly."""
    spaced = np.geomspace if low > 0 else np.linspace
    return tuple(float(f"{v:.6g}") for v in spaced(low, high, count))


def _read(text: str, name: str, knob: Knob) -> Values:
    """The values of a knob, from ``a:b:c`` or ``a..b``."""
    if ".." not in text:
        values = numbers(text, name)
        for value in values:
            knob.check(name, value)
        return values
    low, high = (number(end, name) for end in text.split("..", 1))
    for end in (low, high):
        knob.check(name, end)
    if low >= high:
        raise ValueError(f"{name}: a range a..b needs a < b, got {short(text)}")
    return range(int(low), int(high) + 1) if knob.kind == "integer" else _spaced(low, high)


def _default(name: str, knob: Knob) -> Values:
    """The values of a knob of which only the name is given."""
    low, high = knob.low, knob.high
    if math.isinf(low) or math.isinf(high):
        if not knob.default:
            raise ValueError(f"{name} has no default to search around: give {name}=a:b:c or {name}=a..b")
        if knob.kind == "real":
            return tuple(max(low, min(high, knob.default * factor)) for factor in (0.25, 0.5, 1, 2, 4))
        low, high = max(low, 0), min(high, 2 * knob.default)
    return range(int(low), int(high) + 1) if knob.kind == "integer" else _spaced(low, high)
