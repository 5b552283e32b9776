"""What was trained, under which schedules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from controlat._util.drawing import line_style, panels, save
from controlat.control.schedules import Schedule
from controlat.report._contents import first_seed
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION", "draw"]

_KNOBS = {"alpha": "step size α", "steps": "steps K"}


def notes(result: Result) -> list[str]:
    """Data, network, method, closed loops, and whether a finished run was met again."""
    s, sizes = result["settings"], result["sizes"]
    seeds = ", ".join(map(str, s["seeds"]))
    lines = [
        f"{s['data']} ({sizes['train']} training, {sizes['held_out']} held-out{_parts(sizes)}, "
        f"{sizes['test']} test points), {s['model']}, {s['method']}{_options(s)}, {s['norm']} "
        f"eps {s['eps']}, {s['epochs']} epochs, seeds {seeds}."
    ]
    if loops := [entry["text"] for entry in result["schedules"] if entry.get("closed_loop")]:
        lines.append(
            f"Closed loop ({', '.join(loops)}): controls depend on the state, and so on the seed; figures "
            f"and tables of controls show those that were taken under seed {first_seed(result)}."
        )
    if result.get("reproduced") is None:
        return lines
    how = "bit for bit" if result["reproduced"] else "but not bit for bit (another device or thread count?)"
    return [*lines, f"Training was repeated from {s['run']}, {how}."]


def _parts(sizes: Mapping[str, int]) -> str:
    """The two parts of the held-out samples; results of release 0.1 have one for both."""
    return f" ({sizes['validation']} for validation, {sizes['phi']} for Phi)" if "phi" in sizes else ""


def _options(settings: Mapping[str, Any]) -> str:
    """Options of the method, where some were given."""
    given = settings.get("method_options") or {}
    return f" ({', '.join(f'{name}={value}' for name, value in given.items())})" if given else ""


def _label(result: Result, entry: Mapping[str, Any]) -> str:
    """The schedule; of a closed loop, also under which seed it took these controls."""
    return f"{entry['text']} (seed {first_seed(result)})" if entry.get("closed_loop") else str(entry["text"])


def draw(result: Result, path: Path) -> None:
    """Every knob of every schedule over time."""
    schedules = [Schedule.from_json(entry["schedule"]) for entry in result["schedules"]]
    knobs = sorted({knob for s in schedules for knob in s.curves}, key=lambda k: (k not in _KNOBS, k))
    figure, axes = panels(max(4.5 * len(knobs), 6), 3.6, len(knobs))
    for i, (entry, s) in enumerate(zip(result["schedules"], schedules, strict=True)):
        t = np.arange(s.pieces + 1) * s.resolution
        # Dashes, so that schedules that coincide are all seen.
        style = line_style(i) | {"linestyle": (0, (1 + len(schedules) - i, i and 1))}
        for axis, knob in zip(axes, knobs, strict=True):
            if knob in s.curves:
                values = [s(v)[knob] for v in t]
                axis.step(t, values, where="post", label=_label(result, entry), linewidth=2, **style)
    for axis, knob in zip(axes, knobs, strict=True):
        axis.set_ylabel(_KNOBS.get(knob, knob))
        axis.set_xlabel("t (epochs)")
    named: dict[str, Any] = {}  # a schedule may have some of the knobs only
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


SECTION = Section(
    order=10,
    notes=notes,
    figures=lambda result: {"schedules.png": Figure("step size and steps", draw)},
)
