"""What a search leaves for its reader: what is printed, summary.md and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlat._util import registry
from controlat._util.files import write_text
from controlat._util.texts import count, duration, table
from controlat.records import SearchResult, read_record
from controlat.report.search.judgement import label, recommended, search_table, verdict
from controlat.report.search.trials import at_prices, explained, failed, means
from controlat.report.sections import Figure

__all__ = ["read_search", "search_figures", "search_summary", "search_text", "write_search"]

Result = Mapping[str, Any]


def read_search(path: Path) -> dict[str, Any]:
    """The result file of a search, checked.

    Raises:
        ValueError: it is damaged, or of a search before its trials were kept; the message names the field.
    """
    result: dict[str, Any] = read_record(path, SearchResult)
    return result


def search_text(result: Result) -> str:
    """The table, which schedule to use, and how the search was made."""
    notes = "\n".join(f"- {line}" for line in _notes(result))
    return f"{search_table(result)}\n\n{verdict(result)}\n{notes}"


def _notes(result: Result) -> list[str]:
    """What the columns mean, and what the search cost."""
    s, spent, unit = result["settings"], result["spent"], result["unit"]
    weight = result["price"] * unit["mean_cost"]
    lines = [
        f"{len(s['judge_seeds'])} judging seeds, none of which the search used: mean ± deviation; against "
        "found: paired difference of robust accuracy with its 95 % interval.",
        f"J = Phi + {result['price']:.4g} n, n gradient evaluations per sample and step: all the cost of "
        f"{unit['schedule']} weighs {weight:.3g}.",
        "evals: gradient evaluations of one training, in samples. The search took "
        f"{count(spent['gradients'])} in {spent['trainings']} trainings, which is "
        f"{spent['gradients'] / unit['gradients']:.1f} times a training of {unit['schedule']}, and "
        f"{duration(spent['seconds'])} of training, all processes together.",
    ]
    if "C" in (c := result.get("certificate", {})):
        trusted = "" if c["trusted"] else ", not trusted"
        lines.append(f"C of what was found: {c['C']:.3g}{trusted}; D: {c['D']:.3g} (certificate/summary.md).")
    broken = [f"{label(row)}: {row['errors'][0]}" for row in result["rows"] if row["errors"]]
    return lines + [f"WARNING: training failed under {text}." for text in broken]


def search_summary(result: Result) -> str:
    """summary.md."""
    images = {name: f"![{figure.title}]({name})" for name, figure in search_figures(result).items()}
    env = result["environment"]
    parts = [
        "# Search for a schedule",
        verdict(result),
        search_table(result),
        "\n".join(f"- {line}" for line in _notes(result)),
        "## What was found",
        images["schedule.png"],
        "K and alpha over the epochs; real K: batches take the whole numbers below and above it in turn. No "
        "step size is drawn where no steps are taken. Pale: the best of those that were trained under "
        "several seeds.",
        *_certificate(result),
        "## How to use it",
        _use(result),
        "## How it was searched",
        _how(result),
        images["progress.png"],
        "Each mark is a trial, a triangle at the upper end one above it; open marks are trainings in part. "
        "The best so far, of whole ones, begins anew where trials get more seeds: the lowest of many J under "
        "one seed owes part of it to luck.",
        "## Robustness against cost",
        images["pareto.png"],
        "Above: trials of the search, Phi under its seeds (most have one), the Pareto front, and circles "
        "around the best at multiples of the price gamma. Below: the judgement, with 95 % intervals over "
        "seeds of training.",
        _prices(result),
        "## Which parameters mattered",
        *_parameters(result, images.get("parameters.png")),
        "## Schedules in full",
        table(["name", "schedule", "seconds"], _in_full(result), words=(0, 1)),
        f"Seconds of one training, with {env.get('threads', 1)} threads on {env['hardware']}, beside others "
        f"at a time. torch {env['torch']}, controlat {env['controlat']}.",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```bash
controlat train --out RUN --schedule DIR/schedule.json
```

```python
import controlat

schedule = controlat.load_schedule("DIR/schedule.json")
control = schedule.at(epoch=0, batch=0, batches=100)  # alpha and steps of one batch, for controlat.pgd
```

DIR is the directory of this file."""


def _use(result: Result) -> str:
    """How to train under what was found, which is not always what is recommended."""
    best = recommended(result)
    if best is None or best is result["rows"][0]:
        return _USE
    method = f" with the method {best['method']}" if best.get("method") else ""
    return (
        f"schedule.json holds what was found. What is recommended is `{best['schedule']}`{method}.\n\n{_USE}"
    )


