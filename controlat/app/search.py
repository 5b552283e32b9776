"""The job `search`: a schedule is searched for, and judged against plain ones under other seeds."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from controlat import report
from controlat._util.cores import available_cores
from controlat._util.errors import NonFiniteError
from controlat._util.files import expanded, write_json
from controlat._util.pool import InProcess, Pool, Task
from controlat._util.progress import progress_bar
from controlat._util.ray_pool import RayPool
from controlat._util.sending import Common
from controlat.app.apart import check_apart
from controlat.app.certificate import CERTIFICATE, certificate
from controlat.app.experiment import Experiment
from controlat.app.jobs import PER_CARD, only_here, workers
from controlat.app.placement import Threads
from controlat.app.prefix import Prefix
from controlat.app.runs import environment
from controlat.app.search_result import trials_of
from controlat.app.session import session
from controlat.app.settings import settings_from
from controlat.app.settings.schedules import names_controller
from controlat.app.settings.search import SearchSettings, kept_settings
from controlat.control.controller import as_schedule
from controlat.control.schedules import Schedule
from controlat.pmp.objective import objective, weighed
from controlat.pmp.run_surface import examined
from controlat.robust_accuracy.robust import run_attacks
from controlat.schedule_search import proposers
from controlat.schedule_search.loop import Branch, Plan, Rung, Search, paired
from controlat.schedule_search.trials import Answer, Judge, Ledger, Question, Trial

__all__ = ["search", "searched"]

_ONE = Threads(1, "one for each of the trainings at a time")
_RACE_SEEDS = 8
_PROMOTED = 4  # of each space, judged at full length under more seeds
_STATES = "states"
_FIRST_SHARE = 0.5  # of the budget, for the first of several spaces


def search(out: str | Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Search for a schedule, and judge it under other seeds: `controlat search`.

    Called again with the same settings it goes on where it was stopped, with the same trials.

    Args:
        out: directory for result.json, summary.md, figures, schedule.json, and the answers of all trainings.
        resume: go on with the settings that are kept in the directory.
        **settings: the fields of `controlat.app.settings.search.SearchSettings`; data, model and method
            may be objects (`controlat.app.settings.objects`).

    Returns:
        The content of result.json.

    Raises:
        ValueError: bad settings, a directory that holds something else, or every training failed.
    """
    out = expanded(out)
    if resume:
        settings = kept_settings(out) | settings
    chosen = settings_from(SearchSettings, settings, "search")
    with session(out, {"command": "search"} | chosen.to_json(), chosen):
        experiment = Experiment.of(chosen)
        check_apart(experiment)
        with _workers(chosen) as pool:
            judge = judge_in(pool, chosen, (out / _STATES).absolute())
            result, schedule = searched(experiment, chosen, Ledger(out / "trainings.jsonl", judge))
        schedule.save(out / "schedule.json", overwrite=True)
        if chosen.certificate or (out / CERTIFICATE).exists():
            there = out / CERTIFICATE
            result["certificate"] = certificate(experiment, chosen, result["found"], result["price"], there)
        write_json(out / "result.json", result)
        report.write_search(result, out)
        shutil.rmtree(out / _STATES, ignore_errors=True)
    return result


def searched(
    experiment: Experiment, chosen: SearchSettings, ledger: Ledger
) -> tuple[dict[str, Any], Schedule]:
    """The content of result.json, and the schedule that was found."""
    plan = _plan(experiment, chosen, ledger)
    spaces = chosen.space_list()
    rest = len(spaces) - 1
    shares = [_FIRST_SHARE, *[(1 - _FIRST_SHARE) / rest] * rest] if rest else [1.0]
    branches = [
        Branch(space, proposers.build(chosen.proposer, space, seed), share)
        for seed, (space, share) in enumerate(zip(spaces, shares, strict=True))
    ]
    with progress_bar(None, " trainings", chosen.progress, "search") as bar:

        def each(best: Trial | None) -> None:
            bar.update(1)
            bar.set_postfix_str("" if best is None else f"best J {best.mean(plan.price):.4g}: {best.text}")

        work = Search(branches, ledger, plan, each)
        winner = work.run()
    searched = [a for q, a in ledger.answers.items() if not q.attacked]
    spent = {"trainings": len(searched)} | {
        key: sum(getattr(a, key) for a in searched) for key in ("gradients", "seconds")
    }
    rows = _judged(chosen, ledger, plan, _contenders(chosen, work, winner))
    schedule = _schedule(chosen, ledger, winner.text)
    result = {
        "format": "controlat search",
        "version": 1,
        "settings": chosen.to_json(),
        "environment": environment(experiment.device),
        "sizes": experiment.sizes,
        "price": plan.price,
        "found": winner.text,
        "spent": spent,
        "rows": rows,
        **trials_of(chosen, work, schedule),
    }
    return result, schedule


