"""The derivative of one training step, for every method: what is exact, what is dropped, and how large it is.

    python analysis/one_step.py [--out DIR]    # half a minute on a core

It reads the folder of methods, trains each a little on the bundled digits, and calls
`controlat.dynamics.verify` at the state it has reached: the vector-Jacobian product of the step beside
central differences of the step, in float64 and on smooth networks. Results go to analysis/one_step:
result.json (all numbers), table.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlat import Ball, Control, methods, report
from controlat._util import rng
from controlat._util.files import write_json, write_text
from controlat.app.runs import environment
from controlat.data import load
from controlat.dynamics import verify
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.methods import Batch, Method

EPS = {"linf": 0.1, "l2": 0.5}
# alpha is in units of eps. Whatever else a method has keeps its default.
KNOBS = {"alpha": 0.23, "steps": 3, "inner": 2, "fosc": 0.01, "slack": 1}
# Options beside the defaults: those that carry something, or drop something.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cat": [{"curriculum": False}],  # else it attacks only when it has learnt a lot
    "fast": [{}, {"init": "previous"}],
    "yopo": [{}, {"first_layer_grad": "hamiltonian"}],
}
NETWORKS = ("plain", "BatchNorm")
OPTIMIZERS = {
    "momentum": SGDSettings(momentum=0.9, nesterov=True, weight_decay=5e-4),
    "plain SGD": SGDSettings(momentum=0.0),
}
RATE, SEED, DIRECTIONS = 0.1, 0, 24
SAMPLES, EPOCHS, BATCHES = 32, 3, 3
# Before the step the ball is a little smaller, so that no carried pixel lies where the ball clips it.
SHRINK = 0.9
HERE = Path(__file__).resolve().parent


def network(kind: str) -> nn.Module:
    """A network with two derivatives everywhere, for images (1, 8, 8)."""
    with rng.scoped(SEED, "network"):
        norm = [nn.BatchNorm2d(8)] if kind == "BatchNorm" else []
        features = nn.Conv2d(1, 8, 3, padding=1), *norm, nn.Softplus(), nn.AvgPool2d(2), nn.Flatten()
        return nn.Sequential(*features, nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def control(method: Method, eps: float) -> Control:
    """A control of any method."""
    known = KNOBS | {"alpha": KNOBS["alpha"] * eps}
    chosen = {}
    for name, knob in method.controls.items():
        if name in known:
            chosen[name] = min(max(known[name], knob.low), knob.high)
        elif knob.default is None:
            chosen[name] = max(knob.low, 1.0)
    return method.controls.check(chosen)


def batches(epoch: int) -> list[Batch]:
    """The first digits, with pixels in [0.2, 0.8], where [0, 1] clips no perturbation of the l_inf ball."""
    x, y = load("digits").train.take(torch.arange(SAMPLES * BATCHES))
    x = 0.2 + 0.6 * x.double()
    parts = torch.arange(len(x)).split(SAMPLES)
    return [Batch(x[part], y[part], part, epoch, number) for number, part in enumerate(parts)]


def trained(name: str, options: Mapping[str, Any], norm: str, kind: str, optimizer: SGDSettings) -> Driver:
    """A driver after a few epochs: momentum, memory and rows are not 0."""
    small, ball = (Ball(factor * EPS[norm], norm) for factor in (SHRINK, 1.0))
    driver = Driver(network(kind), methods.build(name, options), small, optimizer, SEED, channels_last=False)
    u = control(driver.method, EPS[norm])
    for epoch in range(EPOCHS):
        for batch in batches(epoch):
            driver.step(batch, u, RATE)
    driver.ball = ball
    return driver


def gradients_share(driver: Driver, batch: Batch, u: Control) -> float:
    """The share of what is dropped in the derivative of the gradient alone, under plain SGD.

    There S = z - rate * g: what grows with the rate, in differences and in products, is g's. Weight,
    directions and signs are the same for both rates.
    """
    found = [verify(driver, batch, u, r, directions=DIRECTIONS, seed=SEED).pairs for r in (RATE, 0.0)]
    moved, still = (torch.tensor(pairs, dtype=torch.float64) for pairs in found)
    differences, products = (moved - still).unbind(1)
    return float((differences - products).norm() / differences.norm())


def row(name: str, options: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {"method": name, "options": dict(options), "norm": norm}
    batch, dropped = batches(EPOCHS)[0], set[str]()
    for kind in NETWORKS:
        driver = trained(name, options, norm, kind, OPTIMIZERS["momentum"])
        u = control(driver.method, EPS[norm])
        one = verify(driver, batch, u, RATE, directions=DIRECTIONS, seed=SEED)
        found["control"] = dict(u)
        found[kind] = {"compared": len(one.pairs), "skipped": one.skipped, "step": one.share}
        dropped.update(one.dropped)
        if one.dropped:
            driver = trained(name, options, norm, kind, OPTIMIZERS["plain SGD"])
            found[kind]["gradient"] = gradients_share(driver, batch, u)
    return found | {"dropped": sorted(dropped)}


def measure() -> dict[str, Any]:
    """The result file."""
    started = time.perf_counter()
    every = [(name, options) for name in methods.names() for options in OPTIONS.get(name, [{}])]
    rows = [row(name, options, norm) for (name, options), norm in itertools.product(every, EPS)]
    settings = {
        "eps": EPS,
        "rate": RATE,
        "seed": SEED,
        "directions": DIRECTIONS,
        "samples": SAMPLES,
        "steps before": EPOCHS * BATCHES,
        "optimizers": {name: vars(o) for name, o in OPTIMIZERS.items()},
    }
    seconds = time.perf_counter() - started
    return {"settings": settings, "environment": environment(), "seconds": seconds, "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """The table in Markdown."""

    def shown(share: float) -> str:
        return f"{share:.0e}" if share < 1e-6 else f"{100 * share:.2g} %"

    cells = []
    for entry in result["rows"]:
        options = ", ".join(f"{key}={str(value).lower()}" for key, value in entry["options"].items())
        compared, skipped = (sum(entry[kind][key] for kind in NETWORKS) for key in ("compared", "skipped"))
        cells.append(
            [
                entry["method"] + (f" ({options})" if options else ""),
                entry["norm"],
                f"{compared} ({skipped})",
                *(
                    shown(entry[kind][what]) if what in entry[kind] else ""
                    for what in ("step", "gradient")
                    for kind in NETWORKS
                ),
                "; ".join(entry["dropped"]) or "nothing",
            ]
        )
    shares = ["step", "step, BatchNorm", "gradient", "gradient, BatchNorm"]
    heads = ["method", "norm", "directions (skipped)", *shares, "dropped"]
    return report.table(heads, cells, words=(0, 1, len(heads) - 1))


def markdown(result: Mapping[str, Any]) -> str:
    """table.md: the table and what its columns are."""
    s, env = result["settings"], result["environment"]
    notes = [
        f"step: |d - p| / |d| over {s['directions']} random directions in the whole state, d the central "
        "differences and p the products; SGD with Nesterov momentum 0.9 and weight decay 5e-4, rate "
        f"{s['rate']:g}; without and with BatchNorm. Directions are those of both networks; skipped: a sign "
        "of an inner gradient differed between the two ends.",
        "gradient: where something is dropped, the same for the derivative of the gradient alone "
        "(under plain SGD): the identity in dS/dz is left out, and the rate with it.",
        f"The state is that after {s['steps before']} steps on {s['samples']} digits each; eps "
        + ", ".join(f"{eps:g} ({norm})" for norm, eps in s["eps"].items())
        + f"; seed {s['seed']}. Controls are in result.json.",
        f"Made on {env['hardware']}, {env['threads']} thread, torch {env['torch']}, in "
        f"{result['seconds']:.0f} seconds.",
    ]
    lines = "\n".join(f"- {line}" for line in notes)
    return f"# The derivative of one step\n\n{table(result)}\n\n{lines}\n"


def main() -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "one_step", help="results; analysis/one_step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure()
    write_json(args.out / "result.json", result)
    write_text(args.out / "table.md", markdown(result))
    print(markdown(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
