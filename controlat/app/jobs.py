"""The jobs as Python calls: train under a schedule, evaluate candidate schedules, attack a checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from controlat import report
from controlat._util.files import expanded, write_json
from controlat._util.parallel import World, joined
from controlat._util.texts import short
from controlat.app.checkpoints import load_weights
from controlat.app.experiment import Experiment, pick_device
from controlat.app.look_back import most_evaluations
from controlat.app.runs import claimed, environment
from controlat.app.schedule_run import ScheduleRun, candidates
from controlat.app.settings import (
    AttackSettings,
    EvaluateSettings,
    Problem,
    TrainSettings,
    from_json,
    names_factory,
    settings_from,
)
from controlat.app.trainer import (
    VALIDATION,
    deterministic,
    fit,
    load_checkpoint,
    read_log,
)
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.schedules import Schedule
from controlat.dynamics.feedback import ahead
from controlat.dynamics.recording import GIBI, Recording
from controlat.dynamics.state import same_bits
from controlat.methods import build
from controlat.pmp import Candidates, described, price, try_terminal
from controlat.records import missing
from controlat.robust_accuracy import Extras, parse_attack
from controlat.robust_accuracy.attack import read_attacks

__all__ = ["attack", "estimate", "evaluate", "train"]

# ---- train


def train(out: str | Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Train one network under one schedule or controller: `controlat train`.

    Args:
        out: the run directory. It gets settings.json, schedule.json, log.jsonl, last.pt, best.pt.
        resume: go on with an interrupted run of the same settings.
        **settings: the fields of `controlat.app.settings.TrainSettings`.

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
    chosen, out = settings_from(TrainSettings, settings, "train"), expanded(out)
    controller, plain = chosen.planned, {"command": "train"} | chosen.to_json()
    with _together(out, plain, chosen) as (world, known):
        finished = world.broadcast(
            not missing(read_log(out, chosen.epochs), chosen.epochs) if world.first else None
        )
        if known and not finished and not resume:
            raise ValueError(
                f"{out} holds an unfinished run of these settings; go on with --resume (resume=True)"
            )
        if world.first and isinstance(controller, Schedule):
            _note_unreached(chosen, {chosen.text: controller})
            _note_far(short(chosen.text), _alphas(controller), chosen.ball)
        experiment = Experiment.of(chosen)
        driver = experiment.driver(chosen.seed)
        tally = fit(
            driver,
            experiment.spec(controller, chosen.seed),
            out,
            held_out=experiment.held_out,
            settings=plain | {"data_dir": chosen.data_dir},
            checkpoint_minutes=chosen.checkpoint_minutes,
            tensorboard=chosen.tensorboard,
            progress=chosen.progress,
            label=short(chosen.text),
            name=chosen.text,
        )
        records = world.once(lambda: read_log(out))
    return {
        "directory": str(out),
        "epochs": records,
        "gradients": tally.gradients,
        "seconds": tally.seconds,
        "finished_before": known and finished,
    }


def _note_unreached(chosen: Problem, schedules: Mapping[str, Schedule]) -> None:
    """Say where a schedule was made for another number of epochs, and what training never comes to."""
    epochs, told = chosen.epochs, []
    for text, schedule in ((short(text), schedule) for text, schedule in schedules.items()):
        if schedule.epochs != epochs:
            what = (
                "only its beginning is used" if schedule.epochs > epochs else "then it holds its last value"
            )
            told.append(f"{text} was made for {schedule.epochs:g} epochs, training has {epochs}: {what}")
        for at, knobs in _by_value(schedule.unreached()).items():
            reach, times = "reach" if len(knobs) > 1 else "reaches", ", ".join(f"{t:g}" for t in at)
            pieces = f"it has {schedule.epochs:g} epochs, in pieces of {schedule.resolution:g}"
            told.append(
                f"{text}: {', '.join(knobs)} never {reach} the value of epoch {short(times)}; {pieces}"
            )
    if late := [f"{t:g}" for t in chosen.rate.at if t >= epochs]:
        when = short(", ".join(late))
        told.append(f"lr {chosen.lr}: never changes at epoch {when}, as training has {epochs} epochs")
    for line in told:
        tqdm.write(f"controlat: note: {line}", file=sys.stderr)


def _by_value(found: Mapping[str, tuple[float, ...]]) -> dict[tuple[float, ...], list[str]]:
    names: dict[tuple[float, ...], list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(name)
    return names


def _note_far(what: str, alphas: Iterable[float], ball: Ball) -> None:
    """Say where a step size is far above the width of the ball."""
    if told := ball.far(max(alphas, default=0.0)):
        tqdm.write(f"controlat: note: {what}: {told}", file=sys.stderr)


def _alphas(schedule: Schedule) -> Iterator[float]:
    """The step sizes that a schedule may take."""
    return (u.get("alpha", 0.0) for u in schedule.controls)


def _steps(attacks: Sequence[str]) -> Iterator[float]:
    """The step sizes that attacks name."""
    return (a.alpha for a in read_attacks(attacks) if a.alpha is not None)


@contextlib.contextmanager
def _together(out: str | Path, plain: dict[str, Any], chosen: Problem) -> Iterator[tuple[World, bool]]:
    """The processes of a run, its directory held, and deterministic kernels: (processes, known before)."""
    with joined(chosen.device) as world, claimed(out, plain, world) as known, deterministic(chosen.threads):
        yield world, known


# ---- evaluate


def evaluate(out: str | Path, **settings: Any) -> dict[str, Any]:
    """Train under each schedule and seed, and compare them: `controlat evaluate`.

    Called again with the same settings it goes on where it was stopped, or returns what is finished.

    Args:
        out: directory for result.json, summary.md, figures and one run directory per schedule and seed.
        **settings: the fields of `controlat.app.settings.EvaluateSettings`.

    Returns:
        The content of result.json.

    Raises:
        ValueError: bad settings, or a directory that holds something else.
        NonFiniteError: a training diverged.
    """
    chosen, out = settings_from(EvaluateSettings, settings, "evaluate"), expanded(out)
    with _together(out, {"command": "evaluate"} | chosen.to_json(), chosen) as (world, _):
        if not world.broadcast((out / "result.json").exists()):
            experiment = Experiment.of(chosen)
            every = list(candidates(experiment, chosen, out))
            if world.first:
                planned = {t: chosen.schedule_of(t) for t in chosen.schedules if not names_factory(t)}
                _note_unreached(chosen, planned)
                for text, schedule in planned.items():
                    _note_far(short(text), _alphas(schedule), chosen.ball)
                _note_far("the grid of G", map(float, chosen.alphas or ()), chosen.ball)
                _note_far("attacks", _steps(chosen.attacks), chosen.ball)
            experiment.surrogate(chosen.surrogate)  # what is bad is refused before anything is trained
            phi = _phi(experiment, chosen)
            if chosen.full:
                _strides(experiment, chosen, every[0])
            runs: dict[int, list[dict[str, Any]]] = {}
            for i, candidate in enumerate(every):
                which, label = (
                    i // len(chosen.seeds),
                    f"[{i + 1}/{len(every)}] {short(candidate.text)}",
                )
                found = candidate.run(f"{label}, seed {candidate.seed}")
                runs.setdefault(which, []).append(found)
                if chosen.progress and world.first:
                    left = found["evaluation"]["robust"]["value"]
                    tqdm.write(f"{label}, seed {candidate.seed}: robust {left:.1%}", file=sys.stderr)
            if world.first:
                schedules = [
                    {
                        "text": label,
                        "schedule": every[i * len(chosen.seeds)].taken.to_json(),
                        "runs": runs[i],
                    }
                    for i, label in enumerate(labels(chosen.schedules))
                ]
                result = report.assemble(
                    settings=chosen.to_json(),
                    environment=environment(experiment.device),
                    sizes={
                        "train": len(experiment.training),
                        "held_out": len(experiment.held_out),
                        "test": len(experiment.data.test),
                    },
                    grid=_searched(every[0].grid, chosen),
                    terminal=phi,
                    schedules=schedules,
                    reproduced=_reproduced(chosen.run, every[0].directory),
                )
                write_json(out / "result.json", result)
        result = world.once(lambda: report.read(out / "result.json"))
        if world.first:
            report.write(result, out)
    return dict(result)


def labels(texts: Sequence[str]) -> list[str]:
    """The schedules' texts for tables and figures: long ones cut, and numbered if that makes them equal."""
    names = list(map(short, texts))
    return [n if names.count(n) == 1 else f"{i}: {n}" for i, n in enumerate(names, start=1)]


