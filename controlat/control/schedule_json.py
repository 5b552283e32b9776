"""The JSON form of a schedule: version, label, length of the run, resolution, and the curve of every knob."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from controlat._util.texts import only
from controlat.control.curves import Curve

if TYPE_CHECKING:
    from controlat.control.schedules import Schedule

__all__ = ["FORMAT", "VERSION", "fields_from_json", "to_json"]

FORMAT, VERSION = "controlat schedule", 1


def to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain data."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "text": schedule.text,
        "epochs": schedule.epochs,
        "resolution": schedule.resolution,
        "knobs": {knob: curve.to_json() for knob, curve in schedule.curves.items()},
        **({"defaults": dict(schedule.defaults)} if schedule.defaults else {}),
    }


def fields_from_json(data: object) -> dict[str, Any]:
    """The keyword arguments of `Schedule`, from its JSON form.

    Raises:
        ValueError: `data` is not a schedule, or one of another version; the message says what is allowed.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'not a schedule: expected an object with "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ValueError(f"schedule version {data.get('version')!r}; this release reads version {VERSION}")
    only(data, {"format", "version", "text", "epochs", "knobs"}, {"resolution", "defaults"}, "a schedule")
    knobs = data["knobs"]
    if not isinstance(knobs, dict) or not all(isinstance(c, dict) for c in knobs.values()):
        raise ValueError('"knobs" must map each knob to a curve')
    curves = {knob: _curve(knob, c) for knob, c in knobs.items()}
    resolution = data.get("resolution", 1.0)
    _plain_numbers((data["epochs"], resolution), "epochs and resolution")
    if not isinstance(data["text"], str):
        raise ValueError(f"text must be a string, got {data['text']!r}")
    defaults = data.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ValueError('"defaults" must map each knob to a number')
    _plain_numbers(defaults.values(), "defaults")
    return {
        "curves": curves,
        "epochs": data["epochs"],
        "resolution": resolution,
        "text": data["text"],
        "defaults": defaults,
    }


def _curve(knob: str, data: dict[str, Any]) -> Curve:
    """The curve of one knob, from its JSON form."""
    only(data, {"curve", "values"}, {"at", "rounding", "of", "rounded"}, f"the curve of {knob}")
    values, at = data["values"], data.get("at", [])
    if not isinstance(values, list) or not isinstance(at, list):
        raise ValueError(f"the curve of {knob}: values and at must be lists of numbers")
    _plain_numbers((*values, *at), f"the curve of {knob}")
    if not isinstance(data.get("rounded", True), bool):
        raise ValueError(f"the curve of {knob}: rounded is true or false, got {data['rounded']!r}")
    options = {name: data[name] for name in ("rounding", "of", "rounded") if name in data}
    return Curve(data["curve"], tuple(values), tuple(at), **options)


def _plain_numbers(values: Iterable[object], what: str) -> None:
    """Refuse texts and booleans, which `number` would read or Python would count as numbers."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{what}: expected plain numbers, got {value!r}")
