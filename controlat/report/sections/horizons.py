"""The full criterion by horizon and by price."""

from __future__ import annotations

from pathlib import Path

from controlat._util.drawing import panels, save
from controlat._util.texts import table
from controlat.report._contents import examined, has_examined
from controlat.report._curves import finished, legend, over_time, seeds
from controlat.report._formats import estimate
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION"]


def text(result: Result) -> str:
    """C from costates that start at the end of windows of h steps, and at other prices."""
    entries = [(e["text"], e["summary"]["full"]) for _, e in examined(result)]
    first = entries[0][1]
    heads = [
        "schedule",
        *(f"h = {h['steps']}" for h in first["horizons"][:-1]),
        "whole run",
        *(f"whole run, gamma {p['gamma']:.3g}" for p in first["prices"]),
    ]
    cells = [
        [name, *map(estimate, full["horizons"]), *(f"{p['mean']:.3g}" for p in full["prices"])]
        for name, full in entries
    ]
    return (
        "## The full criterion\n\nFrom costates that start at the end of windows of h steps: h = 1 looks one "
        f"step ahead, the whole run is (13). Up to {result['settings']['looks']} steps of each epoch were "
        "looked at; mean over seeds, 95 % interval over these steps, ± standard deviation over seeds.\n\n"
        f"{table(heads, cells)}"
    )


def draw(result: Result, path: Path) -> None:
    """C per block by horizon; bands are the range over seeds."""
    entries = examined(result)
    steps = [h["steps"] for h in entries[0][1]["runs"][0]["full"]["horizons"]]
    figure, axes = panels(4.2 * len(steps), 3.9, len(steps))
    for k, (axis, h) in enumerate(zip(axes, steps, strict=True)):
        for i, entry in entries:
            t = [block["t"] for block in entry["runs"][0]["full"]["blocks"]]
            rows = [run["full"]["horizons"][k]["blocks"] for run in entry["runs"]]
            over_time(axis, i, entry["text"], t, rows)
        whole = h == entries[0][1]["runs"][0]["full"]["steps"]
        name = "the whole run" if whole else f"{h} step{'s' * (h > 1)}"
        finished(axis, f"horizon: {name}{seeds(result)}")
    axes[0].set_ylabel("C of the epoch   (0 is best)")
    legend(figure, axes[0])
    save(figure, path)


SECTION = Section(
    order=90,
    wanted=has_examined,
    text=text,
    figures=lambda result: {"horizons.png": Figure("C by horizon", draw)},
)
