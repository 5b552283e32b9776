"""One run of an evaluation: a controller under a seed, trained, scored and attacked."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from controlat._util.checks import number
from controlat._util.files import append_json_line, plain, write_json, write_text
from controlat._util.parallel import World
from controlat._util.progress import progress_bar
from controlat.app.criterion_lines import gaps_of
from controlat.app.experiment import Experiment
from controlat.app.full_criterion import full_criterion, full_criterion_cost, report_payload
from controlat.app.resume import LAST
from controlat.app.runs import slug
from controlat.app.settings import EvaluateSettings
from controlat.app.trainer import SCHEDULE, Tally, fit, read_log, validation_cost
from controlat.control.controller import Controller
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import GIBI, Recorder, Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import same_bits
from controlat.methods import Batch, Method, build
from controlat.pmp import (
    Candidates,
    Evaluations,
    Outcome,
    epoch_scale,
    outcome_at,
    planned_evaluations,
    rollout_cost,
    score,
    training_probe,
    weighed,
)
from controlat.records import (
    CriterionLine,
    Evaluation,
    Full,
    Objective,
    missing,
    read_epochs,
    read_record,
)
from controlat.robust_accuracy import parse_attack

__all__ = ["ScheduleRun", "priced", "schedule_runs"]

CRITERION = "criterion.jsonl"


@dataclass(frozen=True)
class ScheduleRun:
    """One run of an evaluation: a schedule, or another controller, under a seed, in its directory.

    J and the full criterion are taken at the price `gamma`.
    """

    experiment: Experiment
    settings: EvaluateSettings
    text: str
    controller: Controller
    seed: int
    directory: Path
    candidates: Candidates
    gamma: float

    @property
    def taken(self) -> Schedule:
        """The schedule of the run once it is trained: of a closed loop, that which it took."""
        c = self.controller
        return c if isinstance(c, Schedule) else load_schedule(self.directory / SCHEDULE)

    def probe(self, epoch: int) -> list[Batch]:
        """The probe at one epoch."""
        s = self.settings
        return training_probe(
            self.experiment.training, s.probe, batch_size=s.batch_size, epoch=epoch, augment=s.augmentation
        )

    def score_epoch(self, driver: Driver, spec: RunSpec, epoch: int) -> dict[str, Any]:
        """Score the candidates of G at the start of an epoch: a line of criterion.jsonl."""
        began, s, u = time.perf_counter(), self.settings, spec.control_at(epoch, 0, driver)
        total = 1 + (len(self.candidates.around(driver.method, u)) if s.maximiser == "sweep" else s.trials)
        bar = progress_bar(total, " candidates", s.progress, f"C, epoch {epoch}")
        with driver.full_precision(), bar:
            surface = score(
                driver,
                self.probe(epoch),
                u,
                self.candidates,
                terminal=self.experiment.terminal(self.seed, s.terminal),
                scale=epoch_scale(driver, spec, epoch),
                rate=spec.mean_rate(epoch),
                maximiser=s.maximiser,
                gamma=s.greedy_gamma,
                trials=s.trials,
                progress=bar.update,
            )
        line = {"epoch": epoch, "control": dict(u), "surface": surface.to_json()}
        return line | {"seconds": time.perf_counter() - began}

    def score_epoch_cost(self, u: Control, phi: Evaluations) -> float:
        """Gradient evaluations of `score_epoch` where u is the control, in samples."""
        method, s = self.method, self.settings
        tried = self.candidates.cost(method, u)
        if s.maximiser == "tpe":
            tried = s.trials * self.candidates.mean_cost(method, u) + method.controls.cost(u)
        return tried * min(s.probe, len(self.experiment.training)) + phi.gradient

    def objective(self, driver: Driver, tally: Tally) -> Outcome:
        """J's parts at the trained network, sum n as it was counted in training.

        Where it was not, in a run of before, the network is trained once more in memory.
        """
        s = self.settings
        if tally.evaluations is None:
            return self.experiment.objective(self.taken, self.seed, s.terminal)
        terminal = self.experiment.terminal(self.seed, s.terminal)
        total, training, seconds = tally.evaluations, tally.gradients, tally.seconds
        return outcome_at(driver, terminal, total, training_gradients=training, seconds=seconds)

    def full_criterion(self, trained: nn.Module, recording: Recording | None = None) -> dict[str, Any]:
        """The full criterion of the run, with progress bars; rolled out again where it was not recorded."""
        s = self.settings
        return full_criterion(
            self.experiment,
            s,
            self.taken,
            self.seed,
            self.candidates,
            self.gamma,
            trained,
            recording,
            lambda what, total: progress_bar(total, " steps", s.progress, what),
        )

    @property
    def method(self) -> Method:
        """The training system."""
        return build(self.settings.method, self.settings.method_options)

    def cost(self, phi: Evaluations, replays: int) -> dict[str, float]:
        """What `run` costs at most, by part, in gradient evaluations, but for `Experiment.evaluation_cost`.

        Args:
            phi: of the terminal cost.
            replays: how often steps are taken again at most in the full criterion.
        """
        s, spec = self.settings, self.experiment.spec(self.controller, self.seed)
        first = spec.plan()[:: spec.batches_per_epoch]
        full = full_criterion_cost(s, spec, self.method, self.candidates, phi, replays) if s.full else 0.0
        return {
            "training": rollout_cost(spec, self.method) + spec.decision_cost,
            "validation": validation_cost(len(self.experiment.validation)) * spec.epochs,
            "Phi": phi.value,
            "criterion": sum(self.score_epoch_cost(u, phi) for u in first),
            "full criterion": full,
        }

    def run(self, label: str) -> dict[str, Any]:
        """Train, score and attack; what is already there is read, not made again.

        Several processes train together; the first of them scores, attacks and returns the results.
        """
        s, experiment = self.settings, self.experiment
        driver, spec = experiment.driver(self.seed), experiment.spec(self.controller, self.seed)
        recorder = self._recorder(driver, spec)
        tally = self._train(driver, spec, label, recorder)
        if not spec.world.first:
            return {}
        recording = None if recorder is None else recorder.recording()
        if lost := missing(self._surfaces(tally.epoch), tally.epoch):
            self._score_again(lost, tally.epoch, driver.model)
        objective, file, full = (self.directory / f"{n}.json" for n in ("objective", "evaluation", "full"))
        if not objective.exists():
            write_json(objective, self.objective(driver, tally).to_json(spec.price(self.gamma)))
        if not file.exists():
            measured = experiment.evaluate(driver.model, s, self.seed)
            write_json(file, measured.to_json())
        if s.full and not full.exists():
            write_json(full, self.full_criterion(driver.model, recording))
        payload = {}
        if s.full:
            payload["full"] = report_payload(read_record(full, Full), self.taken, self.seed == s.seeds[0])
        return {
            "seed": self.seed,
            "directory": self.directory.name,
            "epochs": read_log(self.directory),
            "objective": read_record(objective, Objective),
            "criterion": self.criterion(tally.epoch),
            "evaluation": self._evaluation(file),
            **payload,
            **{name: getattr(tally, name) for name in ("gradients", "forwards", "seconds")},
        }

    def _recorder(self, driver: Driver, spec: RunSpec) -> Recorder | None:
        """What records the training for the full criterion.

        None where the run is rolled out again for it, if at all: one that goes on from a checkpoint, that of
        several processes, and a closed loop, whose schedule is known after training.
        """
        begun = (self.directory / LAST).exists()
        if begun or not self.settings.full or spec.world.size > 1 or not spec.open_loop:
            return None
        return Recorder.of(driver, spec, limit=self.settings.memory * GIBI)

    def _train(self, driver: Driver, spec: RunSpec, label: str, recorder: Recorder | None) -> Tally:
        """Train, and score the candidates at the start of every epoch whose line is not there yet."""
        s, path = self.settings, self.directory / CRITERION
        scored = {line["epoch"] for line in self._surfaces(spec.epochs)} if spec.world.first else set()

        def score(epoch: int) -> None:
            if epoch not in scored:
                append_json_line(path, self.score_epoch(driver, spec, epoch))

        return fit(
            driver,
            spec,
            self.directory,
            held_out=self.experiment.validation,
            settings={"seed": self.seed, "data_dir": s.data_dir} | s.to_json(),
            at_epoch=score,
            progress=s.progress,
            label=label,
            name=self.text,
            recorder=recorder,
        )

    def _surfaces(self, epochs: int) -> list[dict[str, Any]]:
        """The lines of criterion.jsonl."""
        return read_epochs(self.directory / CRITERION, CriterionLine, epochs)

    def _score_again(self, lost: Sequence[int], epochs: int, trained: nn.Module) -> None:
        """Train once more, in memory, to score epochs whose lines were lost."""
        path, lines = self.directory / CRITERION, self._surfaces(epochs)
        told = f"{path} lacked epoch {', '.join(map(str, lost))}; trained again in memory to score it"
        driver = self.experiment.driver(self.seed)
        spec = replace(self.experiment.spec(self.taken, self.seed), world=World())
        for epoch in range(epochs):
            if epoch in lost:
                lines.append(self.score_epoch(driver, spec, epoch))
            for _ in rollout(driver, spec, epoch=epoch, until=epoch + 1):
                pass
        if not same_bits(driver.model.state_dict(), trained.state_dict()):
            told += ", which did not end with the same bits (another device or thread count?)"
        tqdm.write(f"controlat: warning: {told}", file=sys.stderr)
        lines.sort(key=lambda line: int(line["epoch"]))
        write_text(path, "".join(json.dumps(plain(line)) + "\n" for line in lines))

    def _evaluation(self, path: Path) -> dict[str, Any]:
        """evaluation.json, which has every attack that was asked for."""
        evaluation: dict[str, Any] = read_record(path, Evaluation)
        names = [parse_attack(a).name for a in self.settings.attacks]
        if list(evaluation["after"]) != names:
            there = ", ".join(evaluation["after"])
            raise ValueError(f"{path}: after has {there}, asked for was {', '.join(names)}")
        return evaluation

    def criterion(self, epochs: int) -> list[dict[str, Any]]:
        """The gaps of so many epochs in both forms, from the stored surfaces."""
        gamma, gaps = self.settings.greedy_gamma, []
        for line in self._surfaces(epochs):
            try:
                gaps.append(gaps_of(line, gamma))
            except ValueError as error:
                where = f"{self.directory / CRITERION}, epoch {line['epoch']}"
                raise ValueError(f"{where}: {error}") from None
        return gaps


def schedule_runs(experiment: Experiment, settings: EvaluateSettings, out: Path) -> Iterator[ScheduleRun]:
    """Every run of an evaluation: controllers in turn, each under all seeds, searched over one common set."""
    eps, steps = settings.ball.eps, settings.max_steps or _most_steps(settings)
    space = build(settings.method, settings.method_options).controls
    candidates = Candidates.read(settings.knobs, space, eps=eps, max_steps=steps, alphas=settings.alphas)
    gamma, _ = priced(experiment, settings)
    for number_, text in enumerate(settings.schedules, start=1):
        for seed in settings.seeds:
            yield ScheduleRun(
                experiment=experiment,
                settings=settings,
                text=text,
                controller=settings.controller_of(text),
                seed=seed,
                directory=out / "runs" / f"{number_:02d}-{slug(text)}-seed{seed}",
                candidates=candidates,
                gamma=gamma,
            )


def priced(experiment: Experiment, settings: EvaluateSettings) -> tuple[float, str]:
    """gamma of J: as it is given, or by the weight of the most expensive schedule; the text of that one.

    Raises:
        ValueError: what no schedule costs is known before the run.
    """
    if settings.gamma is not None:
        return number(settings.gamma, "gamma"), ""
    method = build(settings.method, settings.method_options)
    specs = {text: experiment.spec(settings.controller_of(text), 0) for text in settings.schedules}
    known = {
        text: planned_evaluations(spec, method)
        for text, spec in specs.items()
        if spec.open_loop or hasattr(spec.controller, "most_expensive")
    }
    if not known:
        raise ValueError("gamma is missing: what a closed loop costs is not known before the run")
    text = max(known, key=known.__getitem__)
    return weighed(settings.weight, known[text]) / specs[text].mean_rate(), text


def _most_steps(settings: EvaluateSettings) -> int:
    """The largest K of the schedules, and of the controllers that name their most expensive control."""
    every: list[Mapping[str, float]] = []
    for controller in map(settings.controller_of, settings.schedules):
        if isinstance(controller, Schedule):
            every += controller.controls
        elif most_expensive := getattr(controller, "most_expensive", None):
            every.append(most_expensive)
    if not every:
        raise ValueError(
            "max_steps is missing: the largest K of a closed loop is not known before the run; give it, or "
            "the controller an attribute `most_expensive`"
        )
    return max(1, *(int(u.get("steps", 1)) for u in every))
