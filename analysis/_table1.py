"""Table 1 of Amata from result files: how far C orders strategies as robustness and cost do, text, figure."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _tables import pending
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from controlat import report
from controlat._util.files import write
from controlat._util.texts import count

PAPER = {  # schedule: (name, C, robust accuracy in %, seconds)
    "pgd:steps=10,alpha=0.01": ("PGD-10", 7.82, 68.07, 307.57),
    "pgd:steps=20,alpha=0.01": ("PGD-20", 1.52, 85.23, 567.11),
    "pgd:steps=40,alpha=0.01": ("PGD-40", 1.20, 90.56, 1086.31),
    "amata:min=5,max=40,tau=0.4": ("Amata(5..40)", 0.54, 91.47, 697.73),
    "amata:min=10,max=40,tau=0.4": ("Amata(10..40)", 0.68, 91.46, 760.16),
}
DRAWS = 10_000


def ranks(values: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Kendall's tau: (concordant - discordant) pairs over all pairs."""
    pairs = list(itertools.combinations(range(len(values)), 2))
    signs = [np.sign(values[i] - values[j]) * np.sign(other[i] - other[j]) for i, j in pairs]
    return float(np.mean(signs))


def spread(values: Mapping[str, Any], scale: float = 1.0) -> float:
    """Standard error of a mean over seeds and points: from its interval, and the seeds' deviation."""
    low, high = values["interval"] or (values["mean"], values["mean"])
    over_seeds = (values["sd_over_seeds"] or 0.0) / len(values["per_seed"]) ** 0.5
    return scale * float(np.hypot((high - low) / 3.92, over_seeds))


