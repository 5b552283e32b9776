"""Figures of a derivation, from its result only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context

from controlat._util.drawing import panels, save
from controlat.report.derivation.check_figures import bound, principle, sides
from controlat.report.derivation.panels import COLOURS, GREY, drawable, legend_below, whole_ticks
from controlat.report.derivation.words import Result

__all__ = ["FIGURES", "Figure"]

_STYLE: Any = {"axes.titlesize": 10, "legend.fontsize": 8}


class Figure(NamedTuple):
    """One figure: whether a result has what it shows, what makes it, and its title in words."""

    wanted: Callable[[Result], bool]
    make: Callable[[Result], Any]
    title: str

    def draw(self, result: Result, path: Path) -> None:
        """Write the figure as a PNG file."""
        with rc_context(_STYLE):
            save(self.make(result), path)


def _landscape(result: Result) -> Any:
    """l(theta, .) at several times, all to the same scale, with an inner ascent of half the exact step."""
    pictures = result["pictures"]
    figure, axes = panels(3.1 * len(pictures), 3.7, len(pictures))
    gain = max(p["maximum"][1] - p["losses"][0] for p in pictures)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008, "color": COLOURS[1]}
    for axis, p in zip(axes, pictures, strict=True):
        x, y = drawable(p["path"]), drawable(p["losses"])
        outside = np.flatnonzero(~((x >= p["x"][0]) & (x <= p["x"][-1])))
        x, y = (v[: outside[0] + 1] if outside.size else v for v in (x, y))  # an ascent that diverges
        axis.plot(p["x"], drawable(p["l"]), color=COLOURS[0], label="l(θ, x)")
        axis.quiver(x[:-1], y[:-1], np.diff(x), np.diff(y), **arrows)
        axis.plot(x, y, "o", color=COLOURS[1], markersize=4, label="inner ascent, α = α*/2")
        axis.plot(x[0], y[0], "s", color="black", markersize=6, label="data point")
        axis.plot(*p["maximum"], "*", color=COLOURS[2], markersize=13, label="inner maximum x*", zorder=1)
        if gain > 0:
            axis.set_ylim(p["maximum"][1] - 2.2 * gain, p["maximum"][1] + 0.3 * gain)
        title = f"t = {p['t']:.3g},  θ = {p['theta']:.3g}"
        axis.set(xlim=(p["x"][0], p["x"][-1]), title=title, xlabel="x")
    axes[0].set_ylabel("l(θ, x)   (same scale in all panels)")
    return legend_below(figure, axes[:1], 4)


def _schedule(result: Result) -> Any:
    """theta(t) of the robust flow; K*(t) with its Taylor series and the straight line between its ends."""
    figure, (left, right) = panels(9.5, 3.9, 2)
    order = len(result["series"]["values"]) - 1
    t, theta, k, series, line = (
        drawable(result["curves"][n]) for n in ("t", "theta", "K", "series", "linear")
    )
    left.plot(t, theta, label="θ(t), robust flow", color=COLOURS[3])
    for i, (a, b) in enumerate(result["rising"]):
        label = None if i else "K* increases"
        right.axvspan(a, b, color=COLOURS[4], alpha=0.18, lw=0, label=label)
    right.plot(t, k, color=COLOURS[0], lw=2.2, label="K*(t) = τ/α*(θ(t))")
    if order >= 0:
        right.plot(t, series, color=COLOURS[1], ls="--", label=f"Taylor series to t^{order}")
    right.plot(t, line, color=COLOURS[2], ls="-.", label="straight line between the ends")
    shown = np.concatenate([k, line])
    margin = 0.12 * float(np.ptp(shown)) or 0.1 * float(np.abs(shown).max()) or 1.0
    ends = {"xlabel": "t (landscape)", "xlim": (t[0], t[-1])}
    left.set(ylabel="θ(t)", **ends)
    right.set(ylabel="K*(t)", ylim=(float(shown.min()) - margin, float(shown.max()) + margin), **ends)
    return legend_below(figure, (left, right), 3)


def _network(result: Result) -> Any:
    """K and alpha of the network's schedule over epochs, and K* that they come from."""
    figure, axes = panels(9.5, 3.9, 2)
    network = result["network"]
    start, cut = drawable(network["t"]), np.array(network["clipped"], dtype=bool)
    ends = np.append(start, network["schedule"]["epochs"])
    knobs = (("steps", "K, whole steps", "steps K", 0), ("alpha", "α, step size", "step size α (pixels)", 2))
    for axis, (knob, label, ylabel, colour) in zip(axes, knobs, strict=True):
        values = drawable([control[knob] for control in network["controls"]])
        style = {"where": "post", "color": COLOURS[colour], "lw": 2, "label": label}
        axis.step(ends, np.append(values, values[-1]), **style)
        top = 1.08 * max(float(values.max()), 1e-12)
        axis.set(xlabel="t (epochs)", ylabel=ylabel, xlim=(0, ends[-1]), ylim=(0, top))
        whole_ticks(axis)
    left, mapped = axes[0], drawable(network["mapped"])
    over: dict[str, Any] = {"clip_on": False, "zorder": 4}
    left.plot(start, mapped, "o", color=COLOURS[1], markersize=4, label="K* mapped, not rounded", **over)
    if cut.any():
        real = drawable(network["real"])
        left.plot(start, real, ":", color=GREY, label="K* of the landscape")
        style = {"color": "black", "markersize": 8, "label": "cut off at a bound", **over}
        left.plot(start[cut], mapped[cut], "X", **style)
        left.set_ylim(0, 1.08 * max(float(real.max()), left.get_ylim()[1]))
    whole_ticks(left, "y")
    return legend_below(figure, axes, 5)


