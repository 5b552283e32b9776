"""The jobs as Python calls: train under a schedule, evaluate candidate schedules, attack a checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from controlat import models, report, rng
from controlat.config import AttackSettings, EvaluateSettings, Problem, TrainSettings, from_json
from controlat.control import number
from controlat.data import Dataset, Split
from controlat.data import load as load_data
from controlat.dynamics import Driver, Plan
from controlat.evaluation import parse_attack, robustness
from controlat.files import append_json_line, read_json, read_json_lines, write_json
from controlat.methods import Batch, build
from controlat.network import Meter
from controlat.pmp import FORMS, AdversarialLoss, Gap, Grid, Surface, measure, probe_batches
from controlat.runs import claimed, environment, slug
from controlat.schedules import Schedule
from controlat.training import deterministic, fit, initial_model, load_checkpoint, place

__all__ = ["attack", "estimate", "evaluate", "train"]

_TERMINAL_POINTS = 256  # held-out samples of Phi in the costate form
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
    training: Split
    held_out: Split

    @classmethod
    def of(cls, problem: Problem) -> Setting:
        """Load the data and keep a slice of the training set for validation."""
        device = pick_device(problem.device)
        data = load_data(problem.data, problem.data_dir).limited(problem.train_points, problem.test_points)
        held_out = problem.held_out or max(1, min(1000, len(data.train) // 10))
        if held_out >= len(data.train):
            raise ValueError(f"held_out must be below the {len(data.train)} training samples, got {held_out}")
        training, validation = data.hold_out(held_out)
        return cls(problem, device, data, training.to(device), validation.to(device))

    def plan(self, schedule: Schedule, seed: int) -> Plan:
        """The roll-out of one schedule under one seed."""
        p = self.problem
        return Plan(self.training, p.batch_size, p.epochs, schedule, p.rate, seed)

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


# ---- train


def train(out: str | Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Train one network under one schedule: `controlat train`.

    Args:
        out: the run directory. It gets settings.json, schedule.json, log.jsonl, last.pt, best.pt.
        resume: go on with an interrupted run of the same settings.
        **settings: the fields of `controlat.config.TrainSettings`.

    Returns:
        ``{"directory", "epochs": [one record per epoch], "gradients", "seconds", "finished_before"}``.

    Raises:
        ValueError: bad settings, or a directory that holds another run.
        NonFiniteError: training diverged.

    >>> import tempfile
    >>> few = {"epochs": 1, "train_points": 200, "progress": False}
    >>> found = train(tempfile.mkdtemp(), schedule="fgsm:alpha=0.15", **few)
    >>> found["gradients"] == 2 * 180
    True
    """
    chosen = TrainSettings(**settings)
    schedule, plain = chosen.schedule_of(chosen.schedule), {"command": "train"} | chosen.to_json()
    with claimed(out, plain) as known, deterministic(chosen.threads):
        done = read_json_lines(Path(out) / "log.jsonl")
        if known and len(done) < chosen.epochs and not resume:
            raise ValueError(
                f"{out} holds an unfinished run of these settings; go on with --resume (resume=True)"
            )
        setting = Setting.of(chosen)
        driver = setting.driver(chosen.seed)
        tally = fit(
            driver,
            setting.plan(schedule, chosen.seed),
            out,
            held_out=setting.held_out,
            settings=plain | {"data_dir": chosen.data_dir},
            checkpoint_minutes=chosen.checkpoint_minutes,
            tensorboard=chosen.tensorboard,
            progress=chosen.progress,
            label=chosen.schedule,
        )
        records = read_json_lines(Path(out) / "log.jsonl")
    return {
        "directory": str(out),
        "epochs": records,
        "gradients": tally.gradients,
        "seconds": tally.seconds,
        "finished_before": known and len(done) == chosen.epochs,
    }


