"""Figures of a derivation, from its result only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from controlat._util.drawing import line_style, panels, save
from controlat.report.derivation.words import Result, greek

__all__ = ["FIGURES", "Figure"]

Array = NDArray[np.float64]
_STYLE: Any = {"axes.titlesize": 10, "legend.fontsize": 8}
_GREY = "0.5"
_LARGEST = 1e12  # beyond it nothing is drawn: the rest of the panel could not be read
_COLOURS = [line_style(i)["color"] for i in range(8)]


class Figure(NamedTuple):
    """One figure: whether a result has what it shows, what makes it, and its title in words."""

    wanted: Callable[[Result], bool]
    make: Callable[[Result], Any]
    title: str

    def draw(self, result: Result, path: Path) -> None:
        """Write the figure as a PNG file."""
        with rc_context(_STYLE):
            save(self.make(result), path)


def _values(numbers: Sequence[float | None]) -> Array:
    """Numbers to draw: nan for what is undefined or cannot be drawn."""
    y = np.array(numbers, dtype=float)
    return np.where(np.abs(y) < _LARGEST, y, np.nan)


def _below(figure: Any, axes: Sequence[Any], columns: int) -> Any:
    """The figure with one legend under all panels, every label once."""
    named: dict[str, Any] = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
    return figure


def _whole(axis: Any, which: str = "x") -> None:
    """Ticks at whole numbers."""
    getattr(axis, f"{which}axis").set_major_locator(MaxNLocator(integer=True))


# ---- the landscape and what is derived


def _landscape(result: Result) -> Any:
    """l(theta, .) at several times, all to the same scale, with an inner ascent of half the exact step."""
    pictures = result["pictures"]
    figure, axes = panels(3.1 * len(pictures), 3.7, len(pictures))
    gain = max(p["maximum"][1] - p["losses"][0] for p in pictures)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008, "color": _COLOURS[1]}
    for axis, p in zip(axes, pictures, strict=True):
        x, y = _values(p["path"]), _values(p["losses"])
        outside = np.flatnonzero(~((x >= p["x"][0]) & (x <= p["x"][-1])))
        x, y = (v[: outside[0] + 1] if outside.size else v for v in (x, y))  # an ascent that diverges
        axis.plot(p["x"], _values(p["l"]), color=_COLOURS[0], label="l(θ, x)")
        axis.quiver(x[:-1], y[:-1], np.diff(x), np.diff(y), **arrows)
        axis.plot(x, y, "o", color=_COLOURS[1], markersize=4, label="inner ascent, α = α*/2")
        axis.plot(x[0], y[0], "s", color="black", markersize=6, label="data point")
        axis.plot(*p["maximum"], "*", color=_COLOURS[2], markersize=13, label="inner maximum x*", zorder=1)
        if gain > 0:
            axis.set_ylim(p["maximum"][1] - 2.2 * gain, p["maximum"][1] + 0.3 * gain)
        title = f"t = {p['t']:.3g},  θ = {p['theta']:.3g}"
        axis.set(xlim=(p["x"][0], p["x"][-1]), title=title, xlabel="x")
    axes[0].set_ylabel("l(θ, x)   (same scale in all panels)")
    return _below(figure, axes[:1], 4)


def _schedule(result: Result) -> Any:
    """theta(t) of the robust flow; K*(t) with its Taylor series and the straight line between its ends."""
    figure, (left, right) = panels(9.5, 3.9, 2)
    order = len(result["series"]["values"]) - 1
    t, theta, k, series, line = (
        _values(result["curves"][n]) for n in ("t", "theta", "K", "series", "linear")
    )
    left.plot(t, theta, label="θ(t), robust flow", color=_COLOURS[3])
    for i, (a, b) in enumerate(result["rising"]):
        label = None if i else "K* increases"
        right.axvspan(a, b, color=_COLOURS[4], alpha=0.18, lw=0, label=label)
    right.plot(t, k, color=_COLOURS[0], lw=2.2, label="K*(t) = τ/α*(θ(t))")
    if order >= 0:
        right.plot(t, series, color=_COLOURS[1], ls="--", label=f"Taylor series to t^{order}")
    right.plot(t, line, color=_COLOURS[2], ls="-.", label="straight line between the ends")
    shown = np.concatenate([k, line])
    margin = 0.12 * float(np.ptp(shown)) or 0.1 * float(np.abs(shown).max()) or 1.0
    ends = {"xlabel": "t (landscape)", "xlim": (t[0], t[-1])}
    left.set(ylabel="θ(t)", **ends)
    right.set(ylabel="K*(t)", ylim=(float(shown.min()) - margin, float(shown.max()) + margin), **ends)
    return _below(figure, (left, right), 3)


def _network(result: Result) -> Any:
    """K and alpha of the network's schedule over epochs, and K* that they come from."""
    figure, axes = panels(9.5, 3.9, 2)
    network = result["network"]
    start, cut = _values(network["t"]), np.array(network["clipped"], dtype=bool)
    ends = np.append(start, network["schedule"]["epochs"])
    knobs = (("steps", "K, whole steps", "steps K", 0), ("alpha", "α, step size", "step size α (pixels)", 2))
    for axis, (knob, label, ylabel, colour) in zip(axes, knobs, strict=True):
        values = _values([control[knob] for control in network["controls"]])
        style = {"where": "post", "color": _COLOURS[colour], "lw": 2, "label": label}
        axis.step(ends, np.append(values, values[-1]), **style)
        top = 1.08 * max(float(values.max()), 1e-12)
        axis.set(xlabel="t (epochs)", ylabel=ylabel, xlim=(0, ends[-1]), ylim=(0, top))
        _whole(axis)
    left, mapped = axes[0], _values(network["mapped"])
    over: dict[str, Any] = {"clip_on": False, "zorder": 4}
    left.plot(start, mapped, "o", color=_COLOURS[1], markersize=4, label="K* mapped, not rounded", **over)
    if cut.any():
        real = _values(network["real"])
        left.plot(start, real, ":", color=_GREY, label="K* of the landscape")
        style = {"color": "black", "markersize": 8, "label": "cut off at a bound", **over}
        left.plot(start[cut], mapped[cut], "X", **style)
        left.set_ylim(0, 1.08 * max(float(real.max()), left.get_ylim()[1]))
    _whole(left, "y")
    return _below(figure, axes, 5)


