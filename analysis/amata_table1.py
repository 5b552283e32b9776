"""Amata's Table 1 again: PGD-10/20/40 beside Amata(5..40) and Amata(10..40), LeNet on MNIST.

    python analysis/amata_table1.py --data-dir FOLDER                  # reduced: about 80 minutes on a core
    python analysis/amata_table1.py --data-dir FOLDER --scale full --minutes 60  # for a GPU
    python analysis/amata_table1.py --scale smoke                      # digits, two minutes on a core
    python analysis/amata_table1.py --data-dir FOLDER --part maximisers   # TPE beside the sweep, one seed

Every row is a `controlat.evaluate` of one strategy under one seed, with the exact sweep over G. Rows are
taken from the cheapest to the dearest, all of the first seed before the next. Stopped, by --minutes or
otherwise, it goes on with the same command; the directory --work may be copied to another machine in between.
Results go to analysis/amata_table1/SCALE: sweep.json (all numbers), printed.json, table.json, table.md and
figures, of whatever rows are finished. --dry-run says what all of them cost.

The part `maximisers` evaluates all strategies twice on one seed, with the sweep and with hyperopt's TPE (the
paper's maximiser), which look at the same states: maximisers.json. `--part losses` writes losses.json, the
loss of every epoch of the rows in --work. The paper's numbers are from Ye et al. (2021), Table 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _tables import Outcome, Row, fill, finished, hardware, parser, pending, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

import controlat
from controlat import Control, Surface, report
from controlat._util.files import read_json, write, write_json
from controlat._util.texts import count, duration
from controlat.app.estimate import estimate
from controlat.app.runs import slug
from controlat.app.trainer import read_log
from controlat.pmp import interval as interval_of
from controlat.records import CriterionLine, LogLine, missing, read_epochs

PAPER = {  # schedule: (name, C, robust accuracy in %, seconds)
    "pgd:steps=10,alpha=0.01": ("PGD-10", 7.82, 68.07, 307.57),
    "pgd:steps=20,alpha=0.01": ("PGD-20", 1.52, 85.23, 567.11),
    "pgd:steps=40,alpha=0.01": ("PGD-40", 1.20, 90.56, 1086.31),
    "amata:min=5,max=40,tau=0.4": ("Amata(5..40)", 0.54, 91.47, 697.73),
    "amata:min=10,max=40,tau=0.4": ("Amata(10..40)", 0.68, 91.46, 760.16),
}
CHEAPEST = (0, 1, 3, 4, 2)  # positions in PAPER in the order of their cost
GAMMA = 0.04
COMMON: dict[str, Any] = {
    "data": "mnist",
    "model": "lenet",
    "eps": 0.3,
    "gamma": GAMMA,
    # 0.05 learns faster, but of nine runs of six epochs one collapsed to ln 10 and two fell back
    # (reduced/losses.json).
    "lr": 0.02,
    "momentum": 0.9,
    "batch_size": 64,
    "max_steps": 40,  # one G for all rows
    "sweeps": True,
    "full": False,
}
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "digits",
        "model": "cnn_bn",
        "epochs": 2,
        "train_points": 60,
        "held_out": 12,
        "test_points": 16,
        "batch_size": 24,
        "probe": 8,
        "alphas": [0.01, 0.1],
        "attacks": ["fgsm", "pgd-5"],
        "checks": 4,
        "seeds": [0],
    },
    "reduced": {"epochs": 6, "train_points": 12000, "test_points": 1000, "probe": 256, "seeds": [0, 1]},
    "full": {"epochs": 30, "probe": 512, "seeds": [0, 1, 2, 3, 4], "autoattack": 1000},
}
TRIALS = {"smoke": 5, "reduced": 50, "full": 200}
HERE = Path(__file__).resolve().parent
DRAWS = 10_000
FIGURES = ("criterion.png", "sweeps.png", "tradeoff.png")  # of the report


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The evaluation of all strategies under all seeds."""
    where = {"data_dir": args.data_dir, "device": args.device, "threads": args.threads}
    chosen = COMMON | SCALES[args.scale] | where | ({} if args.lr is None else {"lr": args.lr})
    return chosen | {"schedules": list(PAPER)} | ({"seeds": args.seeds} if args.seeds else {})


@dataclass(frozen=True)
class Evaluated:
    """One strategy under one seed, in a directory of its own.

    Args:
        schedule: the strategy, a key of PAPER.
        seed: of everything random.
        directory: of the row.
        settings: of the evaluation.
    """

    schedule: str
    seed: int
    directory: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return PAPER[self.schedule][0]

    @property
    def out(self) -> Path:
        """Where it is evaluated."""
        return self.directory / "evaluation"

    def finished(self) -> bool:
        return (self.out / "result.json").exists()

    def work(self) -> None:
        controlat.evaluate(self.out, **{**self.settings, "schedules": [self.schedule], "seeds": [self.seed]})

    def state(self) -> str:
        runs, epochs = list(self.out.glob("runs/*")), self.settings["epochs"]
        return f"{len(read_log(runs[0], epochs))} of {epochs} epochs" if runs else ""


