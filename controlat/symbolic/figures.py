"""Figures of a derivation, from its result only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure as Sheet
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from controlat._util.drawing import line_style, panels, save
from controlat.symbolic.words import greek

__all__ = ["FIGURES", "Figure"]

Array = NDArray[np.float64]
Result = Mapping[str, Any]
_GREY = "0.5"
_LARGEST = 1e12  # beyond it nothing is drawn: the rest of the panel could not be read


class Figure(NamedTuple):
    """One figure: whether a result has what it shows, how it is drawn, and its title in words."""

    wanted: Callable[[Result], bool]
    draw: Callable[[Result, Path], None]
    title: str


def _values(found: Sequence[float | None]) -> Array:
    """Numbers to draw: nan for what is undefined or cannot be drawn."""
    y = np.array(found, dtype=float)
    return np.where(np.abs(y) < _LARGEST, y, np.nan)


def _colour(i: int) -> Any:
    return line_style(i)["color"]


def _below(figure: Any, axes: Sequence[Any], columns: int) -> None:
    """One legend under all panels, every label once."""
    named: dict[str, Any] = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize=8)


# ---- the landscape and what is derived


def _landscape(result: Result, path: Path) -> None:
    """l(theta, .) at several times, all to the same scale, with an inner ascent of half the exact step."""
    pictures = result["pictures"]
    figure, axes = panels(3.1 * len(pictures), 3.7, len(pictures))
    gain = max(p["maximum"][1] - p["losses"][0] for p in pictures)
    for axis, p in zip(axes, pictures, strict=True):
        x, y = _values(p["path"]), _values(p["losses"])
        outside = np.flatnonzero(~((x >= p["x"][0]) & (x <= p["x"][-1])))
        x, y = (v[: outside[0] + 1] if outside.size else v for v in (x, y))  # an ascent that diverges
        axis.plot(p["x"], _values(p["l"]), color=_colour(0), label="l(θ, x)")
        axis.quiver(
            *(x[:-1], y[:-1], np.diff(x), np.diff(y)),
            **{"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008, "color": _colour(1)},
        )
        axis.plot(x, y, "o", color=_colour(1), markersize=4, label="inner ascent, α = α*/2")
        axis.plot(x[0], y[0], "s", color="black", markersize=6, label="data point")
        axis.plot(*p["maximum"], "*", color=_colour(2), markersize=13, label="inner maximum x*", zorder=1)
        if gain > 0:
            axis.set_ylim(p["maximum"][1] - 2.2 * gain, p["maximum"][1] + 0.3 * gain)
        axis.set_xlim(p["x"][0], p["x"][-1])
        axis.set_title(f"t = {p['t']:.3g},  θ = {p['theta']:.3g}", fontsize=10)
        axis.set_xlabel("x")
    axes[0].set_ylabel("l(θ, x)   (same scale in all panels)")
    _below(figure, axes[:1], 4)
    save(figure, path)


def _schedule(result: Result, path: Path) -> None:
    """theta(t) of the robust flow; K*(t) with its Taylor series and the straight line between its ends."""
    figure, (left, right) = panels(9.5, 3.9, 2)
    curves, order = result["curves"], len(result["series"]["values"]) - 1
    t, k = _values(curves["t"]), _values(curves["K"])
    left.plot(t, _values(curves["theta"]), label="θ(t), robust flow", color=_colour(3))
    left.set_ylabel("θ(t)")
    for i, (a, b) in enumerate(result["rising"]):
        label = "K* increases" if i == 0 else None
        right.axvspan(a, b, color=_colour(4), alpha=0.18, lw=0, label=label)
    right.plot(t, k, color=_colour(0), lw=2.2, label="K*(t) = τ/α*(θ(t))")
    if order >= 0:
        series = _values(curves["series"])
        right.plot(t, series, color=_colour(1), ls="--", label=f"Taylor series to t^{order}")
    right.plot(
        t, _values(curves["linear"]), color=_colour(2), ls="-.", label="straight line between the ends"
    )
    shown = np.concatenate([k, _values(curves["linear"])])
    margin = 0.12 * float(np.ptp(shown)) or 0.1 * float(np.abs(shown).max()) or 1.0
    right.set_ylim(float(shown.min()) - margin, float(shown.max()) + margin)
    right.set_ylabel("K*(t)")
    for axis in (left, right):
        axis.set_xlabel("t (landscape)")
        axis.set_xlim(t[0], t[-1])
    _below(figure, (left, right), 3)
    save(figure, path)


def _network(result: Result, path: Path) -> None:
    """K and alpha of the network's schedule over epochs, and K* that they come from."""
    figure, (left, right) = panels(9.5, 3.9, 2)
    found = result["network"]
    start, cut = _values(found["t"]), np.array(found["clipped"], dtype=bool)
    ends = np.append(start, found["schedule"]["epochs"])
    for axis, knob, colour in ((left, "steps", 0), (right, "alpha", 2)):
        values = _values([control[knob] for control in found["controls"]])
        label = "K, whole steps" if knob == "steps" else "α, step size"
        axis.step(ends, np.append(values, values[-1]), where="post", color=_colour(colour), lw=2, label=label)
        axis.set_xlabel("t (epochs)")
        axis.set_xlim(0, ends[-1])
        axis.set_ylim(0, 1.08 * max(float(values.max()), 1e-12))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    mapped = _values(found["mapped"])
    over: dict[str, Any] = {"clip_on": False, "zorder": 4}
    left.plot(start, mapped, "o", color=_colour(1), markersize=4, label="K* mapped, not rounded", **over)
    if cut.any():
        real = _values(found["real"])
        left.plot(start, real, ":", color=_GREY, label="K* of the landscape")
        left.plot(
            start[cut], mapped[cut], "X", color="black", markersize=8, label="cut off at a bound", **over
        )
        left.set_ylim(0, 1.08 * max(float(real.max()), left.get_ylim()[1]))
    left.set_ylabel("steps K")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylabel("step size α (pixels)")
    _below(figure, (left, right), 5)
    save(figure, path)