def _schedule(chosen: SearchSettings, ledger: Ledger, text: str) -> Schedule:
    """The schedule of a text; of a closed loop, that which it took under the first judging seed."""
    if not names_controller(text):
        return chosen.schedule_of(text)
    answers = [ledger.answers[q] for q in _judging(chosen, text)]
    taken = [a.taken for a in answers if a.taken is not None]
    if not taken:
        raise ValueError(f"{text} was found, but failed under every judging seed: {answers[0].error}")
    return Schedule.from_json(taken[0])


def _judging(chosen: SearchSettings, text: str, method: str = "") -> list[Question]:
    """The trainings of a contender under the judging seeds."""
    return [Question(text, seed, chosen.epochs, attacked=True, method=method) for seed in chosen.judge_seeds]


def _plan(experiment: Experiment, chosen: SearchSettings, ledger: Ledger) -> Plan:
    """How the budget is spent; a training of PGD-K_max, which tells its unit, is the first of all."""
    seeds = chosen.search_seeds(_RACE_SEEDS)
    (most,) = ledger.ask([Question(chosen.most, seeds[0], chosen.epochs)])
    if most.phi is None:
        raise ValueError(f"PGD-K_max, {chosen.most}, cannot be trained: {most.error}")
    price = weighed(chosen.weight, most.mean_cost)
    if chosen.gamma is not None:
        spec = experiment.spec(chosen.schedule_of(chosen.most), seeds[0])
        price = spec.price(float(chosen.gamma)) * spec.epochs * spec.batches_per_epoch
    budget, unit = chosen.allowance(most.gradients)
    return Plan(
        budget=budget,
        unit=unit,
        price=price,
        rungs=_rungs(chosen, len(experiment.training)),
        seeds=seeds,
        batch=4,
        race_seeds=_RACE_SEEDS,
    )


def _rungs(chosen: SearchSettings, samples: int) -> tuple[Rung, ...]:
    """Exploring, and the rungs above it; each keeps a third of what the one before keeps."""
    cheap = [
        Rung(round(epochs * chosen.epochs), None if points == 1 else max(1, round(points * samples)))
        for epochs, points in chosen.shares()
    ]
    explore, *above = [*(cheap or [Rung(chosen.epochs)]), Rung(chosen.epochs, seeds=3)]
    kept = [_PROMOTED * 3**i for i in reversed(range(len(above)))]
    return explore, *(rung._replace(keep=keep) for rung, keep in zip(above, kept, strict=True))


def _contenders(chosen: SearchSettings, work: Search, winner: Trial) -> dict[str, tuple[str, str]]:
    """Method and schedule of the judgement by name: what was found, the best of every other space, others."""
    best = {
        f"best {name}": ("", next(t.text for t in work.promoted if t.space is branch.space))
        for name, branch in zip(chosen.spaces, work.branches, strict=True)
        if branch.space is not winner.space
    }
    against = {given: chosen.contender(given) for given in chosen.against}
    return {"found": ("", winner.text), **best, **against}


