"""Figures of an evaluation, from its result file only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from controlat._util.checks import number
from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat.pmp import FORMS

__all__ = [
    "FIGURES",
    "costates",
    "criterion",
    "examined",
    "horizons",
    "schedules",
    "surfaces",
    "sweeps",
    "tradeoff",
]

_KNOBS = {"alpha": "step size α", "steps": "steps K"}


def schedules(result: Mapping[str, Any], path: Path) -> None:
    """Every knob of every schedule over time."""
    from controlat.control.schedules import Schedule

    every = [Schedule.from_json(entry["schedule"]) for entry in result["schedules"]]
    knobs = sorted({knob for s in every for knob in s.curves}, key=lambda k: (k not in _KNOBS, k))
    figure, axes = panels(max(4.5 * len(knobs), 6), 3.6, len(knobs))
    for i, (entry, s) in enumerate(zip(result["schedules"], every, strict=True)):
        t = np.arange(s.pieces + 1) * s.resolution
        # Dashes, so that schedules that coincide are all seen.
        style = line_style(i) | {"linestyle": (0, (1 + len(result["schedules"]) - i, i and 1))}
        for axis, knob in zip(axes, knobs, strict=True):
            if knob in s.curves:
                values = [s(v)[knob] for v in t]
                axis.step(t, values, where="post", label=entry["text"], linewidth=2, **style)
    for axis, knob in zip(axes, knobs, strict=True):
        axis.set_ylabel(_KNOBS.get(knob, knob))
        axis.set_xlabel("t (epochs)")
    named: dict[str, Any] = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def criterion(result: Mapping[str, Any], path: Path) -> None:
    """C per epoch in both forms; bands are the range over seeds."""
    figure, axes = panels(9, 3.9, len(FORMS))
    for axis, form in zip(axes, FORMS, strict=True):
        for i, entry in enumerate(result["schedules"]):
            t = [e["epoch"] for e in entry["runs"][0]["criterion"]]
            rows = [[e[form]["value"] for e in run["criterion"]] for run in entry["runs"]]
            _over_time(axis, i, entry["text"], t, rows)
        _finished(axis, f"C, {form} form{_seeds(result)}")
    axes[0].set_ylabel("max H − H(u)   (0 is best)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def _over_time(axis: Any, i: int, label: str, t: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """Mean over seeds of something in the course of training, and a band of its range."""
    shortest = min(map(len, rows))  # a method may end training early
    values = np.array([row[:shortest] for row in rows])
    t = t[:shortest]
    axis.plot(t, values.mean(0), marker=MARKERS[i % 8], markersize=4, label=label, **line_style(i))
    if len(values) > 1:
        axis.fill_between(t, values.min(0), values.max(0), color=line_style(i)["color"], alpha=0.15, lw=0)


def _finished(axis: Any, title: str) -> None:
    """Epochs across; a symmetric logarithmic axis of C that turns linear at the smaller means that occur."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("t (epochs)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    found = np.concatenate([line.get_ydata() for line in axis.get_lines()])
    threshold = float(np.quantile(found[found > 0], 0.1)) if (found > 0).any() else 1.0
    axis.set_yscale("symlog", linthresh=threshold)
    axis.set_ylim(bottom=0)


def _seeds(result: Mapping[str, Any]) -> str:
    n = len(result["settings"]["seeds"])
    return f" (mean and range of {n} seeds)" if n > 1 else ""