# ---- the maximum principle


def _principle(result: Result, path: Path) -> None:
    """max H - H(u), schedules, costate and multiplier, and H over alpha."""
    figure = Sheet(figsize=(10, 7.6), dpi=130, layout="constrained")
    grid = figure.subplots(2, 2)
    for axis in grid.ravel():
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    found = result["verification"]
    rows = [found["derived"] | {"name": "derived: α*, K*"}]
    rows += [row for row in found["comparisons"] if "error" not in row]
    for i, row in enumerate(rows):
        # Dashes, so that schedules that coincide are all seen.
        style = {"color": _colour(i), "linestyle": (0, (2 + len(rows) - i, i and 2)), "lw": 1.8}
        grid[0, 0].plot(row["t"], _values(row["gap"]), label=row["name"], **style)
        grid[0, 1].plot(row["t"], _values(row["K"]), label=row["name"], **style)
    _small(grid[0, 0])
    grid[0, 0].set_ylabel("max H − H(u)   (0 is best)")
    grid[0, 1].set_ylabel("K(t)")
    _costate(grid[1, 0], found["derived"])
    _hamiltonian(grid[1, 1], result)
    for axis in (*grid[0], grid[1, 0]):
        axis.set_xlabel("t (landscape)")
    figure.suptitle(
        f"admissible: {greek(found['problem']['formula'])};  γ = {found['problem']['gamma']:.3g}", fontsize=10
    )
    _below(figure, (grid[0, 0],), 3)
    save(figure, path)