def _judged(
    chosen: SearchSettings, ledger: Ledger, plan: Plan, contenders: dict[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """A row for every contender under the judging seeds, with its paired differences to what was found."""
    questions = [q for method, text in contenders.values() for q in _judging(chosen, text, method)]
    with progress_bar(len(questions), " trainings", chosen.progress, "judgement") as bar:
        ledger.ask(questions, bar.update)
    known, rows = ledger.answers, list[dict[str, Any]]()
    for name, (method, text) in contenders.items():
        answers = [known[q] for q in _judging(chosen, text, method)]
        row: dict[str, Any] = {
            "name": name,
            "schedule": text,
            **({"method": method} if method else {}),
            "errors": [a.error for a in answers if a.error],
        }
        if not row["errors"]:
            row["J"] = [a.phi + plan.price * a.mean_cost for a in answers]  # type: ignore[operator]
            row |= {
                key: [getattr(a, key) for a in answers] for key in ("phi", "clean", "robust", "mean_cost")
            }
            row |= {
                key: float(np.mean([getattr(a, key) for a in answers])) for key in ("gradients", "seconds")
            }
        rows.append(row)
    for row in rows[1:]:
        if not row["errors"] and not rows[0]["errors"]:
            row["difference"] = {key: paired(rows[0][key], row[key])._asdict() for key in ("J", "robust")}
    return rows


# ------------------------------------------------------------------------------------------------- a training


def _workers(chosen: SearchSettings) -> Pool | InProcess | RayPool:
    """Where trainings run."""
    if chosen.engine == "ray" and not only_here(chosen, "trainings are done"):
        share = 0.0 if chosen.device == "cpu" else 1 / PER_CARD
        return RayPool(chosen.jobs, address=chosen.address, gpu_share=share)
    return workers(chosen, chosen.jobs or available_cores(), "trainings")


def judge_in(pool: Pool | InProcess | RayPool, chosen: SearchSettings, states: Path) -> Judge:
    """A judge of questions that trains in the workers of a pool.

    Args:
        pool: the workers.
        chosen: the settings of the search.
        states: folder in which trainings that end early leave their states, for others to go on from; where
            workers do not share it, those are trained whole.
    """
    settings = Common(chosen)

    def judge(questions: Sequence[Question], done: Callable[[int, Answer], None]) -> None:
        tasks = [Task(f"{q.text}, seed {q.seed}", trained, (settings, q, states)) for q in questions]
        pool.map(tasks, done)

    return judge


def trained(settings: Common, question: Question, states: Path | None = None) -> Answer:
    """Train under the schedule of a question, and take what it asks for, in a worker."""
    chosen: SearchSettings = settings.value
    experiment = _experiment(settings, question.epochs, question.points, question.method)
    controller = chosen.controller(question.text, question.epochs, question.method)
    spec = experiment.spec(controller, question.seed)
    with experiment.running(_ONE):
        driver, began, surface = experiment.driver(question.seed), time.perf_counter(), None
        terminal = experiment.terminal(question.seed, chosen.terminal)
        try:
            if question.surface:
                outcome, surface = examined(driver, spec, terminal, chosen.max_steps, question.until)
            elif states is None or not spec.open_loop:
                outcome = objective(driver, spec, terminal, until=question.until)
            else:
                outcome = Prefix(states, driver, spec, experiment.problem).objective(terminal, question.until)
        except NonFiniteError as error:
            spent, seconds = float(driver.meter.gradients), time.perf_counter() - began
            return Answer(None, 0.0, spent, seconds, str(error))
        mean = outcome.evaluations / (spec.epochs * spec.batches_per_epoch)
        answer = Answer(outcome.phi, mean, float(outcome.spent), outcome.seconds, surface=surface)
        if not question.attacked:
            return answer
        robust = run_attacks(
            driver.model,
            experiment.test,
            chosen.ball,
            attacks=chosen.attacks,
            seed=question.seed,
            channels_last=chosen.channels_last,
        )
    taken = None
    if not spec.open_loop:
        taken = as_schedule(outcome.controls, spec.batches_per_epoch, spec.epochs, question.text).to_json()
    return answer._replace(clean=robust.clean.value, robust=robust.robust.value, taken=taken)


@functools.lru_cache(maxsize=4)
def _experiment(settings: Common, epochs: int, points: int | None, method: str) -> Experiment:
    """The problem at one fidelity, with one method; its data are loaded once."""
    chosen: SearchSettings = settings.value
    experiment = Experiment.of(chosen.problem(epochs, method))
    if points is None:
        return experiment
    fewer = replace(experiment.data, train=experiment.training).limited(points, None).train
    return replace(experiment, training=fewer)
