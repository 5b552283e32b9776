"""Common parts of all figures: colours, panels, and PNG files that are written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from controlat._util.files import write

__all__ = ["MARKERS", "line_style", "panels", "save"]

# Okabe and Ito's palette, readable with colour-vision deficiency, doubled by line styles.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line."""
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[(i // len(_COLOURS)) % len(_LINES)]}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    write(path, lambda file: file.write(buffer.getvalue()))


def panels(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with panels in one or several rows, and its axes; width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]
