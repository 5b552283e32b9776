"""Short texts of schedules, ``family:name=value,...``: a family builds one curve for each of its knobs."""

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
    """The step size of a family whose K varies: constant (alpha), or tau / K (tau)."""
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


def _monotone(kind: str) -> Callable[[Mapping[str, str], str], dict[str, Curve]]:
    """A family in which K goes from one value to another over the run, by a curve of that kind."""

    def build(p: Mapping[str, str], family: str) -> dict[str, Curve]:
        names = tuple(n for n in ("min", "max", "start", "end") if n in p)
        if names not in (("min", "max"), ("start", "end")):
            raise ValueError(f"{family} needs min and max, or start and end (which may fall)")
        first, last = (number(p[n], n) for n in names)
        if names == ("min", "max") and first > last:
            raise ValueError(
                f"{family} needs min <= max, got {first:g} > {last:g}; use start and end to fall"
            )
        if min(first, last) < 0:
            raise ValueError(f"{family} needs K >= 0, got {min(first, last):g}")
        steps = Curve(kind, (first, last), rounding=p.get("rounding", "half_up"))
        return {"steps": steps, "alpha": _alpha(p, family)}

    return build


def _constant(p: Mapping[str, str], family: str) -> dict[str, Curve]:
    """A family in which K and alpha are constant."""
    return {name: Curve("constant", (number(p[name], name),)) for name in ("steps", "alpha")}


def _listed(kind: str) -> Callable[[Mapping[str, str], str], dict[str, Curve]]:
    """A family in which the values of K, and those of alpha if wanted, are listed."""

    def build(p: Mapping[str, str], family: str) -> dict[str, Curve]:
        at = numbers(p["at"], "at") if kind == "step" else ()
        curves = {"steps": Curve(kind, numbers(p["steps"], "steps"), at)}
        lists_alpha = ":" in p.get("alpha", "")
        if lists_alpha and ("tau" in p or "alpha_from" in p):
            raise ValueError(f"{family} takes a list of alpha, or tau and alpha_from, not both")
        curves["alpha"] = Curve(kind, numbers(p["alpha"], "alpha"), at) if lists_alpha else _alpha(p, family)
        return curves

    return build


def _anneal(p: Mapping[str, str], family: str) -> dict[str, Curve]:
    """Real K on lines through knots at evenly spaced times; alpha constant, or log alpha linear in time."""
    knots = numbers(p["steps"], "steps")
    if min(knots) < 0:
        raise ValueError(f"{family} needs K >= 0, got {min(knots):g}")
    rounding = p.get("rounding", "dither")
    steps = Curve("knots", knots if len(knots) > 1 else knots * 2, rounding=rounding)
    if ":" not in p.get("alpha", ""):
        return {"steps": steps, "alpha": _alpha(p, family)}
    if "tau" in p or "alpha_from" in p:
        raise ValueError(f"{family} takes first:last of alpha, or tau and alpha_from, not both")
    alphas = numbers(p["alpha"], "alpha")
    if len(alphas) != 2 or min(alphas) <= 0:
        raise ValueError(f"{family} takes one alpha or two > 0 (first:last), got {p['alpha']}")
    return {"steps": steps, "alpha": Curve("exponential", alphas)}


def _delayed(p: Mapping[str, str], family: str) -> dict[str, Curve]:
    """No attack before an epoch, and from then on a constant one."""
    steps = Curve("step", (0.0, number(p["steps"], "steps")), (number(p["since"], "since"),))
    return {"steps": steps, "alpha": Curve("constant", (number(p["alpha"], "alpha"),))}


def _free(text: str, rounding: str | None) -> Curve:
    """A curve for any knob.

    ``a`` (constant), ``a..b`` (linear), ``a..b@E`` (linear up to epoch E) or ``a:b:c@E1:E2`` (step).
    """
    values, _, at = text.partition("@")
    edges = numbers(at, "at") if at else ()
    if ".." in values:
        ends = tuple(number(v, "value") for v in values.split(".."))
        return Curve("ramp" if edges else "linear", ends, at=edges, rounding=rounding)
    if ":" in values or edges:
        return Curve("step", numbers(values, "value"), at=edges, rounding=rounding)
    return Curve("constant", (number(values, "value"),), rounding=rounding)


@dataclass(frozen=True)
class Family:
    """A kind of short text: how curves are built from it, the parameters that it takes, and an example."""

    build: Callable[[Mapping[str, str], str], dict[str, Curve]]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str


_MONOTONE = ("min", "max", "start", "end", "tau", "alpha", "rounding", "alpha_from")
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "none": Family(lambda p, f: _constant({"steps": "0", "alpha": "0"}, f), (), (), "none"),
        "fgsm": Family(lambda p, f: _constant({"steps": "1", **p}, f), ("alpha",), (), "fgsm:alpha=10/255"),
        "pgd": Family(_constant, ("steps", "alpha"), (), "pgd:steps=10,alpha=2/255"),
        "amata": Family(_monotone("linear"), (), _MONOTONE, "amata:min=2,max=10,tau=20/255"),
        "linear": Family(_monotone("linear"), (), _MONOTONE, "linear:start=10,end=0,tau=20/255"),
        "exponential": Family(_monotone("exponential"), (), _MONOTONE, "exponential:min=1,max=10,tau=20/255"),
        "cosine": Family(_monotone("cosine"), (), _MONOTONE, "cosine:min=0,max=10,tau=20/255"),
        "step": Family(
            _listed("step"),
            ("steps", "at"),
            ("tau", "alpha", "alpha_from"),
            "step:steps=0:2:10,at=3:8,tau=20/255",
        ),
        "table": Family(
            _listed("table"), ("steps",), ("tau", "alpha", "alpha_from"), "table:steps=0:1:2:2,tau=20/255"
        ),
        "anneal": Family(
            _anneal,
            ("steps",),
            ("tau", "alpha", "alpha_from", "rounding"),
            "anneal:steps=0:2:4:4,alpha=20/255:5/255",
        ),
        "delayed": Family(_delayed, ("steps", "alpha", "since"), (), "delayed:steps=10,alpha=2/255,since=10"),
        "set": Family(lambda p, f: {}, (), (), "set:steps=2..10,alpha=4/255,fosc=0.5..0@40"),
    }
)