# ---- the maximum principle


def _principle(result: Result) -> Any:
    """max H - H(u), schedules, costate and multiplier, and H over alpha."""
    figure, ((gaps, schedules), (costate, hamiltonian)) = panels(10, 7.6, 2, rows=2)
    checked = result["verification"]
    rows = [checked["derived"] | {"name": "derived: α*, K*"}]
    rows += [row for row in checked["comparisons"] if "error" not in row]
    for i, row in enumerate(rows):
        # Dashes, so that schedules that coincide are all seen.
        style = {"color": _COLOURS[i % 8], "linestyle": (0, (2 + len(rows) - i, i and 2)), "lw": 1.8}
        gaps.plot(row["t"], _values(row["gap"]), label=row["name"], **style)
        schedules.plot(row["t"], _values(row["K"]), label=row["name"], **style)
    _small(gaps)
    time = "t (landscape)"
    gaps.set(xlabel=time, ylabel="max H − H(u)   (0 is best)")
    schedules.set(xlabel=time, ylabel="K(t)")
    costate.set(xlabel=time)
    _costate(costate, checked["derived"])
    _hamiltonian(hamiltonian, result)
    problem = checked["problem"]
    figure.suptitle(f"admissible: {greek(problem['formula'])};  γ = {problem['gamma']:.3g}", fontsize=10)
    return _below(figure, (gaps,), 3)


def _small(axis: Any) -> None:
    """A symmetric logarithmic axis of values >= 0, which turns linear at the smaller ones that occur."""
    y = np.concatenate([line.get_ydata() for line in axis.get_lines()])
    finite = np.isfinite(y)
    positive = y[finite & (y > 0)]
    if not len(positive) or positive.max() < 100 * y[finite].min():
        axis.set_ylim(-0.05 * float(positive.max(initial=0.0) or 1.0), None if len(positive) else 1)
        return
    linear = _power(max(float(np.quantile(positive, 0.1)), 1e-6 * float(positive.max())))
    axis.set_yscale("symlog", linthresh=linear)
    axis.set_ylim(bottom=-0.1 * linear)
    if not finite.all():
        axis.set_title(f"values beyond {_LARGEST:g} are left out")


def _power(value: float) -> float:
    """The power of ten at or below a positive number, so that a symmetric axis has its ticks apart."""
    return float(10.0 ** np.floor(np.log10(value)))


def _costate(axis: Any, derived: Result) -> None:
    """p, and where there is one the multiplier m of alpha <= alpha* on an axis of its own."""
    axis.plot(derived["t"], _values(derived["p"]), color=_COLOURS[0])
    axis.set_ylabel("costate p(t)", color=_COLOURS[0])
    m = _values(derived["m"] or [None])
    known = bool(np.isfinite(m).any())
    axis.set_title("derived schedule: costate" + " and multiplier" * known)
    if known:
        other = axis.twinx()
        other.plot(derived["t"], m, color=_COLOURS[1], ls="--")
        other.set_ylabel("multiplier m(t) of α ≤ α*  (dashed)", color=_COLOURS[1])
        other.set_ylim(bottom=min(0.0, 1.1 * float(np.nanmin(m))))
        other.spines["top"].set_visible(False)


