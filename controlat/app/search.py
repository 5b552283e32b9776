"""The job `search`: a schedule is searched for, and judged against plain ones under other seeds."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace

from controlat._util.errors import NonFiniteError
from controlat._util.pool import Pool, Task
from controlat.app.experiment import Experiment
from controlat.app.placement import Threads
from controlat.app.settings.search import SearchSettings
from controlat.schedule_search.trials import Answer, Judge, Question

__all__ = ["judge_in", "trained"]

_ONE = Threads(1, "one for each of the trainings at a time")


def judge_in(pool: Pool, chosen: SearchSettings) -> Judge:
    """A judge of questions that trains in the processes of a pool."""
    sent = pickle.dumps(chosen)

    def judge(questions: Sequence[Question], done: Callable[[int, Answer], None]) -> None:
        tasks = [Task(f"{q.text}, seed {q.seed}", trained, (sent, q)) for q in questions]
        pool.map(tasks, lambda i, answer: done(i, answer))

    return judge


def trained(sent: bytes, question: Question) -> Answer:
    """Train under the schedule of a question, and take Phi."""
    experiment = _experiment(sent, question.epochs, question.points)
    chosen: SearchSettings = pickle.loads(sent)
    schedule = chosen.schedule_of(question.text).stretched(question.epochs)
    steps = experiment.spec(schedule, question.seed)
    with experiment.running(_ONE):
        try:
            outcome = experiment.objective(schedule, question.seed, chosen.terminal)
        except NonFiniteError as error:
            return Answer(None, 0.0, 0.0, 0.0, str(error))
    mean = outcome.evaluations / (steps.epochs * steps.batches_per_epoch)
    return Answer(outcome.phi, mean, float(outcome.spent), outcome.seconds)


@functools.lru_cache(maxsize=4)
def _experiment(sent: bytes, epochs: int, points: int | None) -> Experiment:
    """The problem at one fidelity; its data are loaded once."""
    chosen: SearchSettings = pickle.loads(sent)
    return Experiment.of(replace(chosen, epochs=epochs, train_points=points or chosen.train_points))
