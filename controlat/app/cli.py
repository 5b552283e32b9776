"""The command line: a function for each command of `controlat --help`. Bad usage: one line, code 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlat.app.signals import Terminated, discard, ending, open_streams, terminated

# Nothing that takes time is imported here, but where an interruption is waited for.
if TYPE_CHECKING:
    from jsonargparse import Namespace

__all__ = ["main"]


def _settings(parsed: Namespace, drop: Sequence[str]) -> dict[str, Any]:
    from controlat.app.parser import LISTS

    given = parsed.as_dict()
    return {k: v for k, v in given.items() if k not in drop and (k not in LISTS or v is not None)}


def _evaluate(parsed: Namespace) -> None:
    from controlat import report
    from controlat._util.texts import count, duration, speaker
    from controlat.app.estimate import estimate
    from controlat.app.evaluate import evaluate

    settings = _settings(parsed, ("config", "out", "dry_run"))
    if parsed.dry_run:
        cost = estimate(**settings)
        for part, value in cost["gradients"].items():
            print(f"{part:>14}  {count(value):>8} gradient evaluations")
        seconds = cost["seconds"]
        readable = f" ({duration(seconds)})" if seconds >= 90 else ""
        print(f"about {seconds:.0f} seconds{readable} on this machine; nothing was written")
        return
    result = evaluate(parsed.out, **settings)
    if speaker():
        return
    print(report.table(*report.rows(result)))
    print()
    for line in report.notes(result):
        print(f"- {line}")
    names = ", ".join(report.figures(result))
    print(f"\nIn {parsed.out}: summary.md, result.json, {names}; checkpoints, logs and surfaces in runs/.")
    if (parsed.data, parsed.model, parsed.method) == ("digits", "mlp", "pgd_at"):
        print(_NEXT)


def _search(parsed: Namespace) -> None:
    from controlat import report
    from controlat._util.texts import speaker
    from controlat.app.search import search
    from controlat.app.search_plan import search_plan
    from controlat.app.settings.search import kept_settings

    settings = _settings(parsed, ("config", "out", "resume", "dry_run"))
    begun, out = parsed.get("resume"), parsed.get("resume") or parsed.get("out")
    if out is None or (begun and parsed.get("out")):
        raise ValueError("give --out DIR for a new search, or --resume DIR for one that was begun")
    if parsed.get("dry_run"):
        kept = kept_settings(Path(out)) if begun else {}
        print(report.search_plan_text(search_plan(**kept | settings)))
        return
    result = search(out, resume=begun is not None, **settings)
    if not speaker():
        print(report.search_text(result))
        print(
            f"\nIn {out}: summary.md, schedule.json, result.json, {', '.join(report.search_figures(result))}."
        )
        print(report.search_use(result, Path(out) / "schedule.json"))


def _report(parsed: Namespace) -> None:
    from controlat import report

    names = report.redraw(Path(parsed.directory))
    print(f"In {parsed.directory}: {', '.join(names)}.")


_NEXT = """Next: your own schedules, for example
  controlat evaluate --out mine --schedules pgd:steps=5,alpha=0.06 linear:start=0,end=5,tau=0.3 --seeds 0 1 2
