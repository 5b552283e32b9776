"""The judge of a search: trainings in processes of this machine or on Ray."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from controlat._util.cores import available_cores
from controlat._util.errors import NonFiniteError
from controlat._util.pool import InProcess, Pool, Task
from controlat._util.ray_pool import RayPool
from controlat._util.sending import Common
from controlat.app.experiment import Experiment
from controlat.app.jobs import PER_CARD, only_here, workers
from controlat.app.placement import Threads
from controlat.app.prefix import Prefix
from controlat.app.settings.search import SearchSettings
from controlat.control.controller import as_schedule
from controlat.pmp.objective import objective
from controlat.pmp.run_surface import examined
from controlat.robust_accuracy.robust import run_attacks
from controlat.schedule_search.trials import Answer, Judge, Question

__all__ = ["judge_in", "trained", "workers_of"]

_ONE = Threads(1, "one for each of the trainings at a time")


def workers_of(chosen: SearchSettings) -> Pool | InProcess | RayPool:
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
