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
from controlat._util.kernels import OneChannelWeight, one_channel_weights
from controlat.models.frozen.layout import channels_last
from controlat.models.frozen.view import CHUNK

EPS, ALPHA = 0.3, 0.01
ORACLE, OURS, BARE = "torchattacks", "controlat", "the same steps alone"
TARGETS = {
    "lenet": {"ratio": 0.65, "bookkeeping": 0.05, "loss_difference": 1e-3},
    "mlp": {"ratio": 1.0, "loss_difference": 1e-3},
}
CASES = ("lenet:256:10", "lenet:256:40", "lenet:64:1", "lenet:64:10", "mlp:64:1", "mlp:64:10")
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


def bare(model: nn.Module) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The arithmetic of `controlat.pgd` on a network that was copied, frozen and laid out beforehand.

    What `controlat.pgd` takes longer than this is its bookkeeping: checks, the frozen view, chunks.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)
    images = any(p.dim() == 4 for p in model.parameters())
    layout: Callable[[Tensor], Tensor] = channels_last if images else lambda t: t
    one_channel = one_channel_weights(frozen.modules()) if images else set()
    for module in frozen.modules():
        for name, p in module._parameters.items():
            if p is not None:
                weight = nn.Parameter(layout(p.detach()), requires_grad=False)
                weight = weight.as_subclass(OneChannelWeight) if id(p) in one_channel else weight  # type: ignore[assignment]
                module._parameters[name] = weight

    def run(x: Tensor, y: Tensor, steps: int) -> Tensor:
        start, result = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp_(0, 1), torch.empty_like(x)
        size = CHUNK if images else len(x)
        for i in range(0, len(x), size):
            part = slice(i, i + size)
            x0, adv = layout(x[part]), layout(start[part])
            for _ in range(steps):
                adv = adv.detach().requires_grad_()
                loss = F.cross_entropy(frozen(adv), y[part], reduction="sum")
                (gradient,) = torch.autograd.grad(loss, adv)
                moved = adv.detach() + ALPHA * gradient.sign()
                adv = (x0 + (moved - x0).clamp(-EPS, EPS)).clamp_(0, 1)
            result[part] = adv
        return result

    return run


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
    alone = bare(model)
    wrong = foolbox.criteria.Misclassification(y)
    return {
        ORACLE: lambda: attack(x, y),
        "foolbox": lambda: linf.run(wrapped, x, wrong, epsilon=EPS),
        "plain loop": lambda: plain(model, x, y, steps),
        "torchattacks, user's channels_last": lambda: attack_other(x_other, y),
        BARE: lambda: alone(x, y, steps),
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
    machine meets all of them. With one thread seconds are those that the processor worked for this process.
    """
    names, clock = list(calls), time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    timed: dict[str, Timed] = {}
    for r in range(repeats + 1):
        progress(f"{label}: {'warm-up' if r == 0 else f'round {r} of {repeats}'}")
        for name in names[r % len(names) :] + names[: r % len(names)]:
            torch.manual_seed(seed)
            faulted, began = faults(), clock()
            adv = calls[name]()
            took = clock() - began
            if r == 0:
                timed[name] = Timed(adv, [], [])
            else:
                timed[name].seconds.append(took)
                timed[name].faults.append(faults() - faulted)
    return timed


def judge(model: nn.Module, y: Tensor, timed: Mapping[str, Timed]) -> dict[str, dict[str, Any]]:
    """One row per contender: time, and whether it found the adversarial batch that torchattacks found."""

    def loss(adv: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(adv.contiguous()), y))

    oracle, alone = timed[ORACLE], timed[BARE]
    best, base = min(oracle.seconds), loss(oracle.adv)
    rows: dict[str, dict[str, Any]] = {}
    for name, (adv, seconds, faulted) in timed.items():
        paired = [a / b for a, b in zip(seconds, oracle.seconds, strict=True)]
        value = loss(adv)
        rows[name] = {
            "seconds": min(seconds),
            "ratio": min(seconds) / best,
            "median_ratio": statistics.median(paired),
            "bookkeeping": statistics.median(a / b for a, b in zip(seconds, alone.seconds, strict=True)) - 1,
            "page_faults": statistics.median(faulted),
            "loss": value,
            "loss_difference": abs(value - base) / base,
            "equal_pixels": float(((adv - oracle.adv).abs() <= CLOSE).float().mean()),
            "all_seconds": seconds,
        }
    return rows


def one(problem: Problem, batch: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders with one batch size and number of steps; short calls are repeated more often."""
    if batch > len(problem.data.test):
        raise ValueError(f"batches must be at most {len(problem.data.test)}, got {batch}")
    x, y = problem.data.test.take(torch.arange(batch))
    name, calls = problem.record["model"], contenders(problem.model, x, y, steps)
    repeats = args.repeats * max(1, 2560 // (batch * steps)) if name == "lenet" else args.repeats * 20
    rows = judge(problem.model, y, race(calls, repeats, args.seed, f"{name}, batch {batch}, PGD-{steps}"))
    met = all(rows[OURS][key] <= limit for key, limit in TARGETS[name].items())
    return {
        "model": name,
        "batch": batch,
        "steps": steps,
        "repeats": repeats,
        "target": TARGETS[name],
        "contenders": rows,
        "met": met,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    progress("fitting the networks")
    problems = {name: fitted(args, name) for name in dict.fromkeys(name for name, _, _ in args.cases)}
    runs = [one(problems[name], batch, steps, args) for name, batch, steps in args.cases]
    return {
        "benchmark": "pgd",
        "environment": environment(),
        "problems": {name: problem.record for name, problem in problems.items()},
        "settings": {"eps": EPS, "alpha": ALPHA},
        "runs": runs,
        "met": all(run["met"] for run in runs),
    }


def show(result: dict[str, Any]) -> str:
    """The tables, each with the target beside what came out."""
    parts = [heading(result | {"problem": problem}) for problem in result["problems"].values()]
    head = ("", "seconds", "ratio", "median ratio", "over the steps", "page faults", "mean loss", "equal")
    for run in result["runs"]:
        rows = [
            (name, f"{r['seconds']:.5f}", f"{r['ratio']:.3f}", f"{r['median_ratio']:.3f}",
             f"{r['bookkeeping']:+.1%}", f"{r['page_faults']:,.0f}", f"{r['loss']:.5f}",
             f"{r['equal_pixels']:.3%}")
            for name, r in run["contenders"].items()
        ]  # fmt: skip
        title = f"{run['model']}, batch {run['batch']}, PGD-{run['steps']}, {run['repeats']} rounds"
        ours = run["contenders"][OURS]
        figures = ", ".join(
            f"{key} {ours[key]:.3g} (at most {limit:g})" for key, limit in run["target"].items()
        )
        parts.append(f"{title}\n{table(head, rows)}\n{OURS}: {figures}: {'met' if run['met'] else 'MISSED'}")
    return "\n\n".join(parts)


def case(text: str) -> tuple[str, int, int]:
    """A case MODEL:BATCH:K, for argparse."""
    name, *numbers = text.split(":")
    if name not in TARGETS or len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"must be MODEL:BATCH:K with {' or '.join(TARGETS)}, got {text!r}")
    batch, steps = map(positive, numbers)
    return name, batch, steps


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__, "pgd.json", repeats=15)
    made.add_argument(
        "--cases", metavar="MODEL:BATCH:K", type=case, nargs="+", default=[case(c) for c in CASES],
        help="network, images attacked at once, PGD steps",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
