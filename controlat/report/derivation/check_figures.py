"""Figures of the checks of a derivation: the maximum principle, and Theorem 1 beside actual runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlat._util.drawing import panels
from controlat.report.derivation.panels import COLOURS, LARGEST, drawable, legend_below
from controlat.report.derivation.words import Result, greek

__all__ = ["bound", "principle", "sides"]


def principle(result: Result) -> Any:
    """max H - H(u), schedules, costate and multiplier, and H over alpha."""
    figure, ((gaps, schedules), (costate, hamiltonian)) = panels(10, 7.6, 2, rows=2)
    checked = result["verification"]
    rows = [checked["derived"] | {"name": "derived: α*, K*"}]
    rows += [row for row in checked["comparisons"] if "error" not in row]
    for i, row in enumerate(rows):
        # Dashes, so that schedules that coincide are all seen.
        style = {"color": COLOURS[i % 8], "linestyle": (0, (2 + len(rows) - i, i and 2)), "lw": 1.8}
        gaps.plot(row["t"], drawable(row["gap"]), label=row["name"], **style)
        schedules.plot(row["t"], drawable(row["K"]), label=row["name"], **style)
    _small(gaps)
    time = "t (landscape)"
    gaps.set(xlabel=time, ylabel="max H − H(u)   (0 is best)")
    schedules.set(xlabel=time, ylabel="K(t)")
    costate.set(xlabel=time)
    _costate(costate, checked["derived"])
    _hamiltonian(hamiltonian, result)
    problem = checked["problem"]
    figure.suptitle(f"admissible: {greek(problem['formula'])};  γ = {problem['gamma']:.3g}", fontsize=10)
    return legend_below(figure, (gaps,), 3)


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
        axis.set_title(f"values beyond {LARGEST:g} are left out")


def _power(value: float) -> float:
    """The power of ten at or below a positive number, so that a symmetric axis has its ticks apart."""
    return float(10.0 ** np.floor(np.log10(value)))


def _costate(axis: Any, derived: Result) -> None:
    """p, and where there is one the multiplier m of alpha <= alpha* on an axis of its own."""
    axis.plot(derived["t"], drawable(derived["p"]), color=COLOURS[0])
    axis.set_ylabel("costate p(t)", color=COLOURS[0])
    m = drawable(derived["m"] or [None])
    known = bool(np.isfinite(m).any())
    axis.set_title("derived schedule: costate" + " and multiplier" * known)
    if known:
        other = axis.twinx()
        other.plot(derived["t"], m, color=COLOURS[1], ls="--")
        other.set_ylabel("multiplier m(t) of α ≤ α*  (dashed)", color=COLOURS[1])
        other.set_ylim(bottom=min(0.0, 1.1 * float(np.nanmin(m))))
        other.spines["top"].set_visible(False)


def _hamiltonian(axis: Any, result: Result) -> None:
    """H over alpha/alpha*, relative to its maximum; a star there, a ring at the derived control."""
    checked = result["verification"]
    derived, curves = checked["derived"], result["curves"]
    lowest = 0.0
    for i, row in enumerate(checked["hamiltonian"]):
        h, t = drawable(row["H"]), row["t"]
        best = int(np.nanargmax(h))
        below = h - h[best]
        lowest = min(lowest, float(np.nanmin(below)))
        colour = {"color": COLOURS[i]}
        axis.plot(row["ratio"], below, label=f"t = {t:.3g}", **colour)
        axis.plot(row["ratio"][best], 0, "*", markersize=14 - 3 * i, zorder=4, **colour)
        own = np.interp(t, derived["t"], derived["alpha"]) / np.interp(t, curves["t"], curves["alpha"])
        gap = np.interp(t, derived["t"], drawable(derived["gap"]))
        axis.plot(own, -gap, "o", markersize=16 - 3 * i, fillstyle="none", zorder=4, **colour)
    axis.set_yscale("symlog", linthresh=_power(1e-3 * abs(lowest) or 1.0))
    title = "along the derived schedule; star: maximum, ring: u"
    axis.set(xlabel="α/α*(θ)", ylabel="H − max H", title=title)
    axis.legend()


def sides(result: Result) -> list[Mapping[str, Any]]:
    """The rows to which the theorem applies."""
    return [row for row in (result["bound"] or {"rows": []})["rows"] if row["left"] is not None]


def bound(result: Result) -> Any:
    """Both sides of Theorem 1 over T, a panel for each sigma."""
    rows = sides(result)
    every = sorted({row["sigma"] for row in rows})
    figure, axes = panels(max(4.6 * len(every), 6), 4.1, len(every))
    for axis, sigma in zip(axes, every, strict=True):
        _bound_panel(axis, [row for row in rows if row["sigma"] == sigma])
        title = f"noise of the gradient σ = {sigma:g}"
        axis.set(xscale="log", yscale="log", xlabel="T (steps)", title=title)
    axes[0].set_ylabel("mean over the steps of E L'(θ)²")
    return legend_below(figure, axes, 2)


def _bound_panel(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, left, corrected, printed, error = (
        drawable([row[name] for row in rows])
        for name in ("T", "left", "corrected", "printed", "standard_error")
    )
    axis.plot(steps, corrected, "^--", color=COLOURS[2], label="bound, corrected")
    drawn = np.where(printed > 0, printed, np.nan)
    axis.plot(steps, drawn, "s-.", color=COLOURS[1], label="bound as printed")
    style = {"fmt": "o-", "color": COLOURS[0], "capsize": 3, "label": "measured (bars: 2 standard errors)"}
    axis.errorbar(steps, left, yerr=2 * error, **style)
    broken = np.array([row["printed_holds"] is False for row in rows])
    style = {"color": "black", "markersize": 10, "zorder": 5, "label": "exceeds the bound as printed"}
    axis.plot(steps[broken], left[broken], "X", **style)
    if (zero := steps[printed == 0]).size:  # 0 has no place on a logarithmic axis
        where = "every T" if len(zero) == len(steps) else "T = " + ", ".join(f"{v:g}" for v in zero)
        style = {"transform": axis.transAxes, "fontsize": 9, "color": COLOURS[1]}
        axis.text(0.03, 0.03, f"bound as printed: 0 for {where}", **style)
