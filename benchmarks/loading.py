"""What loading costs beside training: one PGD-1 epoch with its data loaded as usual, and with them ready."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import environment, main, parser, positive, progress, synthetic, table
from PIL import Image

from controlat._util import rng
from controlat.app.placement import place
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule
from controlat.control.space import Control
from controlat.data import Dataset, Samples, Split, parse_augment
from controlat.data import load as load_data
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch, build
from controlat.models import build as build_model

TARGET = 0.1  # largest overhead of loading: seconds with it over seconds without, minus 1


def colours(seed: int, n: int) -> Dataset:
    """Random colour images of CIFAR's shape: loading does not look at what is on them."""
    generator = rng.generator(seed, "colours")
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(x, torch.arange(n) % 10, 255.0)
    return Dataset("random colours 32 x 32", split, split, 10)


def pictures(folder: Path, seed: int, n: int, width: int, height: int) -> Path:
    """JPEG files of smooth random colours, by class."""
    generator = rng.generator(seed, "pictures", width)
    for i in range(n):
        small = torch.rand(1, 3, 12, 12, generator=generator)
        large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)[0]
        pixels = (255 * large).to(torch.uint8).permute(1, 2, 0).numpy()
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return folder


def epoch(driver: Driver, batches: Iterator[Batch], u: Control) -> tuple[float, float]:
    """(seconds in all, seconds spent waiting for data) of training on some batches."""
    waited, began = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        driver.step(batch, u, 0.01)
    if driver.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, waited


def case(
    name: str, data: Dataset, model: str, augment: str, count: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the same batches loaded as usual and ready in memory, in turn."""
    train: Samples = data.train.to(args.device)
    schedule: Schedule = parse_schedule("fgsm:alpha=0.03", 1)
    spec = RunSpec(
        data=train,
        batch_size=args.batch,
        epochs=1,
        controller=schedule,
        rate=parse_rate(0.01),
        seed=args.seed,
        augment=parse_augment(augment),
    )
    with rng.scoped(args.seed, "model"):
        network = place(build_model(model, data.in_shape, data.num_classes), args.device)
    driver = Driver(network, build("pgd_at", {}), Ball(0.03), SGDSettings(), args.seed)
    count = min(count, spec.batches_per_epoch)
    ready = list(itertools.islice(spec.batches(0), count))
    epoch(driver, iter(ready[:2]), schedule(0))
    rounds = []
    for r in range(args.repeats):
        progress(f"{name}: round {r + 1} of {args.repeats}")
        bare, _ = epoch(driver, iter(ready), schedule(0))
        full, waited = epoch(driver, itertools.islice(spec.batches(0), count), schedule(0))
        rounds.append({"ready": bare, "loaded": full, "waited": waited})
    images = sum(len(batch.x) for batch in ready)
    overhead = statistics.median(r["loaded"] / r["ready"] - 1 for r in rounds)
    return {
        "name": name,
        "data": data.name,
        "model": model,
        "augment": augment,
        "batches": count,
        "images": images,
        "shape": list(data.in_shape),
        "rounds": rounds,
        "overhead": overhead,
        "waiting": statistics.median(r["waited"] / r["loaded"] for r in rounds),
        "images_per_second": images / min(r["loaded"] for r in rounds),
        "met": overhead <= TARGET,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        progress("making pictures")
        small = (
            Path(args.pictures) if args.pictures else pictures(Path(folder) / "s", args.seed, 2000, 32, 32)
        )
        large = pictures(Path(folder) / "l", args.seed, 300, 400, 300)
        digits = load_data("mnist", args.mnist) if args.mnist else synthetic(args.seed)
        streamed = load_data("folder", small)
        n = args.batches
        cifar, crop = colours(args.seed, 5000), "crop-flip:pad=4"
        small_size, large_size = "32 x 32 JPEG, streamed", "400 x 300 JPEG to 64 x 64, streamed"
        rows = [
            case("28 x 28 in memory", digits, "lenet", "none", 8 * n, args),
            case("32 x 32 in memory, augmented", cifar, "fosc-8", crop, n, args),
            case("32 x 32 in memory, augmented", cifar, "preactresnet-18", crop, max(n // 8, 2), args),
            case(small_size, streamed, "fosc-8", crop, n, args),
            case(large_size, load_data("folder", large, size=64), "fosc-8", crop, n, args),
        ]
    return {
        "benchmark": "loading",
        "environment": environment(),
        "settings": {"batch": args.batch, "repeats": args.repeats, "device": args.device},
        "target": {"overhead": TARGET},
        "rows": rows,
        "met": all(row["met"] for row in rows),
    }


def show(found: dict[str, Any]) -> str:
    """The table, with the target."""
    where = found["environment"]
    head = ("", "network", "batches", "images/s", "overhead", "waiting")
    rows = [
        (r["name"], r["model"], str(r["batches"]), f"{r['images_per_second']:,.0f}", f"{r['overhead']:.1%}",
         f"{r['waiting']:.1%}")
        for r in found["rows"]
    ]  # fmt: skip
    return (
        f"{where['cpu']}, {where['threads']} thread(s), torch {where['versions']['torch']}, device "
        f"{found['settings']['device']}, batch {found['settings']['batch']}\n\n{table(head, rows)}\n\n"
        f"target: overhead at most {TARGET:.0%} in every row: {'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__ or "", "loading.json", repeats=3)
    made.add_argument(
        "--pictures", metavar="DIR", help="folder of 32 x 32 pictures by class; made if not given"
    )
    made.add_argument("--batch", metavar="N", type=positive, default=64, help="images per outer step")
    made.add_argument("--batches", metavar="N", type=positive, default=16, help="batches timed per round")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
