"""Accuracy against the radius and against the steps of the attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlat._util.checks import number
from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat.report._curves import legend
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION", "draw_networks"]

Curves = Mapping[str, Any]  # see `controlat.robust_accuracy.curves`


def draw_networks(
    networks: Sequence[tuple[str, Sequence[Curves]]], where: Mapping[str, Any], path: Path
) -> None:
    """Accuracy against radius, against steps, and the loss against steps.

    Args:
        networks: a label and the curves (one per seed) of each; lines are means, bars the first's interval.
        where: has norm and eps.
        path: the file.
    """
    figure, axes = panels(12, 3.9, 3)
    for i, (label, curves) in enumerate(networks):
        _network(axes, curves, line_style(i) | {"marker": MARKERS[i % 8], "markersize": 4, "label": label})
    eps = float(where["eps"])
    axes[0].axvline(eps, color="grey", lw=0.8)
    axes[0].set_xlabel(f"radius ({where['norm']}; line: eps = {eps:.3g})")
    axes[0].set_ylabel("accuracy under PGD-20 (%)")
    axes[1].set_ylabel("accuracy under PGD (%)")
    axes[2].set_ylabel("mean cross-entropy")
    for axis in axes[1:]:
        axis.set_xscale("log")
        axis.set_xlabel("steps K of size eps/4")
    for axis in axes:
        axis.set_ylim(bottom=0)
    legend(figure, axes[0])
    save(figure, path)


def _network(axes: Any, curves: Sequence[Curves], style: dict[str, Any]) -> None:
    """The three lines of one network."""
    for axis, kind in zip(axes, ("eps", "steps"), strict=False):
        x = [point[kind] for point in curves[0][kind]]
        y = np.array([[100 * point["value"] for point in one[kind]] for one in curves])
        bounds = 100 * np.array([point["interval"] for point in curves[0][kind]]).T
        bars = np.clip([y[0] - bounds[0], bounds[1] - y[0]], 0, None)
        axis.errorbar(x, y.mean(0), yerr=bars, capsize=2, elinewidth=0.8, **style)
    steps = [point["steps"] for point in curves[0]["steps"]]
    axes[2].plot(steps, np.mean([[p["loss"] for p in one["steps"]] for one in curves], axis=0), **style)


def draw(result: Result, path: Path) -> None:
    """Those of every schedule."""
    s = result["settings"]
    networks: list[tuple[str, Sequence[Curves]]] = [
        (entry["text"], [run["evaluation"]["curves"] for run in entry["runs"]])
        for entry in result["schedules"]
    ]
    draw_networks(networks, {"norm": s["norm"], "eps": number(s["eps"], "eps")}, path)


SECTION = Section(
    order=130,
    wanted=lambda result: bool(result["settings"]["sweeps"]),
    figures=lambda result: {"sweeps.png": Figure("accuracy against radius and steps", draw)},
)
