"""Short texts of schedules, ``family:name=value,...``: a table of families, each a shorthand for curves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from controlat._util.checks import instance, number
from controlat._util.registry import meant
from controlat._util.texts import numbers, only, short, split
from controlat.control.curves import Curve
from controlat.control.schedules import Schedule
from controlat.control.space import Knob

__all__ = ["FAMILIES", "Family", "parse_schedule"]


def _alpha(p: Mapping[str, str], family: str) -> Curve:
    """The step size of a family whose K varies: fixed, listed, or tau / K."""
    if ("tau" in p) == ("alpha" in p):
        raise ValueError(f"{family} needs one of tau (alpha = tau/K) and alpha (fixed)")
    if "alpha" in p:
        if "alpha_from" in p:
            raise ValueError(f"{family} takes alpha_from only with tau; alpha is fixed")
        return Curve("constant", (number(p["alpha"], "alpha"),))
    rounded = p.get("alpha_from", "rounded")
    if rounded not in ("rounded", "real"):
        raise ValueError(f"alpha_from is rounded or real, got {rounded!r}")
    if number(p["tau"], "tau") <= 0:
        raise ValueError(f"tau must be > 0, got {p['tau']}")
    return Curve("ratio", (number(p["tau"], "tau"),), of="steps", rounded=rounded == "rounded")


def _ramp(kind: str) -> Callable[[Mapping[str, str], str], dict[str, Curve]]:
    def build(p: Mapping[str, str], family: str) -> dict[str, Curve]:
        by_bounds, by_ends = ("min" in p, "max" in p), ("start" in p, "end" in p)
        if (all(by_bounds), any(by_ends)) != (True, False) and (any(by_bounds), all(by_ends)) != (
            False,
            True,
        ):
            raise ValueError(f"{family} needs min and max, or start and end (which may fall)")
        names = ("min", "max") if all(by_bounds) else ("start", "end")
        first, last = (number(p[n], n) for n in names)
        if all(by_bounds) and first > last:
            raise ValueError(
                f"{family} needs min <= max, got {first:g} > {last:g}; use start and end to fall"
            )
        if min(first, last) < 0:
            raise ValueError(f"{family} needs K >= 0, got {min(first, last):g}")
        steps = Curve(kind, (first, last), rounding=p.get("rounding", "half_up"))
        return {"steps": steps, "alpha": _alpha(p, family)}

    return build


def _pgd(p: Mapping[str, str], family: str) -> dict[str, Curve]:
    return {name: Curve("constant", (number(p[name], name),)) for name in ("steps", "alpha")}


def _lists(kind: str) -> Callable[[Mapping[str, str], str], dict[str, Curve]]:
    def build(p: Mapping[str, str], family: str) -> dict[str, Curve]:
        at = numbers(p["at"], "at") if kind == "step" else ()
        curves = {"steps": Curve(kind, numbers(p["steps"], "steps"), at)}
        listed = ":" in p.get("alpha", "")
        if listed and ("tau" in p or "alpha_from" in p):
            raise ValueError(f"{family} takes a list of alpha, or tau and alpha_from, not both")
        curves["alpha"] = Curve(kind, numbers(p["alpha"], "alpha"), at) if listed else _alpha(p, family)
        return curves

    return build


def _free(text: str, rounding: str | None) -> Curve:
    """Any knob: ``a``, ``a..b`` (linear), ``a..b@E`` (linear up to epoch E), ``a:b:c@E1:E2`` (steps)."""
    values, _, at = text.partition("@")
    edges = numbers(at, "at") if at else ()
    if ".." in values:
        ends = tuple(number(v, "value") for v in values.split(".."))
        return Curve("ramp" if edges else "linear", ends, edges, rounding)
    if ":" in values or edges:
        return Curve("step", numbers(values, "value"), edges, rounding)
    return Curve("constant", (number(values, "value"),), (), rounding)


@dataclass(frozen=True)
class Family:
    """One kind of short text: what it must and may say, how it becomes curves, and an example."""

    build: Callable[[Mapping[str, str], str], dict[str, Curve]]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str


_RAMP = ("min", "max", "start", "end", "tau", "alpha", "rounding", "alpha_from")
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "none": Family(lambda p, f: _pgd({"steps": "0", "alpha": "0"}, f), (), (), "none"),
        "fgsm": Family(lambda p, f: _pgd({"steps": "1", **p}, f), ("alpha",), (), "fgsm:alpha=10/255"),
        "pgd": Family(_pgd, ("steps", "alpha"), (), "pgd:steps=10,alpha=2/255"),
        "amata": Family(_ramp("linear"), (), _RAMP, "amata:min=2,max=10,tau=20/255"),
        "linear": Family(_ramp("linear"), (), _RAMP, "linear:start=10,end=0,tau=20/255"),
        "exponential": Family(_ramp("exponential"), (), _RAMP, "exponential:min=1,max=10,tau=20/255"),
        "cosine": Family(_ramp("cosine"), (), _RAMP, "cosine:min=0,max=10,tau=20/255"),
        "step": Family(
            _lists("step"),
            ("steps", "at"),
            ("tau", "alpha", "alpha_from"),
            "step:steps=0:2:10,at=3:8,tau=20/255",
        ),
        "table": Family(
            _lists("table"), ("steps",), ("tau", "alpha", "alpha_from"), "table:steps=0:1:2:2,tau=20/255"
        ),
        "set": Family(lambda p, f: {}, (), (), "set:steps=2..10,alpha=4/255,fosc=0.5..0@40"),
    }
)


def parse_schedule(text: str, epochs: float, knobs: Mapping[str, Knob] | None = None) -> Schedule:
    """Read a schedule's short text, ``family:name=value,...``, and bind it to a number of epochs.

    ``none``; ``fgsm:alpha=A``; ``pgd:steps=K,alpha=A``; ``amata:min=K0,max=K1,tau=TAU`` (linear, K rounded
    half up, alpha = TAU / K); ``linear``, ``exponential`` and ``cosine`` alike, also with start and end,
    with ``alpha=`` instead of ``tau=``, ``rounding=floor``, ``alpha_from=real``;
    ``step:steps=K0:K1:...,at=E1:...,tau=TAU``; ``table:steps=K0:K1:...,alpha=A0:A1:...``. Every family takes
    ``resolution=`` (length of a piece in epochs, 1 by default) and ``rounding=dither``: then K, and every
    other integer knob that is named, takes floor and ceiling in turn over the batches (`Schedule.at`), so
    that it is a real number on average. Numbers may be fractions, read exactly.

    Any knob of a method can be named beside those of the family, and ``set:`` has no others: ``value``,
    ``a..b`` (linear over the run), ``a..b@E`` (linear up to epoch E, then b), ``a:b:c@E1:E2`` (b from epoch
    E1 on, c from E2 on), such as ``pgd:steps=10,alpha=0.075,fosc=0.5..0@40``.

    Args:
        text: as above.
        epochs: T, the length of the run.
        knobs: what the method has (`ControlSpace`); None: whatever ``set:`` names, and nothing elsewhere.

    Returns:
        The schedule.

    Raises:
        ValueError: unknown family or name, missing or out-of-range value; the message says what is allowed.

    Warns:
        UserWarning: the run ends before a change, such as ``@8`` in five epochs.

    >>> dict(parse_schedule("pgd:steps=10,alpha=2/255", epochs=30)(0)) == {"alpha": 2 / 255, "steps": 10}
    True
    """
    instance(text, str, "the text of a schedule")
    instance(knobs, (Mapping, type(None)), "knobs")
    family, found = split(text)
    if family not in FAMILIES:
        examples = "; ".join(f.example for f in FAMILIES.values())
        near = meant(family, FAMILIES)
        near = "a file is read by load_schedule; " if family.endswith(".json") else near
        told = f"unknown schedule {short(family)!r} in {short(text)!r}"
        raise ValueError(f"{told}; {near}write one of: {examples}")
    entry = FAMILIES[family]
    resolution = number(found.pop("resolution", "1"), "resolution")
    dither = found.get("rounding") == "dither"
    if "rounding" in found and "rounding" not in entry.optional:
        if not dither:
            raise ValueError(f"rounding of {family} is dither or left out, got {short(found['rounding'])!r}")
        del found["rounding"]
    own = {*entry.required, *entry.optional}
    free = set(found) - own if family == "set" else (set(found) & set(knobs or ())) - own
    only(
        found,
        entry.required,
        {*entry.optional, *free, *(knobs or ())},
        f"schedule {family!r} (such as {entry.example})",
    )
    integers = {"steps"} if knobs is None else {k for k, knob in knobs.items() if knob.kind == "integer"}
    try:
        curves = entry.build({k: v for k, v in found.items() if k not in free}, family)
        curves |= {name: _free(found[name], "half_up" if name in integers else None) for name in free}
        if dither:
            real = {name for name, curve in curves.items() if name in integers and curve.of is None}
            curves |= {name: replace(curves[name], rounding="dither") for name in real}
        schedule = Schedule(curves, epochs, resolution, text.strip())
    except ValueError as error:
        raise ValueError(
            f"{error} (in schedule {short(text)!r}; write for example {entry.example})"
        ) from None
    if late := schedule.unreached():
        told = "; ".join(f"{knob} at epoch {', '.join(f'{t:g}' for t in at)}" for knob, at in late.items())
        warnings.warn(
            f"{short(text)} has changes that a run of {epochs:g} epochs never comes to: {told}", stacklevel=2
        )
    return schedule
