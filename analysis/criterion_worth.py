"""Is C worth its name? Does the criterion order schedules as the objective J does?

    python analysis/criterion_worth.py                                   # digits: an hour on a core
    python analysis/criterion_worth.py --part mnist --data-dir FOLDER    # LeNet: two hours on two cores

Fourteen schedules are trained under several seeds, optimisers and learning rates. For each roll-out it
computes J = Phi + gamma eta sum n and everything that could stand for it: the greedy forms, C over horizons
h, smoothed and averaged, the certificate D, relaxed roll-outs, the trust-region gap; and what D would get by
chance, as it contains J, and how large it is beside the room that there is. Stopped, it goes on with the
same command; with --seeds several processes share the work.
Roll-outs are kept in --work; results go to analysis/criterion_worth/PART: result.json, table.md, figures.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata
from tqdm import tqdm

from controlat import Control, Surface, report
from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.files import read_json, write, write_json, write_text
from controlat._util.texts import duration
from controlat.app.experiment import Experiment
from controlat.app.placement import deterministic
from controlat.app.runs import environment, slug
from controlat.app.settings import TrainSettings
from controlat.dynamics.recording import Recording
from controlat.pmp import (
    AdversarialLoss,
    Candidates,
    Criterion,
    Trust,
    examine,
    probe_batches,
    score,
    trust,
)
from controlat.pmp.hamiltonian import Gains
from controlat.robust_accuracy.robust import run_attacks

HERE = Path(__file__).resolve().parent


def schedules(eps: float, most: int) -> dict[str, str]:
    """Fourteen schedules by name: what people use, and what nobody should. Step sizes cross the ball."""
    a, tau = f"alpha={2.5 * eps / most:.6g}", f"tau={2 * eps:.6g}"
    half = most // 2
    return {
        "none": "none",
        "one step": f"fgsm:alpha={eps:.6g}",
        "PGD-2": f"pgd:steps=2,alpha={eps / 2:.6g}",
        "PGD-3": f"pgd:steps=3,alpha={eps / 2:.6g}",
        "PGD-half": f"pgd:steps={half},alpha={eps / 3:.6g}",
        "PGD": f"pgd:steps={most},{a}",
        "up": f"amata:min=1,max={most},{tau}",
        "down": f"linear:start={most},end=1,{tau}",
        "from zero": f"linear:start=0,end={most},alpha={eps / 3:.6g}",
        "to zero": f"linear:start={most},end=0,alpha={eps / 3:.6g}",
        "exponential": f"exponential:min=1,max={most},{tau}",
        "late": f"step:steps=0:{half},at=LATE,alpha={eps / 3:.6g}",
        "early": f"step:steps={half}:0,at=EARLY,alpha={eps / 3:.6g}",
        "too small": f"pgd:steps={half},alpha={eps / 40:.6g}",
    }


PARTS: dict[str, dict[str, Any]] = {
    "digits": {
        "problem": {
            "data": "digits",
            "model": "mlp",
            "eps": 0.15,
            "epochs": 10,
            "batch_size": 75,
            "held_out": 257,
        },
        "most": 10,
        "grid": ((0.0375, 0.075, 0.15), 10),
        "gamma": 1e-3,
        "dynamics": [(0.0, 0.2), (0.0, 0.5), (0.9, 0.02), (0.9, 0.05)],  # momentum, learning rate
        "seeds": [0, 1, 2, 3, 4],
        "horizons": [1, 7, 14, 28, 70],
        "looks": 2,
        "test": ["pgd-20"],
    },
    "mnist": {
        "problem": {
            "data": "mnist",
            "model": "lenet",
            "eps": 0.2,
            "epochs": 10,
            "batch_size": 64,
            "train_points": 2120,  # 200 are held out: 30 steps of 64 for an epoch
            "held_out": 200,
            "test_points": 500,
        },
        "most": 10,
        "grid": ((0.025, 0.05, 0.1), 10),
        "gamma": 5e-3,
        "dynamics": [(0.9, 0.02)],
        "seeds": [0, 1],
        "horizons": [1, 30, 100],
        "looks": 5,
        "test": ["pgd-20"],
    },
}
LAMBDAS = (1.0, 0.5, 0.25)


def runs(part: Mapping[str, Any]) -> Iterator[tuple[tuple[float, float], int, str, str]]:
    """(dynamics, seed, name, schedule) of every roll-out; a seed of all schedules before the next seed."""
    epochs = part["problem"]["epochs"]
    for seed in part["seeds"]:
        for dynamics in part["dynamics"]:
            for name, text in schedules(part["problem"]["eps"], part["most"]).items():
                text = text.replace("LATE", str(3 * epochs // 10)).replace("EARLY", str(7 * epochs // 10))
                yield dynamics, seed, name, text


def roll_out(experiment: Experiment, text: str, seed: int, part: Mapping[str, Any]) -> dict[str, Any]:
    """One schedule: J and all that may stand for it."""
    began = time.perf_counter()
    problem, schedule = experiment.problem, experiment.problem.schedule_of(text)
    spec, driver = experiment.spec(schedule, seed), experiment.driver(seed)
    ball, held_out = problem.ball, experiment.held_out
    terminal = AdversarialLoss(*held_out.take(torch.arange(len(held_out))), ball, seed=seed)
    recording = Recording.of(driver, spec)
    trained = time.perf_counter() - began
    grid, scale = Candidates.of(*part["grid"]), 1 / (1 - problem.momentum)
    found = examine(
        recording, terminal, grid, gamma=part["gamma"], horizons=part["horizons"], looks=part["looks"]
    )
    calibration = trust(recording, found, terminal, lambdas=LAMBDAS, halvings=1)
    chosen = torch.randperm(len(experiment.training), generator=rng.generator(0, "probe"))[:256]
    probe = probe_batches(*experiment.training.take(chosen), 4, 0, chosen, problem.augmentation)
    surfaces = []
    for epoch in range(problem.epochs):
        visit = recording.at(epoch * spec.batches_per_epoch)
        batches = [b._replace(epoch=epoch) for b in probe]
        weight = scale * spec.mean_rate(epoch) / spec.mean_rate()
        surface = score(driver, batches, visit.control, grid, terminal=terminal, scale=weight)
        surfaces.append({"control": dict(visit.control), "surface": surface.to_json()})
    driver.restore(recording.end)
    test = run_attacks(driver.model, experiment.test, ball, attacks=part["test"], seed=seed)
    return {
        "schedule": text,
        "seed": seed,
        "criterion": found.to_json(),
        "calibration": calibration.to_json(),
        "greedy": surfaces,
        "test": {"clean": test.clean.value, "robust": test.robust.value, "points": test.clean.points},
        "training_gradients": sum(step.spent.gradients for step in recording.steps),
        "training_seconds": trained,
        "seconds": time.perf_counter() - began,
    }


def everything(args: argparse.Namespace) -> None:
    """All roll-outs of a part that are not there yet."""
    part, work = PARTS[args.part], Path(args.work) / args.part
    with tqdm(list(runs(part)), unit=" roll-out") as bar:
        for (momentum, rate), seed, name, text in bar:
            folder = f"momentum{momentum:g}-lr{rate:g}-seed{seed}"
            file = work / folder / f"{slug(name)}.json"
            bar.set_description(f"{folder} {name}")
            if file.exists() or (args.seeds and seed not in args.seeds):
                continue
            settings = TrainSettings(
                schedule=text,
                **part["problem"],
                momentum=momentum,
                lr=rate,
                seed=seed,
                data_dir=args.data_dir,
                threads=1,
                progress=False,
            )
            with deterministic(1):
                try:
                    result = roll_out(Experiment.of(settings), text, seed, part)
                except NonFiniteError as error:
                    result = {"schedule": text, "seed": seed, "failed": str(error)}
            more = {"name": name, "momentum": momentum, "rate": rate, "environment": environment()}
            write_json(file, result | more)


# ---- what came out


def estimates(run: Mapping[str, Any], gamma: float | None = None) -> dict[str, float]:
    """Everything that may stand for J, of one roll-out; relaxed roll-outs at the studied gamma only."""
    c = Criterion.from_json(run["criterion"])
    here = gamma is None or gamma == c.gamma
    c = c if gamma is None else replace(c, gamma=gamma)
    found: dict[str, float] = {"J": c.objective}
    for form, name in (("norm", "greedy norm (14)"), ("costate", "greedy costate")):
        gaps = [
            Surface.from_json(e["surface"]).gap(Control(**e["control"]), c.gamma, form).value
            for e in run["greedy"]
        ]
        found[name] = float(np.mean(gaps))
    for h in c.horizons:
        found[f"C, h = {h}" if h < c.steps else WHOLE] = c.value(h)
    if here:
        found["C / |grad Phi|"] = c.value() / c.norms[-1][1]
        found["C, one step an epoch looked at"] = replace(c, looked=middle(c)).value()
        found["C, smoothed over three epochs"] = smoothed(c)
        calibration = shipped(c, run["calibration"])
        found["C_rho"] = c.value(rho=calibration.rho)
        found["model gain"] = calibration.model_gain
        found["D"] = calibration.certificate
        j = {float(part): value for part, value in run["calibration"]["outcomes"].items()}
        found |= {f"J - J({name})": c.objective - j[part] for part, name in _PARTS.items()}
    return found


WHOLE = "C, whole run (13)"
_PARTS = {0.25: "1/4", 0.5: "1/2", 1.0: "1"}


def shipped(c: Criterion, found: Mapping[str, Any]) -> Trust:
    """The calibration that `evaluate` makes by itself, of the outcomes that are there."""
    j = {float(part): value for part, value in found["outcomes"].items()}
    parts = {part: j[part] for part in (0.5, 0.25)}
    known = Trust(found["gain"], c.objective, parts, found["sizes"], found["bound"], found["spent"])
    if known.trusted or 0.125 not in j:
        return known
    return replace(known, outcomes=parts | {0.125: j[0.125]})


def middle(c: Criterion) -> tuple[Gains, ...]:
    """Of the steps that were looked at, the middle one of every block."""
    by_block: dict[int, list[Gains]] = {}
    for g in c.looked:
        by_block.setdefault(c.blocks[g.number - c.first], []).append(g)
    return tuple(members[len(members) // 2] for members in by_block.values())


def smoothed(c: Criterion) -> float:
    """C with the gain of every candidate averaged over a block and its neighbours, as far as they have it."""
    tables = [dict(c.surface(b.index)[1:]) for b in c.best()]
    total = 0.0
    for i, here in enumerate(tables):
        near = tables[max(0, i - 1) : i + 2]
        total += max(0.0, *(float(np.mean([t[v] for t in near if v in t])) for v in here))
    return total / (c.rate * c.steps)


def together(criteria: Sequence[Criterion]) -> float:
    """C with the gain of every candidate averaged over seeds before the maximum is taken."""
    total = 0.0
    for found in zip(*([dict(c.surface(b.index)[1:]) for b in c.best()] for c in criteria), strict=True):
        common = [v for v in found[0] if all(v in other for other in found)]
        total += max(0.0, *(float(np.mean([other[v] for other in found])) for v in common))
    return total / (criteria[0].rate * criteria[0].steps)


def correlations(runs_: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation with J over schedules, for every estimator.

    Args:
        runs_: for every seed the estimates of all schedules, in one order.

    Returns:
        By name: value of every seed, their mean with a 95 % bootstrap interval over schedules (the same ones
        for all seeds), and the same of the means over seeds.
    """
    picks = resamples(len(runs_[0]))
    found = {}
    for name in runs_[0][0]:
        if name != "J":
            j, e = (np.array([[r[key] for r in seed] for seed in runs_]) for key in ("J", name))
            values = [float(v) for v in spearman(j, e)]
            found[name] = {
                "per_seed": values,
                "mean": float(np.mean(values)),
                "interval": between(spearman(j[:, picks], e[:, picks]).mean(0)),
                **of_means(j, e),
            }
    return found


