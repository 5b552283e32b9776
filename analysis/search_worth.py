"""Which proposer finds the better schedule for the same budget, and do costates help?

    python analysis/search_worth.py                             # digits: 15 minutes on two cores
    python analysis/search_worth.py --part mnist --data-dir FOLDER  # LeNet: 30 minutes on two cores

Every proposer searches the same space (pbt: one of stages) with the same budget in gradient evaluations, in
several repetitions with seeds of their own. At some points of the budget, what has the lowest J so far is
trained under judging seeds, which no search uses: that mean J is what the search was worth until then.
Stopped, it goes on with the same command; after --minutes it stops by itself, and writes what there is.
Answers of all trainings are kept in --work; results go to analysis/search_worth/PART: result.json, table.md,
budget.png.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _tables import OutOfTime, deadline
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from controlat._util.cores import available_cores
from controlat._util.files import write, write_json, write_text
from controlat._util.pool import Pool
from controlat.app.experiment import Experiment
from controlat.app.runs import environment
from controlat.app.search_judge import judge_in
from controlat.app.settings import SearchSettings
from controlat.schedule_search import proposers
from controlat.schedule_search.loop import Branch, Plan, Rung, Search, paired
from controlat.schedule_search.space import Space, named_space
from controlat.schedule_search.trials import Ledger, Question, Trial

HERE = Path(__file__).resolve().parent

# A proposer by the name that it has in tables: its own name, its options, the space.
CONTENDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "random": ("random", {}, "anneal"),
    "grid": ("grid", {}, "anneal"),
    "tpe": ("tpe", {}, "anneal"),
    "gp": ("gp", {}, "anneal"),
    "gp, costates": ("gp", {"costates": 3}, "anneal"),
    "msa": ("msa", {}, "anneal"),
    "pbt": ("pbt", {}, "stages"),
}
PARTS: dict[str, dict[str, Any]] = {
    "digits": {
        "settings": {},
        "levels": [3, 6, 12, 24],
        "repetitions": 5,
        "judges": 8,
    },
    "mnist": {
        "settings": {
            "data": "mnist",
            "model": "lenet",
            "eps": 0.2,
            "epochs": 6,
            "lr": "onecycle:lr=0.1",
            "train_points": 2000,
            "held_out": 250,
            "test_points": 500,
        },
        "levels": [1, 2, 3],
        "repetitions": 2,
        "judges": 3,
    },
}


class Study:
    """All searches of a part, on one ledger."""

    def __init__(self, part: Mapping[str, Any], chosen: SearchSettings, ledger: Ledger) -> None:
        self.part, self.chosen, self.ledger = part, chosen, ledger
        most = ledger.ask([Question(chosen.most, 0, chosen.epochs)])[0]
        if most.phi is None:
            raise ValueError(f"{chosen.most} cannot be trained: {most.error}")
        self.unit, self.price = most.gradients, chosen.weight / most.mean_cost

    def runs(self) -> Iterator[tuple[int, str]]:
        """(repetition, contender), every contender of a repetition before the next."""
        for repetition in range(self.part["repetitions"]):
            for name in CONTENDERS:
                yield repetition, name

    def branch(self, repetition: int, name: str) -> Branch:
        """A whole search, or what the ledger has of it."""
        proposer, options, space_name = CONTENDERS[name]
        space = self.space(space_name)
        seeds = self.seeds(repetition)
        plan = Plan(
            budget=max(self.part["levels"]) * self.unit,
            price=self.price,
            rungs=(Rung(self.chosen.epochs),),
            seeds=seeds,
            batch=4,
            race_seeds=1,
        )
        branch = Branch(space, proposers.build(proposer, space, repetition, options), 1.0)
        Search([branch], self.ledger, plan).explore()
        return branch

    def plain(self) -> list[str]:
        """Schedules that nobody searched for."""
        usual = [text for text in self.chosen.against if text.startswith(("pgd", "amata"))]
        return usual + [self.chosen.ramp(self.chosen.max_steps * share) for share in (0.3, 0.5, 1.0)]

    def space(self, name: str) -> Space:
        """A named space of the problem."""
        c = self.chosen
        return named_space(name, eps=c.ball.eps, max_steps=c.max_steps, epochs=c.epochs)

    def seeds(self, repetition: int) -> tuple[int, ...]:
        """Those of a repetition, which no other and no judgement uses."""
        return tuple(range(10_000 + 100 * repetition, 10_100 + 100 * repetition))

    def best(self, branch: Branch, level: float) -> Trial | None:
        """The trial of lowest J among those that were over when a part of the budget was spent."""
        spent, over = 0.0, list[Trial]()
        for trial in branch.trials:
            spent += sum(a.gradients for a in trial.answers)
            if spent > level * self.unit:
                break
            if not trial.failed and trial.reach == 1:
                over.append(trial)
        return min(over, key=lambda t: t.mean(self.price), default=None)

    def worth(self, text: str) -> list[float]:
        """J of a schedule under every judging seed."""
        asked = [Question(text, seed, self.chosen.epochs) for seed in range(self.part["judges"])]
        return [
            float("inf") if a.phi is None else a.phi + self.price * a.mean_cost
            for a in self.ledger.ask(asked)
        ]

    def row(self, repetition: int, name: str) -> dict[str, Any]:
        """What a search found at every level, and what that is worth."""
        branch, levels = self.branch(repetition, name), list[dict[str, Any]]()
        for level in self.part["levels"]:
            best = self.best(branch, level)
            if best is not None:
                levels.append(
                    {
                        "level": level,
                        "schedule": best.text,
                        "seen": best.mean(self.price),
                        "J": self.worth(best.text),
                    }
                )
        return {
            "proposer": name,
            "repetition": repetition,
            "trials": len(branch.trials),
            "failed": sum(t.failed for t in branch.trials),
            "gradients": branch.spent(),
            "seconds": branch.spent("seconds"),
            "levels": levels,
        }


def work(args: argparse.Namespace) -> dict[str, Any]:
    """All rows that the minutes allow."""
    part = PARTS[args.part]
    chosen = SearchSettings(**part["settings"], data_dir=args.data_dir, progress=False)
    folder = Path(args.work) / args.part
    folder.mkdir(parents=True, exist_ok=True)
    jobs, rows = args.jobs or available_cores(), list[dict[str, Any]]()
    with Pool(jobs, unit="trainings") as pool:
        ledger = Ledger(folder / "trainings.jsonl", judge_in(pool, chosen, folder / "states"))
        try:
            with deadline(args.minutes):
                study = Study(part, chosen, ledger)
                plain = {text: study.worth(text) for text in study.plain()}
                with tqdm(list(study.runs()), unit=" search") as bar:
                    for repetition, name in bar:
                        bar.set_description(f"{name}, repetition {repetition}")
                        rows.append(study.row(repetition, name))
        except OutOfTime:
            print("out of time; the same command goes on", file=sys.stderr)
    settings = chosen.to_json()
    settings.pop("data_dir", None)
    return {
        "part": args.part,
        "settings": settings,
        "environment": environment(Experiment.of(chosen).device) | {"jobs": jobs},
        "levels": part["levels"],
        "price": study.price,
        "unit": study.unit,
        "spaces": {name: study.space(name).text for name in ("anneal", "stages")},
        "plain": plain,
        "rows": rows,
    }


# ---- what came out


def curve(result: Mapping[str, Any], name: str) -> dict[float, list[float]]:
    """Mean J under the judging seeds, of every repetition, at every level of the budget."""
    by_level: dict[float, list[float]] = {level: [] for level in result["levels"]}
    for row in result["rows"]:
        if row["proposer"] == name:
            for at in row["levels"]:
                by_level[at["level"]].append(float(np.mean(at["J"])))
    return by_level


def budgets(result: Mapping[str, Any]) -> str:
    """Mean J, with its standard error over repetitions, of every proposer at every level."""
    levels = result["levels"]
    lines = [
        "| proposer | repetitions | "
        + " | ".join(f"{level:g}" for level in levels)
        + " | trials | seconds |",
        "|---|---|" + "---|" * (len(levels) + 2),
    ]
    for name in CONTENDERS:
        rows = [r for r in result["rows"] if r["proposer"] == name]
        if not rows:
            continue
        cells = [spread(values) for values in curve(result, name).values()]
        trials, seconds = (np.mean([r[key] for r in rows]) for key in ("trials", "seconds"))
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} | {trials:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """table.md."""
    lines = [
        f"Mean J over {PARTS[result['part']]['judges']} judging seeds of what had the lowest J so far; ± "
        "standard error over repetitions. The budget in trainings of PGD-K_max; seconds of all trainings of "
        f"a search, {result['environment']['jobs']} at a time, on {result['environment']['hardware']}.",
        "",
        budgets(result),
        "",
        "| plain schedule | J |",
        "|---|---|",
        *(f"| `{text}` | {spread(values)} |" for text, values in result["plain"].items()),
        "",
        *verdicts(result),
    ]
    return "\n".join(lines) + "\n"


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Paired differences over repetitions at the whole budget: each proposer against random points."""
    last = result["levels"][-1]
    told = []
    for name in CONTENDERS:
        a, b = curve(result, name)[last], curve(result, "random")[last]
        n = min(len(a), len(b))
        if name == "random" or n < 2:
            continue
        d = paired(a[:n], b[:n])
        how = "" if d.decided else ", not decided"
        told.append(f"- {name} against random: {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{how}.")
    return told


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    if not values:
        return "-"
    error = f" ±{np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


