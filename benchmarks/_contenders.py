"""What gpu.py times: attacks, training steps, epochs and analyses of controlat beside plain torch loops."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchattacks
from _common import CLASSES
from pgd import plain
from torch import Tensor, nn

from controlat import pgd
from controlat._util import rng
from controlat.app.placement import deterministic, initial_model, place
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.space import Control
from controlat.data import Split, parse_augment
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import GIBI, Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch
from controlat.methods import build as build_method
from controlat.models import build as build_model
from controlat.models.frozen import graph_use
from controlat.pmp import AdversarialLoss, backward, probe_batches, score
from controlat.pmp.candidates import Candidates

RATE, PADDING = 0.01, 4
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
BASE, LOOP, OURS = "torchattacks", "plain loop", "controlat"
BARE = f"{OURS}, no graphs"
Call = Callable[[], Any]


class Target(NamedTuple):
    """The largest ratio of the seconds of one contender to those of another."""

    contender: str
    over: str
    limit: float


class Problem(NamedTuple):
    """What is attacked, and how."""

    network: str
    shape: tuple[int, int, int]
    batch: int
    eps: float
    alpha: float
    steps: int

    @property
    def ball(self) -> Ball:
        return Ball(self.eps)

    @property
    def control(self) -> Control:
        return Control(alpha=self.alpha, steps=self.steps)

    @property
    def optimizer(self) -> SGDSettings:
        return SGDSettings(momentum=0.9, weight_decay=5e-4)

    def model(self, device: torch.device, seed: int) -> nn.Module:
        """The network at its initial weights, as torch builds it."""
        return initial_model(lambda: build_model(self.network, self.shape, CLASSES), seed).to(device)

    def images(self, n: int, device: torch.device, seed: int) -> Split:
        """Random pixels and labels: what is on them plays no part in the time."""
        generator = rng.generator(seed, "images")
        x = torch.randint(256, (n, *self.shape), dtype=torch.uint8, generator=generator)
        return Split(x, torch.randint(CLASSES, (n,), generator=generator), 255.0).to(device)


@dataclass(frozen=True)
class Case:
    """Contenders that are timed in turn.

    Args:
        name: what they do.
        over: the contender that ratios are over.
        calls: makes the contenders, when their turn comes.
        targets: the ratios that are aimed at.
        loss: of what a contender returned, to see whether all do the same; None where that says nothing.
        settings: of the problem, for the record.
        notes: why something ran without CUDA graphs; filled in the course of the calls.
    """

    name: str
    over: str
    calls: Callable[[], dict[str, Call]]
    targets: tuple[Target, ...] = ()
    loss: Callable[[Any], float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)


def mixed(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision, where there is any."""
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def as_named(name: str, notes: set[str]) -> Iterator[None]:
    """Kernels and CUDA graphs as the name of a contender says; why there are no graphs is noted.

    Kernels are deterministic, as in every run, unless the name says otherwise.
    """
    kernels = contextlib.nullcontext() if "not deterministic" in name else deterministic()
    with kernels, graph_use.using("off" if "no graphs" in name else "auto", notes.add):
        yield


def no_slower(precisions: tuple[str, ...], names: tuple[str, ...] = (OURS,)) -> tuple[Target, ...]:
    """Nothing is slower than the plain loop of the same precision."""
    return tuple(Target(f"{n}, {p}", f"{LOOP}, {p}", 1.0) for p in precisions for n in names)


def attack_case(
    problem: Problem, device: torch.device, seed: int, targets: tuple[Target, ...] = (), both: bool = True
) -> Case:
    """One PGD call, in eval mode."""
    precisions = tuple(PRECISIONS) if both else ("float32",)
    x, y = problem.images(problem.batch, device, seed).take(torch.arange(problem.batch, device=device))
    model = problem.model(device, seed).eval()
    how: dict[str, Any] = {"eps": problem.eps, "alpha": problem.alpha, "steps": problem.steps}

    notes: set[str] = set()

    def ours(name: str) -> Tensor:
        with graph_use.using("off" if name == BARE else "auto", notes.add):
            return pgd(model, x, y, **how)

    def run(call: Call, precision: str) -> Any:
        with mixed(device, precision):
            return call()

    def calls() -> dict[str, Call]:
        library = torchattacks.PGD(model, **how)
        attacks: dict[str, Call] = {BASE: lambda: library(x, y), LOOP: lambda: plain(model, x, y, **how)}
        for name in (OURS, BARE):
            attacks[name] = partial(ours, name)
        return {_label(name, p): partial(run, call, p) for p in precisions for name, call in attacks.items()}

    def loss(x_adv: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(x_adv.contiguous()), y))

    name = f"PGD-{problem.steps} call, {problem.network}, batch {problem.batch}"
    targets = (*targets, *no_slower(precisions))
    return Case(name, f"{BASE}, float32", calls, targets, loss, problem._asdict(), notes)