def _how(result: Result) -> str:
    s, trials = result["settings"], result["trials"]
    spaces = ", ".join(f"`{space['name']}`" for space in result["spaces"])
    stages = dict.fromkeys(t["stage"] for t in trials)
    each = ", ".join(f"{stage}: {sum(t['stage'] == stage for t in trials)}" for stage in stages)
    lost = sum(map(failed, trials))
    lines = [
        f"Data {s['data']}, network {s['model']}, method {s['method']}, {s['norm']} eps {s['eps']}, "
        f"{s['epochs']} epochs. Spaces: {spaces}; proposer {s['proposer']}, budget {s['budget']}.",
        f"Trials by stage: {each}; {lost or 'none'} of them failed. The best were trained again under fresh "
        "seeds; after every round of the race the worse half dropped out, and what was decidedly behind.",
        "What was found is the best of many under a few seeds; only the judging seeds say what it is worth. "
        "They differ from those of the search, the test samples do not differ from seed to seed, so that "
        "intervals over seeds leave out the choice of test samples.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _certificate(result: Result) -> list[str]:
    """C and D of what was found, where they were asked for."""
    if "certificate" not in result:
        return [
            "C and D, which say how far it is from optimal by the maximum principle, were not asked for; "
            "`controlat search --resume DIR --certificate true` adds them, for about ten trainings per seed."
        ]
    c = result["certificate"]
    seeds = ", ".join(map(str, c["seeds"]))
    if "failed" in c:
        return [f"C and D under judging seeds {seeds} are not finite: {c['failed']}."]
    cells = [[f"{c['C']:.3g}", f"{c['D']:.3g}", "yes" if c["trusted"] else "no", seeds]]
    doubt = (
        ""
        if c["trusted"]
        else " Not trusted: a quarter of the way reached less than a quarter of what C promises, for one "
        "seed at least; go by D."
    )
    return [
        table(["C full", "D", "trusted", "seeds"], cells, words=(2, 3)),
        "C full: the maximum principle's criterion over the whole run; D: the largest decrease of J that "
        f"relaxed controls really reached.{doubt} certificate/summary.md has them in full, with caveats.",
    ]


def _prices(result: Result) -> str:
    """The best trial at several prices of a gradient evaluation."""
    weight = result["unit"]["mean_cost"]
    cells = []
    for price, trial in at_prices(result):
        n, phi = means(trial)
        factor = f"{price / result['price']:g}"
        cells.append(
            [
                factor,
                f"{price * weight:.3g}",
                trial["schedule"],
                f"{n:.2f}",
                f"{phi:.3f}",
                str(len(trial["runs"])),
            ]
        )
    heads = ["times gamma", "cost of PGD-K_max in J", "best trial", "n", "Phi", "seeds"]
    return f"The best trial at other prices, from the same trials:\n\n{table(heads, cells, words=(2,))}"


def _parameters(result: Result, image: str | None) -> list[str]:
    """Which parameters mattered, and where trials are too few to say so."""
    every = explained(result)
    few = [f"`{one.space}` ({one.trials} trials)" for one in every if not one.degree]
    told = [f"Too few trials to tell: {', '.join(few)}."] if few else []
    if image is None:
        return told
    return [
        image,
        "Share of the variance of the ranks of J that is lost without a parameter, in a model with a "
        "parabola (a straight line where trials are few) for each. Grey: no more than chance gives in one of "
        "twenty cases. Trials gather where J is low, so that a parameter may matter more elsewhere.",
        *told,
    ]


def _in_full(result: Result) -> list[list[str]]:
    return [
        [label(row), f"`{row['schedule']}`", "-" if row["errors"] else f"{row['seconds']:.1f}"]
        for row in result["rows"]
    ]


def search_figures(result: Result) -> dict[str, Figure]:
    """Figures by file name; without that of the parameters where nothing can be told of any."""
    every = registry.member(__package__, "figures").FIGURES  # which imports matplotlib
    told = any(one.degree for one in explained(result))
    return {name: figure for name, figure in every.items() if told or name != "parameters.png"}


def write_search(result: Result, out: Path) -> None:
    """Write summary.md and the figures beside result.json."""
    write_text(out / "summary.md", search_summary(result))
    for name, figure in search_figures(result).items():
        figure.draw(result, out / name)