def _phi(experiment: Experiment, chosen: EvaluateSettings) -> str:
    """The terminal cost in words; the user's own is tried on the untrained network first."""
    terminal = experiment.terminal(chosen.seeds[0], chosen.terminal)
    if ":" in chosen.terminal:
        try_terminal(terminal, experiment.driver(chosen.seeds[0]), chosen.terminal)
    return described(terminal)


def _strides(experiment: Experiment, chosen: EvaluateSettings, candidate: ScheduleRun) -> tuple[int, ...]:
    """How the full criterion records a run; an error where it does not fit in memory."""
    spec = replace(experiment.spec(candidate.controller, candidate.seed), world=World())
    driver = experiment.driver(candidate.seed)
    try:
        return Recording.check(driver, spec, limit=chosen.memory * GIBI)
    except ValueError as error:
        raise ValueError(f"full criterion: {error} (--memory), or leave it out (--full false)") from None


def _searched(grid: Candidates, chosen: EvaluateSettings) -> dict[str, Any]:
    """What the maximum is over: as far as the method has these controls."""
    knobs = build(chosen.method, chosen.method_options).controls
    values = grid.within(knobs)
    alphas, steps = values.pop("alpha", ()), values.pop("steps", (0,))
    return {
        "alphas": list(alphas),
        "least": steps[0],
        "max_steps": steps[-1],
        "others": [n for n, k in knobs.items() if n not in grid.values and k.low < k.high],
        **({"more": {name: list(listed) for name, listed in values.items()}} if values else {}),
    }