class TorchLoop:
    """Adversarial training as one writes it with torchattacks."""

    def __init__(self, problem: Problem, device: torch.device, seed: int, precision: str) -> None:
        self.problem, self.device, self.precision = problem, device, precision
        self.model = problem.model(device, seed).train()
        how = {"eps": problem.eps, "alpha": problem.alpha, "steps": problem.steps}
        self.attack = torchattacks.PGD(self.model, **how)
        sgd = problem.optimizer
        self.sgd = torch.optim.SGD(
            self.model.parameters(), lr=RATE, momentum=sgd.momentum, weight_decay=sgd.weight_decay
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        """One outer step; the loss is not looked at."""
        with mixed(self.device, self.precision):
            x_adv = self.attack(x, y)
            self.sgd.zero_grad()
            loss = F.cross_entropy(self.model(x_adv), y)
        loss.backward()
        self.sgd.step()

    def epoch(self, data: Split) -> None:
        """One pass over images on the device, cropped and flipped there."""
        for index in torch.randperm(len(data), device=self.device).split(self.problem.batch):
            self.step(cropped(data.x[index]).float() / data.scale, data.y[index])


def cropped(x: Tensor) -> Tensor:
    """Random crops of padded images, mirrored at random, without a loop over images."""
    n, _, height, width = x.shape
    padded = F.pad(x, [PADDING] * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), device=x.device)
    columns = left + torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    rows = top + torch.arange(height, device=x.device)
    first = torch.arange(n, device=x.device)[:, None, None]
    return padded[first, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def trained(problem: Problem, device: torch.device, seed: int, precision: str) -> Driver:
    """The system that controlat trains, placed as its trainer places it."""
    return Driver(
        model=place(problem.model(device, seed).train(), device, in_shape=problem.shape),
        method=build_method("pgd_at"),
        ball=problem.ball,
        optimizer=problem.optimizer,
        seed=seed,
        autocast=PRECISIONS[precision],
    )


SYSTEMS = (OURS, BARE, f"{OURS}, not deterministic")  # what one driver each is made for


def step_case(problem: Problem, device: torch.device, seed: int, targets: tuple[Target, ...] = ()) -> Case:
    """One outer step of PGD training."""
    x, y = problem.images(problem.batch, device, seed).take(torch.arange(problem.batch, device=device))
    notes: set[str] = set()

    def calls() -> dict[str, Call]:
        made: dict[str, Call] = {}
        for p in PRECISIONS:
            made[f"{LOOP}, {p}"] = _torch_step(TorchLoop(problem, device, seed, p), x, y)
            for name in SYSTEMS:
                driver = trained(problem, device, seed, p)
                made[_label(name, p)] = _our_step(driver, name, problem.control, x, y, notes)
        return made

    name = f"PGD-{problem.steps} training step, {problem.network}, batch {problem.batch}"
    return Case(
        name,
        f"{LOOP}, float32",
        calls,
        (*targets, *no_slower(tuple(PRECISIONS))),
        settings=problem._asdict(),
        notes=notes,
    )


def _label(name: str, precision: str) -> str:
    """`controlat, bf16` and `controlat, bf16, no graphs` from the parts."""
    first, *rest = name.split(", ")
    return ", ".join([first, precision, *rest])


def _torch_step(loop: TorchLoop, x: Tensor, y: Tensor) -> Call:
    return lambda: loop.step(x, y)


def _our_step(driver: Driver, name: str, u: Control, x: Tensor, y: Tensor, notes: set[str]) -> Call:
    numbers, indices = itertools.count(), torch.arange(len(x), device=x.device)

    def call() -> None:
        with as_named(name, notes):
            driver.step(Batch(x=x, y=y, indices=indices, epoch=0, number=next(numbers)), u, RATE)

    return call


def specification(problem: Problem, data: Split, seed: int, epochs: int) -> RunSpec:
    """A run under a constant schedule, augmented where images are in colour."""
    return RunSpec(
        data=data,
        batch_size=problem.batch,
        epochs=epochs,
        controller=parse_schedule(f"pgd:steps={problem.steps},alpha={problem.alpha!r}", epochs),
        rate=parse_rate(RATE),
        seed=seed,
        augment=parse_augment(f"crop-flip:pad={PADDING}"),
    )


def epoch_case(
    problem: Problem, images: int, device: torch.device, seed: int, targets: tuple[Target, ...] = ()
) -> Case:
    """One epoch of PGD training with images on the device, cropped and flipped."""
    data, most, notes = problem.images(images, device, seed), 10_000, set[str]()

    def ours(driver: Driver, name: str, spec: RunSpec, epochs: itertools.count[int]) -> None:
        e = next(epochs)
        with as_named(name, notes):
            for _ in rollout(driver, spec, epoch=e, until=e + 1):
                pass

    def calls() -> dict[str, Call]:
        spec = specification(problem, data, seed, most)
        made: dict[str, Call] = {}
        for p in PRECISIONS:
            loop = TorchLoop(problem, device, seed, p)
            made[f"{LOOP}, {p}"] = partial(loop.epoch, data)
            for name in SYSTEMS:
                driver = trained(problem, device, seed, p)
                made[_label(name, p)] = partial(ours, driver, name, spec, itertools.count())
        return made

    name = f"PGD-{problem.steps} epoch of {images} images, {problem.network}, batch {problem.batch}"
    return Case(
        name,
        f"{LOOP}, float32",
        calls,
        (*targets, *no_slower(tuple(PRECISIONS))),
        settings=problem._asdict() | {"images": images},
        notes=notes,
    )


def criterion_case(problem: Problem, probe: int, alphas: int, device: torch.device, seed: int) -> Case:
    """The surface of the greedy criterion at one instant, in training steps."""
    notes: set[str] = set()

    def calls() -> dict[str, Call]:
        data = problem.images(probe, device, seed)
        x, y = data.take(torch.arange(probe, device=device))
        driver = trained(problem, device, seed, "float32")
        candidates = Candidates.default(problem.eps, problem.steps, alphas)
        batches = probe_batches(x, y, max(2, probe // problem.batch))
        half = len(x) // 2
        phi = AdversarialLoss(x[:half], y[:half], problem.ball, steps=10)

        def surface() -> None:
            with as_named(OURS, notes):
                score(driver, batches, problem.control, candidates, terminal=phi)

        part = slice(0, problem.batch)
        training = trained(problem, device, seed, "float32")
        return {
            "training step": _our_step(training, OURS, problem.control, x[part], y[part], notes),
            "surface of the criterion": surface,
        }

    name = f"criterion, {alphas} step sizes, K to {problem.steps}, {probe} images, {problem.network}"
    return Case(
        name,
        "training step",
        calls,
        settings=problem._asdict() | {"probe": probe, "alphas": alphas},
        notes=notes,
    )


def costate_case(problem: Problem, steps: int, device: torch.device, seed: int) -> Case:
    """A whole run: trained, recorded, and recorded and swept back to its beginning."""
    data = problem.images(steps * problem.batch, device, seed)
    x, y = data.take(torch.arange(min(256, len(data)), device=device))
    notes: set[str] = set()

    def run(kind: str) -> None:
        driver = trained(problem, device, seed, "float32")
        spec = specification(problem, data, seed, 1)
        with as_named(OURS, notes):
            if kind == "training":
                for _ in rollout(driver, spec):
                    pass
                return
            recording = Recording.of(driver, spec, limit=8 * GIBI)
            if kind == "recorded and swept":
                for _ in backward(recording, AdversarialLoss(x, y, problem.ball, steps=10)):
                    pass

    def calls() -> dict[str, Call]:
        return {kind: partial(run, kind) for kind in ("training", "recorded", "recorded and swept")}

    name = f"costates of {steps} PGD-{problem.steps} steps, {problem.network}, batch {problem.batch}"
    return Case(name, "training", calls, settings=problem._asdict() | {"updates": steps}, notes=notes)
