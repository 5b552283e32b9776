"""The command line: evaluate, train, derive, attack, data, methods, models. Bad usage: one line, code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from controlat.texts import count, duration

__all__ = ["main"]

_LISTS: dict[str, Any] = {
    "schedules": str,
    "seeds": int,
    "attacks": str,
    "alphas": str | float,
    "horizons": int,
    "x_range": str | float,
    "theta_range": str | float,
}


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the reason in one line and exit with 2."""
        reason = " ".join(str(message).split())
        print(f"controlat{_which()}: error: {reason} (see controlat --help)", file=sys.stderr)
        raise SystemExit(2)


def _which() -> str:
    """Which process speaks, if it is not the first or only one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}]"


def _command(settings: type, description: str) -> Parser:
    parser = Parser(description=description, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it.")
    lists = [name for name in _LISTS if name in settings.__dataclass_fields__]  # type: ignore[attr-defined]
    parser.add_class_arguments(settings, skip={*lists, "checkpoint"}, as_group=False)
    for name in lists:
        help_ = _help(settings, name)
        parser.add_argument(f"--{name}", nargs="+", type=_LISTS[name], default=None, help=help_)
    return parser


def _help(settings: type, name: str) -> str:
    for line in (settings.__doc__ or "").splitlines():
        if line.strip().startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


def _parser() -> Parser:
    from controlat import __version__
    from controlat.config import AttackSettings, DeriveSettings, EvaluateSettings, TrainSettings

    top = Parser(
        prog="controlat",
        description="Optimal-control analysis of adversarial training: how far is a schedule from optimal?",
        version=__version__,
        allow_abbrev=False,
    )
    commands = top.add_subcommands(required=True, dest="command")

    evaluate = _command(EvaluateSettings, "Train under several schedules and compare C, robustness and cost.")
    evaluate.add_argument(
        "--out", type=str, required=True, help="Directory for results; with it alone: the demo."
    )
    evaluate.add_argument("--dry_run", action="store_true", help="Print evaluations and estimated time only.")
    commands.add_subcommand("evaluate", evaluate, help="compare schedules: criterion C, robustness, cost")

    train = _command(TrainSettings, "Train one network under one schedule.")
    train.add_argument("--out", type=str, required=True, help="Run directory: log, checkpoints, schedule.")
    train.add_argument(
        "--resume", action="store_true", help="Go on with an interrupted run of these settings."
    )
    commands.add_subcommand("train", train, help="train under one schedule")

    derive = _command(DeriveSettings, "Derive a schedule from a landscape l(theta, x), and check it.")
    derive.add_argument(
        "--out", type=str, required=True, help="Directory for results; with it alone: Amata's landscape."
    )
    commands.add_subcommand("derive", derive, help="solve a landscape and make it a schedule")

    attack = _command(AttackSettings, "Measure the robustness of a checkpoint.")
    attack.add_argument("checkpoint", type=str, help="last.pt or best.pt of a run directory")
    attack.add_argument("--out", type=str, default=None, help="JSON file to write.")
    commands.add_subcommand("attack", attack, help="robust accuracy of a checkpoint")

    data = Parser(description="List the data sets, or download one.", default_env=False)
    data.add_argument("name", nargs="?", default=None, help="Data set to download; lists them without it.")
    data.add_argument("--data_dir", type=str, default=None, help="Where to; the cache if left out.")
    commands.add_subcommand("data", data, help="list the data sets, download one")

    systems = Parser(description="List the training systems, or describe one.", default_env=False)
    systems.add_argument("name", nargs="?", default=None, help="Describe this one: options and controls.")
    commands.add_subcommand("methods", systems, help="list the training systems with their controls")

    networks = Parser(description="List the networks.", default_env=False)
    networks.add_argument("--num_classes", type=int, default=10, help="Number of classes.")
    commands.add_subcommand("models", networks, help="list the networks with their parameters")
    return top


def _settings(found: Namespace, drop: Sequence[str]) -> dict[str, Any]:
    given = found.as_dict()
    return {k: v for k, v in given.items() if k not in drop and (k not in _LISTS or v is not None)}


def _evaluate(found: Namespace) -> None:
    from controlat import jobs, report

    settings = _settings(found, ("config", "out", "dry_run"))
    if found.dry_run:
        cost = jobs.estimate(**settings)
        for part, value in cost["gradients"].items():
            print(f"{part:>14}  {count(value):>8} gradient evaluations")
        seconds = cost["seconds"]
        readable = f" ({duration(seconds)})" if seconds >= 90 else ""
        print(f"about {seconds:.0f} seconds{readable} on this machine; nothing was written")
        return
    result = jobs.evaluate(found.out, **settings)
    if _which():
        return
    print(report.table(*report.rows(result)))
    print()
    for line in report.notes(result):
        print(f"- {line}")
    names = ", ".join(report.figures(result))
    print(f"\nIn {found.out}: summary.md, result.json, {names}; checkpoints, logs and surfaces in runs/.")
    if (found.data, found.model, found.method) == ("digits", "mlp", "pgd_at"):
        print(_NEXT)


_NEXT = """Next: your own schedules, for example
  controlat evaluate --out mine --schedules pgd:steps=5,alpha=0.06 linear:start=0,end=5,tau=0.3 --seeds 0 1 2
