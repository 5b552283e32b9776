"""The job `evaluate`: train under several schedules and seeds, and compare them."""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from controlat import report
from controlat._util.files import expanded, write_json
from controlat._util.parallel import World
from controlat._util.pool import Pool, Task
from controlat._util.texts import short
from controlat.app.experiment import Experiment
from controlat.app.jobs import cards, number_of_jobs
from controlat.app.notes import alphas, note_step_size, note_unreached, step_sizes
from controlat.app.placement import Threads
from controlat.app.runs import environment
from controlat.app.schedule_run import ScheduleRun, priced, schedule_runs
from controlat.app.session import begun_threads, session
from controlat.app.settings import EvaluateSettings, names_controller, settings_from
from controlat.app.trainer import load_checkpoint
from controlat.control.controller import is_open
from controlat.dynamics.recording import GIBI, Recording
from controlat.dynamics.state import same_bits
from controlat.methods import build
from controlat.pmp import Candidates, described, try_terminal

__all__ = ["evaluate", "labels", "strides", "tried_terminal"]


def evaluate(out: str | Path, **settings: Any) -> dict[str, Any]:
    """Train under each schedule and seed, and compare them: `controlat evaluate`.

    Called again with the same settings it goes on where it was stopped, or returns what is finished.

    Args:
        out: directory for result.json, summary.md, figures and one run directory per schedule and seed.
        **settings: the fields of `controlat.app.settings.EvaluateSettings`; data, model and method may be
            objects (`controlat.app.settings.objects`).

    Returns:
        The content of result.json.

    Raises:
        ValueError: bad settings, or a directory that holds something else.
        NonFiniteError: a training diverged.
    """
    chosen, out = settings_from(EvaluateSettings, settings, "evaluate"), expanded(out)
    with session(out, {"command": "evaluate"} | chosen.to_json(), chosen, chosen.run) as (world, _, shared):
        if not world.broadcast((out / "result.json").exists()):
            experiment = Experiment.of(chosen, shared)
            directories = [out] if chosen.run is None else [out, chosen.run]
            jobs, begun = number_of_jobs(chosen, experiment), world.once(lambda: begun_threads(*directories))
            threads = experiment.threads(begun, jobs)
            with experiment.running(threads):
                result = _compared(experiment, chosen, out, world, jobs, threads)
            if world.first:
                write_json(out / "result.json", result)
        result = world.once(lambda: report.read(out / "result.json"))
        if world.first:
            report.write(result, out)
    return dict(result)


def _compared(
    experiment: Experiment, chosen: EvaluateSettings, out: Path, world: World, jobs: int, threads: Threads
) -> dict[str, Any]:
    """The content of result.json, in the first process; so many runs are made at a time."""
    every = list(schedule_runs(experiment, chosen, out))
    if world.first:
        _note(chosen)
    experiment.surrogate(chosen.surrogate)  # what is bad is refused before anything is trained
    phi = tried_terminal(experiment, chosen)
    if chosen.full:
        strides(experiment, chosen, every[0])
    titles = [
        f"[{i}/{len(every)}] {short(run.text)}, seed {run.seed}" for i, run in enumerate(every, start=1)
    ]
    if jobs > 1:
        results = _in_workers(jobs, threads, titles, chosen, experiment.shared, out)
    else:
        results = [_run(run, title, world) for run, title in zip(every, titles, strict=True)]
    if not world.first:
        return {}
    made_on = environment(experiment.device) | {"jobs": jobs}
    if jobs > 1:  # what workers have run without CUDA graphs, they alone know
        made_on["cuda_graphs"] = load_checkpoint(every[0].directory / "last.pt")["environment"].get(
            "cuda_graphs"
        )
    n, names = len(chosen.seeds), labels(chosen.schedules)
    schedules = [
        {
            "text": name,
            "schedule": every[i * n].taken.to_json(),
            **({} if is_open(every[i * n].controller) else {"closed_loop": True}),
            "runs": results[i * n : (i + 1) * n],
        }
        for i, name in enumerate(names)
    ]
    return report.assemble(
        settings=chosen.to_json(),
        environment=made_on,
        sizes=experiment.sizes,
        grid=_searched(every[0].candidates, chosen),
        terminal=phi,
        schedules=schedules,
        reproduced=_reproduced(chosen.run, every[0].directory),
        **_price(experiment, chosen, names),
    )


