"""Curves over the epochs of training, for several figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from controlat._util.drawing import MARKERS, line_style
from controlat.report.sections import Result

__all__ = ["finished", "legend", "over_time", "seeds"]


def over_time(axis: Any, i: int, label: str, t: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """Mean over seeds of something in the course of training, and a band of its range."""
    shortest = min(map(len, rows))  # a method may end training early
    values = np.array([row[:shortest] for row in rows])
    t = t[:shortest]
    axis.plot(t, values.mean(0), marker=MARKERS[i % 8], markersize=4, label=label, **line_style(i))
    if len(values) > 1:
        axis.fill_between(t, values.min(0), values.max(0), color=line_style(i)["color"], alpha=0.15, lw=0)


def finished(axis: Any, title: str) -> None:
    """Epochs across; a symmetric logarithmic axis of C that turns linear at the smaller means that occur."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("t (epochs)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = np.concatenate([line.get_ydata() for line in axis.get_lines()])
    threshold = float(np.quantile(values[values > 0], 0.1)) if (values > 0).any() else 1.0
    axis.set_yscale("symlog", linthresh=threshold)
    axis.set_ylim(bottom=0)


def seeds(result: Result) -> str:
    """The end of a title: what lines and bands are."""
    n = len(result["settings"]["seeds"])
    return f" (mean and range of {n} seeds)" if n > 1 else ""


def legend(figure: Figure, axis: Any) -> None:
    """The schedules under a figure, as one of its axes names them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
