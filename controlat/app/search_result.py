"""The trials of a search as plain data, as its report draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from controlat.app.settings.schedules import names_controller
from controlat.app.settings.search import SearchSettings
from controlat.control.schedules import Schedule
from controlat.schedule_search.loop import Search
from controlat.schedule_search.trials import Answer, Question, Trial

__all__ = ["trials_of"]


def trials_of(chosen: SearchSettings, work: Search, schedule: Schedule) -> dict[str, Any]:
    """Parts of result.json: the spaces, all trials in the order made, schedules in full.

    Args:
        chosen: settings.
        work: a search that has ended.
        schedule: of its winner.
    """
    names = {id(b.space): name for name, b in zip(chosen.spaces, work.branches, strict=True)}
    others = (t.text for t in (*work.raced[1:], *work.promoted) if not t.failed)
    schedules = {t: chosen.schedule_of(t) for t in others if not names_controller(t)}
    return {
        "spaces": [
            {"name": name, "text": b.space.text, "parameters": [asdict(p) for p in b.space.parameters]}
            for name, b in zip(chosen.spaces, work.branches, strict=True)
        ],
        "trials": [_plain(t, _stage(work, t), names[id(t.space)]) for t in work.made],
        "schedules": {text: s.to_json() for text, s in (schedules | {work.raced[0].text: schedule}).items()},
    }


def _stage(work: Search, trial: Trial) -> str:
    if any(trial is explored for branch in work.branches for explored in branch.trials):
        return "explore"
    return "race" if len(trial.answers) > work.plan.rungs[-1].seeds else "promote"


def _plain(trial: Trial, stage: str, space: str) -> dict[str, Any]:
    """One trial; all its seeds are judged at one fidelity."""
    first = trial.questions[0]
    return {
        "stage": stage,
        "space": space,
        "schedule": trial.text,
        "point": dict(trial.point),
        "epochs": first.epochs,
        "points": first.points,
        "until": first.until,
        "runs": [_run(q, a) for q, a in zip(trial.questions, trial.answers, strict=True)],
    }


def _run(question: Question, answer: Answer) -> dict[str, Any]:
    keys: Sequence[str] = ("phi", "mean_cost", "gradients", "seconds")
    more: dict[str, Any] = {"surface": True} if question.surface else {}
    more |= {"error": answer.error} if answer.error else {}
    return {"seed": question.seed, **{key: getattr(answer, key) for key in keys}, **more}