def _price(experiment: Experiment, chosen: EvaluateSettings, names: Sequence[str]) -> dict[str, Any]:
    """Where weight decides it, gamma of J and of the greedy forms, and the schedule that it is by."""
    gamma, most = priced(experiment, chosen)
    if not most:
        return {}
    name = names[list(chosen.schedules).index(most)]
    greedy = chosen.greedy_gamma
    return {"price": {"gamma": gamma, "weight": chosen.weight, "schedule": name, "greedy": greedy}}


def _run(run: ScheduleRun, title: str, world: World) -> dict[str, Any]:
    """What one run came to, told on a line."""
    result = run.run(title)
    if run.settings.progress and world.first:
        robust = result["evaluation"]["robust"]["value"]
        tqdm.write(f"{title}: J {result['objective']['J']:.3g}, robust {robust:.1%}", file=sys.stderr)
    return result


def _in_workers(
    jobs: int, threads: Threads, titles: Sequence[str], chosen: EvaluateSettings, shared: bool, out: Path
) -> list[dict[str, Any]]:
    """What the runs came to, some of them made at a time."""
    common = pickle.dumps(chosen), shared, out
    tasks = [Task(title, _nth_run, (common, i, title, threads)) for i, title in enumerate(titles)]
    with Pool(jobs, environments=cards(chosen), show=chosen.progress, unit="runs") as pool:
        return pool.map(tasks)


def _nth_run(common: tuple[bytes, bool, Path], i: int, title: str, threads: Threads) -> dict[str, Any]:
    """`_run` in a worker."""
    run = _runs(*common)[i]
    with run.experiment.running(threads):
        return _run(run, title, World())


@functools.lru_cache(maxsize=1)
def _runs(chosen: bytes, shared: bool, out: Path) -> list[ScheduleRun]:
    """Every run, in a worker: the data are loaded once, the files of schedules come with the settings."""
    settings: EvaluateSettings = pickle.loads(chosen)
    return list(schedule_runs(Experiment.of(settings, shared), settings, out))


def _note(chosen: EvaluateSettings) -> None:
    """Say what is likely a mistake, and still allowed."""
    planned = {t: chosen.schedule_of(t) for t in chosen.schedules if not names_controller(t)}
    note_unreached(chosen, planned)
    for text, schedule in planned.items():
        note_step_size(short(text), alphas(schedule), chosen.ball)
    note_step_size("the candidates", map(float, chosen.alphas or ()), chosen.ball)
    note_step_size("attacks", step_sizes(chosen.attacks), chosen.ball)


def labels(texts: Sequence[str]) -> list[str]:
    """The schedules' texts for tables and figures: long ones cut, and numbered if that makes them equal."""
    names = list(map(short, texts))
    return [n if names.count(n) == 1 else f"{i}: {n}" for i, n in enumerate(names, start=1)]


def tried_terminal(experiment: Experiment, chosen: EvaluateSettings) -> str:
    """The terminal cost in words; the user's own is tried on the untrained network first."""
    terminal = experiment.terminal(chosen.seeds[0], chosen.terminal)
    if ":" in chosen.terminal:
        try_terminal(terminal, experiment.driver(chosen.seeds[0]), chosen.terminal)
    return described(terminal)


def strides(experiment: Experiment, chosen: EvaluateSettings, run: ScheduleRun) -> tuple[int, ...]:
    """How the full criterion records a run; an error where it does not fit in memory."""
    spec = replace(experiment.spec(run.controller, run.seed), world=World())
    driver = experiment.driver(run.seed)
    try:
        return Recording.check(driver, spec, limit=chosen.memory * GIBI)
    except ValueError as error:
        raise ValueError(f"full criterion: {error} (--memory), or leave it out (--full false)") from None


def _searched(candidates: Candidates, chosen: EvaluateSettings) -> dict[str, Any]:
    """What the maximum is over: as far as the method has these controls."""
    knobs = build(chosen.method, chosen.method_options).controls
    values = candidates.within(knobs)
    alphas_, steps = values.pop("alpha", ()), values.pop("steps", (0,))
    return {
        "alphas": list(alphas_),
        "least": steps[0],
        "max_steps": steps[-1],
        "others": [n for n, k in knobs.items() if n not in candidates.values and k.low < k.high],
        **({"more": {name: list(listed) for name, listed in values.items()}} if values else {}),
    }


def _reproduced(run: str | None, directory: Path) -> bool | None:
    """Whether training ended with the bits of a finished run; None where none was given."""
    if run is None:
        return None
    theirs, ours = (load_checkpoint(d / "last.pt")["model"] for d in (Path(run), directory))
    return same_bits(theirs, ours)