def tradeoff(result: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy (with Wilson interval) against cost, in gradient evaluations and in seconds."""
    figure, axes = panels(9, 4.1, 2)
    for i, entry in enumerate(result["schedules"]):
        s = entry["summary"]
        robust, (low, high) = 100 * s["robust"]["mean"], (100 * v for v in s["robust"]["interval"])
        bars = [[max(robust - low, 0)], [max(high - robust, 0)]]
        for axis, cost in zip(axes, ("gradients", "seconds"), strict=True):
            axis.errorbar(
                s[cost]["mean"],
                robust,
                yerr=bars,
                fmt=MARKERS[i % 8],
                markersize=8,
                capsize=3,
                color=line_style(i)["color"],
                label=entry["text"],
            )
    axes[0].set_xlabel("gradient evaluations of training (samples)")
    axes[1].set_xlabel("seconds of training")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]), top=max(10, axis.get_ylim()[1]))
    axes[0].set_ylabel("robust accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def sweeps(
    networks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], where: Mapping[str, Any], path: Path
) -> None:
    """Accuracy against radius, against steps, and the loss against steps.

    Args:
        networks: a label and the sweeps (one per seed) of each; lines are means, bars the first's interval.
        where: has norm and eps.
        path: the file.
    """
    figure, axes = panels(12, 3.9, 3)
    for i, (label, found) in enumerate(networks):
        style = line_style(i) | {"marker": MARKERS[i % 8], "markersize": 4, "label": label}
        for axis, kind in zip(axes, ("eps", "steps"), strict=False):
            x = [point[kind] for point in found[0][kind]]
            y = np.array([[100 * point["value"] for point in one[kind]] for one in found])
            bounds = 100 * np.array([point["interval"] for point in found[0][kind]]).T
            bars = np.clip([y[0] - bounds[0], bounds[1] - y[0]], 0, None)
            axis.errorbar(x, y.mean(0), yerr=bars, capsize=2, elinewidth=0.8, **style)
        steps = [point["steps"] for point in found[0]["steps"]]
        axes[2].plot(steps, np.mean([[p["loss"] for p in one["steps"]] for one in found], axis=0), **style)
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def _sweeps(result: Mapping[str, Any], path: Path) -> None:
    networks = [
        (entry["text"], [run["evaluation"]["curves"] for run in entry["runs"]])
        for entry in result["schedules"]
    ]
    settings = result["settings"]
    sweeps(networks, {"norm": settings["norm"], "eps": number(settings["eps"], "eps")}, path)


def examined(result: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """(place, schedule) of those that have the full criterion: it may be left out, or not be finite."""
    every = enumerate(result["schedules"])
    return [(i, e) for i, e in every if "failed" not in e["summary"].get("full", {"failed": ""})]


def horizons(result: Mapping[str, Any], path: Path) -> None:
    """C per block by horizon; bands are the range over seeds."""
    entries = examined(result)
    steps = [h["steps"] for h in entries[0][1]["runs"][0]["full"]["horizons"]]
    figure, axes = panels(4.2 * len(steps), 3.9, len(steps))
    for k, (axis, h) in enumerate(zip(axes, steps, strict=True)):
        for i, entry in entries:
            t = [block["t"] for block in entry["runs"][0]["full"]["blocks"]]
            rows = [run["full"]["horizons"][k]["blocks"] for run in entry["runs"]]
            _over_time(axis, i, entry["text"], t, rows)
        whole = h == entries[0][1]["runs"][0]["full"]["steps"]
        name = "the whole run" if whole else f"{h} step{'s' * (h > 1)}"
        _finished(axis, f"horizon: {name}{_seeds(result)}")
    axes[0].set_ylabel("C of the epoch   (0 is best)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def costates(result: Mapping[str, Any], path: Path) -> None:
    """Length of the costate along the run, and what C predicted beside what relaxed controls reached."""
    figure, axes = panels(9, 4.1, 2)
    for i, entry in examined(result):
        first = entry["runs"][0]["full"]
        t = np.array([n for n, _ in first["norms"]]) * len(entry["runs"][0]["epochs"]) / first["steps"]
        axes[0].plot(t, [p for _, p in first["norms"]], label=entry["text"], **line_style(i))
        for run in entry["runs"]:
            c = run["full"]["calibration"]
            known = {float(part): j for part, j in c["outcomes"].items() if j is not None}
            points = [(part * c["gain"], c["objective"] - j) for part, j in known.items()] or [(0, 0)]
            axes[1].plot(*zip(*points, strict=True), MARKERS[i % 8], color=line_style(i)["color"], alpha=0.7)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("t (epochs)")
    axes[0].set_ylabel("length of the costate p")
    reached = np.concatenate([line.get_xydata() for line in axes[1].get_lines()])
    right = 2 * float(reached[:, 0].max())
    low, high = 2 * float(reached[:, 1].min()), 2 * float(reached[:, 1].max())
    axes[1].plot([0, right], [0, right], color="grey", lw=0.8)
    axes[1].axhline(0, color="grey", lw=0.8)
    axes[1].set_xscale("symlog", linthresh=0.1)  # one schedule may promise a hundred times what others do
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_xlim(0, max(right, 0.1))
    axes[1].set_ylim(min(low, 0), max(high, 0.1))
    axes[1].set_xlabel("decrease of J predicted, λ G")
    axes[1].set_ylabel("decrease of J reached, J − J(λ)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def surfaces(result: Mapping[str, Any], path: Path) -> None:
    """What every (alpha, K) would be worth in an early, a middle and a late epoch, for the first seed."""
    entries = [entry for _, entry in examined(result)]
    columns = max(len(entry["runs"][0]["full"]["surfaces"]) for entry in entries)
    figure = Figure(figsize=(3.6 * columns, 2.6 * len(entries)), dpi=110, layout="constrained")
    grid = figure.subplots(len(entries), columns, squeeze=False)
    for row, entry in zip(grid, entries, strict=True):
        for axis in row:
            axis.set_visible(False)
        for axis, found in zip(row, entry["runs"][0]["full"]["surfaces"], strict=False):
            axis.set_visible(True)
            _surface(figure, axis, found)
            axis.set_title(f"{entry['text']}, t = {found['t']:g}", fontsize=7)
    save(figure, path)


def _surface(figure: Figure, axis: Any, found: Mapping[str, Any]) -> None:
    """One block: colours are sum DeltaH, a ring is u, a star the maximiser."""
    best: dict[tuple[float, float], float] = {}  # over other knobs that were searched
    for c in found["candidates"]:
        place = c["control"].get("alpha", 0.0), c["control"].get("steps", 0)
        best[place] = max(c["gain"], best.get(place, -np.inf))
    alpha, steps, gain = (np.array(v) for v in zip(*((*p, g) for p, g in best.items()), strict=True))
    limit = max(float(np.abs(gain).max()), 1e-12)
    drawn = axis.scatter(alpha, steps, c=gain, cmap="RdBu", vmin=-limit, vmax=limit, s=45, marker="s")
    for marker, size, v in (("o", 110, found["control"]), ("*", 60, found["maximiser"])):
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


FIGURES: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = MappingProxyType(
    {
        "schedules.png": schedules,
        "criterion.png": criterion,
        "tradeoff.png": tradeoff,
        "sweeps.png": _sweeps,
        "horizons.png": horizons,
        "costates.png": costates,
        "surfaces.png": surfaces,
    }
)
