"""What following BatchNorm's running statistics costs: a step's derivative with and without them."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any
from unittest import mock

import torch
from _common import environment, main, parser, positive, progress, table

from controlat._util import rng
from controlat.app.experiment import pick_device
from controlat.app.placement import deterministic, initial_model, place
from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.methods import Batch
from controlat.methods import build as build_method
from controlat.models import build
from controlat.models.frozen import batchnorm

NETWORKS = {"cnn_bn": (1, 28, 28), "preactresnet-18": (3, 32, 32)}
EPS, RATE = 8 / 255, 0.01
TARGET = {"ratio": 1.2}


def seconds(driver: Driver, batch: Batch, u: Control, follow: bool) -> float:
    """One product (dS/dz)^T p, running the step included."""
    p = driver.point(batch.indices).copy()
    nothing = mock.patch.object(batchnorm, "followed", return_value=contextlib.nullcontext())
    with contextlib.nullcontext() if follow else nothing:
        began = time.perf_counter()
        found = pullback(driver, batch, u, RATE, p).costate.parameters[0]
        found.sum().item()  # waits for the device
        return time.perf_counter() - began


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both in turn, in rounds after an untimed one."""
    shape, device = NETWORKS[name], pick_device(args.device)
    model = place(initial_model(lambda: build(name, shape, 10), args.seed), device)
    driver = Driver(model, build_method("pgd_at"), Ball(EPS), SGDSettings(0.9), args.seed)
    generator = rng.generator(args.seed, "images")
    x = torch.rand(args.batch, *shape, generator=generator).to(device)
    batch = Batch(x, (torch.arange(args.batch) % 10).to(device), torch.arange(args.batch), 0, 0)
    u = Control(alpha=EPS / 4, steps=args.inner)
    found: dict[bool, list[float]] = {True: [], False: []}
    for r in range(args.repeats + 1):
        progress(f"{name}: round {r} of {args.repeats}")
        for follow, times in found.items():
            times.append(seconds(driver, batch, u, follow))
    with_, without = min(found[True][1:]), min(found[False][1:])
    layers = len(driver.statistics) // 2
    return {"network": name, "layers": layers, "with": with_, "without": without, "ratio": with_ / without}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    with deterministic(args.threads):
        rows = [row(name, args) for name in NETWORKS]
    return {
        "benchmark": "batchnorm",
        "environment": environment(),
        "settings": {name: getattr(args, name) for name in ("inner", "batch", "device", "repeats")},
        "target": TARGET,
        "rows": rows,
        "met": all(r["ratio"] <= TARGET["ratio"] for r in rows),
    }


def show(found: dict[str, Any]) -> str:
    """The result as a table."""
    heads = ("network", "layers", "with, s", "without, s", "ratio")
    cells = [
        (r["network"], str(r["layers"]), f"{r['with']:.3f}", f"{r['without']:.3f}", f"{r['ratio']:.2f}")
        for r in found["rows"]
    ]
    where, of = found["environment"], found["settings"]
    return (
        f"{where['cpu']}, {where['threads']} thread(s), device {of['device']}\n"
        f"PGD-{of['inner']}, batch of {of['batch']}, minimum of {of['repeats']} rounds\n\n"
        f"{table(heads, cells)}\n\n"
        f"target: a ratio of at most {TARGET['ratio']}: {'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "batchnorm.json", repeats=5)
    made.add_argument("--inner", metavar="K", type=positive, default=2, help="steps of the attack")
    made.add_argument("--batch", metavar="N", type=positive, default=32, help="samples")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
