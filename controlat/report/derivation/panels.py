"""What the figures of a derivation have in common: colours, values that can be drawn, one legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from controlat._util.drawing import line_style

__all__ = ["COLOURS", "GREY", "LARGEST", "drawable", "legend_below", "whole_ticks"]

Array = NDArray[np.float64]
GREY = "0.5"
LARGEST = 1e12  # beyond it nothing is drawn: the rest of the panel could not be read
COLOURS = [line_style(i)["color"] for i in range(8)]


def drawable(numbers: Sequence[float | None]) -> Array:
    """Numbers to draw: nan for what is undefined or cannot be drawn."""
    y = np.array(numbers, dtype=float)
    return np.where(np.abs(y) < LARGEST, y, np.nan)


def legend_below(figure: Any, axes: Sequence[Any], columns: int) -> Any:
    """The figure with one legend under all panels, every label once."""
    named: dict[str, Any] = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
    return figure


def whole_ticks(axis: Any, which: str = "x") -> None:
    """Ticks at whole numbers."""
    getattr(axis, f"{which}axis").set_major_locator(MaxNLocator(integer=True))