# ---- evaluate


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
        return probe_batches(*data.take(order), count, epoch)

    def measure(self, driver: Driver, plan: Plan, epoch: int) -> None:
        """Score the candidates of G at the start of an epoch; one line of criterion.jsonl."""
        file = self.directory / "criterion.jsonl"
        if any(line["epoch"] == epoch for line in read_json_lines(file)):
            return
        began, s, u = time.perf_counter(), self.settings, plan.schedule(epoch)
        phi = self.setting.held_out.take(torch.arange(min(_TERMINAL_POINTS, len(self.setting.held_out))))
        analysis = Driver(
            driver.model, driver.method, driver.ball, driver.optimizer, self.seed, None, driver.channels_last
        )
        analysis.memory = driver.memory
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
        )
        line = {"epoch": epoch, "control": dict(u), "surface": surface.to_json()}
        append_json_line(file, line | {"seconds": time.perf_counter() - began})

    def run(self, label: str) -> dict[str, Any]:
        """Train, score and attack; what is already there is read, not made again."""
        s, file = self.settings, self.directory / "evaluation.json"
        driver, plan = self.setting.driver(self.seed), self.setting.plan(self.schedule, self.seed)
        tally = fit(
            driver,
            plan,
            self.directory,
            held_out=self.setting.held_out,
            settings={"seed": self.seed, "data_dir": s.data_dir} | s.to_json(),
            at_epoch=lambda epoch: self.measure(driver, plan, epoch),
            progress=s.progress,
            label=label,
        )
        if not file.exists():
            test, plain = self.setting.data.test, {"attacks": s.attacks, "seed": self.seed}
            found = robustness(
                driver.model,
                *test.take(torch.arange(len(test))),
                eps=driver.ball.eps,
                norm=s.norm,
                device=self.setting.device,
                **plain,  # type: ignore[arg-type]
            )
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
                    "scale": surface.scale,
                    "candidates": len(surface.controls),
                    "gradients": surface.spent,
                    "seconds": line["seconds"],
                }
            )
        return found


def _candidates(setting: Setting, settings: EvaluateSettings, out: Path) -> Iterator[Candidate]:
    schedules = [settings.schedule_of(text) for text in settings.schedules]
    largest = max(int(s(p * s.resolution)["steps"]) for s in schedules for p in range(s.pieces))
    eps, steps = settings.ball.eps, max(largest, 1)
    grid = Grid.default(eps, steps) if settings.alphas is None else Grid(tuple(settings.alphas), steps)  # type: ignore[arg-type]
    for number_, (text, schedule) in enumerate(zip(settings.schedules, schedules, strict=True), start=1):
        for seed in settings.seeds:
            directory = out / "runs" / f"{number_:02d}-{slug(text)}-seed{seed}"
            yield Candidate(setting, settings, schedule, seed, directory, grid)


def evaluate(out: str | Path, **settings: Any) -> dict[str, Any]:
    """Train under each schedule and seed, and compare them: `controlat evaluate`.

    Called again with the same settings it goes on where it was stopped, or returns what is finished.

    Args:
        out: directory for result.json, summary.md, figures and one run directory per schedule and seed.
        **settings: the fields of `controlat.config.EvaluateSettings`.

    Returns:
        The content of result.json.

    Raises:
        ValueError: bad settings, or a directory that holds something else.
        NonFiniteError: a training diverged.
    """
    chosen, out = EvaluateSettings(**settings), Path(out)
    with claimed(out, {"command": "evaluate"} | chosen.to_json()), deterministic(chosen.threads):
        if not (out / "result.json").exists():
            setting = Setting.of(chosen)
            runs: dict[int, list[dict[str, Any]]] = {}
            every = list(_candidates(setting, chosen, out))
            for i, candidate in enumerate(every):
                which, label = i // len(chosen.seeds), f"[{i + 1}/{len(every)}] {candidate.schedule.text}"
                found = candidate.run(f"{label}, seed {candidate.seed}")
                runs.setdefault(which, []).append(found)
                if chosen.progress:
                    left = found["evaluation"]["robust"]["value"]
                    tqdm.write(f"{label}, seed {candidate.seed}: robust {left:.1%}", file=sys.stderr)
            schedules = [
                {"text": text, "schedule": chosen.schedule_of(text).to_json(), "runs": runs[i]}
                for i, text in enumerate(chosen.schedules)
            ]
            result = report.assemble(
                settings=chosen.to_json(),
                environment=environment(setting.device),
                sizes={
                    "train": len(setting.training),
                    "held_out": len(setting.held_out),
                    "test": len(setting.data.test),
                },
                grid={"alphas": list(every[0].grid.alphas), "max_steps": every[0].grid.max_steps},
                schedules=schedules,
            )
            write_json(out / "result.json", result)
        result = read_json(out / "result.json")
        report.write(result, out)
    return dict(result)


