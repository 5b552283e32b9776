"""What the full maximum principle would change in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from controlat._util.drawing import save
from controlat.report._contents import examined, first_seed, has_examined, searched_knobs
from controlat.report._formats import by_epoch, knobs
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION"]


def text(result: Result) -> str:
    """Per epoch, under the first seed: the maximiser over each of its blocks, and its gain."""
    entries = [entry for _, entry in examined(result)]
    return (
        "## What the full maximum principle would change\n\nControl of the schedule → maximiser over the "
        f"block, and what it would gain in units of J; seed {first_seed(result)}.\n\n"
        f"{by_epoch(entries, partial(_cell, searched_knobs(result)))}"
    )


def _cell(names: Sequence[str], run: Mapping[str, Any], epoch: int) -> str:
    blocks = [block for block in run["full"]["blocks"] if int(block["t"] + 1e-9) == epoch]
    return "; ".join(_change(names, block) for block in blocks) or "-"


def _change(names: Sequence[str], block: Mapping[str, Any]) -> str:
    u, v = block["control"], block["maximiser"]
    better = f" → {knobs(v, names)}, +{block['gain']:.3g}" if u != v else " is best"
    return knobs(u, names) + better


def draw(result: Result, path: Path) -> None:
    """The gain of every scored (alpha, K) in an early, a middle and a late epoch, for the first seed."""
    entries = [entry for _, entry in examined(result)]
    columns = max(len(entry["runs"][0]["full"]["surfaces"]) for entry in entries)
    figure = matplotlib.figure.Figure(
        figsize=(3.6 * columns, 2.6 * len(entries)), dpi=110, layout="constrained"
    )
    grid = figure.subplots(len(entries), columns, squeeze=False)
    for row, entry in zip(grid, entries, strict=True):
        for axis in row:
            axis.set_visible(False)
        for axis, block in zip(row, entry["runs"][0]["full"]["surfaces"], strict=False):
            axis.set_visible(True)
            _surface(figure, axis, block)
            axis.set_title(f"{entry['text']}, t = {block['t']:g}", fontsize=7)
    save(figure, path)


def _surface(figure: matplotlib.figure.Figure, axis: Any, block: Mapping[str, Any]) -> None:
    """One block: colours are sum DeltaH, a ring is u, a star the maximiser."""
    best: dict[tuple[float, float], float] = {}  # over other knobs that were searched
    for c in block["candidates"]:
        place = c["control"].get("alpha", 0.0), c["control"].get("steps", 0)
        best[place] = max(c["gain"], best.get(place, -np.inf))
    alpha, steps, gain = (np.array(v) for v in zip(*((*p, g) for p, g in best.items()), strict=True))
    limit = max(float(np.abs(gain).max()), 1e-12)
    drawn = axis.scatter(alpha, steps, c=gain, cmap="RdBu", vmin=-limit, vmax=limit, s=45, marker="s")
    for marker, size, v in (("o", 110, block["control"]), ("*", 60, block["maximiser"])):
        x, y = v.get("alpha", 0.0), v.get("steps", 0)
        face = "none" if marker == "o" else "black"
        axis.scatter([x], [y], marker=marker, s=size, facecolors=face, edgecolors="black")
    positive = alpha[alpha > 0]
    if len(positive) and positive.max() > 3 * positive.min():
        axis.set_xscale("symlog", linthresh=float(positive.min()))
    axis.set_xlabel("step size α", fontsize=7)
    axis.set_ylabel("steps K", fontsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=6)
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("gain in J (ring: u, star: best)", fontsize=6)


_TITLE = "the Hamiltonian over step size and steps (ring: u, star: the maximiser), seed"
SECTION = Section(
    order=110,
    wanted=has_examined,
    text=text,
    figures=lambda result: {"surfaces.png": Figure(f"{_TITLE} {first_seed(result)}", draw)},
)