def _small(axis: Any) -> None:
    """A symmetric logarithmic axis of values >= 0, which turns linear at the smaller ones that occur."""
    y = np.concatenate([line.get_ydata() for line in axis.get_lines()])
    positive = y[np.isfinite(y) & (y > 0)]
    if not len(positive) or positive.max() < 100 * y[np.isfinite(y)].min():
        axis.set_ylim(-0.05 * float(positive.max(initial=0.0) or 1.0), None if len(positive) else 1)
        return
    linear = _power(max(float(np.quantile(positive, 0.1)), 1e-6 * float(positive.max())))
    axis.set_yscale("symlog", linthresh=linear)
    axis.set_ylim(bottom=-0.1 * linear)
    if not np.isfinite(y).all():
        axis.set_title(f"values beyond {_LARGEST:g} are left out", fontsize=10)


def _power(value: float) -> float:
    """The power of ten at or below a positive number, so that a symmetric axis has its ticks apart."""
    return float(10.0 ** np.floor(np.log10(value)))


def _costate(axis: Any, derived: Result) -> None:
    """p, and where there is one the multiplier m of alpha <= alpha* on an axis of its own."""
    axis.plot(derived["t"], _values(derived["p"]), color=_colour(0))
    axis.set_ylabel("costate p(t)", color=_colour(0))
    m = _values(derived["m"] or [None])
    if not np.isfinite(m).any():
        axis.set_title("derived schedule: costate", fontsize=10)
        return
    other = axis.twinx()
    other.plot(derived["t"], m, color=_colour(1), ls="--")
    other.set_ylabel("multiplier m(t) of α ≤ α*  (dashed)", color=_colour(1))
    other.set_ylim(bottom=min(0.0, 1.1 * float(np.nanmin(m))))
    other.spines["top"].set_visible(False)
    axis.set_title("derived schedule: costate and multiplier", fontsize=10)


def _hamiltonian(axis: Any, result: Result) -> None:
    """H over alpha/alpha*, relative to its maximum; a star there, a ring at the derived control."""
    found = result["verification"]
    derived, curves = found["derived"], result["curves"]
    lowest = 0.0
    for i, row in enumerate(found["hamiltonian"]):
        h, t = _values(row["H"]), row["t"]
        best = int(np.nanargmax(h))
        below = h - h[best]
        lowest = min(lowest, float(np.nanmin(below)))
        axis.plot(row["ratio"], below, label=f"t = {t:.3g}", **line_style(i) | {"linestyle": "-"})
        axis.plot(row["ratio"][best], 0, "*", color=_colour(i), markersize=14 - 3 * i, zorder=4)
        own = np.interp(t, derived["t"], derived["alpha"]) / np.interp(t, curves["t"], curves["alpha"])
        gap = np.interp(t, derived["t"], _values(derived["gap"]))
        axis.plot(own, -gap, "o", color=_colour(i), markersize=16 - 3 * i, fillstyle="none", zorder=4)
    axis.set_yscale("symlog", linthresh=_power(1e-3 * abs(lowest) or 1.0))
    axis.set_xlabel("α/α*(θ)")
    axis.set_ylabel("H − max H")
    axis.set_title("along the derived schedule; star: maximum, ring: u", fontsize=10)
    axis.legend(fontsize=8)


# ---- Theorem 1


def _sides(result: Result) -> list[Mapping[str, Any]]:
    """The rows to which the theorem applies."""
    return [row for row in (result["bound"] or {"rows": []})["rows"] if row["left"] is not None]


def _bound(result: Result, path: Path) -> None:
    """Both sides of Theorem 1 over T, a panel for each sigma."""
    rows = _sides(result)
    every = sorted({row["sigma"] for row in rows})
    figure, axes = panels(max(4.6 * len(every), 6), 4.1, len(every))
    for axis, sigma in zip(axes, every, strict=True):
        _bound_panel(axis, [row for row in rows if row["sigma"] == sigma])
        axis.set_title(f"noise of the gradient σ = {sigma:g}", fontsize=10)
    axes[0].set_ylabel("mean over the steps of E L'(θ)²")
    _below(figure, axes, 2)
    save(figure, path)