or real data (the four MNIST files in a folder); --dry-run says first what it will cost:
  controlat evaluate --out mnist --data mnist --data-dir FOLDER --model lenet --eps 0.3 --epochs 6 \\
    --schedules pgd:steps=10,alpha=0.01 amata:min=5,max=40,tau=0.4 --dry-run"""


def _train(parsed: Namespace) -> None:
    from controlat import report
    from controlat._util.texts import count, duration, speaker
    from controlat.app.train import train

    result = train(parsed.out, resume=parsed.resume, **_settings(parsed, ("config", "out", "resume")))
    if speaker():
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
    print(f"Test it: controlat attack {Path(parsed.out) / 'best.pt'}")


def _derive(parsed: Namespace) -> None:
    from controlat.app.derive import derive
    from controlat.report.derivation.figures import FIGURES

    result = derive(out=parsed.out, **_settings(parsed, ("config", "out")))
    print(result)
    names = ", ".join(name for name, figure in FIGURES.items() if figure.wanted(result.result))
    print(f"\nIn {parsed.out}: schedule.json, summary.md, result.json, {names}.")
    print(f"Train under it: controlat train --out RUN --schedule {Path(parsed.out) / 'schedule.json'} ...")


def _attack(parsed: Namespace) -> None:
    from controlat import report
    from controlat._util.texts import count
    from controlat.app.attack import attack, figure_of

    settings = _settings(parsed, ("config", "out", "checkpoint"))
    result = attack(parsed.checkpoint, out=parsed.out, **settings)
    print(report.attack_table(result))
    print(
        f"\n{result['checkpoint']}: {result['points']} points, {result['norm']} eps {result['eps']:.4g}, "
        f"after {result['epoch']} epochs of {result['schedule'] or 'a schedule'}; "
        f"{count(result['gradients'])} gradient evaluations, "
        f"{result['seconds']:.1f} seconds. A sample is robust if it survives every attack and restart."
    )
    for line in report.attack_notes(result):
        print(line)
    if parsed.out is not None:
        print(f"Written to {parsed.out}" + (f" and {figure_of(parsed.out)}" if parsed.sweeps else ""))


def _data(parsed: Namespace) -> None:
    from controlat import data, report

    if parsed.name is None:
        print(report.table(*data.overview(), words=range(4)))
        print("\nFiles are looked for in --data-dir, else in the cache, where controlat data NAME puts them.")
        return
    folder = data.download(parsed.name, parsed.data_dir)
    where = "" if parsed.data_dir is None else f" --data-dir {parsed.data_dir}"
    print(f"{parsed.name} is in {folder}; use it with --data {parsed.name}{where}")


def _methods(parsed: Namespace) -> None:
    from controlat import methods, report

    if parsed.name is not None:
        print(methods.manual(parsed.name))
        return
    print(report.methods_table(methods.describe()).replace("\\|", "|"))
    print("\ncontrolat methods NAME describes one, with its options.")
    print("Any control can be given a schedule, such as pgd:steps=10,alpha=2/255,fosc=0.5..0@40.")


def _models(parsed: Namespace) -> None:
    from controlat import models, report
    from controlat.app.ranges import RANGES

    def row(entry: dict[str, Any]) -> list[str]:
        number = "" if entry["parameters"] is None else f"{entry['parameters']:,}"
        return [entry["name"], number, " x ".join(map(str, entry["input"])), entry["what"]]

    RANGES["num_classes"].check("num_classes", parsed.num_classes)
    heads = ["network", "parameters", "for input", ""]
    print(report.table(heads, [row(entry) for entry in models.describe(parsed.num_classes)], words=(0, 3)))
    print("\nInputs are pixels in [0, 1]. Other sizes are taken if they are not too small for the network.")


def _underscored(argument: str) -> str:
    """--data-dir is --data_dir."""
    name, sign, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + sign + value if name.startswith("--") else argument


_COMMANDS = {
    "evaluate": _evaluate,
    "search": _search,
    "report": _report,
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
        0 when it went well, 1 when training diverged or another process was lost, 130 or 143 when it was
        interrupted. Bad usage raises SystemExit(2), after one line.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    words = [_underscored(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    open_streams()
    try:
        with terminated():
            return _run(words)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        discard(sys.stdout)
        return 0
    except KeyboardInterrupt as error:
        print(_interrupted(words), file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _interrupted(words: list[str]) -> str:
    cure = dict.fromkeys(("evaluate", "search", "data"), "the same command goes on")
    cure["train"] = "the same command with --resume goes on"
    told = cure.get(words[0] if words else "", "the same command begins again")
    return f"controlat: interrupted; {told}"


def _run(words: list[str]) -> int:
    with ending(_interrupted(words)):
        from controlat._util.errors import NonFiniteError
        from controlat._util.parallel import PeerLost, started
        from controlat._util.pool import WorkerDied
        from controlat._util.texts import speaker
        from controlat.app.parser import build_parser

    parser = build_parser()
    try:
        parsed = parser.parse_args(words)
        if parsed.command == "search" and parsed.search.resume is not None:
            parsed = parser.parse_args(words, defaults=False)  # all that is not given is as it was
        if started() > 1 and (
            parsed.command not in ("train", "evaluate") or parsed[parsed.command].get("dry_run")
        ):
            raise ValueError(
                "train and evaluate run in several processes, nothing else; start it without torchrun"
            )
        _COMMANDS[parsed.command](parsed[parsed.command])
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (PeerLost, WorkerDied) as error:
        print(f"controlat{speaker()}: stopped: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("CONTROLAT_DEBUG"):
            raise
        parser.error("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except NonFiniteError as error:
        print(f"controlat{speaker()}: training stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