def parse_schedule(text: str, epochs: float, knobs: Mapping[str, Knob] | None = None) -> Schedule:
    """Read a schedule's short text, ``family:name=value,...``, and bind it to a number of epochs.

    ``none``; ``fgsm:alpha=A``; ``pgd:steps=K,alpha=A``; ``amata:min=K0,max=K1,tau=TAU`` (linear, K rounded
    half up, alpha = TAU / K); ``linear``, ``exponential`` and ``cosine`` with the same parameters. Those four
    also take start and end in place of min and max, ``alpha=`` in place of ``tau=``, ``rounding=floor``, and
    ``alpha_from=real`` (alpha = TAU over K before rounding).
    ``anneal:steps=K0:K1:...,alpha=A0:A1``: K on lines through so many values at evenly spaced times from 0 to
    T, real (``rounding=dither`` unless another one is asked for), log alpha linear in time.
    ``delayed:steps=K,alpha=A,since=E``: no attack before epoch E (Gupta et al., 2020).
    ``step:steps=K0:K1:...,at=E1:...,tau=TAU``; ``table:steps=K0:K1:...,alpha=A0:A1:...``. Every family takes
    ``resolution=`` (length of a piece in epochs, 1 by default) and ``rounding=dither``: then K, and every
    other integer knob that is named, is rounded down in some batches and up in others (`Schedule.at`), so
    that its mean is a real number. Numbers may be fractions, which are read exactly.

    Other knobs of the method can be added to any family; ``set:`` has only such. They are written ``value``,
    ``a..b`` (linear over the run), ``a..b@E`` (linear up to epoch E, then b) or ``a:b:c@E1:E2`` (b from epoch
    E1 on, c from E2 on), such as ``pgd:steps=10,alpha=0.075,fosc=0.5..0@40``.

    Args:
        text: as above.
        epochs: T, the length of the run.
        knobs: the method's knobs (`ControlSpace`), which may be added. Without it ``set:`` takes any name,
            and the other families only their own parameters.

    Returns:
        The schedule.

    Raises:
        ValueError: unknown family or name, missing or out-of-range value; the message says what is allowed.

    Warns:
        UserWarning: the run ends before a change, such as ``@8`` in a run of five epochs.

    >>> dict(parse_schedule("pgd:steps=10,alpha=2/255", epochs=30)(0)) == {"alpha": 2 / 255, "steps": 10}
    True
    """
    instance(text, str, "the text of a schedule")
    instance(knobs, (Mapping, type(None)), "knobs")
    name, parameters = split(text)
    family = _family(name, text)
    resolution = number(parameters.pop("resolution", "1"), "resolution")
    dither = parameters.get("rounding") == "dither"
    if "rounding" in parameters and "rounding" not in family.optional:
        if not dither:
            raise ValueError(
                f"rounding of {name} is dither or left out, got {short(parameters['rounding'])!r}"
            )
        del parameters["rounding"]
    own = {*family.required, *family.optional}
    free = set(parameters) - own if name == "set" else (set(parameters) & set(knobs or ())) - own
    only(
        parameters,
        family.required,
        {*family.optional, *free, *(knobs or ())},
        f"schedule {name!r} (such as {family.example})",
    )
    integers = {"steps"} if knobs is None else {k for k, knob in knobs.items() if knob.kind == "integer"}
    try:
        curves = family.build({k: v for k, v in parameters.items() if k not in free}, name)
        curves |= {
            k: _free(value, "half_up" if k in integers else None)
            for k, value in parameters.items()  # in the order of the text: a set has none
            if k in free
        }
        if dither:
            dithered = {k for k, curve in curves.items() if k in integers and curve.of is None}
            curves |= {k: replace(curves[k], rounding="dither") for k in dithered}
        schedule = Schedule(curves, epochs, resolution=resolution, text=text.strip())
    except ValueError as error:
        raise ValueError(
            f"{error} (in schedule {short(text)!r}; write for example {family.example})"
        ) from None
    _warn_of_late_changes(schedule, stacklevel=3)
    return schedule


def _family(name: str, text: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none; the message shows an example of each.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    hint = "a file is read by load_schedule; " if name.endswith(".json") else meant(name, FAMILIES)
    raise ValueError(
        f"unknown schedule {short(name)!r} in {short(text)!r}; {hint}write one of: "
        + "; ".join(family.example for family in FAMILIES.values())
    )


def _warn_of_late_changes(schedule: Schedule, stacklevel: int) -> None:
    """Warn where the run ends before a change that the text asks for."""
    if late := schedule.unreached():
        changes = "; ".join(f"{knob} at epoch {', '.join(f'{t:g}' for t in at)}" for knob, at in late.items())
        warnings.warn(
            f"{short(schedule.text)} has changes that a run of {schedule.epochs:g} epochs never comes to: "
            f"{changes}",
            stacklevel=stacklevel,
        )
