"""The figures of a search, drawn from its result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat._util.texts import short
from controlat.control.schedules import Schedule
from controlat.report.search.judgement import finished, label
from controlat.report.search.trials import (
    Explained,
    at_prices,
    explained,
    failed,
    front,
    full_length,
    is_whole,
    means,
    objective,
    spent_after,
)
from controlat.report.sections import Figure

__all__ = ["FIGURES"]

Result = Mapping[str, Any]
_KNOBS = {"steps": "steps K", "alpha": "step size α"}
_RUNNERS_UP = 8  # schedules behind the one that was found
_WIDTH = 7.0  # inches: shown 700 pixels wide, letters of size 9 have 12 pixels


def _styles(result: Result) -> dict[str, dict[str, Any]]:
    """Colour and marker of every space."""
    names = [space["name"] for space in result["spaces"]]
    return {name: {"color": line_style(i)["color"], "marker": MARKERS[i % 8]} for i, name in enumerate(names)}


def _legend(figure: Any, axis: Any, columns: int = 3) -> None:
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # every label once
    shown = [short(name, 40) for name in named]
    figure.legend(named.values(), shown, loc="outside lower center", ncols=columns, fontsize=9)


# -------------------------------------------------------------------------------------------------- schedules


def schedules(result: Result, path: Path) -> None:
    """Every control over time: what was found, and pale behind it the best of the others."""
    every = {text: Schedule.from_json(entry) for text, entry in result["schedules"].items()}
    best = every.pop(result["found"])
    spaces = {trial["schedule"]: trial["space"] for trial in result["trials"]}
    knobs = sorted(best.curves, key=lambda k: ([*_KNOBS, k].index(k), k))
    figure, axes = panels(_WIDTH, 3.4, len(knobs))
    styles = _styles(result)
    for axis, knob in zip(axes, knobs, strict=True):
        for text in list(every)[:_RUNNERS_UP]:
            colour = styles[spaces[text]]["color"]
            style = {"color": colour, "alpha": 0.4, "lw": 1.2, "label": f"runner-up, {spaces[text]}"}
            _draw_knob(axis, every[text], knob, style)
        name = f"found, {spaces[result['found']]}"
        style = {"color": styles[spaces[result["found"]]]["color"], "lw": 2.8, "label": name}
        _draw_knob(axis, best, knob, style)
        axis.set_ylabel(_KNOBS.get(knob, knob))
        axis.set_xlabel("t (epochs)")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_ylim(bottom=0)
    _legend(figure, axes[0])
    save(figure, path)


def _draw_knob(axis: Any, schedule: Schedule, knob: str, style: Mapping[str, Any]) -> None:
    """A control over time, real where it is dithered; a step size only where steps are taken."""
    if knob not in schedule.curves:
        return
    t = np.arange(schedule.pieces + 1) * schedule.resolution
    controls = [schedule(time) for time in t]
    unused = [knob == "alpha" and u.get("steps", 1) == 0 for u in controls]
    values = [np.nan if none else u[knob] for u, none in zip(controls, unused, strict=True)]
    axis.step(t, values, where="post", **style)


# --------------------------------------------------------------------------------------------------- progress


def progress(result: Result, path: Path) -> None:
    """J of every trial against what was spent, and the best so far of each stage."""
    figure, (axis,) = panels(_WIDTH, 4.2, 1)
    trials, spent, styles = result["trials"], spent_after(result), _styles(result)
    j = np.array([objective(t, result["price"]) for t in trials])
    top = _top(j[np.isfinite(j)])
    for name, style in styles.items():
        good = [i for i, t in enumerate(trials) if t["space"] == name and not failed(t)]
        for whole, fill in ((True, {}), (False, {"mfc": "none"})):
            here = [i for i in good if is_whole(result, trials[i]) == whole]
            label_ = name if whole else f"{name}, in part"
            _dots(axis, [spent[i] for i in here], j[here], top, style | fill | {"label": label_})
    lost = [spent[i] for i, t in enumerate(trials) if failed(t)]
    _at_the_end(axis, lost, top, "x", "black", "failed")
    _best_so_far(axis, trials, spent, np.where([is_whole(result, t) for t in trials], j, np.nan))
    axis.set_ylim(top=top)
    axis.set_xlim(left=0)
    axis.set_xlabel("gradient evaluations spent (samples)")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set_ylabel("J, mean over the seeds of a trial")
    unit = float(result["unit"]["gradients"])
    upper = axis.secondary_xaxis("top", functions=(lambda x: x / unit, lambda x: x * unit))
    upper.set_xlabel(f"trainings of {short(result['unit']['schedule'], 40)}", fontsize=9)
    _legend(figure, axis)
    save(figure, path)


def _top(j: Any) -> float:
    """The upper end of an axis on which the better four fifths can be told apart."""
    if not len(j):
        return 1.0
    low, high = float(j.min()), float(np.quantile(j, 0.8))
    return min(float(j.max()), high + 0.5 * (high - low)) + 0.05 * max(high - low, 1e-3)


def _dots(axis: Any, x: Sequence[float], j: Any, top: float, style: Mapping[str, Any]) -> None:
    """Trials; those above the axis as triangles at its upper end."""
    if len(x):
        axis.plot(x, np.where(j <= top, j, np.nan), ls="", ms=6, alpha=0.75, **style)
    _at_the_end(axis, [v for v, one in zip(x, j, strict=True) if one > top], top, 6, style["color"])


def _at_the_end(axis: Any, x: Sequence[float], top: float, marker: Any, colour: str, name: str = "") -> None:
    """Marks at the upper end of an axis. None are drawn of nothing, which the layout would make room for."""
    if x:
        style = {"marker": marker, "color": colour, "label": name or None, "alpha": 0.75}
        axis.plot(x, [top] * len(x), ls="", ms=7, clip_on=False, **style)


def _best_so_far(axis: Any, trials: Sequence[Any], spent: Sequence[float], j: Any) -> None:
    """A line for each stage, of whole runs: J under more seeds, or of less training, is another quantity."""
    stages = [t["stage"] for t in trials]
    for i, stage in enumerate(dict.fromkeys(stages)):
        here = [k for k, s in enumerate(stages) if s == stage]
        best = np.fmin.accumulate(j[here])
        line = {"color": "black", "ls": "-" if i == 0 else (0, (2, 1)), "lw": 1.6}
        axis.step([spent[k] for k in here], best, where="post", label="best so far", **line)
        if i:
            axis.axvline(spent[here[0] - 1], color="0.6", lw=0.8)
        place = (spent[here[0] - 1] if i else 0.0, 0.9)
        axis.annotate(f" {stage}", place, xycoords=("data", "axes fraction"), fontsize=9, color="0.35")


# ----------------------------------------------------------------------------------------------------- pareto


def pareto(result: Result, path: Path) -> None:
    """Phi of the trials, and robust accuracy of the contenders, against the cost n of a step."""
    figure, axes = panels(_WIDTH, 8.2, 1, 2)
    upper, lower = axes[:, 0]
    _trials(upper, result)
    _contenders(lower, result)
    for axis in (upper, lower):
        axis.set_xlabel("n, gradient evaluations per sample and step")
        axis.set_xlim(left=0)
    upper.legend(fontsize=8, ncols=2, loc="best")
    handles, names = lower.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    save(figure, path)


def _trials(axis: Any, result: Result) -> None:
    """(n, Phi) of all trials of full length, their front, and the best at several prices."""
    trials = full_length(result)
    points = [means(t) for t in trials]
    top = _top(np.array([phi for _, phi in points]))
    for name, style in _styles(result).items():
        here = [point for point, t in zip(points, trials, strict=True) if t["space"] == name]
        _dots(axis, [n for n, _ in here], np.array([y for _, y in here]), top, style | {"label": name})
    edge = [points[i] for i in front(points)]
    axis.step(*zip(*edge, strict=True), where="post", color="black", lw=1.2, label="Pareto front")
    best: dict[tuple[float, float], list[str]] = {}
    for price, trial in at_prices(result):
        best.setdefault(means(trial), []).append(f"{price / result['price']:g}")
    for i, ((n, phi), factors) in enumerate(sorted(best.items())):
        told = f"{factors[0]}..{factors[-1]} γ" if len(factors) > 1 else f"{factors[0]} γ"
        axis.plot(n, phi, "o", ms=12, mfc="none", mec="black")
        place = {"xytext": (0, -10 - 11 * (i % 2)), "textcoords": "offset points"}  # neighbours do not clash
        axis.annotate(told, (n, phi), fontsize=9, va="top", ha="center", **place)
    least = min(y for _, y in points)
    axis.set_ylim(least - 0.25 * (top - least), top)
    axis.set_ylabel("Phi under the search's seeds")


def _contenders(axis: Any, result: Result) -> None:
    """(n, robust accuracy) of the judgement with 95 % intervals over seeds, and their front."""
    rows = finished(result)
    points = [(float(np.mean(row["mean_cost"])), -100 * float(np.mean(row["robust"]))) for row in rows]
    least = _bottom(sorted(-y for _, y in points))
    for i, (row, (n, y)) in enumerate(zip(rows, points, strict=True)):
        style = {"color": line_style(i)["color"], "label": label(row)}
        if -y < least:  # far below all others: a triangle at the lower end
            axis.plot(n, least, marker=7, ms=8, ls="", clip_on=False, **style)
            axis.annotate(f"  {-y:.0f} %", (n, least), (4, 4), textcoords="offset points", fontsize=9)
            continue
        style |= {"fmt": MARKERS[(i + i // 8) % 8], "capsize": 3, "ms": 10 if row is result["rows"][0] else 7}
        axis.errorbar(n, -y, yerr=_half_width(row["robust"]), **style)
    edge = [points[i] for i in front(points)]
    axis.step([n for n, _ in edge], [-y for _, y in edge], where="post", color="0.5", lw=1, zorder=0)
    if np.isfinite(least):
        axis.set_ylim(bottom=least)
    axis.set_ylabel("robust accuracy (%), judging seeds")


def _bottom(heights: Sequence[float]) -> float:
    """The lower end of an axis that leaves out one value far below all others; -inf where there is none."""
    if len(heights) < 3 or heights[1] - heights[0] <= max(heights[-1] - heights[1], 3.0):
        return -np.inf
    return heights[1] - 0.5 * (heights[-1] - heights[1]) - 3


def _half_width(shares: Sequence[float]) -> float:
    """Of the 95 % interval of a mean (Student's t), in per cent; 0 for one seed."""
    from scipy import stats

    n = len(shares)
    return float(100 * stats.t.ppf(0.975, n - 1) * np.std(shares, ddof=1) / np.sqrt(n)) if n > 1 else 0.0


# ------------------------------------------------------------------------------------------------- parameters


def parameters(result: Result, path: Path) -> None:
    """What every parameter explains of the order of the trials of its space."""
    every = [space for space in explained(result) if space.degree]
    figure, axes = panels(_WIDTH, 0.9 + sum(0.7 + 0.32 * (len(e.shares) + 1) for e in every), 1, len(every))
    np.ravel(axes)[0].get_gridspec().set_height_ratios([len(one.shares) + 1 for one in every])
    for axis, one in zip(np.ravel(axes), every, strict=True):
        _bars(axis, one)
    np.ravel(axes)[-1].set_xlabel("share of the variance of the ranks of J (%)")
    _legend(figure, np.ravel(axes)[0])
    save(figure, path)


def _bars(axis: Any, one: Explained) -> None:
    names = [*one.shares, "noise, interactions"]
    places = np.arange(len(names))[::-1]
    values = [100 * share for share in one.shares.values()]
    colour, grey = line_style(0)["color"], "0.75"
    axis.barh(places[:-1], values, color=[colour if v > 100 * one.chance else grey for v in values])
    axis.barh(places[-1], 100 * one.rest, color="white", edgecolor="0.5", hatch="//")
    axis.axvline(
        100 * one.chance, color=line_style(1)["color"], ls="--", lw=1.4, label="reached by chance in 5 %"
    )
    axis.set_yticks(places, names, fontsize=9)
    axis.set_xlim(0, 100)
    axis.grid(axis="y", visible=False)
    kind = "parabolas" if one.degree == 2 else "straight lines"
    axis.set_title(f"{short(one.space, 40)}: {one.trials} trials, {kind}", fontsize=10)


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "schedule.png": Figure("the schedule that was found, and the runners-up", schedules),
        "progress.png": Figure("J against the budget spent", progress),
        "pareto.png": Figure("Phi and robust accuracy against cost", pareto),
        "parameters.png": Figure("which parameters mattered", parameters),
    }
)
