"""A problem with its data in place, and one run of it: what the jobs are made of."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from controlat import models, rng
from controlat.config import AttackSettings, EvaluateSettings, Problem
from controlat.control import number
from controlat.data import Dataset, Samples
from controlat.data import load as load_data
from controlat.dynamics import Driver
from controlat.evaluation import Evaluation, Extras, protocol
from controlat.files import append_json_line, read_json, read_json_lines, write_json
from controlat.losses import cross_entropy
from controlat.methods import Batch, build
from controlat.network import Meter, View
from controlat.parallel import current
from controlat.plan import Plan
from controlat.pmp import FORMS, AdversarialLoss, Gap, Grid, Surface, measure, probe_batches
from controlat.runs import slug
from controlat.schedules import Schedule
from controlat.texts import count, duration
from controlat.training import fit, initial_model, load_checkpoint, place

__all__ = ["TERMINAL_POINTS", "Candidate", "Setting", "candidates", "pick_device"]

TERMINAL_POINTS = 256  # held-out samples of Phi in the costate form
_MAX_PROBE_BATCHES = 16


def pick_device(name: str) -> torch.device:
    """The device by its name; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); give auto or cpu") from None
    return device


@dataclass(frozen=True)
class Setting:
    """A problem with its data in place: what every run of it shares."""

    problem: Problem
    device: torch.device
    data: Dataset
    training: Samples
    held_out: Samples
    test: Samples

    @classmethod
    def of(cls, problem: Problem) -> Setting:
        """Load the data and keep a slice of the training set for validation."""
        device = pick_device(problem.device)
        data = load_data(problem.data, problem.data_dir, **problem.data_options)
        data = data.limited(problem.train_points, problem.test_points)
        held_out = problem.held_out or max(1, min(1000, len(data.train) // 10))
        if held_out >= len(data.train):
            raise ValueError(f"held_out must be below the {len(data.train)} training samples, got {held_out}")
        training, validation = data.hold_out(held_out)
        return cls(problem, device, data, training.to(device), validation.to(device), data.test.to(device))

    def plan(self, schedule: Schedule, seed: int) -> Plan:
        """The roll-out of one schedule under one seed."""
        p = self.problem
        return Plan(
            self.training,
            p.batch_size,
            p.epochs,
            schedule,
            p.rate,
            seed,
            p.augmentation,
            self.held_out,
            current(),
        )

    def model(self, seed: int) -> nn.Module:
        """The network at its initial weights."""
        p = self.problem
        model = initial_model(lambda: models.build(p.model, self.data.in_shape, self.data.num_classes), seed)
        return place(model, self.device, p.channels_last)

    def driver(self, seed: int) -> Driver:
        """The system at its initial state."""
        p = self.problem
        return Driver(
            self.model(seed),
            build(p.method, p.method_options),
            p.ball,
            p.sgd,
            seed,
            torch.bfloat16 if p.bf16 else None,
            p.channels_last,
        )

    def surrogate(self, checkpoint: str | None) -> nn.Module | None:
        """A network trained independently, for transfer attacks.

        Raises:
            ValueError: the checkpoint is damaged, or of a network for other data.
        """
        if checkpoint is None:
            return None
        found = load_checkpoint(checkpoint, self.device)
        there = found["settings"]
        if there.get("data") != self.problem.data:
            raise ValueError(
                f"surrogate {checkpoint} was trained on {there.get('data')}, not on {self.problem.data}"
            )
        model = models.build(there["model"], self.data.in_shape, self.data.num_classes)
        try:
            model.load_state_dict(found["model"])
        except RuntimeError:
            raise ValueError(
                f"surrogate {checkpoint} holds weights that do not fit {there['model']} for inputs "
                f"{tuple(self.data.in_shape)} and {self.data.num_classes} classes"
            ) from None
        return place(model, self.device, self.problem.channels_last)

    def evaluate(
        self, model: nn.Module, settings: EvaluateSettings | AttackSettings, seed: int, batch_size: int = 256
    ) -> Evaluation:
        """Everything that is asked for on the test set, with a progress bar."""
        surrogate = self.surrogate(settings.surrogate)
        extras = Extras(settings.checks, settings.autoattack, settings.sweeps, surrogate)
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
            )

    def _announce(self, model: nn.Module, cost: Meter, points: int, batch_size: int) -> str:
        """What AutoAttack will cost at most, from a few timed passes of the batch that it will use."""
        x, y = self.test.take(torch.arange(min(points, batch_size)))
        calls = -(-points // batch_size) / points
        with View(model) as view:
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
    found = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - began)
    return found


def progress_bar(total: int, unit: str, show: bool, label: str = "") -> Any:
    """A progress bar that is there while it is needed, on a terminal only."""
    disable = None if show else True
    return tqdm(total=total, unit=unit, desc=label, disable=disable, leave=False, mininterval=0.5)


@dataclass(frozen=True)
class Candidate:
    """One run of an evaluation: a schedule under a seed, in its directory."""

    setting: Setting
    settings: EvaluateSettings
    schedule: Schedule
    seed: int
    directory: Path
    grid: Grid

    def probe(self, epoch: int) -> list[Batch]:
        """The probe at one epoch: fixed training samples, in batches of the training batch size."""
        data, size = self.setting.training, self.settings.batch_size
        order = torch.randperm(len(data), generator=rng.generator(0, "probe"))[: self.settings.probe]
        count = min(max(len(order) // size, 2), _MAX_PROBE_BATCHES)
        augment = self.settings.augmentation
        return probe_batches(*data.take(order), count, epoch, order, augment)

    def measure(self, driver: Driver, plan: Plan, epoch: int) -> None:
        """Score the candidates of G at the start of an epoch; one line of criterion.jsonl."""
        began, s, u = time.perf_counter(), self.settings, plan.schedule(epoch)
        held_out = self.setting.held_out  # in the order of the data set, which may be sorted by class
        order = torch.randperm(len(held_out), generator=rng.generator(0, "terminal"))
        phi = held_out.take(order[:TERMINAL_POINTS])
        analysis = Driver(
            driver.model, driver.method, driver.ball, driver.optimizer, self.seed, None, driver.channels_last
        )
        analysis.memory, analysis.rows = driver.memory, driver.rows
        total = 1 + (len(self.grid.candidates(driver.method, u)) if s.maximiser == "sweep" else s.trials)
        with progress_bar(total, " candidates", s.progress, f"C, epoch {epoch}") as bar:
            surface = measure(
                analysis,
                self.probe(epoch),
                u,
                self.grid,
                terminal=AdversarialLoss(*phi, driver.ball, seed=self.seed),
                scale=plan.mean_rate(epoch) / plan.mean_rate() / (1 - s.momentum),
                rate=plan.mean_rate(epoch),
                maximiser=s.maximiser,
                gamma=number(s.gamma, "gamma"),
                trials=s.trials,
                progress=bar.update,
            )
        line = {"epoch": epoch, "control": dict(u), "surface": surface.to_json()}
        append_json_line(self.directory / "criterion.jsonl", line | {"seconds": time.perf_counter() - began})

    def run(self, label: str) -> dict[str, Any]:
        """Train, score and attack; what is already there is read, not made again.

        Several processes train together; the first of them scores, attacks and returns what was found.
        """
        s, file = self.settings, self.directory / "evaluation.json"
        driver, plan = self.setting.driver(self.seed), self.setting.plan(self.schedule, self.seed)
        scored = {line["epoch"] for line in read_json_lines(self.directory / "criterion.jsonl")}
        tally = fit(
            driver,
            plan,
            self.directory,
            held_out=self.setting.held_out,
            settings={"seed": self.seed, "data_dir": s.data_dir} | s.to_json(),
            at_epoch=lambda epoch: None if epoch in scored else self.measure(driver, plan, epoch),
            progress=s.progress,
            label=label,
        )
        if not plan.world.first:
            return {}
        if not file.exists():
            found = self.setting.evaluate(driver.model, s, self.seed)
            write_json(file, found.to_json())
        return {
            "seed": self.seed,
            "directory": self.directory.name,
            "epochs": read_json_lines(self.directory / "log.jsonl"),
            "criterion": self.criterion(),
            "evaluation": read_json(file),
            "gradients": tally.gradients,
            "forwards": tally.forwards,
            "seconds": tally.seconds,
        }

    def criterion(self) -> list[dict[str, Any]]:
        """The gaps of every epoch in both forms, from the stored surfaces."""
        found = []
        for line in read_json_lines(self.directory / "criterion.jsonl"):
            surface, gamma = Surface.from_json(line["surface"]), number(self.settings.gamma, "gamma")
            gaps: dict[str, Gap] = {
                form: surface.gap(self.schedule(line["epoch"]), gamma, form) for form in FORMS
            }
            found.append(
                {
                    "epoch": line["epoch"],
                    **{form: gap.to_json() for form, gap in gaps.items()},
                    "prices": [
                        {"gamma": g}
                        | {form: surface.gap(gaps[form].control, g, form).value for form in FORMS}
                        for g in (gamma / 4, 4 * gamma)
                    ],
                    "scale": surface.scale,
                    "candidates": len(surface.controls),
                    "gradients": surface.spent,
                    "seconds": line["seconds"],
                }
            )
        return found


def candidates(setting: Setting, settings: EvaluateSettings, out: Path) -> Iterator[Candidate]:
    """Every run of an evaluation: schedules in turn, each under all seeds, searched over one common grid."""
    schedules = [settings.schedule_of(text) for text in settings.schedules]
    every = [s(p * s.resolution) for s in schedules for p in range(s.pieces)]
    largest = max(int(u.get("steps", 1)) for u in every)
    eps, steps = settings.ball.eps, settings.max_steps or max(largest, 1)
    grid = Grid.default(eps, steps) if settings.alphas is None else Grid(tuple(settings.alphas), steps)  # type: ignore[arg-type]
    for number_, (text, schedule) in enumerate(zip(settings.schedules, schedules, strict=True), start=1):
        for seed in settings.seeds:
            directory = out / "runs" / f"{number_:02d}-{slug(text)}-seed{seed}"
            yield Candidate(setting, settings, schedule, seed, directory, grid)