def shuffled(j: NDArray[np.float64], reached: NDArray[np.float64]) -> dict[str, Any]:
    """What D would correlate with J by containing it: D = [J - J(lambda)]_+, J(lambda) of another schedule.

    Args:
        j: (seeds, schedules).
        reached: the lowest J(lambda) of each, alike.

    Returns:
        Mean and the middle 95 % over random permutations of the schedules, and the share of them in which the
        correlation is at least that of D itself; the same for what was averaged over seeds first.
    """
    generator = np.random.default_rng(0)
    orders = np.stack([generator.permutation(j.shape[1]) for _ in range(2000)])
    own = np.maximum(0, j - reached)
    others = np.maximum(0, j[:, None] - reached[:, orders])
    found: dict[str, Any] = {}
    for kind, drawn, value in (
        (
            "mean",
            spearman(np.broadcast_to(j[:, None], others.shape), others).mean(0),
            spearman(j, own).mean(),
        ),
        (
            "of_means",
            spearman(np.broadcast_to(j.mean(0), others.shape[1:]), others.mean(0)),
            spearman(j.mean(0), own.mean(0)),
        ),
    ):
        found |= {kind: float(np.nanmean(drawn)), _INTERVAL[kind]: between(drawn)}
        found[f"{kind}_above"] = float(np.mean(drawn >= value - 1e-12))
    return found


