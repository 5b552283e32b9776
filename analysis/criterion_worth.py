"""Is C worth its name? Does the criterion order schedules as the objective J does?

    python analysis/criterion_worth.py                                   # digits: an hour on a core
    python analysis/criterion_worth.py --part mnist --data-dir FOLDER    # LeNet

Fourteen schedules are trained under several seeds, optimisers and learning rates. For each roll-out it
computes J = Phi + gamma eta sum n and everything that could stand for it: the greedy forms, C over horizons
h, the certificate D, relaxed roll-outs, the trust-region gap. Stopped, it goes on with the same command.
Roll-outs are kept in --work; results go to analysis/criterion_worth/PART: result.json, table.md, figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from controlat import rng
from controlat.config import TrainSettings
from controlat.evaluation.robust import measure as attacked
from controlat.files import write_json
from controlat.network import NonFiniteError
from controlat.pmp import AdversarialLoss, Grid, calibrate, examine, measure, probe_batches
from controlat.recording import Recording
from controlat.runs import environment, slug
from controlat.setting import Setting
from controlat.training import deterministic

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
        "looks": 2,
        "test": ["pgd-20"],
    },
}
LAMBDAS = (0.5, 0.25, 1.0)


def runs(part: Mapping[str, Any]) -> Iterator[tuple[tuple[float, float], int, str, str]]:
    """(dynamics, seed, name, schedule) of every roll-out; a seed of all schedules before the next seed."""
    epochs = part["problem"]["epochs"]
    for seed in part["seeds"]:
        for dynamics in part["dynamics"]:
            for name, text in schedules(part["problem"]["eps"], part["most"]).items():
                text = text.replace("LATE", str(3 * epochs // 10)).replace("EARLY", str(7 * epochs // 10))
                yield dynamics, seed, name, text


def roll_out(setting: Setting, text: str, seed: int, part: Mapping[str, Any]) -> dict[str, Any]:
    """One schedule: J and all that may stand for it."""
    began = time.perf_counter()
    problem, schedule = setting.problem, setting.problem.schedule_of(text)
    plan, driver = setting.plan(schedule, seed), setting.driver(seed)
    ball, held_out = problem.ball, setting.held_out
    terminal = AdversarialLoss(*held_out.take(torch.arange(len(held_out))), ball, seed=seed)
    recording = Recording.of(driver, plan)
    trained = time.perf_counter() - began
    grid, scale = Grid(*part["grid"]), 1 / (1 - problem.momentum)
    found = examine(
        recording, terminal, grid, gamma=part["gamma"], horizons=part["horizons"], looks=part["looks"]
    )
    calibration = calibrate(recording, found, terminal, lambdas=LAMBDAS)
    chosen = torch.randperm(len(setting.training), generator=rng.generator(0, "probe"))[:256]
    probe = probe_batches(*setting.training.take(chosen), 4, 0, chosen, problem.augmentation)
    surfaces = []
    for epoch in range(problem.epochs):
        visit = recording.at(epoch * plan.batches_per_epoch)
        batches = [b._replace(epoch=epoch) for b in probe]
        weight = scale * plan.mean_rate(epoch) / plan.mean_rate()
        surface = measure(driver, batches, visit.control, grid, terminal=terminal, scale=weight)
        surfaces.append({"control": dict(visit.control), "surface": surface.to_json()})
    driver.restore(recording.end)
    test = attacked(driver.model, setting.test, ball, attacks=part["test"], seed=seed)
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
                    result = roll_out(Setting.of(settings), text, seed, part)
                except NonFiniteError as error:
                    result = {"schedule": text, "seed": seed, "failed": str(error)}
            more = {"name": name, "momentum": momentum, "rate": rate, "environment": environment()}
            write_json(file, result | more)


def main() -> int:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=list(PARTS), default="digits")
    parser.add_argument("--data-dir", default=None, help="folder of the MNIST files")
    parser.add_argument("--work", default="criterion-worth", help="where roll-outs are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="some of the seeds")
    args = parser.parse_args()
    everything(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