def figure(result: Mapping[str, Any]) -> bytes:
    """J against budget."""
    fig = Figure(figsize=(7, 4.2), layout="constrained")
    axes = fig.add_subplot()
    for i, name in enumerate(CONTENDERS):
        points = {level: v for level, v in curve(result, name).items() if v}
        if not points:
            continue
        means = np.array([np.mean(v) for v in points.values()])
        errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in points.values()]
        shift = 1 + 0.012 * (i - len(CONTENDERS) / 2)  # error bars beside each other
        axes.errorbar(
            np.array(list(points)) * shift, means, errors, label=name, marker="osD^v<>"[i], capsize=2, lw=1.2
        )
    lowest = min(result["plain"], key=lambda text: float(np.mean(result["plain"][text])))
    axes.axhline(float(np.mean(result["plain"][lowest])), color="0.6", ls="--", lw=1, label=lowest)
    axes.set_xscale("log", base=2)
    axes.set_xticks(result["levels"], [f"{level:g}" for level in result["levels"]])
    axes.set_xlabel("budget, in trainings of PGD-K_max")
    axes.set_ylabel("J of the best so far, judging seeds")
    axes.legend(fontsize=8, ncols=2)
    image = io.BytesIO()
    FigureCanvasAgg(fig)
    fig.savefig(image, format="png", dpi=130)
    return image.getvalue()


def main() -> None:
    """Run what is missing, and write what there is."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="digits")
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    parser.add_argument("--work", default="search_worth-work", help="where answers are kept")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--jobs", type=int, help="trainings at a time; as many as cores if left out")
    parser.add_argument("--out", default=str(HERE / "search_worth"), help="where results go")
    args = parser.parse_args()
    result = work(args)
    out = Path(args.out) / args.part
    write_json(out / "result.json", result)
    write_text(out / "table.md", table(result))
    image = figure(result)
    write(out / "budget.png", lambda file: file.write(image))
    print(table(result))


if __name__ == "__main__":
    main()
