"""What a GPU gains, in ratios of one run: PGD calls, training steps, epochs, criterion, costates, memory.

    python benchmarks/gpu.py                            # on a CUDA device, at most 8 minutes
    python benchmarks/gpu.py --device cpu --minutes 1   # a dry trial with tiny sizes: its ratios mean nothing

Cases are taken in the order of their worth; what was not reached within the minutes is listed. With --resume
the cases that the result file has from the same machine are kept, and the others measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, main, positive, progress, table
from _contenders import (
    Case,
    Problem,
    Target,
    attack_case,
    costate_case,
    criterion_case,
    epoch_case,
    step_case,
)

from controlat._util.files import read_json, write_json
from controlat.app.experiment import pick_device

MEBI = 2**20
WARM_UP = 3  # untimed calls of every contender; a graph is captured in the second one
SHARE = 60.0  # seconds after which no further round of a case begins
COLOUR, GREY, SMALL = (3, 32, 32), (1, 28, 28), (1, 8, 8)
CIFAR, MNIST = (8 / 255, 2 / 255), (0.3, 0.01)


class OutOfTime(Exception):
    """The minutes are over."""


def cases(device: torch.device, seed: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every case by a short name, cheapest and most telling first; on a CPU with a small network."""
    tiny = device.type == "cpu"
    deep = "cnn_bn" if tiny else "preactresnet-18"

    def problem(
        network: str, shape: tuple[int, int, int], batch: int, ball: tuple[float, float], steps: int
    ) -> Problem:
        batch, steps = (2, 2) if tiny else (batch, steps)
        return Problem(network, shape, batch, ball[0], ball[1], steps)

    res = problem(deep, COLOUR, 128, CIFAR, 10)
    lenet = problem("lenet", GREY, 128, MNIST, 40)
    looked = problem("lenet", GREY, 64, MNIST, 5)
    mlp = problem("mlp", SMALL, 64, (0.15, 0.0375), 10)
    whole = problem(deep, COLOUR, 512, CIFAR, 10)
    call = (
        Target("controlat, bf16", "torchattacks, float32", 0.45),
        Target("controlat, float32", "torchattacks, float32", 0.65),
    )
    quarter = (Target("controlat, float32", "torchattacks, float32", 0.25),)
    half = (Target("controlat, bf16", "plain loop, bf16", 0.5),)
    images = 8 if tiny else 16 * 128
    yield "call", lambda: attack_case(res, device, seed, call)
    yield "call, LeNet", lambda: attack_case(lenet, device, seed, quarter)
    yield "call, MLP", lambda: attack_case(mlp, device, seed, both=False)
    yield "step", lambda: step_case(res, device, seed, half)
    yield "step, LeNet", lambda: step_case(lenet, device, seed)
    yield (
        "criterion, LeNet",
        lambda: criterion_case(looked, 4 if tiny else 512, 2 if tiny else 5, device, seed),
    )
    yield "costates, LeNet", lambda: costate_case(looked, 3 if tiny else 200, device, seed)
    yield "call, batch 512", lambda: attack_case(whole, device, seed)
    yield "epoch", lambda: epoch_case(res, images, device, seed, half)
    yield "criterion", lambda: criterion_case(res, 4 if tiny else 512, 2 if tiny else 5, device, seed)
    yield "costates", lambda: costate_case(res, 2 if tiny else 20, device, seed)


def synchronized(device: torch.device) -> float:
    """Seconds on the clock, with nothing left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float | None]:
    """What untimed calls returned, and the MiB of tensors that they had at most beyond those of before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(WARM_UP):
        result = call()
    if device.type != "cuda":
        return result, None
    torch.cuda.synchronize(device)
    return result, (torch.cuda.max_memory_allocated(device) - before) / MEBI


def race(case: Case, device: torch.device, repeats: int, deadline: float, seed: int) -> dict[str, Any]:
    """One case: all contenders in every round, another one first each time, after untimed calls.

    Raises:
        OutOfTime: the minutes were over before one round was.
    """
    calls = case.calls()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rows: dict[str, dict[str, Any]] = {}

    def left() -> None:
        if time.perf_counter() > deadline:
            raise OutOfTime

    for name, call in calls.items():
        left()
        torch.manual_seed(seed)
        result, most = peak(device, call)
        rows[name] = {"peak_mib": most} | ({"loss": case.loss(result)} if case.loss else {})
    began = time.perf_counter()
    for r in range(repeats):
        if r and time.perf_counter() > min(deadline, began + SHARE):
            break
        left()
        progress(f"{case.name}: round {r + 1} of {repeats}")
        for name in names[r % len(names) :] + names[: r % len(names)]:
            torch.manual_seed(seed)
            start = synchronized(device)
            calls[name]()
            seconds[name].append(synchronized(device) - start)
    return judged(case, rows, seconds)


def ratio(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[over], strict=True))


