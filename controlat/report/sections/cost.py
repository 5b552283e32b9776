"""What training cost, and what robust accuracy came with it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import EngFormatter, MaxNLocator

from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat._util.texts import count
from controlat.report._contents import summaries
from controlat.report._curves import legend
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION"]


def numbers(result: Result) -> dict[str, list[str]]:
    """Gradient evaluations and seconds of training."""
    every = summaries(result)
    return {
        "gradient evals": [count(s["gradients"]["mean"]) for s in every],
        "seconds": [f"{s['seconds']['mean']:.1f}" for s in every],
    }


def notes(result: Result) -> list[str]:
    """What was counted."""
    return [
        "gradient evals: forward-backward passes, in samples, of training; seconds: of training "
        "(both without validation, criterion and evaluation; mean over seeds)."
    ]


def draw(result: Result, path: Path) -> None:
    """Robust accuracy (with Wilson interval) against cost, in gradient evaluations and in seconds."""
    figure, axes = panels(9, 4.1, 2)
    for i, entry in enumerate(result["schedules"]):
        s = entry["summary"]
        robust, (low, high) = 100 * s["robust"]["mean"], (100 * v for v in s["robust"]["interval"])
        style = {"markersize": 8, "capsize": 3, "color": line_style(i)["color"], "label": entry["text"]}
        bars = [[max(robust - low, 0)], [max(high - robust, 0)]]
        for axis, cost in zip(axes, ("gradients", "seconds"), strict=True):
            axis.errorbar(s[cost]["mean"], robust, yerr=bars, fmt=MARKERS[i % 8], **style)
    axes[0].set_xlabel("gradient evaluations of training (samples)")
    axes[1].set_xlabel("seconds of training")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]), top=max(10, axis.get_ylim()[1]))
    axes[0].set_ylabel("robust accuracy (%)")
    legend(figure, axes[0])
    save(figure, path)


SECTION = Section(
    order=70,
    numbers=numbers,
    notes=notes,
    figures=lambda result: {"tradeoff.png": Figure("robustness against cost", draw)},
)