def estimate(**settings: Any) -> dict[str, Any]:
    """What `evaluate` would cost: gradient evaluations by part, and seconds from a few timed steps.

    The evaluation's count is an upper bound: survivors alone are attacked again.

    Returns:
        ``{"gradients": {"training", "validation", "criterion", "evaluation", "total"}, "seconds"}``.
    """
    chosen = EvaluateSettings(**settings)
    setting = Setting.of(chosen)
    every = list(_candidates(setting, chosen, Path("unused")))
    method = build(chosen.method, chosen.method_options)
    count = dict.fromkeys(("training", "validation", "criterion", "evaluation"), 0.0)
    phi = min(_TERMINAL_POINTS, len(setting.held_out))
    for c in every:
        plan = setting.plan(c.schedule, c.seed)
        for epoch in range(chosen.epochs):
            u = [c.schedule(epoch + b / plan.batches_per_epoch) for b in range(plan.batches_per_epoch)]
            count["training"] += sum(map(method.controls.cost, u)) * len(setting.training) / len(u)
            now, k = method.controls.cost(u[0]), c.grid.max_steps
            grid = len(c.grid.alphas) * 2 * k + 1
            tried = grid if chosen.maximiser == "sweep" else chosen.trials * (k / 2 + 1)
            count["criterion"] += (tried + now) * min(chosen.probe, len(setting.training)) + 21 * phi
        count["validation"] += 10 * chosen.epochs * len(setting.held_out)
        attacks = sum(parse_attack(a).cost() for a in chosen.attacks)
        count["evaluation"] += attacks * len(setting.data.test)
    with deterministic(chosen.threads):
        seconds = _seconds_per_evaluation(setting, every[0])
    total = sum(count.values())
    gradients = {k: round(v) for k, v in count.items()} | {"total": round(total)}
    return {"gradients": gradients, "seconds": total * seconds}


def _seconds_per_evaluation(setting: Setting, candidate: Candidate) -> float:
    driver, plan = setting.driver(0), setting.plan(candidate.schedule, 0)
    batch = next(plan.batches(0))
    control = type(candidate.schedule(0))(alpha=candidate.grid.alphas[0], steps=3)
    best = float("inf")
    for _ in range(4):
        meter, began = Meter(), time.perf_counter()
        driver.field(batch, control, meter=meter)
        best = min(best, (time.perf_counter() - began) / meter.gradients)
    return best


# ---- attack


def attack(checkpoint: str | Path, *, out: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Measure the robustness of a checkpoint on its test set: `controlat attack`.

    Args:
        checkpoint: last.pt or best.pt of a run directory; model, data and eps are read from it.
        out: a JSON file to write; it must not exist.
        **settings: the fields of `controlat.config.AttackSettings`.

    Returns:
        Clean accuracy, accuracy after each attack, robust accuracy, evaluations, seconds, settings.

    Raises:
        ValueError: bad settings, a damaged checkpoint, or a file that exists.
    """
    chosen = AttackSettings(str(checkpoint), **settings)
    if out is not None and Path(out).exists():
        raise ValueError(f"{out} exists; give another name")
    device = pick_device(chosen.device)
    found = load_checkpoint(checkpoint, device)
    stored = from_json(Problem, found["settings"])
    stored |= {"device": chosen.device, "test_points": chosen.points}
    stored |= {k: v for k in ("eps", "norm", "data_dir") if (v := getattr(chosen, k)) is not None}
    setting = Setting.of(Problem(**stored))
    model = setting.model(0)
    model.load_state_dict(found["model"])
    test = setting.data.test
    with deterministic(chosen.threads), _attack_bar(chosen, len(test)) as bar:
        measured = robustness(
            model,
            *test.take(torch.arange(len(test))),
            eps=setting.problem.ball.eps,
            norm=setting.problem.norm,
            attacks=chosen.attacks,
            batch_size=chosen.batch_size,
            seed=chosen.seed,
            device=device,
            progress=lambda n, name: (bar.set_description(name), bar.update(n)),
        )
    result = measured.to_json() | {
        "checkpoint": Path(checkpoint).name,
        "epoch": found["tally"]["epoch"],
        "eps": setting.problem.ball.eps,
        "norm": setting.problem.norm,
        "attacks": list(chosen.attacks),
        "seed": chosen.seed,
        "schedule": found["schedule"]["text"],
        "environment": environment(device),
    }
    if out is not None:
        write_json(out, result)
    return result


def _attack_bar(chosen: AttackSettings, points: int) -> contextlib.AbstractContextManager[Any]:
    total = points * sum(parse_attack(a).restarts for a in chosen.attacks)
    return tqdm(total=total, unit=" samples", disable=None if chosen.progress else True, leave=False)
