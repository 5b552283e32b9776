"""The job `search`: a schedule is searched for, and judged against plain ones under other seeds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from controlat import report
from controlat._util.files import expanded, write_json
from controlat._util.progress import progress_bar
from controlat.app.apart import check_apart
from controlat.app.certificate import CERTIFICATE, certificate
from controlat.app.experiment import Experiment
from controlat.app.runs import environment
from controlat.app.search_judge import judge_in, workers_of
from controlat.app.search_result import trials_of
from controlat.app.session import session
from controlat.app.settings import settings_from
from controlat.app.settings.schedules import names_controller
from controlat.app.settings.search import RAMP, SearchSettings, kept_settings
from controlat.control.schedules import Schedule
from controlat.methods import build
from controlat.pmp.objective import planned_evaluations, rollout_cost, weighed
from controlat.pmp.terminal import terminal_evaluations
from controlat.schedule_search import proposers
from controlat.schedule_search.loop import Branch, Plan, Rung, Search, paired
from controlat.schedule_search.trials import Ledger, Question, Trial

__all__ = ["search", "searched"]

_RACE_SEEDS = 8
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
        with workers_of(chosen) as pool:
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
    """The content of result.json, and the schedule that was found.

    Args:
        experiment: the problem.
        chosen: settings.
        ledger: what is known of trainings, and who judges others.

    Raises:
        ValueError: every training failed.
    """
    plan, unit = _plan(experiment, chosen)
    spaces = chosen.space_list()
    rest = len(spaces) - 1
    shares = [_FIRST_SHARE, *[(1 - _FIRST_SHARE) / rest] * rest] if rest else [1.0]
    branches = [
        Branch(
            space, proposers.build(chosen.proposer, space, plan.seeds[0] + i, chosen.proposer_options), share
        )
        for i, (space, share) in enumerate(zip(spaces, shares, strict=True))
    ]
    with progress_bar(None, " trainings", chosen.progress, "search") as bar:

        def each(best: Trial | None) -> None:
            bar.update(1)
            bar.set_postfix_str("" if best is None else f"best J {best.mean(plan.price):.4g}: {best.text}")

        work = Search(branches, ledger, plan, each)
        winner = work.run()
    answers = list(work.answers.values())
    spent = {key: sum(getattr(a, key) for a in answers) for key in ("gradients", "seconds")}
    spent["trainings"] = len(answers)
    rows = _judged(chosen, ledger, plan, _contenders(experiment, chosen, work, winner))
    schedule = _schedule(chosen, ledger, winner.text)
    result = {
        "format": "controlat search",
        "version": 1,
        "settings": chosen.to_json(),
        "environment": environment(experiment.device),
        "sizes": experiment.sizes,
        "price": plan.price,
        "unit": unit,
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


def _plan(experiment: Experiment, chosen: SearchSettings) -> tuple[Plan, dict[str, Any]]:
    """How the budget is spent, and a training of PGD-K_max, its unit: by the cost that is declared."""
    seeds = chosen.search_seeds(1 + _RACE_SEEDS)
    spec, driver = experiment.spec(chosen.schedule_of(chosen.most), seeds[0]), experiment.driver(seeds[0])
    phi = terminal_evaluations(experiment.terminal(seeds[0], chosen.terminal), driver).value
    steps = spec.epochs * spec.batches_per_epoch
    n, training = planned_evaluations(spec, driver.method) / steps, rollout_cost(spec, driver.method) + phi
    price = weighed(chosen.weight, n) if chosen.gamma is None else spec.price(float(chosen.gamma)) * steps
    budget, unit = chosen.allowance(training)
    plan = Plan(
        budget=budget,
        unit=unit,
        price=price,
        rungs=_rungs(chosen, len(experiment.training)),
        samples=len(experiment.training),
        rate=training / (n * spec.epochs * len(experiment.training)),
        seeds=seeds,
        batch=4,
        race_seeds=_RACE_SEEDS,
    )
    return plan, {"schedule": chosen.most, "mean_cost": n, "gradients": training}


def _rungs(chosen: SearchSettings, samples: int) -> tuple[Rung, ...]:
    """Exploring, and the rungs above it, which have fresh seeds."""
    cheap = [
        Rung(round(epochs * chosen.epochs), None if points == 1 else max(1, round(points * samples)))
        for epochs, points in chosen.shares()
    ]
    explore, *above = [*(cheap or [Rung(chosen.epochs)]), Rung(chosen.epochs)]
    return explore, *(rung._replace(first=1) for rung in above)


def _contenders(
    experiment: Experiment, chosen: SearchSettings, work: Search, winner: Trial
) -> dict[str, tuple[str, str]]:
    """Method and schedule of the judgement by name: what was found, the best of every other space, others."""
    best = {}
    for name, branch in zip(chosen.spaces, work.branches, strict=True):
        promoted = [t for t in work.promoted if t.space is branch.space]
        trials = [t for t in promoted or branch.trials if not t.failed]
        if branch.space is not winner.space and trials:
            best[f"best {name}"] = "", min(trials, key=work.rank).text
    against = {given: chosen.contender(given) for given in chosen.against}
    if RAMP in chosen.against:
        against[RAMP] = "", _ramp(experiment, chosen, np.mean([a.mean_cost for a in winner.answers]))
    return {"found": ("", winner.text), **best, **against}


def _ramp(experiment: Experiment, chosen: SearchSettings, n: Any) -> str:
    """The plain ramp K = 0..b whose trainings cost n gradient evaluations per sample and step."""
    method, ends = build(chosen.method, chosen.method_options), (0, chosen.max_steps)
    specs = [experiment.spec(chosen.schedule_of(chosen.ramp(end)), 0) for end in ends]
    costs = [planned_evaluations(spec, method) / (spec.epochs * spec.batches_per_epoch) for spec in specs]
    return chosen.ramp(float(np.interp(n, costs, ends)))  # the cost of a step is linear in K


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
