"""How many CPU threads suit a network: seconds of a training step with one and with several, in turn."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from _common import environment, main, parser, positive, progress, table

from controlat._util import rng
from controlat.app.placement import default_threads, deterministic, initial_model, place
from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.methods import Batch
from controlat.methods import build as build_method
from controlat.models import build

EPS, RATE, TARGET = 8 / 255, 0.001, {"ratio": 1.1}


class Case(NamedTuple):
    """A network, the shape of its inputs and the samples of a batch."""

    model: str
    shape: tuple[int, int, int]
    batch: int


CASES = (
    Case("mlp", (1, 8, 8), 64),
    Case("mlp", (1, 28, 28), 128),
    Case("cnn_bn", (1, 8, 8), 64),
    Case("lenet", (1, 28, 28), 64),
    Case("lenet", (1, 28, 28), 128),
    Case("small_cnn", (1, 28, 28), 64),
    Case("small_cnn", (1, 28, 28), 128),
    Case("fosc-8", (3, 32, 32), 32),
    Case("preactresnet-18", (3, 32, 32), 16),
)


def step_of(case: Case, args: argparse.Namespace) -> tuple[Driver, Batch]:
    """A driver of the case's network, and a batch."""
    model = place(initial_model(lambda: build(case.model, case.shape, 10), args.seed), "cpu")
    driver = Driver(model, build_method("pgd_at"), Ball(EPS), SGDSettings(0.9), args.seed)
    x = torch.rand(case.batch, *case.shape, generator=rng.generator(args.seed, "images"))
    return driver, Batch(x, torch.arange(case.batch) % 10, torch.arange(case.batch), 0, 0)


def seconds(driver: Driver, batch: Batch, u: Control, threads: int) -> float:
    """One step with so many threads, after one that is not timed."""
    with deterministic(threads):
        driver.step(batch, u, RATE)
        began = time.perf_counter()
        driver.step(batch, u, RATE)
        return time.perf_counter() - began


def row(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One case: both numbers of threads in rounds, which of them comes first in turn."""
    driver, batch = step_of(case, args)
    chosen = default_threads(driver.model, in_shape=case.shape, batch_size=case.batch)
    times: dict[int, list[float]] = {1: [], args.several: []}
    began, rounds = time.perf_counter(), 0
    while rounds < args.repeats and (rounds < 3 or time.perf_counter() - began < args.seconds):
        progress(f"{case.model}, batch of {case.batch}: round {rounds + 1} of {args.repeats}")
        for threads in (1, args.several) if rounds % 2 else (args.several, 1):
            times[threads].append(seconds(driver, batch, Control(alpha=EPS / 4, steps=args.inner), threads))
        rounds += 1
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    best = 1 if ratio >= 1 else args.several
    lost = 1.0 if (chosen.number > 1) == (best > 1) else max(ratio, 1 / ratio)
    return {
        **case._asdict(),
        "rounds": rounds,
        "seconds": statistics.median(times[1]),
        "ratio": ratio,
        "least ratio": min(times[args.several]) / min(times[1]),
        "chosen": chosen.number,
        "why": chosen.why,
        "lost": lost,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    os.environ.pop("OMP_NUM_THREADS", None)  # the choice would be the user's
    load = os.getloadavg()[0]
    rows = [row(case, args) for case in CASES]
    return {
        "benchmark": "threads",
        "environment": environment() | {"cores": os.cpu_count(), "load": load},
        "settings": {name: getattr(args, name) for name in ("several", "inner", "repeats", "seconds")},
        "target": TARGET,
        "rows": rows,
        "met": all(r["lost"] <= TARGET["ratio"] for r in rows),
    }


def show(result: dict[str, Any]) -> str:
    """The result as a table."""
    where, of = result["environment"], result["settings"]
    heads = ("network", "batch", "1 thread, s", "ratio", "least", "chosen", "why")
    cells = [
        (
            f"{r['model']} {r['shape'][-1]}",
            str(r["batch"]),
            f"{r['seconds']:.4f}",
            f"{r['ratio']:.2f}",
            f"{r['least ratio']:.2f}",
            str(r["chosen"]),
            r["why"],
        )
        for r in result["rows"]
    ]
    return (
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f}\n"
        f"PGD-{of['inner']} training step, {of['several']} threads over one\n\n{table(heads, cells)}\n\n"
        f"target: the chosen number takes at most {TARGET['ratio']} of the faster: "
        f"{'met' if result['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "threads.json", repeats=15)
    made.add_argument("--several", metavar="N", type=positive, default=2, help="threads held against one")
    made.add_argument("--inner", metavar="K", type=positive, default=3, help="steps of the attack")
    made.add_argument("--seconds", metavar="S", type=float, default=20, help="for a row, beyond three rounds")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