def _reproduced(run: str | None, directory: Path) -> bool | None:
    """Whether training ended with the bits of a finished run; None where none was given."""
    if run is None:
        return None
    theirs, ours = (load_checkpoint(d / "last.pt")["model"] for d in (Path(run), directory))
    return same_bits(theirs, ours)


def estimate(**settings: Any) -> dict[str, Any]:
    """What `evaluate` would cost: gradient evaluations by part, and seconds from a few timed steps.

    The counts of the evaluation and of the full criterion are upper bounds: survivors alone are attacked
    again, and all states of a roll-out may fit in memory. Three forward passes count as one gradient
    evaluation there.

    Returns:
        ``{"gradients": {"training", "validation", "criterion", "full criterion", "evaluation", "total"},
        "seconds"}``.
    """
    chosen = settings_from(EvaluateSettings, settings, "evaluate")
    experiment = Experiment.of(chosen)
    every = list(candidates(experiment, chosen, Path("unused")))
    method = build(chosen.method, chosen.method_options)
    count = dict.fromkeys(("training", "validation", "criterion", "full criterion", "evaluation"), 0.0)
    extras = Extras(chosen.checks, chosen.autoattack, chosen.sweeps, experiment.surrogate(chosen.surrogate))
    _phi(experiment, chosen)
    phi = price(experiment.terminal(chosen.seeds[0], chosen.terminal), experiment.driver(chosen.seeds[0]))
    replays = len(_strides(experiment, chosen, every[0])) - 1 if chosen.full else 0
    for c in every:
        spec = experiment.spec(c.controller, c.seed)
        for epoch in range(chosen.epochs):
            u = spec.plan(epoch * spec.batches_per_epoch, (epoch + 1) * spec.batches_per_epoch)
            count["training"] += sum(map(method.controls.cost, u)) * len(experiment.training) / len(u)
            tried = c.grid.cost(method, u[0])
            if chosen.maximiser == "tpe":
                tried = chosen.trials * c.grid.mean_cost(method, u[0]) + method.controls.cost(u[0])
            count["criterion"] += tried * min(chosen.probe, len(experiment.training)) + phi.gradient
        if chosen.full:
            count["full criterion"] += most_evaluations(chosen, spec, method, c.grid, phi, replays)
        count["validation"] += parse_attack(VALIDATION).cost() * chosen.epochs * len(experiment.held_out)
        parts = extras.cost(len(experiment.test), experiment.data.num_classes, chosen.attacks).values()
        count["evaluation"] += sum(part.gradients + part.forwards / 3 for part in parts)
    with deterministic(chosen.threads):
        seconds = _seconds_per_evaluation(experiment, every[0])
    total = sum(count.values())
    gradients = {k: round(v) for k, v in count.items()} | {"total": round(total)}
    return {"gradients": gradients, "seconds": total * seconds}