def agreement(
    c: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], sign: int
) -> dict[str, Any]:
    """tau between C and another quantity, and its 95 % interval when both are redrawn within their errors."""
    draw = np.random.default_rng(0)

    def drawn(values: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        mean, error = np.array([v["mean"] for v in values]), np.array([spread(v) for v in values])
        return mean + error * draw.standard_normal((DRAWS, len(values)))

    taus = [ranks(a, sign * b) for a, b in zip(drawn(c), drawn(other), strict=True)]
    exact = ranks(np.array([f["mean"] for f in c]), sign * np.array([f["mean"] for f in other]))
    return {"tau": exact, "interval": [float(q) for q in np.quantile(taus, [0.025, 0.975])]}


def digest(sweep: Mapping[str, Any], literal: Mapping[str, Any]) -> dict[str, Any]:
    """The table and what it says about C, from the result files."""
    rows = []
    for entry in sweep["schedules"]:
        name, theirs_c, robust, seconds = PAPER[entry["text"]]
        s = entry["summary"]
        rows.append(
            {
                "name": name,
                "schedule": entry["text"],
                "paper": {"C": theirs_c, "robust": robust / 100, "seconds": seconds},
                "C_as_printed": literal[entry["text"]],
                "C_norm": s["criterion"]["norm"],
                "C_costate": s["criterion"]["costate"],
                "clean": s["clean"],
                "robust": s["robust"],
                "gradients": s["gradients"],
                "seconds": s["seconds"],
            }
            | ({"autoattack": s["autoattack"]} if "autoattack" in s else {})
        )
    return {"rows": rows, "orders": _orders(rows) if len(rows) == len(PAPER) else {}}


def _orders(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far C orders the strategies as points broken and cost do, here and in the paper."""
    flat = {"interval": None, "sd_over_seeds": None, "per_seed": [0]}
    orders: dict[str, Any] = {}
    for form in ("C_as_printed", "C_norm", "C_costate"):
        c = [row[form] for row in rows]
        cost = [flat | {"mean": row["gradients"]["mean"]} for row in rows]
        orders[form] = {
            "robust error": agreement(c, [row["robust"] for row in rows], -1),
            "gradient evaluations": agreement(c, cost, 1),
        }
    theirs = [np.array([row["paper"][key] for row in rows]) for key in ("C", "robust", "seconds")]
    orders["paper"] = {
        "robust error": {"tau": ranks(theirs[0], -theirs[1])},
        "gradient evaluations": {"tau": ranks(theirs[0], theirs[2])},
    }
    return orders


def interval(values: Mapping[str, Any], percent: bool = False) -> str:
    """mean [low, high] ± deviation over seeds."""
    f = 100 if percent else 1
    shape = "{:.1f}" if percent else "{:.3g}"
    text = shape.format(f * values["mean"])
    if values["interval"] is not None:
        text += " [" + ", ".join(shape.format(f * v) for v in values["interval"]) + "]"
    if values["sd_over_seeds"] is not None:
        text += " ±" + ("{:.1f}" if percent else "{:.2g}").format(f * values["sd_over_seeds"])
    return text


def strategies(table: Mapping[str, Any]) -> str:
    """The table: the paper's figures beside ours."""
    auto = "autoattack" in table["rows"][0]
    heads = ["strategy", "C, paper", "C as printed", "C norm", "C costate", "robust %, paper", "robust %"]
    heads += ["AutoAttack %"] * auto + ["seconds, paper", "gradient evals", "seconds"]
    cells = [
        [
            row["name"],
            f"{row['paper']['C']:.2f}",
            interval(row["C_as_printed"]),
            interval(row["C_norm"]),
            interval(row["C_costate"]),
            f"{100 * row['paper']['robust']:.1f}",
            interval(row["robust"], percent=True),
            *([interval(row["autoattack"], percent=True)] if auto else []),
            f"{row['paper']['seconds']:.0f}",
            count(row["gradients"]["mean"]),
            f"{row['seconds']['mean']:.0f}",
        ]
        for row in table["rows"]
    ]
    return report.table(heads, cells)


def orders(table: Mapping[str, Any]) -> str:
    """How far C orders the strategies as robustness and cost do."""

    def tau(entry: Mapping[str, Any]) -> str:
        text = f"{entry['tau']:+.2f}"
        return text if "interval" not in entry else text + " [{:+.2f}, {:+.2f}]".format(*entry["interval"])

    cells = [
        [
            f"C, {name}" if name == "paper" else name.replace("_", " "),
            tau(entry["robust error"]),
            tau(entry["gradient evaluations"]),
        ]
        for name, entry in table["orders"].items()
    ]
    return report.table(["Kendall's tau with", "points broken", "cost"], cells)


def markdown(
    table: Mapping[str, Any],
    sweep: Mapping[str, Any],
    unfinished: Sequence[Mapping[str, Any]] = (),
    machines: Sequence[str] = (),
) -> str:
    """table.md: both tables, what they mean, what is not finished, and the figures."""
    env = sweep["environment"]
    notes = [
        *report.notes(sweep),
        "C as printed: equation 14 of the paper to the letter, |grad|^2 - gamma n, without the factor s = 10 "
        "that momentum 0.9 puts on the first term (C norm has it); from the same surfaces.",
        "Kendall's tau over the five strategies: +1 where a smaller C always goes with fewer broken points ("
        "or a lower cost), -1 where never. Intervals: C and accuracy redrawn "
        f"{DRAWS} times within their errors.",
        f"Made on {'; '.join(machines) or env['hardware']}, {env['threads']} threads, torch {env['torch']}.",
    ]
    parts = [
        "# Amata's Table 1, again",
        strategies(table),
        orders(table) if table["orders"] else "",
        pending(unfinished),
        "\n".join(f"- {line}" for line in notes),
        "![table 1](table1.png)\n![C per epoch](criterion.png)\n![sweeps](sweeps.png)",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def figure(table: Mapping[str, Any], path: Path) -> None:
    """C against robust accuracy and against cost: the paper's on the left, ours on the right."""
    drawing = Figure(figsize=(9, 6.4), dpi=130, layout="constrained")
    axes = drawing.subplots(2, 2)
    colours = ["#0072B2", "#56B4E9", "#000000", "#D55E00", "#E69F00"]
    styles = dict(zip(PAPER, zip(colours, "osD^v", strict=True), strict=True))
    for row in table["rows"]:
        colour, marker = styles[row["schedule"]]
        kind = {"color": colour, "marker": marker, "markersize": 8, "linestyle": "none", "label": row["name"]}
        paper, c, robust = row["paper"], row["C_as_printed"], row["robust"]
        axes[0][0].plot(paper["C"], 100 * paper["robust"], **kind)
        axes[1][0].plot(paper["C"], paper["seconds"], **kind)
        x = [[1.96 * spread(c)]] * 2
        y = [[1.96 * spread(robust, 100)]] * 2
        axes[0][1].errorbar(c["mean"], 100 * robust["mean"], xerr=x, yerr=y, capsize=3, **kind)
        axes[1][1].errorbar(c["mean"], row["gradients"]["mean"] / 1e6, xerr=x, capsize=3, **kind)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for i, title in enumerate(("the paper", "here")):
        axes[0][i].set_title(title, fontsize=10)
        axes[0][i].set_ylabel("robust accuracy (%)")
        axes[1][i].set_xlabel("C (equation 14)")
    axes[1][0].set_ylabel("seconds of training")
    axes[1][1].set_ylabel("million gradient evaluations")
    drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(drawing)
    drawing.savefig(buffer, format="png")
    write(path, lambda file: file.write(buffer.getvalue()))
