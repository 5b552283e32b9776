"""Time and memory of a costate sweep beside the training that it looks back on, as the run grows."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from _common import CLASSES, SIDE, environment, main, parser, positive, progress, table
from torch import Tensor

from controlat import rng
from controlat.balls import Ball
from controlat.data import Split
from controlat.dynamics import Driver, SGDSettings
from controlat.families import parse_schedule
from controlat.methods import build as build_method
from controlat.models import build
from controlat.network import Meter
from controlat.plan import Plan
from controlat.pmp import AdversarialLoss, sweep
from controlat.rates import parse_rate
from controlat.recording import GIBI, Recording
from controlat.training import initial_model, place

EPS, BATCH, EPOCH = 0.3, 64, 10  # an epoch of ten steps
TARGET = {"evaluations_per_update": 5.0}


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthetic images: what they show plays no part here."""
    generator = rng.generator(seed, "images")
    x = torch.rand((n, 1, SIDE, SIDE), generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def system(steps: int, k: int, seed: int) -> tuple[Driver, Plan]:
    """LeNet under PGD-K with momentum, for at least so many steps, in whole epochs."""
    epochs = -(-steps // EPOCH)
    model = place(initial_model(lambda: build("lenet", (1, SIDE, SIDE), CLASSES), seed), "cpu")
    driver = Driver(model, build_method("pgd_at"), Ball(EPS), SGDSettings(0.9), seed)
    schedule = parse_schedule(f"pgd:steps={k},alpha={EPS / 4}", epochs)
    data = Split(*images(EPOCH * BATCH, seed))
    return driver, Plan(data, BATCH, epochs, schedule, parse_rate(0.01), seed)


def measured(steps: int, k: int, limit: float, seed: int) -> dict[str, Any]:
    """One run: recorded, and swept from its end to its beginning."""
    driver, plan = system(steps, k, seed)
    steps = plan.epochs * EPOCH
    began = time.perf_counter()
    recording = Recording.of(driver, plan, limit=limit)
    trained = time.perf_counter() - began
    terminal = AdversarialLoss(*images(256, seed + 1), driver.ball)
    meter, began = Meter(), time.perf_counter()
    norms = [swept.norms[steps] for swept in sweep(recording, terminal, meter=meter)]
    seconds = time.perf_counter() - began
    updates = steps * BATCH
    attack = k * updates + 21 * 256  # generated again, and grad Phi
    return {
        "steps": steps,
        "stride": recording.stride,
        "states_gib": len(recording.stored) * _bytes(driver) / GIBI,
        "training_seconds": trained,
        "sweep_seconds": seconds,
        "ratio": seconds / trained,
        "training_evaluations": sum(step.spent.gradients for step in recording.steps),
        "sweep_evaluations": meter.gradients,
        "steps_again_evaluations": recording.spent.gradients,
        "evaluations_per_update": (meter.gradients - attack) / updates,
        "growth": norms[-1] / norms[0],
    }


def _bytes(driver: Driver) -> int:
    """Of one state: parameters and momentum buffers."""
    return sum(2 * p.numel() * p.element_size() for p in driver.parameters)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written: every length, with all states in memory and with few."""
    torch.set_num_threads(args.threads)
    rows = []
    for steps in args.steps:
        for limit in (4 * GIBI, args.megabytes * 2**20):
            progress(f"{steps} steps, {limit / 2**20:.0f} MiB of states")
            rows.append(measured(steps, args.inner, limit, args.seed) | {"limit_mib": limit / 2**20})
    return {
        "benchmark": "costate",
        "environment": environment(),
        "settings": {"inner": args.inner, "batch": BATCH, "momentum": 0.9},
        "target": TARGET,
        "rows": rows,
        "met": all(r["evaluations_per_update"] <= TARGET["evaluations_per_update"] for r in rows),
    }


def show(found: dict[str, Any]) -> str:
    """The result as a table."""
    where, of = found["environment"], found["settings"]
    heads = ("steps", "MiB allowed", "stride", "training s", "sweep s", "ratio", "per update", "growth")
    cells = [
        (
            str(r["steps"]),
            f"{r['limit_mib']:.0f}",
            str(r["stride"]),
            f"{r['training_seconds']:.2f}",
            f"{r['sweep_seconds']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['evaluations_per_update']:.2f}",
            f"{r['growth']:.3g}",
        )
        for r in found["rows"]
    ]
    return (
        f"{where['cpu']}, {where['threads']} thread(s)\nLeNet, PGD-{of['inner']}, batches of {of['batch']}, "
        f"momentum {of['momentum']}\n\n{table(heads, cells)}\n\nper update: gradient evaluations per sample "
        "of the sweep, without steps taken again and attacks made again; growth: ||p|| at the beginning over "
        f"that at the end\ntarget: at most {TARGET['evaluations_per_update']:g} per update: "
        f"{'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "costate.json", repeats=1)
    lengths = [50, 100, 200, 400]
    made.add_argument(
        "--steps", metavar="T", nargs="+", type=positive, default=lengths, help="lengths of runs"
    )
    made.add_argument("--inner", metavar="K", type=positive, default=5, help="steps of the attack")
    made.add_argument(
        "--megabytes", metavar="N", type=positive, default=256, help="of states in the second run"
    )
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
