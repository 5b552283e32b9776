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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _table1 import PAPER, digest, figure, markdown
from _tables import Outcome, Row, fill, finished, hardware, parser, written

import controlat
from controlat import Control, Surface, report
from controlat._util.files import read_json, write_json
from controlat._util.texts import count, duration
from controlat.app.estimate import estimate
from controlat.app.runs import slug
from controlat.app.trainer import read_log
from controlat.pmp import interval as interval_of
from controlat.records import CriterionLine, LogLine, missing, read_epochs

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
