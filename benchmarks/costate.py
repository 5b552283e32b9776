"""Time and memory of training, recorded and swept for costates, beside training alone, as the run grows."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
from _common import CLASSES, SIDE, environment, main, parser, positive, progress, table
from torch import Tensor

from controlat._util import rng
from controlat.app.experiment import pick_device
from controlat.app.placement import deterministic, initial_model, place
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import Split
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import GIBI, Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build as build_method
from controlat.models import build
from controlat.pmp import AdversarialLoss, backward

EPS, BATCH, EPOCH = 0.3, 64, 10  # an epoch of ten steps
HELD_OUT, ATTACK = 256, 20  # images of Phi, and steps of its attack
TARGET = {"evaluations_per_update": 5.0}
MEBI = 2**20


class Job(NamedTuple):
    """What one process does: it trains and, where there is a limit (bytes of states), records and sweeps."""

    steps: int
    inner: int
    limit: float | None
    seed: int
    threads: int
    device: str


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthetic images: what they show plays no part here."""
    generator = rng.generator(seed, "images")
    x = torch.rand((n, 1, SIDE, SIDE), generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def system(job: Job) -> tuple[Driver, RunSpec]:
    """LeNet under PGD-K with momentum, for at least so many steps, in whole epochs."""
    epochs = -(-job.steps // EPOCH)
    device = pick_device(job.device)
    model = place(initial_model(lambda: build("lenet", (1, SIDE, SIDE), CLASSES), job.seed), device)
    driver = Driver(model, build_method("pgd_at"), Ball(EPS), SGDSettings(0.9), job.seed)
    schedule = parse_schedule(f"pgd:steps={job.inner},alpha={EPS / 4}", epochs)
    data = Split(*images(EPOCH * BATCH, job.seed)).to(device)
    return driver, RunSpec(
        data=data, batch_size=BATCH, epochs=epochs, controller=schedule, rate=parse_rate(0.01), seed=job.seed
    )


def clock(driver: Driver) -> float:
    """Seconds, with nothing left to do on the device."""
    if driver.device.type == "cuda":
        torch.cuda.synchronize(driver.device)
    return time.perf_counter()


def peak(device: torch.device) -> float:
    """The most memory that this process has had, in MiB: resident, or tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBI
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEBI


def train(job: Job) -> dict[str, Any]:
    """One run, with nothing kept of it but its losses."""
    driver, spec = system(job)
    began = clock(driver)
    losses = [step.loss for step in rollout(driver, spec)]
    return {"steps": len(losses), "training_seconds": clock(driver) - began, "losses": losses}


def look_back(job: Job, limit: float) -> dict[str, Any]:
    """The same run recorded, and swept from its end to its beginning."""
    driver, spec = system(job)
    x, y = images(HELD_OUT, job.seed + 1)
    terminal = AdversarialLoss(x.to(driver.device), y.to(driver.device), driver.ball, steps=ATTACK)
    began = clock(driver)
    recording = Recording.of(driver, spec, limit=limit)
    recorded = clock(driver)
    meter, steps = Meter(), len(recording.steps)
    norms = [step.norms[steps] for step in backward(recording, terminal, meter=meter)]
    ended = clock(driver)
    updates = steps * BATCH
    attacks = job.inner * updates + (ATTACK + 1) * HELD_OUT  # made again, and grad Phi
    return {
        "steps": steps,
        "stride": recording.stride,
        "recording_seconds": recorded - began,
        "sweep_seconds": ended - recorded,
        "training_evaluations": sum(step.spent.gradients for step in recording.steps),
        "sweep_evaluations": meter.gradients,
        "steps_again_evaluations": recording.spent.gradients,
        "evaluations_per_update": (meter.gradients - attacks) / updates,
        "growth": norms[-1] / norms[0],
        "losses": [step.loss for step in recording.steps],
    }


def work(job: Job) -> dict[str, Any]:
    """What one process does, after an untimed run of one epoch, and the most memory that it has had."""

    def once(job: Job) -> dict[str, Any]:
        return train(job) if job.limit is None else look_back(job, job.limit)

    with deterministic(job.threads):
        once(job._replace(steps=EPOCH))
        device = pick_device(job.device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return once(job) | {"peak_mib": peak(device)}


def alone(job: Job) -> dict[str, Any]:
    """`work` in a process of its own, so that its peak of memory is that of this job.

    Raises:
        ValueError: the process was ended from outside.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            raise ValueError(f"{job.steps} steps: the process was killed, for want of memory?") from None


def best(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One job over its rounds: the least seconds, the largest peak; all else is the same in every round."""
    seconds = {key: min(r[key] for r in rounds) for key in rounds[0] if key.endswith("_seconds")}
    return rounds[0] | seconds | {"peak_mib": max(r["peak_mib"] for r in rounds)}


def row(training: dict[str, Any], found: dict[str, Any], limit: float) -> dict[str, Any]:
    """A recorded and swept run beside the training alone.

    Raises:
        ValueError: they are not the same run.
    """
    if found["losses"] != training["losses"]:
        raise ValueError(f"{found['steps']} steps: the recorded run has other losses than the training")
    base = training["training_seconds"]
    return {key: value for key, value in found.items() if key != "losses"} | {
        "limit_mib": limit / MEBI,
        "training_seconds": base,
        "ratio": (found["recording_seconds"] + found["sweep_seconds"]) / base,
        "sweep_ratio": found["sweep_seconds"] / base,
        "training_peak_mib": training["peak_mib"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written: every length, with all states in memory and with few."""
    torch.set_num_threads(args.threads)
    limits = (4 * GIBI, args.megabytes * MEBI)
    rows = []
    for steps in args.steps:
        rounds: dict[float | None, list[dict[str, Any]]] = {None: [], **{limit: [] for limit in limits}}
        for r in range(args.repeats):
            for limit, found in rounds.items():
                what = "training" if limit is None else f"{limit / MEBI:.0f} MiB of states"
                progress(f"{steps} steps, round {r + 1} of {args.repeats}: {what}")
                found.append(alone(Job(steps, args.inner, limit, args.seed, args.threads, args.device)))
        training = best(rounds[None])
        rows += [row(training, best(rounds[limit]), limit) for limit in limits]
    return {
        "benchmark": "costate",
        "environment": environment(),
        "settings": {
            "inner": args.inner,
            "batch": BATCH,
            "momentum": 0.9,
            "device": args.device,
            "repeats": args.repeats,
        },
        "target": TARGET,
        "rows": rows,
        "met": all(r["evaluations_per_update"] <= TARGET["evaluations_per_update"] for r in rows),
    }


def show(found: dict[str, Any]) -> str:
    """The result as a table."""
    where, of = found["environment"], found["settings"]
    heads = ("steps", "MiB allowed", "stride", "training s", "recording s", "sweep s", "ratio", "sweep ratio",
             "training MiB", "sweep MiB", "per update", "growth")  # fmt: skip
    cells = [
        (str(r["steps"]), f"{r['limit_mib']:.0f}", str(r["stride"]), f"{r['training_seconds']:.2f}",
         f"{r['recording_seconds']:.2f}", f"{r['sweep_seconds']:.2f}", f"{r['ratio']:.2f}",
         f"{r['sweep_ratio']:.2f}", f"{r['training_peak_mib']:.0f}", f"{r['peak_mib']:.0f}",
         f"{r['evaluations_per_update']:.2f}", f"{r['growth']:.3g}")
        for r in found["rows"]
    ]  # fmt: skip
    return (
        f"{where['cpu']}, {where['threads']} thread(s), device {of['device']}\n"
        f"LeNet, PGD-{of['inner']}, batches of {of['batch']}, momentum {of['momentum']}, "
        f"minimum of {of['repeats']} round(s)\n\n{table(heads, cells)}\n\n"
        "ratio: recording and sweep over training alone; sweep ratio: the sweep over training alone\n"
        "training MiB, sweep MiB: peak memory of a process that only trains, and of one that records and "
        "sweeps\n"
        "per update: gradient evaluations per sample of the sweep, without steps taken again and attacks made"
        " again\n"
        "growth: ||p|| at the beginning over that at the end\n"
        f"target: at most {TARGET['evaluations_per_update']:g} per update: "
        f"{'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "costate.json", repeats=2)
    lengths = [50, 100, 200, 400]
    made.add_argument(
        "--steps", metavar="T", nargs="+", type=positive, default=lengths, help="lengths of runs"
    )
    made.add_argument("--inner", metavar="K", type=positive, default=5, help="steps of the attack")
    made.add_argument(
        "--megabytes", metavar="N", type=positive, default=256, help="of states in the second run"
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
