"""Count what the sweep over (alpha, K) saves over running every candidate control from its start."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from _common import Problem, environment, fitted, heading, main, parser, positive, progress, table

from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Batch, build
from controlat.pmp import probe_batches
from controlat.pmp.candidates import Candidates
from controlat.pmp.maximise import Scored, score_one, score_sweep

EPS = 0.3
TARGET = {"evaluations_ratio": 8.0}
TOLERANCE = 1e-4  # the two ways must agree: relative difference of a squared gradient norm
Way = Callable[[Meter], Iterator[Scored]]


class Run(NamedTuple):
    """One run of one way of scoring: squared gradient norms per probe batch, and what they cost."""

    values: dict[Control, list[float]]
    evaluations: int
    seconds: float


def controls_of(candidates: Candidates) -> list[Control]:
    """All candidates: no attack, and each step size with each K."""
    return candidates.around(build("pgd_at"), Control(alpha=0.0, steps=0))


def ways(driver: Driver, batches: Sequence[Batch], candidates: Candidates) -> dict[str, Way]:
    """The two ways of scoring the same candidates on the same probe."""
    return {
        "rerun": lambda meter: (score_one(driver, batches, v, 0.0, meter) for v in controls_of(candidates)),
        "sweep": lambda meter: score_sweep(
            driver, batches, candidates, Control(alpha=0.0, steps=0), 0.0, meter
        ),
    }


def score(way: Way, total: int, label: str) -> Run:
    """Run one way to its end."""
    meter, values = Meter(), {}
    began = time.perf_counter()
    for i, (v, _, fields) in enumerate(way(meter), start=1):
        values[v] = [float(sum(g.double().square().sum() for g in field.gradients)) for field in fields]
        if i % 50 == 0 or i == total:
            progress(f"{label}: {i} of {total} candidates")
    return Run(values, meter.gradients, time.perf_counter() - began)


def difference(a: Run, b: Run) -> float:
    """The largest relative difference between the squared gradient norms of two runs.

    Raises:
        ValueError: they did not score the same candidates.
    """
    if set(a.values) != set(b.values):
        raise ValueError(f"{len(a.values)} candidates were scored one way and {len(b.values)} the other")
    pairs = [p for v in a.values for p in zip(a.values[v], b.values[v], strict=True)]
    return max(abs(p - q) / max(p, q, 1e-300) for p, q in pairs)


def prepare(problem: Problem, args: argparse.Namespace) -> tuple[Driver, list[Batch], Candidates]:
    """The driver, the probe and the candidates.

    Raises:
        ValueError: the probe is larger than the training data, or smaller than its number of batches.
    """
    data = problem.data.train
    if args.samples > len(data):
        raise ValueError(f"--samples must be at most {len(data)}, got {args.samples}")
    driver = Driver(problem.model, build("pgd_at"), Ball(EPS), seed=args.seed)
    batches = probe_batches(*data.take(torch.arange(args.samples)), args.batches)
    return driver, batches, Candidates.default(EPS, args.steps, args.alphas)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    progress("fitting the network")
    problem = fitted(args)
    driver, batches, candidates = prepare(problem, args)
    calls = ways(driver, batches, candidates)
    for batch in batches:
        driver.field(batch, Control(alpha=candidates.values["alpha"][0], steps=1))  # warm-up
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for r in range(args.repeats):
        for name, way in calls.items():
            runs[name].append(
                score(way, len(controls_of(candidates)), f"round {r + 1} of {args.repeats}, {name}")
            )
    slow, fast = runs["rerun"], runs["sweep"]
    ratio = slow[0].evaluations / fast[0].evaluations
    apart = max(difference(a, b) for a, b in zip(slow, fast, strict=True))
    samples = sum(len(b.x) for b in batches)
    rows = {name: summary(found, samples) for name, found in runs.items()}
    return {
        "benchmark": "sweep",
        "environment": environment(),
        "problem": problem.record,
        "settings": settings(args, candidates, samples),
        "target": TARGET | {"largest_difference": TOLERANCE},
        "ways": rows,
        "evaluations_ratio": ratio,
        "seconds_ratio": rows["rerun"]["seconds"] / rows["sweep"]["seconds"],
        "largest_difference": apart,
        "met": ratio >= TARGET["evaluations_ratio"] and apart <= TOLERANCE,
    }


def settings(args: argparse.Namespace, candidates: Candidates, samples: int) -> dict[str, Any]:
    """What was scored on what."""
    return {
        "method": "pgd_at",
        "eps": EPS,
        "alphas": list(candidates.values["alpha"]),
        "max_steps": candidates.values["steps"][-1],
        "candidates": len(controls_of(candidates)),
        "samples": samples,
        "probe_batches": args.batches,
        "repeats": args.repeats,
    }


def summary(runs: list[Run], samples: int) -> dict[str, Any]:
    """One row of the table: the counts are the same in every round, of the seconds the least counts."""
    return {
        "evaluations": runs[0].evaluations,
        "evaluations_per_sample": runs[0].evaluations / samples,
        "seconds": min(run.seconds for run in runs),
        "all_seconds": [run.seconds for run in runs],
    }


def show(found: dict[str, Any]) -> str:
    """The table, with the target beside what came out."""
    of, ways = found["settings"], found["ways"]
    base = ways["sweep"]
    rows = [
        (name, f"{r['evaluations']:,}", f"{r['evaluations_per_sample']:,.0f}", f"{r['seconds']:.2f}",
         f"{r['evaluations'] / base['evaluations']:.2f}", f"{r['seconds'] / base['seconds']:.2f}")
        for name, r in ways.items()
    ]  # fmt: skip
    head = ("", "gradient evaluations", "per sample", "seconds", "evaluations ratio", "seconds ratio")
    return (
        f"{heading(found)}\n{of['candidates']} candidates ({len(of['alphas'])} step sizes, K to "
        f"{of['max_steps']}, and no attack), {of['samples']} samples in {of['probe_batches']} probe "
        f"batches, minimum of {of['repeats']} rounds\n\n{table(head, rows)}\n\n"
        f"largest relative difference of a squared gradient norm: {found['largest_difference']:.1e} "
        f"(at most {TOLERANCE:g})\n"
        f"target: at least {TARGET['evaluations_ratio']:g} times fewer gradient evaluations; "
        f"sweep: {found['evaluations_ratio']:.2f}: {'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "sweep.json", repeats=2)
    made.add_argument("--alphas", metavar="N", type=positive, default=5, help="number of step sizes")
    made.add_argument("--steps", metavar="K", type=positive, default=40, help="largest number of steps")
    made.add_argument("--samples", metavar="N", type=positive, default=64, help="samples of the probe")
    made.add_argument("--batches", metavar="N", type=positive, default=2, help="batches of the probe")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
