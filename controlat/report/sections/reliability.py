"""What the size of the full criterion means: what relaxed controls reached of it."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat._util.texts import table
from controlat.report._contents import examined, has_examined
from controlat.report._curves import legend
from controlat.report._formats import mean
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION"]


def text(result: Result) -> str:
    """The gain to first order beside the decreases that roll-outs reached."""
    entries = [(e["text"], e["summary"]["full"]) for _, e in examined(result)]
    parts = dict.fromkeys(p for _, full in entries for p in full["reliability"])
    heads = ["schedule", "J", "G", "D", "model", *(f"r({Fraction(p)})" for p in parts), "reach", "kappa"]
    cells = [
        [
            name,
            *(mean(full[key]) for key in ("objective", "gain", "certificate", "model_gain")),
            *(mean(full["reliability"].get(p)) for p in parts),
            "-" if full["reach"] is None else str(Fraction(full["reach"]) or "none"),
            *(mean(full[key]) for key in ("kappa", "C_rho", "cosine", "growth")),
        ]
        for name, full in entries
    ]
    return (
        "## What its size means\n\nG = C eta T: what all maximisers together would gain to first order. "
        "D: the largest decrease that roll-outs which go a part lambda of the way to them reached; r = "
        "(decrease reached)/(lambda G); reach: the largest lambda with r >= 1/4 for all seeds; model: the "
        "largest decrease of the parabola through J with slope -G and the roll-out at lambda = 1/2; kappa = "
        "G/(J - its lower bound), above 1 G cannot be a decrease; C_rho: C in the trust region of that "
        "parabola; cosine: between the costate and what the maximiser changes in the state, negative "
        "where it is taken for its price; growth: of |p| from the end of the run to the first step looked "
        "at. Means over seeds; - where there is none.\n\n"
        f"{table([*heads, 'C_rho', 'cosine', 'growth'], cells)}"
    )


def draw(result: Result, path: Path) -> None:
    """Length of the costate along the run, and what C predicted beside what relaxed controls reached."""
    figure, axes = panels(9, 4.1, 2)
    for i, entry in examined(result):
        first = entry["runs"][0]["full"]
        t = np.array([n for n, _ in first["norms"]]) * len(entry["runs"][0]["epochs"]) / first["steps"]
        axes[0].plot(t, [p for _, p in first["norms"]], label=entry["text"], **line_style(i))
        for run in entry["runs"]:
            points = _reached(run["full"]["calibration"])
            axes[1].plot(*zip(*points, strict=True), MARKERS[i % 8], color=line_style(i)["color"], alpha=0.7)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("t (epochs)")
    axes[0].set_ylabel("length of the costate p")
    _finish_reached(axes[1])
    legend(figure, axes[0])
    save(figure, path)


def _reached(calibration: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(decrease predicted, decrease reached) of the roll-outs whose J is finite."""
    gain, j0 = calibration["gain"], calibration["objective"]
    outcomes = calibration["outcomes"].items()
    return [(float(part) * gain, j0 - j) for part, j in outcomes if j is not None] or [(0, 0)]


def _finish_reached(axis: Any) -> None:
    """The line on which everything predicted is reached; axes that hold all points, and 0."""
    points = np.concatenate([line.get_xydata() for line in axis.get_lines()])
    right = 2 * float(points[:, 0].max())
    low, high = 2 * float(points[:, 1].min()), 2 * float(points[:, 1].max())
    axis.plot([0, right], [0, right], color="grey", lw=0.8)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set_xscale("symlog", linthresh=0.1)  # one schedule may promise a hundred times what others do
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xlim(0, max(right, 0.1))
    axis.set_ylim(min(low, 0), max(high, 0.1))
    axis.set_xlabel("decrease of J predicted, λ G")
    axis.set_ylabel("decrease of J reached, J − J(λ)")


SECTION = Section(
    order=100,
    wanted=has_examined,
    text=text,
    figures=lambda result: {
        "costates.png": Figure("costates, and what C promised beside what was reached", draw)
    },
)
