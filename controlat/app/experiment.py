"""A problem with its data in place: what every run of it shares."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from tqdm import tqdm

from controlat import models
from controlat._util import rng
from controlat._util.parallel import World, current
from controlat._util.progress import progress_bar
from controlat._util.texts import count, duration
from controlat.app.checkpoints import load_checkpoint, load_weights
from controlat.app.notes import note
from controlat.app.placement import (
    TF32_CHOICES,
    Threads,
    default_threads,
    deterministic,
    initial_model,
    place,
)
from controlat.app.settings import AttackSettings, EvaluateSettings, Problem, from_json
from controlat.attacks.losses import cross_entropy
from controlat.control.controller import Controller
from controlat.control.cost import Meter
from controlat.data import Dataset, Samples
from controlat.data import load as load_data
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.models.frozen import graph_use
from controlat.models.frozen.view import FrozenModel
from controlat.pmp.objective import Outcome, objective
from controlat.pmp.terminal import Terminal, build_terminal
from controlat.robust_accuracy import Evaluation, Extras, protocol
from controlat.robust_accuracy.source import read_device

__all__ = ["TERMINAL_POINTS", "Experiment", "pick_device"]

TERMINAL_POINTS = 256  # held-out samples of Phi at most


def pick_device(name: str) -> torch.device:
    """The device by its name; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return read_device(name)