def _calibration(result: Result) -> Any:
    """What was measured per epoch, the fitted landscape, and the residuals."""
    fit, name = result["calibration"]["fit"], result["settings"]["measure"]
    measured = result["calibration"]["measured"]["measures"][name]
    t, every = drawable(fit["times"]), drawable(result["calibration"]["measured"]["times"])
    values, residuals = drawable(measured["values"]), drawable(fit["residuals"])
    figure, (left, right) = panels(9.5, 3.9, 2)
    used, marked = np.isin(every, t), np.array([bool(mark) for mark in measured["marks"]])
    left.plot(every[used], values[used], "o", color="black", label="measured")
    for which, marker, size, label in (
        (~used, "x", 7, "measured, not used"),
        (marked, "o", 12, "a bound only"),
    ):
        if np.isfinite(values[which]).any():
            style: dict[str, Any] = {
                "color": "black",
                "markersize": size,
                "fillstyle": "none",
                "label": label,
            }
            left.plot(every[which], values[which], marker, **style)
    label = f"landscape, θ₀ = {fit['theta0']:.3g}, c = {fit['scale']:.3g} per epoch"
    left.plot(t, drawable(fit["fitted"]), color=COLOURS[0], label=label)
    left.set_ylim(bottom=0)
    right.axhline(0, color=GREY, lw=0.8)
    right.vlines(t, 0, residuals, color=COLOURS[1])
    right.plot(t, residuals, "o", color=COLOURS[1])
    others = f"constant {fit['rms_constant']:.3g}, straight line {fit['rms_line']:.3g}"
    right.set(title=f"rms {fit['rms']:.3g}  ({others})", ylabel="residual, log(measured/fitted)")
    left.set_ylabel(f"{name} (s/α*(θ))")
    for axis in (left, right):
        axis.set(xlabel="t (epochs)", xlim=left.get_xlim())
        whole_ticks(axis)
    return legend_below(figure, (left,), 4)


def _always(result: Result) -> bool:
    return True


def _has_positive_side(result: Result) -> bool:
    return any(row["left"] > 0 for row in sides(result))


def _has(key: str) -> Callable[[Result], bool]:
    return lambda result: result[key] is not None


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "landscape.png": Figure(_always, _landscape, "the landscape along the flow, with inner ascents"),
        "schedule.png": Figure(_always, _schedule, "θ(t) and K*(t)"),
        "network.png": Figure(_always, _network, "the network's schedule"),
        "principle.png": Figure(_has("verification"), principle, "the check against the maximum principle"),
        "bound.png": Figure(_has_positive_side, bound, "both sides of Theorem 1"),
        "calibration.png": Figure(_has("calibration"), _calibration, "measurements, fit and residuals"),
    }
)
