"""The job `train`: one network under one schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlat._util.files import expanded
from controlat._util.texts import short
from controlat.app.experiment import Experiment
from controlat.app.notes import alphas, note_step_size, note_unreached
from controlat.app.session import begun_threads, session
from controlat.app.settings import TrainSettings, settings_from
from controlat.app.trainer import fit, read_log
from controlat.control.schedules import Schedule
from controlat.records import missing

__all__ = ["train"]


def train(out: str | Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Train one network under one schedule or controller: `controlat train`.

    Args:
        out: the run directory. It gets settings.json, schedule.json, log.jsonl, last.pt, best.pt.
        resume: go on with an interrupted run of the same settings.
        **settings: the fields of `controlat.app.settings.TrainSettings`; data, model and method may be
            objects (`controlat.app.settings.objects`).

    Returns:
        ``{"directory", "epochs": [one record per epoch], "gradients", "seconds", "finished_before"}``.

    Raises:
        ValueError: bad settings, or a directory that holds another run.
        NonFiniteError: training diverged.

    >>> import tempfile
    >>> few = {"epochs": 1, "train_points": 200, "progress": False}
    >>> result = train(tempfile.mkdtemp(), schedule="fgsm:alpha=0.15", **few)
    >>> result["gradients"] == 2 * 180
    True
    """
    chosen, out = settings_from(TrainSettings, settings, "train"), expanded(out)
    controller, plain = chosen.planned, {"command": "train"} | chosen.to_json()
    with session(out, plain, chosen) as (world, known, shared):
        finished = world.broadcast(
            not missing(read_log(out, chosen.epochs), chosen.epochs) if world.first else None
        )
        if known and not finished and not resume:
            raise ValueError(
                f"{out} holds an unfinished run of these settings; go on with --resume (resume=True)"
            )
        if world.first and isinstance(controller, Schedule):
            note_unreached(chosen, {chosen.text: controller})
            note_step_size(short(chosen.text), alphas(controller), chosen.ball)
        experiment = Experiment.of(chosen, shared)
        with experiment.running(experiment.threads(world.once(lambda: begun_threads(out)))):
            driver = experiment.driver(chosen.seed)
            tally = fit(
                driver,
                experiment.spec(controller, chosen.seed),
                out,
                held_out=experiment.validation,
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