or real data (the four MNIST files in a folder); --dry-run says first what it will cost:
  controlat evaluate --out mnist --data mnist --data-dir FOLDER --model lenet --eps 0.3 --epochs 6 \\
    --schedules pgd:steps=10,alpha=0.01 amata:min=5,max=40,tau=0.4 --dry-run"""


def _train(found: Namespace) -> None:
    from controlat import jobs, report

    result = jobs.train(found.out, resume=found.resume, **_settings(found, ("config", "out", "resume")))
    if _which():
        return
    epochs = result["epochs"]
    # Every control that changes, and the two that all readers look for.
    knobs = [
        name
        for name in sorted(epochs[0]["control"], key=lambda name: name != "steps")
        if name in ("steps", "alpha") or len({e["control"][name] for e in epochs}) > 1
    ]
    carried = [name for name in ("strength",) if name in epochs[-1]["carried"]]
    heads = ["epoch", *("K" if name == "steps" else name for name in knobs), *carried]
    heads += ["loss", "clean %", "robust %", "gradient evals", "seconds"]
    cells = [
        [
            str(e["epoch"]),
            *(f"{e['control'][name]:.4g}" for name in knobs),
            *(f"{e['carried'].get(name, 0):g}" for name in carried),
            f"{e['loss']:.4f}",
            f"{100 * e['clean']:.1f}",
            f"{100 * e['robust']:.1f}",
            count(e["gradients"]),
            f"{e['seconds']:.1f}",
        ]
        for e in result["epochs"]
    ]
    print(report.table(heads, cells))
    spent = f"{count(result['gradients'])} gradient evaluations, {duration(result['seconds'])}"
    layers = epochs[-1]["layers"]
    spent += f" and {count(layers)} passes of the first layer" * bool(layers)
    again = " (finished before)" if result["finished_before"] else ""
    print(f"\nclean, robust (PGD-10): on held-out training samples. Training cost {spent}{again}.")
    print(f"Test it: controlat attack {Path(found.out) / 'best.pt'}")


def _derive(found: Namespace) -> None:
    from controlat.derived import derive
    from controlat.symbolic.figures import FIGURES

    result = derive(out=found.out, **_settings(found, ("config", "out")))
    print(result)
    names = ", ".join(name for name, figure in FIGURES.items() if figure.wanted(result.result))
    print(f"\nIn {found.out}: schedule.json, summary.md, result.json, {names}.")
    print(f"Train under it: controlat train --out RUN --schedule {Path(found.out) / 'schedule.json'} ...")


def _attack(found: Namespace) -> None:
    from controlat import jobs, report

    settings = _settings(found, ("config", "out", "checkpoint"))
    result = jobs.attack(found.checkpoint, out=found.out, **settings)
    print(report.attack_table(result))
    print(
        f"\n{result['points']} points, {result['norm']} eps {result['eps']:.4g}, after {result['epoch']} "
        f"epochs of {result['schedule'] or 'a schedule'}; "
        f"{count(result['gradients'])} gradient evaluations, "
        f"{result['seconds']:.1f} seconds. A sample is robust if it survives every attack and restart."
    )
    for line in report.attack_notes(result):
        print(line)
    if found.out is not None:
        print(f"Written to {found.out}" + (f" and {jobs.figure_of(found.out)}" if found.sweeps else ""))


def _data(found: Namespace) -> None:
    from controlat import data, report

    if found.name is None:
        print(report.table(*data.overview(), words=range(4)))
        print("\nFiles are looked for in --data-dir, else in the cache, where controlat data NAME puts them.")
        return
    folder = data.download(found.name, found.data_dir)
    where = "" if found.data_dir is None else f" --data-dir {found.data_dir}"
    print(f"{found.name} is in {folder}; use it with --data {found.name}{where}")


def _methods(found: Namespace) -> None:
    from controlat import methods, report

    if found.name is not None:
        print(methods.manual(found.name))
        return
    print(report.methods_table(methods.describe()).replace("\\|", "|"))
    print("\ncontrolat methods NAME describes one, with its options.")
    print("Any control can be given a schedule, such as pgd:steps=10,alpha=2/255,fosc=0.5..0@40.")


def _models(found: Namespace) -> None:
    from controlat import models, report

    def row(entry: dict[str, Any]) -> list[str]:
        number = "" if entry["parameters"] is None else f"{entry['parameters']:,}"
        return [entry["name"], number, " x ".join(map(str, entry["input"])), entry["what"]]

    if found.num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {found.num_classes}")
    heads = ["network", "parameters", "for input", ""]
    print(report.table(heads, [row(entry) for entry in models.describe(found.num_classes)], words=(0, 3)))
    print("\nInputs are pixels in [0, 1]. Other sizes are taken if they are not too small for the network.")


def _underscored(argument: str) -> str:
    """--data-dir is --data_dir."""
    name, sign, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + sign + value if name.startswith("--") else argument


_COMMANDS = {
    "evaluate": _evaluate,
    "train": _train,
    "derive": _derive,
    "attack": _attack,
    "data": _data,
    "methods": _methods,
    "models": _models,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``controlat``; those of the process by default.

    Returns:
        0 when it went well, 1 when training diverged. Bad usage raises SystemExit(2), after one line.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    parser = _parser()
    found = parser.parse_args([_underscored(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    from controlat.network import NonFiniteError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (
        found.command not in ("train", "evaluate") or found[found.command].get("dry_run")
    ):
        parser.error("train and evaluate run in several processes, nothing else; start it without torchrun")
    try:
        _COMMANDS[found.command](found[found.command])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("CONTROLAT_DEBUG"):
            raise
        parser.error("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except NonFiniteError as error:
        print(f"controlat{_which()}: training stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        cure = {"train": "the same command with --resume goes on", "derive": "the same command begins again"}
        told = cure.get(found.command, "the same command goes on")
        print(f"controlat: interrupted; {told}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
