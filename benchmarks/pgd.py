"""Time one PGD call of torchattacks, foolbox, a plain loop and controlat, side by side in one process."""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _common import Problem, environment, fitted, heading, main, parser, positive, progress, table
from torch import Tensor, nn

from controlat import pgd

EPS, ALPHA = 0.3, 0.01
ORACLE, OURS = "torchattacks", "controlat"
TARGET = {"ratio": 0.65, "loss_difference": 1e-3}
CLOSE = 1e-6  # pixels nearer than this count as equal
Contender = Callable[[], Tensor]


def plain(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, eps: float = EPS, alpha: float = ALPHA
) -> Tensor:
    """PGD as one writes it by hand, with the gradient taken with respect to the input only."""
    adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + alpha * gradient.sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1)
    return adv


def contenders(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Contender]:
    """The calls to time, by name; torchattacks is the one that the others are held against.

    Raises:
        ValueError: an oracle is not installed.
    """
    try:
        import foolbox
        import torchattacks
        from foolbox.models.pytorch import PyTorchModel
    except ImportError as error:
        cure = "install the test extra: pip install -c constraints.txt -e '.[test]'"
        raise ValueError(f"{error.name or error} is not installed; {cure}") from None
    step: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": steps}
    other: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_other = x.to(memory_format=torch.channels_last)
    attack, attack_other = torchattacks.PGD(model, **step), torchattacks.PGD(other, **step)
    linf = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps, random_start=True)
    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    wrong = foolbox.criteria.Misclassification(y)
    return {
        ORACLE: lambda: attack(x, y),
        "foolbox": lambda: linf.run(wrapped, x, wrong, epsilon=EPS),
        "plain loop": lambda: plain(model, x, y, steps),
        "torchattacks, user's channels_last": lambda: attack_other(x_other, y),
        "controlat, channels_last=False": lambda: pgd(model, x, y, channels_last=False, **step),
        OURS: lambda: pgd(model, x, y, **step),
    }


class Timed(NamedTuple):
    """What one contender returned, and its seconds and page faults in every round."""

    adv: Tensor
    seconds: list[float]
    faults: list[int]


def faults() -> int:
    """Page faults of this process so far: memory that was given back to the system and asked for again."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def race(calls: Mapping[str, Contender], repeats: int, seed: int, label: str) -> dict[str, Timed]:
    """Time every call in every round, after an untimed one.

    Each round runs all contenders, starting with another one each time, so that a slow spell of the
    machine meets all of them.
    """
    names = list(calls)
    found: dict[str, Timed] = {}
    for r in range(repeats + 1):
        progress(f"{label}: {'warm-up' if r == 0 else f'round {r} of {repeats}'}")
        for name in names[r % len(names) :] + names[: r % len(names)]:
            torch.manual_seed(seed)
            faulted, began = faults(), time.perf_counter()
            adv = calls[name]()
            took = time.perf_counter() - began
            if r == 0:
                found[name] = Timed(adv, [], [])
            else:
                found[name].seconds.append(took)
                found[name].faults.append(faults() - faulted)
    return found


def judge(model: nn.Module, y: Tensor, timed: Mapping[str, Timed]) -> dict[str, dict[str, Any]]:
    """One row per contender: time, and whether it found the adversarial batch that torchattacks found."""

    def loss(adv: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(adv.contiguous()), y))

    oracle = timed[ORACLE]
    best, base = min(oracle.seconds), loss(oracle.adv)
    rows: dict[str, dict[str, Any]] = {}
    for name, (adv, seconds, faulted) in timed.items():
        paired = [a / b for a, b in zip(seconds, oracle.seconds, strict=True)]
        value = loss(adv)
        rows[name] = {
            "seconds": min(seconds),
            "ratio": min(seconds) / best,
            "median_ratio": statistics.median(paired),
            "page_faults": statistics.median(faulted),
            "loss": value,
            "loss_difference": abs(value - base) / base,
            "equal_pixels": float(((adv - oracle.adv).abs() <= CLOSE).float().mean()),
            "all_seconds": seconds,
        }
    return rows


def one(problem: Problem, x: Tensor, y: Tensor, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders with one number of steps."""
    calls = contenders(problem.model, x, y, steps)
    rows = judge(problem.model, y, race(calls, args.repeats, args.seed, f"PGD-{steps}"))
    met = all(rows[OURS][key] <= limit for key, limit in TARGET.items())
    return {"steps": steps, "contenders": rows, "met": met}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    progress("fitting the network")
    problem = fitted(args)
    if args.batch > len(problem.data.test):
        raise ValueError(f"--batch must be at most {len(problem.data.test)}, got {args.batch}")
    x, y = problem.data.test.take(torch.arange(args.batch))
    runs = [one(problem, x, y, steps, args) for steps in args.steps]
    return {
        "benchmark": "pgd",
        "environment": environment(),
        "problem": problem.record,
        "settings": {"batch": args.batch, "eps": EPS, "alpha": ALPHA, "repeats": args.repeats},
        "target": TARGET,
        "runs": runs,
        "met": all(run["met"] for run in runs),
    }


def show(found: dict[str, Any]) -> str:
    """The tables, each with the target beside what came out."""
    settings = found["settings"]
    parts = [f"{heading(found)}\nbatch {settings['batch']}, minimum of {settings['repeats']} rounds"]
    head = ("", "seconds", "ratio", "median ratio", "page faults", "mean loss", f"equal within {CLOSE:g}")
    for run in found["runs"]:
        rows = [
            (name, f"{r['seconds']:.4f}", f"{r['ratio']:.3f}", f"{r['median_ratio']:.3f}",
             f"{r['page_faults']:,.0f}", f"{r['loss']:.5f}", f"{r['equal_pixels']:.3%}")
            for name, r in run["contenders"].items()
        ]  # fmt: skip
        ours = run["contenders"][OURS]
        parts.append(f"PGD-{run['steps']}\n{table(head, rows)}")
        parts.append(
            f"target: ratio at most {TARGET['ratio']}, loss equal to {TARGET['loss_difference']:g}; "
            f"{OURS}: {ours['ratio']:.3f}, {ours['loss_difference']:.1e}: {'met' if run['met'] else 'MISSED'}"
        )
    return "\n\n".join(parts)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "pgd.json", repeats=15)
    made.add_argument("--batch", metavar="N", type=positive, default=256, help="images attacked at once")
    made.add_argument("--steps", metavar="K", type=positive, nargs="+", default=[10, 40], help="PGD steps")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