def evaluations(args: argparse.Namespace, work: Path) -> list[Evaluated]:
    """All rows: the cheapest first, and all of one seed before the next."""
    every, schedules = settings(args), list(PAPER)
    return [
        Evaluated(schedules[i], seed, work / "rows" / f"{slug(schedules[i])}-seed{seed}", every)
        for seed in every["seeds"]
        for i in CHEAPEST
    ]


def together(finished: Sequence[Row]) -> dict[str, Any]:
    """The result files of the finished rows as one: strategies in the order of the paper."""
    rows = [row for row in finished if isinstance(row, Evaluated)]
    results = {row.directory.name: read_json(row.out / "result.json") for row in rows}
    schedules, seeds = [], sorted({row.seed for row in rows})
    for text in PAPER:
        mine = [(row, results[row.directory.name]["schedules"][0]) for row in rows if row.schedule == text]
        if mine:
            runs = [
                run | {"directory": f"{row.directory.name}/evaluation/runs/{run['directory']}"}
                for row, entry in mine
                for run in entry["runs"]
            ]
            schedules.append({k: mine[0][1][k] for k in ("text", "schedule")} | {"runs": runs})
    first = results[rows[0].directory.name]
    told = first["settings"] | {"schedules": [s["schedule"] for s in schedules], "seeds": seeds}
    kept = {k: first[k] for k in ("environment", "sizes", "grid", "terminal", "reproduced") if k in first}
    return report.assemble(settings=told, **kept, schedules=schedules)


def maximisers(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """C of the same states by the sweep and by TPE: one seed is trained twice, to the same bits."""
    sweep = settings(args)
    sweep["seeds"] = sweep["seeds"][:1]
    tpe = sweep | {"maximiser": "tpe", "trials": TRIALS[args.scale]}
    tpe |= {"attacks": ["fgsm"], "checks": 0, "sweeps": False, "autoattack": 0}
    one, two = (controlat.evaluate(work / name, **s) for name, s in (("one-seed", sweep), ("tpe", tpe)))
    rows = []
    for a, b in zip(one["schedules"], two["schedules"], strict=True):
        left, right = a["runs"][0], b["runs"][0]
        rows.append(
            {
                "schedule": a["text"],
                "sweep": [e["norm"]["value"] for e in left["criterion"]],
                "tpe": [e["norm"]["value"] for e in right["criterion"]],
                "sweep_maximiser": [e["norm"]["maximiser"] for e in left["criterion"]],
                "tpe_maximiser": [e["norm"]["maximiser"] for e in right["criterion"]],
                "sweep_gradients": a["summary"]["criterion_gradients"],
                "tpe_gradients": b["summary"]["criterion_gradients"],
                "sweep_seconds": sum(e["seconds"] for e in left["criterion"]),
                "tpe_seconds": sum(e["seconds"] for e in right["criterion"]),
                "same_bits": [e["loss"] for e in left["epochs"]] == [e["loss"] for e in right["epochs"]],
            }
        )
    kept = {name: one["settings"][name] for name in ("lr", "epochs", "probe", "seeds", "gamma")}
    return {"settings": kept | {"trials": tpe["trials"]}, "environment": one["environment"], "rows": rows}


def whole(path: Path, shape: Any, epochs: int) -> list[Any]:
    """The lines of a file that has one for every epoch."""
    lines = read_epochs(path, shape)
    if lost := missing(lines, epochs):
        raise ValueError(f"{path} lacks epoch {lost[0]} of {epochs}; run the evaluation again")
    return lines


def losses(rows: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Training loss and held-out accuracy of every epoch of the rows that are finished."""
    table = []
    for row in filter(Evaluated.finished, rows):
        for folder in sorted((row.out / "runs").iterdir()):
            epochs = whole(folder / "log.jsonl", LogLine, row.settings["epochs"])
            shown = [{k: e[k] for k in ("epoch", "lr", "loss", "clean", "robust")} for e in epochs]
            table.append({"run": folder.name, "epochs": shown})
    return table


def printed(work: Path, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """C by equation 14 as it is printed, without the factor 1/(1 - mu) of momentum, from the stored surfaces.

    With s = 10 for momentum 0.9, max [s q - gamma n] - ... is s times the same with q alone and gamma / s.
    """
    by_schedule = {}
    for entry in sweep["schedules"]:
        per_seed, left_out = [], []
        for run in entry["runs"]:
            path = work / "rows" / run["directory"] / "criterion.jsonl"
            lines = whole(path, CriterionLine, len(run["epochs"]))
            gaps = []
            for line in lines:
                surface = Surface.from_json(line["surface"])
                gap = surface.gap(Control(**line["control"]), GAMMA * surface.scale, "norm").to_json()
                gaps.append(gap["value"] / surface.scale)
                left_out.append(np.array(gap["jackknife"]) / surface.scale)
            per_seed.append(float(np.mean(gaps)))
        mean = float(np.mean(per_seed))
        by_schedule[entry["text"]] = {
            "mean": mean,
            "sd_over_seeds": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
            "per_seed": per_seed,
            "interval": interval_of(mean, list(np.mean(left_out, axis=0))),
        }
    return by_schedule


def ranks(values: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Kendall's tau: (concordant - discordant) pairs over all pairs."""
    pairs = list(itertools.combinations(range(len(values)), 2))
    signs = [np.sign(values[i] - values[j]) * np.sign(other[i] - other[j]) for i, j in pairs]
    return float(np.mean(signs))


def spread(found: Mapping[str, Any], scale: float = 1.0) -> float:
    """Standard error of a mean over seeds and points: from its interval, and the seeds' deviation."""
    low, high = found["interval"] or (found["mean"], found["mean"])
    over_seeds = (found["sd_over_seeds"] or 0.0) / len(found["per_seed"]) ** 0.5
    return scale * float(np.hypot((high - low) / 3.92, over_seeds))


def agreement(
    c: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], sign: int
) -> dict[str, Any]:
    """tau between C and another quantity, and its 95 % interval when both are redrawn within their errors."""
    draw = np.random.default_rng(0)

    def drawn(found: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        mean, error = np.array([f["mean"] for f in found]), np.array([spread(f) for f in found])
        return mean + error * draw.standard_normal((DRAWS, len(found)))

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


def interval(found: Mapping[str, Any], percent: bool = False) -> str:
    """mean [low, high] ± deviation over seeds."""
    f = 100 if percent else 1
    shape = "{:.1f}" if percent else "{:.3g}"
    text = shape.format(f * found["mean"])
    if found["interval"] is not None:
        text += " [" + ", ".join(shape.format(f * v) for v in found["interval"]) + "]"
    if found["sd_over_seeds"] is not None:
        text += " ±" + ("{:.1f}" if percent else "{:.2g}").format(f * found["sd_over_seeds"])
    return text


def strategies(found: Mapping[str, Any]) -> str:
    """The table: the paper's figures beside ours."""
    auto = "autoattack" in found["rows"][0]
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
        for row in found["rows"]
    ]
    return report.table(heads, cells)


def orders(found: Mapping[str, Any]) -> str:
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
        for name, entry in found["orders"].items()
    ]
    return report.table(["Kendall's tau with", "points broken", "cost"], cells)


