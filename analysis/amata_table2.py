"""Amata's Table 2 again, and more: eight ways of training a PreActResNet-18 on CIFAR-10, eps 8/255.

    python analysis/amata_table2.py --data-dir FOLDER --minutes 60               # reduced: 15 epochs
    python analysis/amata_table2.py --data-dir FOLDER --scale full --minutes 60  # 100 epochs, three seeds
    python analysis/amata_table2.py --scale smoke                                # digits, a minute on a core

Rows are taken from the cheapest to the dearest, all of the first seed before the next. Stopped, by --minutes
or otherwise, it goes on with the same command; the directory --work may be copied to another machine in
between. Results go to analysis/amata_table2/SCALE: table.json (all numbers) and table.md, of whatever rows
are finished. Pictures by class, such as CIFAR-10 in JPEG, are read with --data folder. The paper's numbers
are from Ye et al. (2021), Table 2; it has none for AutoAttack, N-FGSM and K = 0..10.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from _tables import (
    Outcome,
    Row,
    accuracy,
    fill,
    finished,
    hardware,
    machines,
    parser,
    pending,
    percent,
    spread,
    written,
)

import controlat
from controlat import report
from controlat._util.files import read_json
from controlat._util.texts import count
from controlat.app.runs import slug
from controlat.app.settings import TrainSettings
from controlat.app.trainer import read_log
from controlat.robust_accuracy.auto import require as require_autoattack

HERE = Path(__file__).resolve().parent


class Strategy(NamedTuple):
    """A way of training, and what the paper has for it.

    Args:
        name: in the table.
        method: the training system.
        schedule: its schedule; {a} and {b} stand for epochs, at the shares of `at`.
        paper: (clean, PGD-20, C&W in %, seconds); None where the paper has no such row.
        at: shares of the training at which something changes.
    """

    name: str
    method: str
    schedule: str
    paper: tuple[float, float, float, float] | None
    at: tuple[float, ...] = ()

    def text(self, epochs: int) -> str:
        """The schedule of a training of so many epochs."""
        ends = (f"{share * epochs:g}" for share in self.at)
        return self.schedule.format(**dict(zip("ab", ends, strict=False)))


# Cheapest first. tau = 20/255 for all constant K too, so that the attacks differ in K alone. FAT's slack and
# Dynamic's level change at the shares of training that their papers have: 50 and 90, and 100, of 120 epochs.
STRATEGIES = (
    Strategy("ERM", "pgd_at", "none", (94.75, 0.0, 0.23, 2099.58)),
    Strategy("N-FGSM", "nfgsm", "fgsm:alpha=8/255", None),
    Strategy("PGD-2", "pgd_at", "pgd:steps=2,alpha=10/255", (90.16, 31.70, 13.36, 6913.36)),
    Strategy("K 0..10, dithered", "pgd_at", "amata:min=0,max=10,tau=20/255,rounding=dither", None),
    Strategy("Amata(2..10)", "pgd_at", "amata:min=2,max=10,tau=20/255", (85.52, 47.62, 52.94, 14308.96)),
    Strategy(
        "FAT",
        "fat",
        "pgd:steps=10,alpha=2/255,slack=0:1:2@{a}:{b}",
        (89.30, 41.34, 41.16, 14586.08),
        (50 / 120, 90 / 120),
    ),
    Strategy(
        "Dynamic",
        "dynamic",
        "pgd:steps=10,alpha=2/255,fosc=0.5..0@{a}",
        (85.29, 47.75, 47.70, 26126.98),
        (100 / 120,),
    ),
    Strategy("PGD-10", "pgd_at", "pgd:steps=10,alpha=2/255", (85.27, 47.31, 51.73, 23108.10)),
)
COLUMNS = {"clean": "clean", "pgd-20": "PGD-20", "cw-30": "C&W", "autoattack": "AutoAttack"}
OWN = ("method", "schedule", "data_dir", "device", "threads", "progress", "checkpoint_minutes")  # of a row
PAPER = ("clean", "pgd-20", "cw-30", "seconds")  # the columns that the paper has
COMMON: dict[str, Any] = {
    "eps": "8/255",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "checkpoint_minutes": 1.0,
    "progress": True,
}
CIFAR: dict[str, Any] = {"data": "cifar10", "model": "preactresnet-18", "augment": "crop-flip:pad=4"}
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "train": {
            "data": "digits",
            "model": "cnn_bn",
            "epochs": 2,
            "batch_size": 16,
            "lr": 0.05,
            "train_points": 60,
            "held_out": 10,
            "checkpoint_minutes": 1e-9,
        },
        "seeds": [0],
        "points": 16,
        "autoattack": 2,
    },
    "reduced": {
        "train": CIFAR | {"epochs": 15, "lr": "onecycle:lr=0.2", "bf16": True},
        "seeds": [0],
        "points": None,
        "autoattack": 500,
    },
    "full": {  # the paper's epochs; its learning rates are not known: those of Rice et al. (2020)
        "train": CIFAR | {"epochs": 100, "lr": "multistep:lr=0.1,at=50:75,factor=0.1"},
        "seeds": [0, 1, 2],
        "points": None,
        "autoattack": 1000,
    },
}


@dataclass(frozen=True)
class Network:
    """One strategy under one seed: trained, and attacked in parts that are kept one by one.

    Args:
        strategy: what it is.
        seed: of everything random.
        directory: of the run and the parts.
        settings: of the training.
        attacks: options of `controlat.attack` by the name of the part.
    """

    strategy: Strategy
    seed: int
    directory: Path
    settings: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.strategy.name

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def part(self, name: str) -> Path:
        """The file of one part; that of AutoAttack names its points, of which more may be wanted later."""
        points = self.attacks[name].get("autoattack")
        return self.directory / (f"{name}-{points}.json" if points else f"{name}.json")

    def finished(self) -> bool:
        return all(self.part(name).exists() for name in self.attacks)

    def work(self) -> None:
        controlat.train(self.run, resume=True, seed=self.seed, **self.settings)
        for name, how in self.attacks.items():
            if not self.part(name).exists():
                controlat.attack(self.run / "last.pt", out=self.part(name), **how)

    def state(self) -> str:
        if not self.run.exists():
            return ""
        done, epochs = len(read_log(self.run)), self.settings["epochs"]
        if done < epochs:
            return f"{done} of {epochs} epochs"
        return "trained; attacked by " + (
            ", ".join(name for name in self.attacks if self.part(name).exists()) or "none yet"
        )

    def result(self) -> dict[str, Any]:
        """Accuracies, cost and machines."""
        parts = {name: read_json(self.part(name)) for name in self.attacks}
        last = read_log(self.run)[-1]
        accuracies = {name: part["after"][name] for name, part in parts.items() if name != "autoattack"}
        if "autoattack" in parts:
            accuracies["autoattack"] = parts["autoattack"]["autoattack"]["robust"]
        return accuracies | {
            "clean": parts["pgd-20"]["clean"],
            "warnings": sorted({text for part in parts.values() for text in part["warnings"]}),
            "gradients": last["total_gradients"],
            "seconds": last["total_seconds"],
            "machines": machines(self.directory),
        }


def networks(args: argparse.Namespace, work: Path) -> list[Row]:
    """All rows: the cheapest first, and all of one seed before the next."""
    scale = SCALES[args.scale]
    where = {"data_dir": args.data_dir, "device": args.device, "threads": args.threads}
    common = COMMON | scale["train"] | where
    if args.data:
        decoded = args.data == "folder" and scale["points"] is None  # once, where all pictures are needed
        common |= {"data": args.data, "data_options": {"in_memory": True} if decoded else {}}
    attack: dict[str, Any] = {**where, "points": scale["points"], "checks": 0}
    attacks = {name: attack | {"attacks": [name]} for name in ("pgd-20", "cw-30")}
    attacks["pgd-20"]["checks"] = 100
    points = scale["autoattack"] if args.autoattack is None else args.autoattack
    if points:
        require_autoattack()  # before hours of training
        attacks["autoattack"] = attack | {"attacks": ["fgsm"], "autoattack": points}
    rows = [
        Network(
            strategy=s,
            seed=seed,
            directory=work / f"{slug(s.name)}-seed{seed}",
            settings=common | {"method": s.method, "schedule": s.text(common["epochs"])},
            attacks=attacks,
        )
        for seed in args.seeds or scale["seeds"]
        for s in STRATEGIES
    ]
    for row in rows:
        TrainSettings(seed=row.seed, **row.settings)  # what is not allowed is refused at once
    return list[Row](rows)


def digest(every: Sequence[Row], stands: Outcome) -> dict[str, Any]:
    """table.json: means over the seeds that are finished, the paper's figures, and what is left to do."""
    rows = []
    for s in STRATEGIES:
        mine = [row for row in stands.finished if isinstance(row, Network) and row.strategy == s]
        if not mine:
            continue
        results = [row.result() for row in mine]
        rows.append(
            {
                "name": s.name,
                "method": s.method,
                "schedule": mine[0].settings["schedule"],
                "paper": s.paper and dict(zip(PAPER, s.paper, strict=True)),
                "seeds": [row.seed for row in mine],
                **{key: accuracy([r[key] for r in results]) for key in COLUMNS if key in results[0]},
                **{key: spread([r[key] for r in results]) for key in ("gradients", "seconds")},
                "warnings": sorted({text for r in results for text in r["warnings"]}),
                "machines": [r["machines"] for r in results],
            }
        )
    first = next(row for row in every if isinstance(row, Network))
    return {
        "settings": {k: v for k, v in first.settings.items() if k not in OWN},
        "rows": rows,
        "unfinished": stands.unfinished,
        "hardware": hardware(stands.finished),
    }


