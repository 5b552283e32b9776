"""The job `attack`: the robust accuracy of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlat import report
from controlat._util.files import expanded, write_json
from controlat.app.checkpoints import load_weights
from controlat.app.experiment import Experiment, pick_device
from controlat.app.notes import note_step_size, step_sizes
from controlat.app.runs import environment
from controlat.app.settings import AttackSettings, Problem, from_json, settings_from
from controlat.app.trainer import load_checkpoint

__all__ = ["attack", "figure_of"]


def attack(
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    data: Any = None,
    model: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure the robustness of a checkpoint on its test set: `controlat attack`.

    Args:
        checkpoint: a run directory, for its best.pt or else its last.pt, or such a file; model, data and eps
            are read from it.
        out: a JSON file to write, and a PNG file of the same name for sweeps; neither may exist.
        data: the data of training, where they were given as an object (`controlat.app.settings.objects`).
        model: the network of training, where it was given as an object; its weights play no part.
        **settings: the fields of `controlat.app.settings.AttackSettings`.

    Returns:
        Clean accuracy, accuracy after each attack, robust accuracy, evaluations, seconds, settings, checks
        for gradient masking and their warnings, and what else was asked for.

    Raises:
        ValueError: bad settings, a damaged checkpoint, another object than in training, or a file that
            exists.
    """
    chosen = settings_from(AttackSettings, {"checkpoint": str(checkpoint)} | settings, "attack")
    checkpoint, out = Path(chosen.checkpoint), None if out is None else expanded(out)
    for path in _files(out, chosen.sweeps):
        if path.exists():
            raise ValueError(f"{path} exists; give another name")
    device = pick_device(chosen.device)
    saved = load_checkpoint(checkpoint, device)
    plain = {"method": "pgd_at", "method_options": {}}  # how it was trained plays no part
    stored = from_json(Problem, saved["settings"] | plain, f"{checkpoint}: settings")
    if chosen.eps is None and chosen.norm not in (None, stored["norm"]):
        raise ValueError(
            f"eps is missing: {stored['eps']} is the radius of training in {stored['norm']}; "
            f"give one in {chosen.norm}"
        )
    given = {name: getattr(chosen, name) for name in ("eps", "norm", "data_dir")}
    given |= {"device": chosen.device, "test_points": chosen.points, "threads": chosen.threads}
    given |= {"batch_size": chosen.batch_size, "tf32": "off", "cuda_graphs": chosen.cuda_graphs}
    stored |= {name: value for name, value in given.items() if value is not None}
    objects = {name: thing for name, thing in (("data", data), ("model", model)) if thing is not None}
    problem = Problem(**stored | objects)
    for name in objects:
        if (given := getattr(problem, name)) != (there := stored[name]):
            raise ValueError(f"{name} is {given}, but {checkpoint} is of {there}; give the same object")
    experiment = Experiment.of(problem)
    network = experiment.model(0)
    load_weights(network, saved["model"], str(checkpoint))
    note_step_size("attacks", step_sizes(chosen.attacks), experiment.problem.ball)
    with experiment.running():
        measured = experiment.evaluate(network, chosen, chosen.seed, chosen.batch_size)
        made_on = environment(device)
    result = measured.to_json() | {
        "checkpoint": checkpoint.name,
        "epoch": saved["tally"]["epoch"],
        "eps": experiment.problem.ball.eps,
        "norm": experiment.problem.norm,
        "attacks": list(chosen.attacks),
        "seed": chosen.seed,
        "schedule": saved.get("schedule", {}).get("text", saved["settings"].get("controller")),
        "environment": made_on,
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