_INTERVAL = {"mean": "interval", "of_means": "of_means_interval"}


def of_room(j: NDArray[np.float64], e: NDArray[np.float64]) -> list[float]:
    """Quartiles, over schedules and seeds, of an estimate of J - J* over J - the lowest J of that seed."""
    room = j - j.min(1, keepdims=True)
    return [float(v) for v in np.quantile(e[room > 0] / room[room > 0], (0.25, 0.5, 0.75))]


def of_means(j: NDArray[np.float64], e: NDArray[np.float64]) -> dict[str, Any]:
    """Rank correlation of what was averaged over seeds first, (seeds, schedules), with its interval."""
    j, e = j.mean(0), e.mean(0)
    picks = resamples(len(j))
    return {"of_means": float(spearman(j, e)), "of_means_interval": between(spearman(j[picks], e[picks]))}


def resamples(n: int, draws: int = 2000) -> NDArray[np.int64]:
    """Positions of the bootstrap, (draws, n)."""
    return np.random.default_rng(0).integers(n, size=(draws, n))


def between(drawn: NDArray[np.float64]) -> list[float]:
    """The 95 % interval of what was drawn; draws of one schedule only have no correlation."""
    return [float(v) for v in np.nanquantile(drawn, (0.025, 0.975))]


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation over the last axis; NaN where one side is constant."""
    a, b = (rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2 for v in (a, b))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray(np.divide((a * b).sum(-1), scale, out=np.full_like(scale, np.nan), where=scale > 0))


GAMMAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def digest(args: argparse.Namespace) -> dict[str, Any]:
    """All correlations of the roll-outs that are there: dynamics with all schedules of a seed."""
    part, work = PARTS[args.part], Path(args.work) / args.part
    names = list(schedules(part["problem"]["eps"], part["most"]))
    found: dict[str, Any] = {
        "part": args.part,
        "gamma": part["gamma"],
        "schedules": {},
        "dynamics": [],
        "failed": [],
    }
    for momentum, rate in part["dynamics"]:
        complete = []
        for seed in part["seeds"]:
            folder = work / f"momentum{momentum:g}-lr{rate:g}-seed{seed}"
            files = [folder / f"{slug(name)}.json" for name in names]
            runs_ = [read_json(file) for file in files if file.exists()]
            failed = [f"{folder.name} {r['name']}: {r['failed']}" for r in runs_ if "failed" in r]
            found["failed"] += failed
            if len(runs_) == len(names) and not failed:
                complete.append((seed, runs_))
        if not complete:
            continue
        found["environment"] = complete[0][1][0]["environment"]
        found["schedules"] = {r["name"]: r["schedule"] for r in complete[0][1]}
        every = [[estimates(r) for r in runs_] for _, runs_ in complete]
        rows = [
            {
                "name": name,
                **{key: [seed[i][key] for seed in every] for key in every[0][0]},
                "phi": [runs_[i]["criterion"]["phi"] for _, runs_ in complete],
                "robust": [runs_[i]["test"]["robust"] for _, runs_ in complete],
                "reliability": [runs_[i]["calibration"]["reliability"]["0.25"] for _, runs_ in complete],
                "gradients": [runs_[i]["training_gradients"] for _, runs_ in complete],
            }
            for i, name in enumerate(names)
        ]
        prices = {
            f"{g:g}": correlations([[estimates(r, g) for r in runs_] for _, runs_ in complete])
            for g in GAMMAS
        }
        criteria = [[Criterion.from_json(r["criterion"]) for r in runs_] for _, runs_ in complete]
        joint = np.array([[together(cs) for cs in zip(*criteria, strict=True)]])
        j = np.array([[c.objective for c in cs] for cs in criteria])
        trusted = [
            [shipped(c, r["calibration"]) for c, r in zip(cs, runs_, strict=True)]
            for cs, (_, runs_) in zip(criteria, complete, strict=True)
        ]
        reached = np.array([[min(t.outcomes.values()) for t in row] for row in trusted])
        sizes = {
            name: [[getattr(t, name) for t in row] for row in trusted] for name in ("gain", "certificate")
        }
        found["dynamics"].append(
            {
                "momentum": momentum,
                "rate": rate,
                "seeds": [seed for seed, _ in complete],
                "steps": len(complete[0][1][0]["criterion"]["blocks"]),
                "correlations": correlations(every),
                "seeds averaged": of_means(j, joint),
                "D shuffled": shuffled(j, reached),
                "of J - best J": {name: of_room(j, np.array(v)) for name, v in sizes.items()},
                "at other gammas": prices,
                "rows": rows,
                "seconds": sum(r["seconds"] for _, runs_ in complete for r in runs_),
            }
        )
    return found


def _heads(found: Mapping[str, Any]) -> list[str]:
    heads = ["estimator"]
    for d in found["dynamics"]:
        what = "plain SGD" if d["momentum"] == 0 else f"momentum {d['momentum']:g}"
        heads.append(f"{what}, rate {d['rate']:g} ({len(d['seeds'])} seeds)")
    return heads


def ranking(found: Mapping[str, Any], kind: str = "mean") -> str:
    """Rank correlations with J, a column for every dynamics.

    Args:
        found: the digest.
        kind: ``"mean"`` over seeds, or ``"of_means"``: of what was averaged over seeds first.
    """
    names = list(found["dynamics"][0]["correlations"])
    rows = {name: [d["correlations"][name] for d in found["dynamics"]] for name in names}
    if kind == "of_means":
        rows["C, gains averaged over seeds"] = [d["seeds averaged"] for d in found["dynamics"]]
    rows["D, J(lambda) of another schedule"] = [d["D shuffled"] for d in found["dynamics"]]
    cells = [
        [name, *("{:+.2f} [{:+.2f}, {:+.2f}]".format(c[kind], *c[_INTERVAL[kind]]) for c in row)]
        for name, row in rows.items()
    ]
    return report.table(_heads(found), cells)


def sizes(found: Mapping[str, Any]) -> str:
    """G and D over J - the lowest J among the schedules of a seed, a column for every dynamics."""
    cells = [
        [name, *("{1:.2f} [{0:.2f}, {2:.2f}]".format(*d["of J - best J"][key]) for d in found["dynamics"])]
        for name, key in (("G", "gain"), ("D", "certificate"))
    ]
    return report.table(_heads(found), cells)


def tables(found: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    prices = [
        [
            f"{name}, gamma {g}",
            *(
                f"{d['at other gammas'][g][name]['mean']:+.2f}" if name in d["at other gammas"][g] else ""
                for d in found["dynamics"]
            ),
        ]
        for name in ("greedy norm (14)", "greedy costate", WHOLE)
        for g in found["dynamics"][0]["at other gammas"]
    ]
    parts = [
        f"# What C is worth: {found['part']}",
        f"Spearman's rank correlation with J over {len(found['schedules'])} schedules, gamma "
        f"{found['gamma']:g}: mean over seeds, 95 % bootstrap interval over schedules.",
        ranking(found),
        "The same of J and estimators that were averaged over seeds first:",
        ranking(found, "of_means"),
        "D = J - J(lambda) contains J: the last row of both tables is what it would correlate with J if "
        "every schedule had the J(lambda) of another one, drawn at random (mean and middle 95 % of 2,000 "
        "permutations). D is at or below that in a share of "
        + "; ".join(
            f"{d['D shuffled']['mean_above']:.2f} (of means {d['D shuffled']['of_means_above']:.2f})"
            for d in found["dynamics"]
        )
        + " of them.",
        "Does the size mean something? G and D as a share of J - the lowest J among the schedules of a seed: "
        "median and quartiles over schedules and seeds.",
        sizes(found),
        "At other prices, from the same roll-outs:",
        report.table(_heads(found), prices),
        *([f"Not finite, their seeds left out: {'; '.join(found['failed'])}."] if found["failed"] else []),
        "Schedules: " + "; ".join(f"{name}: `{text}`" for name, text in found["schedules"].items()) + ".",
        f"Made on {found['environment']['hardware']}, {found['environment']['threads']} thread, torch "
        f"{found['environment']['torch']}; "
        f"{duration(sum(d['seconds'] for d in found['dynamics']))} for all roll-outs.",
    ]
    return "\n\n".join(parts) + "\n"


def figure(found: Mapping[str, Any], path: Path) -> None:
    """J against three estimators, a colour for every dynamics, means over seeds."""
    chosen = ("greedy norm (14)", WHOLE, "D")
    drawn = Figure(figsize=(11, 3.9), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    for axis, name in zip(drawn.subplots(1, len(chosen)), chosen, strict=True):
        for i, d in enumerate(found["dynamics"]):
            j, e = ([float(np.mean(row[key])) for row in d["rows"]] for key in ("J", name))
            label = f"momentum {d['momentum']:g}, rate {d['rate']:g}"
            axis.plot(e, j, "osD^"[i % 4], label=label, alpha=0.8)
        axis.set_xscale("symlog", linthresh=1e-2)
        axis.set_xlabel(name)
        axis.set_ylabel("J")
        axis.grid(alpha=0.25)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    write(path, lambda file: file.write(buffer.getvalue()))


def main() -> int:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=list(PARTS), default="digits")
    parser.add_argument("--data-dir", default=None, help="folder of the MNIST files")
    parser.add_argument("--work", default="criterion-worth", help="where roll-outs are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="some of the seeds")
    parser.add_argument("--digest", action="store_true", help="only write the results of what is there")
    args = parser.parse_args()
    if not args.digest:
        everything(args)
    found, out = digest(args), HERE / "criterion_worth" / args.part
    write_json(out / "result.json", found)
    write_text(out / "table.md", tables(found))
    figure(found, out / "worth.png")
    print(tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