def markdown(
    found: Mapping[str, Any],
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
        strategies(found),
        orders(found) if found["orders"] else "",
        pending(unfinished),
        "\n".join(f"- {line}" for line in notes),
        "![table 1](table1.png)\n![C per epoch](criterion.png)\n![sweeps](sweeps.png)",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def figure(found: Mapping[str, Any], path: Path) -> None:
    """C against robust accuracy and against cost: the paper's on the left, ours on the right."""
    drawing = Figure(figsize=(9, 6.4), dpi=130, layout="constrained")
    axes = drawing.subplots(2, 2)
    colours = ["#0072B2", "#56B4E9", "#000000", "#D55E00", "#E69F00"]
    styles = dict(zip(PAPER, zip(colours, "osD^v", strict=True), strict=True))
    for row in found["rows"]:
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


def tabulate(stands: Outcome, work: Path, out: Path) -> None:
    """Write the results of the finished rows; nothing before the first of them is."""
    if not stands.finished:
        return
    sweep = together(stands.finished)
    literal = printed(work, sweep)
    table = digest(sweep, literal)
    write_json(out / "sweep.json", sweep)
    write_json(out / "printed.json", literal)
    written(out, table, markdown(table, sweep, stands.unfinished, hardware(stands.finished)))
    figure(table, out / "table1.png")
    for name, drawn in report.figures(sweep).items():
        if name in FIGURES:
            drawn.draw(sweep, out / name)


def main() -> int:
    """Go on, and write the results of what is finished."""
    made = parser(__doc__, list(SCALES), "reduced", "amata-table1")
    made.add_argument("--lr", type=float, default=None, help="another learning rate than 0.02")
    made.add_argument("--part", choices=("table", "maximisers", "losses"), default="table")
    made.add_argument("--dry-run", action="store_true", help="say what it would cost")
    args = made.parse_args()
    work = args.work or Path(f"amata-table1-{args.scale}")
    out = args.out or HERE / "amata_table1" / args.scale
    try:
        if args.dry_run:
            cost = estimate(**settings(args))
            total = count(cost["gradients"]["total"])
            print(f"at most {total} gradient evaluations, about {duration(cost['seconds'])}")
            return 0
        rows = evaluations(args, work)
        if args.part != "table":
            table = maximisers(args, work) if args.part == "maximisers" else {"runs": losses(rows)}
            write_json(out / f"{args.part}.json", table)
            print(f"written to {out / args.part}.json")
            return 0
        stands = fill(rows, args.minutes, args.device, lambda stands: tabulate(stands, work, out))
    except ValueError as error:
        made.error(str(error))
    if stands.finished:
        print((out / "table.md").read_text())
    return finished(stands)


if __name__ == "__main__":
    sys.exit(main())