def _hamiltonian(axis: Any, result: Result) -> None:
    """H over alpha/alpha*, relative to its maximum; a star there, a ring at the derived control."""
    checked = result["verification"]
    derived, curves = checked["derived"], result["curves"]
    lowest = 0.0
    for i, row in enumerate(checked["hamiltonian"]):
        h, t = _values(row["H"]), row["t"]
        best = int(np.nanargmax(h))
        below = h - h[best]
        lowest = min(lowest, float(np.nanmin(below)))
        colour = {"color": _COLOURS[i]}
        axis.plot(row["ratio"], below, label=f"t = {t:.3g}", **colour)
        axis.plot(row["ratio"][best], 0, "*", markersize=14 - 3 * i, zorder=4, **colour)
        own = np.interp(t, derived["t"], derived["alpha"]) / np.interp(t, curves["t"], curves["alpha"])
        gap = np.interp(t, derived["t"], _values(derived["gap"]))
        axis.plot(own, -gap, "o", markersize=16 - 3 * i, fillstyle="none", zorder=4, **colour)
    axis.set_yscale("symlog", linthresh=_power(1e-3 * abs(lowest) or 1.0))
    title = "along the derived schedule; star: maximum, ring: u"
    axis.set(xlabel="α/α*(θ)", ylabel="H − max H", title=title)
    axis.legend()


# ---- Theorem 1


def _sides(result: Result) -> list[Mapping[str, Any]]:
    """The rows to which the theorem applies."""
    return [row for row in (result["bound"] or {"rows": []})["rows"] if row["left"] is not None]


def _bound(result: Result) -> Any:
    """Both sides of Theorem 1 over T, a panel for each sigma."""
    rows = _sides(result)
    every = sorted({row["sigma"] for row in rows})
    figure, axes = panels(max(4.6 * len(every), 6), 4.1, len(every))
    for axis, sigma in zip(axes, every, strict=True):
        _bound_panel(axis, [row for row in rows if row["sigma"] == sigma])
        title = f"noise of the gradient σ = {sigma:g}"
        axis.set(xscale="log", yscale="log", xlabel="T (steps)", title=title)
    axes[0].set_ylabel("mean over the steps of E L'(θ)²")
    return _below(figure, axes, 2)


def _bound_panel(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, left, corrected, printed, error = (
        _values([row[name] for row in rows])
        for name in ("T", "left", "corrected", "printed", "standard_error")
    )
    axis.plot(steps, corrected, "^--", color=_COLOURS[2], label="bound, corrected")
    drawn = np.where(printed > 0, printed, np.nan)
    axis.plot(steps, drawn, "s-.", color=_COLOURS[1], label="bound as printed")
    style = {"fmt": "o-", "color": _COLOURS[0], "capsize": 3, "label": "measured (bars: 2 standard errors)"}
    axis.errorbar(steps, left, yerr=2 * error, **style)
    broken = np.array([row["printed_holds"] is False for row in rows])
    style = {"color": "black", "markersize": 10, "zorder": 5, "label": "exceeds the bound as printed"}
    axis.plot(steps[broken], left[broken], "X", **style)
    if (zero := steps[printed == 0]).size:  # 0 has no place on a logarithmic axis
        where = "every T" if len(zero) == len(steps) else "T = " + ", ".join(f"{v:g}" for v in zero)
        style = {"transform": axis.transAxes, "fontsize": 9, "color": _COLOURS[1]}
        axis.text(0.03, 0.03, f"bound as printed: 0 for {where}", **style)


# ---- calibration


def _calibration(result: Result) -> Any:
    """What was measured per epoch, the fitted landscape, and the residuals."""
    fit, name = result["calibration"]["fit"], result["settings"]["measure"]
    measured = result["calibration"]["measured"]["measures"][name]
    t, every = _values(fit["times"]), _values(result["calibration"]["measured"]["times"])
    values, residuals = _values(measured["values"]), _values(fit["residuals"])
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
    left.plot(t, _values(fit["fitted"]), color=_COLOURS[0], label=label)
    left.set_ylim(bottom=0)
    right.axhline(0, color=_GREY, lw=0.8)
    right.vlines(t, 0, residuals, color=_COLOURS[1])
    right.plot(t, residuals, "o", color=_COLOURS[1])
    others = f"constant {fit['rms_constant']:.3g}, straight line {fit['rms_line']:.3g}"
    right.set(title=f"rms {fit['rms']:.3g}  ({others})", ylabel="residual, log(measured/fitted)")
    left.set_ylabel(f"{name} (s/α*(θ))")
    for axis in (left, right):
        axis.set(xlabel="t (epochs)", xlim=left.get_xlim())
        _whole(axis)
    return _below(figure, (left,), 4)


def _always(result: Result) -> bool:
    return True


def _has_positive_side(result: Result) -> bool:
    return any(row["left"] > 0 for row in _sides(result))


def _has(key: str) -> Callable[[Result], bool]:
    return lambda result: result[key] is not None


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "landscape.png": Figure(_always, _landscape, "the landscape along the flow, with inner ascents"),
        "schedule.png": Figure(_always, _schedule, "θ(t) and K*(t)"),
        "network.png": Figure(_always, _network, "the network's schedule"),
        "principle.png": Figure(_has("verification"), _principle, "the check against the maximum principle"),
        "bound.png": Figure(_has_positive_side, _bound, "both sides of Theorem 1"),
        "calibration.png": Figure(_has("calibration"), _calibration, "measurements, fit and residuals"),
    }
)