def _seconds_per_evaluation(experiment: Experiment, candidate: ScheduleRun) -> float:
    driver, spec = experiment.driver(0), experiment.spec(candidate.controller, 0)
    batch = next(spec.batches(0))
    control = ahead(spec.controller, spec.moment(0), driver)
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
        checkpoint: a run directory, for its best.pt or else its last.pt, or such a file; model, data and eps
            are read from it.
        out: a JSON file to write, and a PNG file of the same name for sweeps; neither may exist.
        **settings: the fields of `controlat.app.settings.AttackSettings`.

    Returns:
        Clean accuracy, accuracy after each attack, robust accuracy, evaluations, seconds, settings, checks
        for gradient masking and their warnings, and what else was asked for.

    Raises:
        ValueError: bad settings, a damaged checkpoint, or a file that exists.
    """
    chosen = settings_from(AttackSettings, {"checkpoint": str(checkpoint)} | settings, "attack")
    checkpoint, out = Path(chosen.checkpoint), None if out is None else expanded(out)
    for path in _files(out, chosen.sweeps):
        if path.exists():
            raise ValueError(f"{path} exists; give another name")
    device = pick_device(chosen.device)
    found = load_checkpoint(checkpoint, device)
    plain = {"method": "pgd_at", "method_options": {}}  # how it was trained plays no part
    stored = from_json(Problem, found["settings"] | plain, f"{checkpoint}: settings")
    if chosen.eps is None and chosen.norm not in (None, stored["norm"]):
        raise ValueError(
            f"eps is missing: {stored['eps']} is the radius of training in {stored['norm']}; "
            f"give one in {chosen.norm}"
        )
    given = {name: getattr(chosen, name) for name in ("eps", "norm", "data_dir")}
    given |= {"device": chosen.device, "test_points": chosen.points}
    stored |= {name: value for name, value in given.items() if value is not None}
    experiment = Experiment.of(Problem(**stored))
    model = experiment.model(0)
    load_weights(model, found["model"], str(checkpoint))
    _note_far("attacks", _steps(chosen.attacks), experiment.problem.ball)
    with deterministic(chosen.threads):
        measured = experiment.evaluate(model, chosen, chosen.seed, chosen.batch_size)
    result = measured.to_json() | {
        "checkpoint": checkpoint.name,
        "epoch": found["tally"]["epoch"],
        "eps": experiment.problem.ball.eps,
        "norm": experiment.problem.norm,
        "attacks": list(chosen.attacks),
        "seed": chosen.seed,
        "schedule": found.get("schedule", {}).get("text", found["settings"].get("controller")),
        "environment": environment(device),
    }
    if out is not None:
        write_json(out, result)
        if chosen.sweeps:
            report.attack_figure(result, figure_of(out))
    return result


def _files(out: str | Path | None, sweeps: bool) -> list[Path]:
    """The files that `attack` writes."""
    if out is None:
        return []
    if sweeps and figure_of(out) == Path(out):
        raise ValueError(f"{out} would be the name of the figure too; give a name that ends in .json")
    return [Path(out), *([figure_of(out)] if sweeps else [])]


def figure_of(out: str | Path) -> Path:
    """Where `attack` puts the figure of its sweeps: beside its JSON file."""
    return Path(out).with_suffix(".png")
