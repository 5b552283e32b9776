"""What `search` would do and cost, said before anything is trained: a search whose judge reads plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from controlat._util.cores import available_cores
from controlat.app.estimate import seconds_per_evaluation
from controlat.app.experiment import Experiment
from controlat.app.placement import Threads
from controlat.app.search import searched
from controlat.app.settings import settings_from
from controlat.app.settings.search import SearchSettings
from controlat.control.controller import as_schedule
from controlat.pmp import rollout_cost, terminal_evaluations
from controlat.robust_accuracy.protocol import Extras
from controlat.schedule_search.trials import Answer, Judge, Ledger, Question

__all__ = ["search_plan"]


def search_plan(**settings: Any) -> dict[str, Any]:
    """What `search` would do, and about what it would cost.

    The search is run with trials spread evenly in their spaces, and noise that decides no race in the place
    of Phi. Costs are those that the schedules and the method declare.

    Args:
        **settings: the fields of `controlat.app.settings.search.SearchSettings`.

    Returns:
        A result as `search` has it, in which Phi is noise and nothing was found; beside it ``judging``, the
        gradient evaluations of the judgement (three forward passes count as one), and ``expected_seconds``.

    Raises:
        ValueError: bad settings.
    """
    asked = settings_from(SearchSettings, settings, "search")
    chosen = replace(asked, proposer="random", proposer_options={}, progress=False)
    experiment = Experiment.of(chosen)
    with experiment.running(Threads(1, "one for each of the trainings at a time")):
        each = seconds_per_evaluation(experiment, chosen.schedule_of(chosen.most))
    result, _ = searched(experiment, chosen, Ledger(None, _planned(experiment, chosen, each)))
    sizes = len(experiment.test), experiment.data.num_classes, chosen.attacks
    attack = sum(m.gradients + m.forwards / 3 for m in Extras(checks=0).cost(*sizes).values())
    judging = sum(row["gradients"] + attack for row in result["rows"]) * len(chosen.judge_seeds)
    seconds = (result["spent"]["seconds"] + judging * each) / (chosen.jobs or available_cores())
    return result | {"settings": asked.to_json(), "judging": judging, "expected_seconds": seconds}


def _planned(experiment: Experiment, chosen: SearchSettings, each: float) -> Judge:
    """A judge that trains nothing: it knows what trainings would cost, and takes Phi to be noise.

    Args:
        experiment: the problem.
        chosen: settings.
        each: seconds of a gradient evaluation.
    """
    seed = chosen.judge_seeds[0]
    phi = terminal_evaluations(experiment.terminal(seed, chosen.terminal), experiment.driver(seed)).value

    def answer(q: Question) -> Answer:
        there = replace(experiment, problem=chosen.problem(chosen.epochs, q.method))
        spec = there.spec(chosen.controller(q.text, chosen.epochs, q.method), q.seed)
        whole = rollout_cost(spec, there.driver(q.seed).method) + spec.decision_cost
        part = (q.until or q.epochs) / spec.epochs * (q.points or len(spec.data)) / len(spec.data)
        n = whole / (len(spec.data) * spec.epochs) * (q.until or q.epochs) / q.epochs
        gradients = whole * part + phi
        noise = float(np.random.default_rng([q.seed, *q.text.encode()]).standard_normal())
        taken = None
        if not spec.open_loop:  # its most expensive control throughout
            taken = as_schedule(spec.plan(), spec.batches_per_epoch, spec.epochs, q.text).to_json()
        return Answer(noise, n, gradients, gradients * each, clean=0.0, robust=0.0, taken=taken)

    def judge(questions: Sequence[Question], done: Callable[[int, Answer], None]) -> None:
        for i, question in enumerate(questions):
            done(i, answer(question))

    return judge