def _bound_panel(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, left = _values([row["T"] for row in rows]), _values([row["left"] for row in rows])
    corrected, printed = (_values([row[name] for row in rows]) for name in ("corrected", "printed"))
    axis.plot(steps, corrected, "--", color=_colour(2), marker="^", label="bound, corrected")
    axis.plot(
        steps,
        np.where(printed > 0, printed, np.nan),
        "-.",
        color=_colour(1),
        marker="s",
        label="bound as printed",
    )
    errors = [2 * row["standard_error"] for row in rows]
    axis.errorbar(
        steps,
        left,
        yerr=errors,
        fmt="o-",
        color=_colour(0),
        capsize=3,
        label="measured (bars: 2 standard errors)",
    )
    broken = np.array([row["printed_holds"] is False for row in rows])
    axis.plot(
        *(steps[broken], left[broken], "X"),
        **{"color": "black", "markersize": 10, "zorder": 5, "label": "exceeds the bound as printed"},
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("T (steps)")
    _zero(axis, steps, printed)


def _zero(axis: Any, steps: Array, printed: Array) -> None:
    """A bound of 0 has no place on a logarithmic axis: say so."""
    if (zero := steps[printed == 0]).size:
        where = "every T" if len(zero) == len(steps) else "T = " + ", ".join(f"{v:g}" for v in zero)
        axis.text(
            0.03,
            0.03,
            f"bound as printed: 0 for {where}",
            transform=axis.transAxes,
            fontsize=9,
            color=_colour(1),
        )


# ---- calibration


def _calibration(result: Result, path: Path) -> None:
    """What was measured per epoch, the fitted landscape, and the residuals."""
    found, name = result["calibration"]["fit"], result["settings"]["measure"]
    measured = result["calibration"]["measured"]["measures"][name]
    t, every = _values(found["times"]), _values(result["calibration"]["measured"]["times"])
    values = _values(measured["values"])
    figure, (left, right) = panels(9.5, 3.9, 2)
    used, marked = np.isin(every, t), np.array([bool(mark) for mark in measured["marks"]])
    left.plot(every[used], values[used], "o", color="black", label="measured")
    kinds = ((~used, "x", 7, "measured, not used"), (marked, "o", 12, "a bound only"))
    for which, marker, size, label in kinds:
        if np.isfinite(values[which]).any():
            style: dict[str, Any] = {
                "color": "black",
                "markersize": size,
                "fillstyle": "none",
                "label": label,
            }
            left.plot(every[which], values[which], marker, **style)
    label = f"landscape, θ₀ = {found['theta0']:.3g}, c = {found['scale']:.3g} per epoch"
    left.plot(t, _values(found["fitted"]), color=_colour(0), label=label)
    left.set_ylabel(f"{name} (s/α*(θ))")
    left.set_ylim(bottom=0)
    right.axhline(0, color=_GREY, lw=0.8)
    right.vlines(t, 0, _values(found["residuals"]), color=_colour(1))
    right.plot(t, _values(found["residuals"]), "o", color=_colour(1))
    others = f"constant {found['rms_constant']:.3g}, straight line {found['rms_line']:.3g}"
    rms = f"rms {found['rms']:.3g}  ({others})"
    right.set_title(rms, fontsize=10)
    right.set_ylabel("residual, log(measured/fitted)")
    for axis in (left, right):
        axis.set_xlabel("t (epochs)")
        axis.set_xlim(left.get_xlim())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _below(figure, (left,), 4)
    save(figure, path)


def _always(result: Result) -> bool:
    return True


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "landscape.png": Figure(_always, _landscape, "the landscape along the flow, with inner ascents"),
        "schedule.png": Figure(_always, _schedule, "θ(t) and K*(t)"),
        "network.png": Figure(_always, _network, "the network's schedule"),
        "principle.png": Figure(
            lambda result: result["verification"] is not None,
            _principle,
            "the check against the maximum principle",
        ),
        "bound.png": Figure(
            lambda result: any(row["left"] > 0 for row in _sides(result)), _bound, "both sides of Theorem 1"
        ),
        "calibration.png": Figure(
            lambda result: result["calibration"] is not None, _calibration, "measurements, fit and residuals"
        ),
    }
)