def strategies(table: Mapping[str, Any]) -> str:
    """The table: the paper's figures beside ours."""

    def paper(row: Mapping[str, Any], key: str, digits: int) -> str:
        return f"{row['paper'][key]:.{digits}f}" if row["paper"] else ""

    heads = ["strategy"]
    for head in list(COLUMNS.values())[:-1]:
        heads += [f"{head} %, paper", f"{head} %"]
    heads += ["AutoAttack %", "gradient evals", "seconds, paper", "seconds"]
    cells = []
    for row in table["rows"]:
        line = [row["name"]]
        for key in list(COLUMNS)[:-1]:
            line += [paper(row, key, 2), percent(row[key])]
        line += [percent(row.get("autoattack")), count(row["gradients"]["mean"]), paper(row, "seconds", 0)]
        cells.append([*line, f"{row['seconds']['mean']:.0f}"])
    return report.table(heads, cells)


def markdown(table: Mapping[str, Any]) -> str:
    """table.md: the table, what it means, and what is not finished."""
    of = table["settings"]
    counts = {
        key: row[key]["points"] for row in table["rows"] for key in ("clean", "autoattack") if key in row
    }
    notes = [
        f"{of['data']}, {of['model']}, l_inf eps {of['eps']}, {of['epochs']} epochs, "
        f"batch {of['batch_size']}, lr {of['lr']}, momentum {of['momentum']:g}, weight decay "
        f"{of['weight_decay']:g}" + (", bf16" if of.get("bf16") else "") + ".",
        f"Accuracies on {counts.get('clean', 0)} test points after each attack by itself, AutoAttack on "
        f"{counts.get('autoattack', 0)}, of the network at the end of training. [Wilson's 95 % interval for "
        "one set of points], ± standard error over seeds where there are several.",
        "C&W: 30 steps on the margin, kappa 0. Which the paper's is, its learning rates, and whether its "
        "attacks start at random is not known; here they do. alpha of PGD-2 is 10/255, so that alpha K is "
        "20/255 as for Amata.",
        "gradient evals: forward-backward passes, in samples, of training; seconds: of training, on "
        f"{'; '.join(table['hardware']) or 'no machine yet'}. Seconds of different machines do not compare.",
        "Empty: the paper has no such figure (Ye et al., 2021, Table 2).",
        *(f"{row['name']}: {text}" for row in table["rows"] for text in row["warnings"]),
    ]
    parts = [
        "# Amata's Table 2, again",
        strategies(table) if table["rows"] else "No row is finished.",
        pending(table["unfinished"]),
        "\n".join(f"- {line}" for line in notes),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def main() -> int:
    """Go on, and write the table of what is finished."""
    made = parser(__doc__, list(SCALES), "reduced", "amata-table2")
    made.add_argument("--data", help="another data set, such as folder for pictures by class")
    made.add_argument("--autoattack", type=int, help="points of AutoAttack; those of the scale by default")
    args = made.parse_args()
    work, out = (
        args.work or Path(f"amata-table2-{args.scale}"),
        args.out or HERE / "amata_table2" / args.scale,
    )

    rows = networks(args, work)

    def write(stands: Outcome) -> None:
        table = digest(rows, stands)
        written(out, table, markdown(table))

    try:
        stands = fill(rows, args.minutes, args.device, write)
    except ValueError as error:
        made.error(str(error))
    print((out / "table.md").read_text())
    return finished(stands)


if __name__ == "__main__":
    sys.exit(main())