@dataclass(frozen=True)
class Experiment:
    """A problem with its data in place: what every run of it shares.

    Args:
        problem: what is trained on what, and how.
        device: where.
        data: the data set.
        training: samples that are trained on.
        held_out: the others of the training set, for `validation` and `phi`.
        test: samples that networks are attacked on.
        shared: whether all of `held_out` is for validation, that of Phi included, as in runs of release 0.1.
    """

    problem: Problem
    device: torch.device
    data: Dataset
    training: Samples
    held_out: Samples
    test: Samples
    shared: bool = False

    @classmethod
    def of(cls, problem: Problem, shared: bool = False) -> Experiment:
        """Load the data and hold out a slice of the training set.

        Raises:
            ValueError: there are too few samples, or data and problem do not fit.
        """
        device = pick_device(problem.device)
        data = load_data(problem.data, problem.data_dir, **problem.data_options)
        problem.ball.check(data.in_shape)
        data = data.limited(problem.train_points, problem.test_points)
        held_out = problem.held_out or max(1, min(1000, len(data.train) // 10))
        if held_out >= len(data.train):
            raise ValueError(f"held_out must be below the {len(data.train)} training samples, got {held_out}")
        training, rest = data.hold_out(held_out)
        return cls(
            problem=problem,
            device=device,
            data=data,
            training=training.to(device),
            held_out=rest.to(device),
            test=data.test.to(device),
            shared=shared,
        )

    @cached_property
    def _parts(self) -> tuple[Samples, Samples]:
        """The held-out samples for decisions during training, and those of Phi: half of them, at most 256.

        The two are disjoint, each with the class proportions of the whole, and always the same.
        """
        if self.shared:
            order = torch.randperm(len(self.held_out), generator=rng.generator(0, "terminal"))
            return self.held_out, self.held_out.subset(order[:TERMINAL_POINTS])
        n = len(self.held_out)
        if n < 2:
            raise ValueError(
                f"held_out must be at least 2, a sample to decide by in training and one for Phi, got {n}"
            )
        return replace(self.data, train=self.held_out).hold_out(min(TERMINAL_POINTS, n // 2))

    @property
    def validation(self) -> Samples:
        """Held-out samples for all that is decided during training: validation, best.pt, hooks of methods."""
        return self._parts[0]

    @property
    def phi(self) -> Samples:
        """Held-out samples of Phi, which nothing that is decided during training sees."""
        return self._parts[1]

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of samples, as results state them."""
        parts = {} if self.shared else {"validation": len(self.validation), "phi": len(self.phi)}
        sizes = {"train": len(self.training), "held_out": len(self.held_out), "test": len(self.data.test)}
        return sizes | parts

    def spec(self, controller: Controller, seed: int) -> RunSpec:
        """The roll-out of one controller under one seed."""
        p = self.problem
        return RunSpec(
            data=self.training,
            batch_size=p.batch_size,
            epochs=p.epochs,
            controller=controller,
            rate=p.rate,
            seed=seed,
            augment=p.augmentation,
            held_out=self.validation,
            world=current(),
        )

    def model(self, seed: int) -> nn.Module:
        """The network at its initial weights."""
        p = self.problem
        model = initial_model(lambda: models.build(p.model, self.data.in_shape, self.data.num_classes), seed)
        return place(model.train(), self.device, p.channels_last, self.data.in_shape)

    def threads(self, begun: int | None = None, jobs: int = 1) -> Threads:
        """CPU threads: those that are given, else those of a run that goes on, else what suits the network.

        Args:
            begun: the number that the run was begun with, None for a new one; not kept where there are
                fewer cores.
            jobs: runs that are made at a time and share the cores.
        """
        if self.problem.threads is not None:
            return Threads(self.problem.threads, "given")
        if begun is not None and begun <= (os.cpu_count() or 1):
            return Threads(begun, "as the run was begun")
        size, shape = self.problem.batch_size, self.data.in_shape
        return default_threads(self.model(0), jobs * current().size, in_shape=shape, batch_size=size)

    @contextlib.contextmanager
    def running(self, threads: Threads | None = None) -> Iterator[None]:
        """Deterministic kernels, the problem's precision and CUDA graphs, and CPU threads in the block."""
        kernels = deterministic(threads or self.threads(), TF32_CHOICES[self.problem.tf32])
        with kernels, graph_use.using(self.problem.cuda_graphs, note):
            yield

    def driver(self, seed: int) -> Driver:
        """The system at its initial state."""
        p = self.problem
        return Driver(
            model=self.model(seed),
            method=build(p.method, p.method_options),
            ball=p.ball,
            optimizer=p.sgd,
            seed=seed,
            autocast=torch.bfloat16 if p.bf16 else None,
            channels_last=p.channels_last,
        )

    def terminal(self, seed: int, name: str = "adversarial") -> Terminal:
        """Phi on its held-out samples, by its name or as a sum of names (`controlat.pmp.terminal`)."""
        return build_terminal(name, *self.phi.take(torch.arange(len(self.phi))), self.problem.ball, seed)

    def objective(
        self,
        controller: Controller,
        seed: int,
        terminal: str = "adversarial",
        progress: Callable[[], object] | None = None,
    ) -> Outcome:
        """Phi, sum n and their cost for one controller under one seed, trained in memory by this process.

        Raises:
            NonFiniteError: training diverged; the message names the step.
        """
        spec = replace(self.spec(controller, seed), world=World())
        return objective(self.driver(seed), spec, self.terminal(seed, terminal), progress=progress)

    def surrogate(self, checkpoint: str | None) -> nn.Module | None:
        """A network trained independently, for transfer attacks.

        Raises:
            ValueError: the checkpoint is damaged, or of a network for other data.
        """
        if checkpoint is None:
            return None
        saved = load_checkpoint(checkpoint, self.device)
        there = saved["settings"]
        if there.get("data") != self.problem.data:
            raise ValueError(
                f"surrogate {checkpoint} was trained on {there.get('data')}, not on {self.problem.data}"
            )
        plain = {"method": "pgd_at", "method_options": {}}  # how it was trained plays no part
        from_json(Problem, there | plain, f"surrogate {checkpoint}: settings")
        mine = self.problem.model  # which may carry an object
        name = mine if there["model"] == mine else there["model"]
        model = models.build(name, self.data.in_shape, self.data.num_classes).train()
        network = (
            f"{there['model']} for inputs {tuple(self.data.in_shape)} and {self.data.num_classes} classes"
        )
        load_weights(model, saved["model"], f"surrogate {checkpoint}", network)
        return place(model, self.device, self.problem.channels_last, self.data.in_shape)

    def evaluate(
        self, model: nn.Module, settings: EvaluateSettings | AttackSettings, seed: int, batch_size: int = 256
    ) -> Evaluation:
        """Everything that is asked for on the test set, with a progress bar."""
        extras = self._extras(settings)
        sizes = len(self.test), self.data.num_classes, settings.attacks
        if settings.autoattack:
            cost = extras.cost(*sizes)["autoattack"]
            told = self._announce(model, cost, min(settings.autoattack, len(self.test)), batch_size)
            tqdm.write(told, file=sys.stderr)
        with progress_bar(extras.samples(*sizes), " samples", settings.progress) as bar:
            return protocol(
                model,
                self.test,
                self.problem.ball,
                attacks=settings.attacks,
                extras=extras,
                batch_size=batch_size,
                seed=seed,
                progress=lambda n, name: (bar.set_description(name), bar.update(n)),
                channels_last=self.problem.channels_last,
            )

    def evaluation_cost(self, settings: EvaluateSettings) -> float:
        """What `evaluate` costs at most, in gradient evaluations; three forward passes count as one."""
        sizes = len(self.test), self.data.num_classes, settings.attacks
        parts = self._extras(settings).cost(*sizes).values()
        return sum(part.gradients + part.forwards / 3 for part in parts)

    def _extras(self, settings: EvaluateSettings | AttackSettings) -> Extras:
        """What is asked for beside the attacks."""
        surrogate = self.surrogate(settings.surrogate)
        return Extras(settings.checks, settings.autoattack, settings.sweeps, surrogate)

    def _announce(self, model: nn.Module, cost: Meter, points: int, batch_size: int) -> str:
        """What AutoAttack will cost at most, from a few timed passes of the batch that it will use."""
        x, y = self.test.take(torch.arange(min(points, batch_size)))
        calls = -(-points // batch_size) / points
        with FrozenModel(model, channels_last=self.problem.channels_last) as view:
            backward = fastest(
                lambda: view.gradient(view.prepare(x), lambda logits: cross_entropy(logits, y)).sum().item()
            )
            forward = fastest(lambda: view(x).sum().item())
        seconds = calls * (cost.gradients * backward + cost.forwards * forward)
        return (
            f"AutoAttack on {points} points: at most {count(cost.gradients)} gradient evaluations and "
            f"{count(cost.forwards)} forward passes, about {duration(seconds)} on this machine"
        )


def fastest(call: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