def judged(
    case: Case, rows: Mapping[str, dict[str, Any]], seconds: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The record of a case: medians, ratios, and the targets beside what came out."""
    contenders = {
        name: row
        | {
            "seconds": statistics.median(seconds[name]),
            "ratio": ratio(seconds, name, case.over),
            "all_seconds": seconds[name],
        }
        for name, row in rows.items()
    }
    targets = [
        target._asdict() | {"ratio": value, "met": value <= target.limit}
        for target in case.targets
        for value in [ratio(seconds, target.contender, target.over)]
    ]
    return {
        "name": case.name,
        "over": case.over,
        "settings": dict(case.settings),
        "rounds": len(seconds[case.over]),
        "contenders": contenders,
        "targets": targets,
        "without_graphs": sorted(case.notes),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The environment, and the GPU with what torch does on it by default."""
    if device.type != "cuda":
        return environment() | {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return environment() | {
        "device": device.type,
        "gpu": properties.name,
        "gpu_memory_mib": properties.total_memory / MEBI,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def kept(path: Path, where: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of a result file that the same machine and versions made."""
    if not path.exists():
        return {}
    stored = read_json(path)
    same = ("versions", "cpu", "gpu", "cuda", "cudnn")
    differ = [k for k in same if stored["environment"].get(k) != where.get(k)]
    if differ:
        raise ValueError(
            f"{path} was made with another {', '.join(differ)}; give another --out, or leave --resume out"
        )
    return dict(stored["cases"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result; the file is written after every case."""
    deadline = time.perf_counter() + 60 * args.minutes
    device = pick_device(args.device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda, or cpu for a dry trial, got {args.device}")
    where, dry = machine(device), device.type == "cpu"
    done = kept(args.out, where) if args.resume else {}
    failed: dict[str, str] = {}
    every = dict(cases(device, args.seed))

    def result() -> dict[str, Any]:
        targets = [t for case in done.values() for t in case["targets"]]
        missing = [name for name in every if name not in done and name not in failed]
        return {
            "benchmark": "gpu",
            "environment": where,
            "settings": {"minutes": args.minutes, "repeats": args.repeats, "seed": args.seed},
            "dry": dry,
            "cases": done,
            "failed": failed,
            "not_reached": missing,
            "met": not missing and not failed and (dry or all(t["met"] for t in targets)),
        }

    for name, make in every.items():
        if name in done:
            continue
        if time.perf_counter() > deadline:
            break
        progress(name)
        try:
            done[name] = race(make(), device, args.repeats, deadline, args.seed)
        except OutOfTime:
            break
        except Exception as error:  # the cases after it are worth their minutes all the same
            failed[name] = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_json(args.out, result())
    return result()


def show(result: dict[str, Any]) -> str:
    """The tables, each with its targets beside what came out."""
    where = result["environment"]
    packages = ", ".join(f"{name} {v}" for name, v in where["versions"].items() if v)
    parts = [f"{where.get('gpu', where['cpu'])}, Python {where['python']}, {packages}"]
    if result["dry"]:
        parts.append(
            "A dry trial on the CPU with tiny sizes: its ratios mean nothing, and no target applies."
        )
    for case in result["cases"].values():
        rows = [
            (name, f"{1e3 * c['seconds']:.2f}", f"{c['ratio']:.3f}",
             "" if c["peak_mib"] is None else f"{c['peak_mib']:.0f}",
             f"{c['loss']:.5f}" if "loss" in c else "")
            for name, c in case["contenders"].items()
        ]  # fmt: skip
        head = ("", "median ms", f"over {case['over']}", "peak MiB", "mean loss")
        parts.append(f"{case['name']} ({case['rounds']} rounds)\n{table(head, rows)}")
        if case["targets"] and not result["dry"]:
            parts.append("\n".join(map(_target, case["targets"])))
        parts += case["without_graphs"]
    parts += [f"{name} failed: {error}" for name, error in result["failed"].items()]
    if result["not_reached"]:
        parts.append(f"not reached within the minutes: {'; '.join(result['not_reached'])}")
    return "\n\n".join(parts)


def _target(t: Mapping[str, Any]) -> str:
    told = "met" if t["met"] else "MISSED"
    return f"target: {t['contender']} over {t['over']} at most {t['limit']:g}: {t['ratio']:.3f}: {told}"


def minutes(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--minutes", type=minutes, default=8.0, help="no case begins after so long")
    made.add_argument("--device", default="cuda", help="cuda, or cpu for a dry trial with tiny sizes")
    made.add_argument("--out", metavar="FILE", type=Path, default=RESULTS / "gpu.json", help="JSON result")
    made.add_argument("--repeats", metavar="N", type=positive, default=11, help="timed rounds of a case")
    made.add_argument("--seed", type=int, default=0, help="of networks, images and random starts")
    made.add_argument("--resume", action="store_true", help="keep the cases that --out has")
    made.add_argument("--check", action="store_true", help="exit with status 1 when a target is missed")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
