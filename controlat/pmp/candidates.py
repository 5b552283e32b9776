"""The bounded part of G over which the Hamiltonian is maximised: values of any knobs of a method."""

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
_USUAL = "alpha", "steps"
_EACH = 8  # so many whole numbers are candidates one by one where each costs a run of its own
_COUNT = 5  # values of a real knob


@dataclass(frozen=True)
class Candidates:
    """Controls around u: some knobs take given values, in all combinations, and the others stay as in u.

    Args:
        values: knob to a list of its values, or a `range` of whole numbers. A method that lacks alpha or
            steps is searched without it.

    Raises:
        ValueError: a list is empty or holds something else than numbers, or step sizes are not > 0.

    >>> from controlat.methods import build
    >>> found = Candidates({"alpha": (0.1, 0.2), "steps": range(3), "beta": (1, 6)})
    >>> u = build("trades").controls.check({"alpha": 0.05, "steps": 4, "beta": 3})
    >>> len(found.around(build("trades"), u))  # no attack under 2 weights, and 2 * 2 * 2 more
    10
    """

    values: Mapping[str, Values]

    def __post_init__(self) -> None:
        instance(self.values, Mapping, "values", "such as {'alpha': (0.1, 0.2), 'steps': range(6)}")
        checked = {name: _checked(name, values) for name, values in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(checked))

    def __hash__(self) -> int:
        return hash(frozenset(self.values.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # pickles and deep copies, which a mapping proxy refuses
        return Candidates, (dict(self.values),)

    @classmethod
    def of(cls, alphas: Iterable[float | str], max_steps: int, **others: Values) -> Candidates:
        """These step sizes, K = 0, ..., max_steps, and values of other knobs.

        >>> Candidates.of((0.3, 0.1), 10).values["alpha"]
        (0.1, 0.3)
        """
        steps = range(whole(max_steps, "max_steps", 1) + 1)
        return cls({**others, "alpha": alphas, "steps": steps})  # type: ignore[dict-item]

    @classmethod
    def default(cls, eps: float, max_steps: int, count: int = _COUNT) -> Candidates:
        """`count` step sizes spaced logarithmically in [eps/40, 2 eps], and K = 0, ..., max_steps.

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
        """The knobs of a method that are named, ``name``, ``name=a:b:c`` or ``name=a..b``.

        A name alone: for alpha and steps those of `alphas` (or of `default`) and 0, ..., `max_steps`; for
        others what lies between their bounds, or a quarter, half, once, twice and four times their default.
        ``a..b`` are all whole numbers from a to b, or five real ones, spaced logarithmically where a > 0.

        Args:
            texts: as above; alpha and steps, where the method has them, if None.
            space: what the method has.
            eps: radius, for the default step sizes.
            max_steps: largest K.
            alphas: step sizes.

        Raises:
            ValueError: the method has no such knob, a value is out of its bounds, or there is no default.

        >>> from controlat.methods import build
        >>> space = build("trades").controls
        >>> dict(Candidates.read(["steps", "beta=1:3"], space, eps=0.1, max_steps=2).values)
        {'steps': range(0, 3), 'beta': (1.0, 3.0)}
        """
        usual = cls.default(eps, max_steps) if alphas is None else cls.of(alphas, max_steps)
        if texts is None:
            return cls({name: values for name, values in usual.values.items() if name in space})
        found: dict[str, Values] = {}
        for text in texts:
            name, sign, listed = (part.strip() for part in text.partition("="))
            if name not in space:
                raise ValueError(
                    f"knobs: {short(text)!r} is no knob of this method; {meant(name, space)}it has "
                    f"{', '.join(sorted(space))}"
                )
            if name in found or (sign and name == "alpha" and alphas is not None):
                raise ValueError(f"{name} is given twice among what is searched")
            if sign:
                found[name] = _read(listed, name, space[name])
            else:
                found[name] = usual.values[name] if name in usual.values else _default(name, space[name])
        if not found:
            raise ValueError(f"knobs must name one or more of {', '.join(sorted(space))}, got none")
        return cls(found)

    def within(self, space: Mapping[str, Knob]) -> dict[str, Values]:
        """The values of every knob that is searched, within the bounds of a method's; K varies fastest.

        Raises:
            ValueError: the method has no such knob, or does not admit a value of a list.
        """
        if unknown := sorted(set(self.values) - set(space) - set(_USUAL)):
            raise ValueError(
                f"{', '.join(unknown)} cannot be searched: the method has {', '.join(sorted(space))}"
            )
        order = [name for name in self.values if name not in _USUAL] + list(_USUAL)
        found: dict[str, Values] = {}
        for name in (name for name in order if name in self.values and name in space):
            values, knob = self.values[name], space[name]
            if isinstance(values, range):
                low = max(values[0], math.ceil(knob.low))
                knob.check(name, low)
                found[name] = range(low, max(low, int(min(values[-1], knob.high))) + 1)
                continue
            for value in values:
                knob.check(name, value)
            found[name] = tuple(map(int, values)) if knob.kind == "integer" else values
        return found

    def around(self, method: Method, u: Control) -> list[Control]:
        """The candidates around u, once each.

        Of a range of whole numbers all, where the method scores them on one trajectory (`Prefixes`, for K);
        else, as each costs a run of its own, all up to 8, about four for each doubling beyond, and the last.
        """
        axes = self.within(method.controls)
        for name, values in axes.items():
            if isinstance(values, range) and not (name == "steps" and isinstance(method, Prefixes)):
                axes[name] = tuple(v for v in values if v == values[-1] or _kept(v))
        return list(dict.fromkeys(_combinations(u, axes)))

    def cost(self, method: Method, u: Control) -> float:
        """Gradient evaluations per sample of scoring u and all candidates around it, by a sweep."""
        price = method.controls.cost
        if not isinstance(method, Prefixes):
            return sum(map(price, self.around(method, u))) + price(u)
        axes = self.within(method.controls)
        steps = axes.pop("steps", (u["steps"],))
        alphas = len(axes.pop("alpha", (0.0,)))
        return math.prod(map(len, axes.values())) * (alphas * 2 * steps[-1] + (0 in steps)) + price(u)

    def mean_cost(self, method: Method, u: Control) -> float:
        """Gradient evaluations per sample of one candidate that is drawn evenly, as TPE begins."""
        costs = list(map(method.controls.cost, _combinations(u, self.within(method.controls))))
        return sum(costs) / len(costs)


def replaced(u: Control, values: Mapping[str, float]) -> Control:
    """u with other values of the knobs that it has."""
    return Control(**{name: values.get(name, value) for name, value in u.items()})


def _combinations(u: Control, axes: Mapping[str, Values]) -> Iterable[Control]:
    points = itertools.product(*axes.values())
    return (replaced(u, dict(zip(axes, point, strict=True))) for point in points)


def _kept(k: int) -> bool:
    return k <= _EACH or k % 2 ** (k.bit_length() - 3) == 0


def _checked(name: str, values: object) -> Values:
    """The values of a knob, in order and once each."""
    what = "step sizes > 0" if name == "alpha" else f"values of {name}"
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of {what}, got {brief(values)}")
    if isinstance(values, range):
        if values and values.step == 1:
            return values
        raise ValueError(f"a range of {name} must have steps of 1 and not be empty, got {values}")
    found = tuple(sorted({number(value, f"a value of {name}") for value in values}))
    if not found:
        raise ValueError(f"{name} must be a list of {what}, got none")
    if name == "alpha" and found[0] <= 0:
        raise ValueError(f"the step sizes that are searched must be > 0, got {found}")
    return found


def _spaced(low: float, high: float, count: int = _COUNT) -> tuple[float, ...]:
    """Values from `low` to `high`, logarithmically where they are positive."""
    spaced = np.geomspace if low > 0 else np.linspace
    return tuple(float(f"{v:.6g}") for v in spaced(low, high, count))


def _read(text: str, name: str, knob: Knob) -> Values:
    """``a:b:c``, or ``a..b``."""
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
    """What of a knob is searched where only its name is given."""
    low, high = knob.low, knob.high
    if math.isinf(low) or math.isinf(high):
        if not knob.default:
            raise ValueError(f"{name} has no default to search around: give {name}=a:b:c or {name}=a..b")
        if knob.kind == "real":
            return tuple(max(low, min(high, knob.default * factor)) for factor in (0.25, 0.5, 1, 2, 4))
        low, high = max(low, 0), min(high, 2 * knob.default)
    return range(int(low), int(high) + 1) if knob.kind == "integer" else _spaced(low, high)
