"""Results as data, as a table and as files: everything printed or plotted comes from the result file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from controlat._util.files import write_text
from controlat._util.texts import count, table
from controlat.pmp import FORMS, interval
from controlat.records import Result, read_record
from controlat.robust_accuracy import wilson

__all__ = ["assemble", "read", "summary", "table", "write"]

FORMAT, VERSION = "controlat evaluation", 1


def assemble(**parts: Any) -> dict[str, Any]:
    """The result file: settings, environment, sizes, grid, and every schedule with its runs and summary."""
    schedules = [s | {"summary": _summarise(s["runs"])} for s in parts.pop("schedules")]
    return {"format": FORMAT, "version": VERSION, **parts, "schedules": schedules}


def read(path: Path) -> dict[str, Any]:
    """A result file, checked: every field that is used, and that its parts fit together.

    Raises:
        ValueError: it is damaged; the message names file and field.
    """
    result: dict[str, Any] = read_record(path, Result)
    try:
        summary(result)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: its parts do not fit together ({type(error).__name__}: {error})") from None
    return result


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "sd_over_seeds": statistics.stdev(values) if len(values) > 1 else None,
        "per_seed": list(values),
    }


def _accuracy(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds, and Wilson's interval there for ONE set of test points: the seeds share them."""
    spread, points = _spread([a["value"] for a in found]), found[0]["points"]
    return spread | {"points": points, "interval": list(wilson(round(spread["mean"] * points), points))}


def _criterion(runs: Sequence[Mapping[str, Any]], form: str) -> dict[str, Any]:
    """C: mean over epochs, then seeds; interval over probe batches, which all epochs and seeds share."""
    per_run = [[epoch[form] for epoch in run["criterion"]] for run in runs]
    found = _spread([statistics.fmean(g["value"] for g in gaps) for gaps in per_run])
    every = [gap for gaps in per_run for gap in gaps]
    left_out = np.mean([gap["jackknife"] for gap in every], axis=0)
    for name in ("unbiased", "cross_fitted"):
        values = [gap[name] for gap in every]
        found[name] = None if None in values else statistics.fmean(values)
    found["prices"] = [
        {
            "gamma": price["gamma"],
            "mean": statistics.fmean(e["prices"][i][form] for run in runs for e in run["criterion"]),
        }
        for i, price in enumerate(runs[0]["criterion"][0]["prices"])
    ]
    found["dropped"] = sorted({d for gap in every for d in gap["dropped"]})
    doubt = statistics.fmean(gap["doubt"] for gap in every)
    return found | {"interval": interval(found["mean"], list(left_out), least=0.0, more=doubt)}


def _summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluations = [run["evaluation"] for run in runs]
    return {
        **({"objective": _spread([run["objective"]["J"] for run in runs])} if "objective" in runs[0] else {}),
        "criterion": {form: _criterion(runs, form) for form in FORMS},
        "clean": _accuracy([e["clean"] for e in evaluations]),
        "robust": _accuracy([e["robust"] for e in evaluations]),
        "after": {
            name: _accuracy([e["after"][name] for e in evaluations]) for name in evaluations[0]["after"]
        },
        "gradients": _spread([run["gradients"] for run in runs]),
        "seconds": _spread([run["seconds"] for run in runs]),
        **_extras(runs),
        **({"full": _full(runs)} if "full" in runs[0] else {}),
        "criterion_gradients": sum(e["gradients"] for run in runs for e in run["criterion"]),
        "evaluation_gradients": sum(e["gradients"] for e in evaluations),
        "dropped": sorted({d for run in runs for e in run["epochs"] for d in e["dropped"]}),
    }


def _full(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The full criterion by horizon, and its calibration, over seeds; what failed where it is not finite."""
    failed = [f"seed {run['seed']}: {run['full']['failed']}" for run in every if "failed" in run["full"]]
    if failed:
        return {"failed": "; ".join(failed)}
    runs = [run["full"] for run in every]
    calibrations = [run["calibration"] for run in runs]
    horizons = [
        _spread([h["value"] for h in found])
        | {"steps": found[0]["steps"], "interval": _together([(h["value"], h["interval"]) for h in found])}
        for found in zip(*(run["horizons"] for run in runs), strict=True)
    ]
    parts = dict.fromkeys(p for c in calibrations for p in c["reliability"])  # 1/8 where it was needed
    return {
        "horizons": horizons,
        "objective": _spread([c["objective"] for c in calibrations]),
        "certificate": _spread([c["certificate"] for c in calibrations]),
        "kappa": _known([c["kappa"] for c in calibrations]),
        "reliability": {p: _known([c["reliability"].get(p) for c in calibrations]) for p in parts},
        "uncalibrated": sum(not c["calibrated"] for c in calibrations),
        "reach": min((c["reach"] or 0.0 for c in calibrations if c["gain"] > 0), default=None),
        "gain": _spread([c["gain"] for c in calibrations]),
        "model_gain": _spread([c["model_gain"] for c in calibrations]),
        **{name: _known([run[name] for run in runs]) for name in ("C_rho", "cosine", "growth")},
        "prices": [
            {"gamma": found[0]["gamma"], "mean": statistics.fmean(p["value"] for p in found)}
            for found in zip(*(run["prices"] for run in runs), strict=True)
        ],
        "same": all(run["same"] is not False for run in runs),
        "dropped": sorted({name for run in runs for name in run["dropped"]}),
        "gradients": sum(sum(run["gradients"].values()) for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
    }


def _known(values: Sequence[Any]) -> dict[str, Any] | None:
    """Mean and spread of the values that are numbers; None without any (r means nothing where G is 0)."""
    numbers = [float(v) for v in values if v is not None]
    return _spread(numbers) if numbers else None


def _together(found: Sequence[tuple[float, Sequence[float] | None]]) -> list[float] | None:
    """The interval of a mean of independent values, from the interval of each, one side at a time."""
    known = [(value, *interval) for value, interval in found if interval is not None]
    if len(known) < len(found):
        return None
    mean = statistics.fmean(value for value, _, _ in known)
    below = sum((value - low) ** 2 for value, low, _ in known) ** 0.5 / len(known)
    above = sum((high - value) ** 2 for value, _, high in known) ** 0.5 / len(known)
    return [mean - below, mean + above]


def _extras(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AutoAttack and transfer where they ran, and warnings with the seeds that they were given for."""
    found: dict[str, Any] = {}
    for name in ("autoattack", "transfer"):
        parts = [run["evaluation"][name] for run in runs if name in run["evaluation"]]
        if parts:
            found[name] = _accuracy([part["robust"] for part in parts])
    told: dict[str, list[int]] = {}
    for run in runs:
        for text in run["evaluation"]["warnings"]:
            told.setdefault(text, []).append(run["seed"])
    return found | {"warnings": [{"text": text, "seeds": seeds} for text, seeds in told.items()]}


def _c(found: Mapping[str, Any]) -> str:
    text = f"{found['mean']:.3g}"
    if found["interval"] is not None:
        text += " [{:.3g}, {:.3g}]".format(*found["interval"])
    return text + ("" if found["sd_over_seeds"] is None else f" ±{found['sd_over_seeds']:.2g}")


def _percent(found: Mapping[str, Any]) -> str:
    text = "{:.1%} [{:.1%}, {:.1%}]".format(found["mean"], *found["interval"]).replace("%", "")
    return text + (f" ±{100 * found['sd_over_seeds']:.1f}" if found["sd_over_seeds"] is not None else "")


def _full_cells(found: Mapping[str, Any]) -> list[str]:
    """C over the whole run, and the certificate."""
    if "failed" in found:
        return ["not finite", "-"]
    doubt = " uncalibrated" if found["uncalibrated"] else ""
    return [_c(found["horizons"][-1]) + doubt, f"{found['certificate']['mean']:.3g}"]


def _objective(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """J over seeds; in results of before it stands with the full criterion alone."""
    return found.get("objective", found.get("full", {}).get("objective"))  # type: ignore[no-any-return]


_TITLES = {"autoattack": "AutoAttack", "transfer": "transfer"}


def _shown(result: Mapping[str, Any]) -> list[str]:
    """Which of the extra accuracies the result has."""
    return [name for name in _TITLES if name in result["schedules"][0]["summary"]]


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table."""
    full = "full" in result["schedules"][0]["summary"]
    known = any(_objective(schedule["summary"]) for schedule in result["schedules"])
    heads = [
        "schedule",
        *(["J"] if known else []),
        *(["C full", "D"] if full else []),
        "C norm",
        "C costate",
        "clean %",
        "robust %",
        *(f"{_TITLES[name]} %" for name in _shown(result)),
        "gradient evals",
        "seconds",
    ]
    cells = []
    for schedule in result["schedules"]:
        s = schedule["summary"]
        cells.append(
            [
                schedule["text"],
                *([_mean(_objective(s))] if known else []),
                *(_full_cells(s["full"]) if full else []),
                *(_c(s["criterion"][form]) for form in FORMS),
                f"{100 * s['clean']['mean']:.1f}",
                _percent(s["robust"]),
                *(_percent(s[name]) for name in _shown(result)),
                count(s["gradients"]["mean"]),
                f"{s['seconds']['mean']:.1f}",
            ]
        )
    return heads, cells


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the numbers of the table mean, in lines."""
    s, sizes, g = result["settings"], result["sizes"], result["grid"]
    alphas = ", ".join(f"{a:.3g}" for a in g["alphas"])
    scale = "1" if s["momentum"] == 0 else f"{1 / (1 - s['momentum']):.3g}"
    seeds = ", ".join(map(str, s["seeds"]))
    least, others = g.get("least", 0), g.get("others", [])
    searched = f"K = {least}..{g['max_steps']}" + f", alpha in {{{alphas}}}" * bool(g["alphas"])
    searched += ", and the schedule's own control"
    if others:
        searched += (
            f"; {', '.join(others)} as in the schedule, so that rows which differ there have other maxima"
        )
    if s["maximiser"] == "tpe":
        searched = (
            f"K = 0..{g['max_steps']}, alpha from {g['alphas'][0]:.3g} to {g['alphas'][-1]:.3g}, by "
            f"{s['trials']} trials of hyperopt's TPE on the norm form (costate form: the best of these)"
        )
    several = len(s["seeds"]) > 1
    said = "as above" if _objective_note(result) else _phi(result)
    lines = [
        f"{s['data']} ({sizes['train']} training, {sizes['held_out']} held-out{_held_out(sizes)}, "
        f"{sizes['test']} test points), {s['model']}, {s['method']}{_options(s)}, {s['norm']} "
        f"eps {s['eps']}, {s['epochs']} epochs, seeds {seeds}.",
        *_run_note(result),
        *_objective_note(result),
        *_full_notes(result),
        "C norm, C costate: mean over epochs (at the start of each) of max over (alpha, K) of "
        "[s q - gamma n] minus its value at the schedule's own control; 0 is a schedule that the greedy "
        f"maximum principle cannot improve. gamma {s['gamma']}, n = gradient evaluations per sample, "
        f"s = {scale} times the epoch's learning rate over the mean one.",
        f"norm: q = |grad l(A)|^2 (Amata, eq. 14); costate: q = <grad Phi, grad l(A)>, Phi {said} "
        "(eval mode; the greedy forms hold BatchNorm's running statistics fixed). "
        f"Searched: {searched}. Intervals: 95 % over probe batches"
        + (", ± standard deviation over seeds." if several else "."),
        f"robust: survives {', '.join(s['attacks'])}; 95 % Wilson interval for {sizes['test']} points"
        + (", ± standard deviation over seeds." if several else "."),
        *_extra_notes(result),
        "gradient evals: forward-backward passes, in samples, of training; seconds: of training "
        "(both without validation, criterion and evaluation; mean over seeds).",
    ]
    lines += [
        f"{e['text']} was made for {e['schedule']['epochs']:g} epochs; this run has {s['epochs']}."
        for e in result["schedules"]
        if e["schedule"]["epochs"] != s["epochs"]
    ]
    lines += _greedy_notes(result)
    dropped = sorted({d for schedule in result["schedules"] for d in schedule["summary"]["dropped"]})
    return lines + [f"Dropped dependences on theta: {'; '.join(dropped)}."] * bool(dropped)


def _greedy_notes(result: Mapping[str, Any]) -> list[str]:
    """What the greedy forms leave out."""
    criteria = [schedule["summary"]["criterion"] for schedule in result["schedules"]]
    found = sorted({d for c in criteria for form in FORMS for d in c[form].get("dropped", ())})
    if len(found) > 3:
        found = [*found[:3], f"{len(found) - 3} more in result.json"]
    lines = [f"C norm, C costate leave out: {'; '.join(found)}."] * bool(found)
    decay = "C norm leaves out weight decay, which moves theta, too; in C costate it cancels."
    return lines + [decay] * bool(result["settings"].get("weight_decay", 0))


def _phi(result: Mapping[str, Any]) -> str:
    """The terminal cost in words; results of before it could be chosen do not have them."""
    return str(result.get("terminal", "the adversarial loss on held-out data"))


def _held_out(sizes: Mapping[str, int]) -> str:
    """The two parts of the held-out samples; results of before have one slice for both."""
    return f" ({sizes['validation']} for validation, {sizes['phi']} for Phi)" if "phi" in sizes else ""


def _options(settings: Mapping[str, Any]) -> str:
    """Options of the method, where some were given."""
    given = settings.get("method_options") or {}
    return f" ({', '.join(f'{name}={value}' for name, value in given.items())})" if given else ""


def _run_note(result: Mapping[str, Any]) -> list[str]:
    """Whether a finished run was met again."""
    if result.get("reproduced") is None:
        return []
    how = "bit for bit" if result["reproduced"] else "but not bit for bit (another device or thread count?)"
    return [f"Training was repeated from {result['settings']['run']}, {how}."]


def _objective_note(result: Mapping[str, Any]) -> list[str]:
    """What J is, where it is known."""
    if not any({"objective", "full"} & schedule["summary"].keys() for schedule in result["schedules"]):
        return []
    return [f"J = Phi + gamma eta sum n, with Phi {_phi(result)} and eta the mean learning rate."]


def _full_notes(result: Mapping[str, Any]) -> list[str]:
    summaries, s = [schedule["summary"] for schedule in result["schedules"]], result["settings"]
    if "full" not in summaries[0]:
        return []
    lines = [
        "C full: Amata's (13) over the whole run, from exact costates: the sum over epochs (shorter blocks "
        "where the control changes within one) of max over (alpha, K) of the sum of H(v) - H(u) over their "
        "steps, divided by eta T; 95 % interval, up to "
        f"{s['looks']} steps of each were looked at. D: the largest decrease of J that relaxed controls "
        "really reached, half or a quarter of the way to the maximisers, or an eighth where first order does "
        "not reach so far.",
    ]
    doubtful = [e["text"] for e in result["schedules"] if e["summary"]["full"].get("uncalibrated")]
    if doubtful:
        lines.append(
            f"uncalibrated ({', '.join(doubtful)}): a quarter of the way reached less than a quarter of what "
            "C promises, for one seed at least; go by D there."
        )
    lines += [
        f"WARNING, {e['text']}: no C full, {e['summary']['full']['failed']}."
        for e in result["schedules"]
        if "failed" in e["summary"]["full"]
    ]
    if not all(e["full"].get("same", True) for e in summaries):
        lines.append("The recorded roll-out of some run did not end with the bits of its training.")
    dropped = sorted({name for e in summaries for name in e["full"].get("dropped", [])})
    return lines + [f"Costates leave out: {'; '.join(dropped)}."] * bool(dropped)


def _extra_notes(result: Mapping[str, Any]) -> list[str]:
    summaries, s = [schedule["summary"] for schedule in result["schedules"]], result["settings"]
    lines = []
    if "autoattack" in summaries[0]:
        points = summaries[0]["autoattack"]["points"]
        lines.append(f"AutoAttack (standard version, Croce and Hein 2020): on {points} of the test points.")
    if "transfer" in summaries[0]:
        lines.append(f"transfer: survives the same attacks made on the surrogate {s['surrogate']}.")
    told = [
        f"WARNING, {schedule['text']}, seed {', '.join(map(str, w['seeds']))}: {w['text']}."
        for schedule in result["schedules"]
        for w in schedule["summary"]["warnings"]
    ]
    checked = result["schedules"][0]["runs"][0]["evaluation"]["masking"]["points"]
    if told or not checked:
        return lines + told
    return [*lines, f"Checks for gradient masking on up to {s['checks']} points of each run: nothing found."]


def attack_table(result: Mapping[str, Any]) -> str:
    """The accuracies of one network under attack."""

    def row(name: str, accuracy: Mapping[str, Any]) -> list[str]:
        low, high = accuracy["interval"]
        return [name, str(accuracy["points"]), f"{accuracy['value']:.1%}", f"[{low:.1%}, {high:.1%}]"]

    cells = [row("clean", result["clean"])]
    cells += [row(f"after {name}", a) for name, a in result["after"].items()]
    cells.append(row("robust", result["robust"]))
    if "transfer" in result:
        cells += [row(f"transfer, {name}", a) for name, a in result["transfer"]["after"].items()]
    if "autoattack" in result:
        cells += [row(f"AutoAttack, after {name}", a) for name, a in result["autoattack"]["after"].items()]
    if "curves" in result:
        cells += [row(f"pgd-20, eps {a['eps']:.4g}", a) for a in result["curves"]["eps"]]
        cells += [row(f"pgd, {a['steps']} steps", a) for a in result["curves"]["steps"]]
    return table(["", "points", "accuracy", "95 % interval"], cells)


def attack_notes(result: Mapping[str, Any]) -> list[str]:
    """What else an attack on one network cost, and its warnings, in lines."""
    titles = {"masking": "Checks for gradient masking", "transfer": "Transfer", "curves": "Sweeps"}
    lines = []
    for name, title in (titles | {"autoattack": "AutoAttack"}).items():
        part = result.get(name, {})
        if part.get("gradients"):
            spent = (
                f"{count(part['gradients'])} gradient evaluations, {count(part['forwards'])} forward passes"
            )
            none = ": nothing found" if name == "masking" and not part["warnings"] else ""
            lines.append(f"{title}{none} ({spent}, {part['seconds']:.1f} seconds).")
    return lines + [f"WARNING: {text}." for text in result["warnings"]]


def methods_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The training systems, as `controlat.methods.describe` tells them."""
    heads = ["method", "minimises", "controls (default)", "gradient evaluations", "source"]
    keys = ("name", "what", "controls", "cost", "source")
    cells = [[str(e[key]).rstrip(".").replace("|", "\\|") for key in keys] for e in entries]
    return table(heads, cells, words=range(len(heads)))


FIGURES = {
    "schedules.png": "step size and steps",
    "criterion.png": "C per epoch",
    "tradeoff.png": "robustness against cost",
}


SWEEPS = {"sweeps.png": "accuracy against radius and steps"}
FULL = {
    "horizons.png": "C by horizon",
    "costates.png": "costates, and what C promised beside what was reached",
    "surfaces.png": "the Hamiltonian over step size and steps (ring: u, star: the maximiser)",
}


def figures(result: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a result, by file name, with their titles."""
    from controlat.report.plots import examined

    full = bool(examined(result))
    return FIGURES | (FULL if full else {}) | (SWEEPS if result["settings"]["sweeps"] else {})


def _best(result: Mapping[str, Any]) -> str:
    """Per epoch, under the first seed: the schedule's control, and where the norm form has its maximum."""
    runs = [schedule["runs"][0] for schedule in result["schedules"]]

    def cell(run: Mapping[str, Any], epoch: int) -> str:
        if epoch >= len(run["criterion"]):
            return "-"
        gap = run["criterion"][epoch]["norm"]
        u, v = gap["control"], gap["maximiser"]
        if u == v:
            return f"{_knobs(u, ['steps'])} is best"
        shown = [name for name in ("steps", "alpha") if name in u]
        return f"{_knobs(u, shown)} → {_knobs(v, shown)}, +{gap['value']:.3g}"

    heads = ["epoch", *(schedule["text"] for schedule in result["schedules"])]
    epochs = range(max(len(run["criterion"]) for run in runs))
    return table(heads, [[str(e), *(cell(run, e) for run in runs)] for e in epochs])


def _full_parts(result: Mapping[str, Any]) -> list[str]:
    """The full criterion: by horizon and price, its calibration, and what it would change in every block."""
    from controlat.report.plots import examined

    entries = examined(result)
    if not entries:
        return []
    every = [(e["text"], e["summary"]["full"]) for _, e in entries]
    first = every[0][1]
    last = len(first["horizons"]) - 1
    heads = [
        *(f"h = {h['steps']}" if i < last else "whole run" for i, h in enumerate(first["horizons"])),
        *(f"whole run, gamma {p['gamma']:.3g}" for p in first["prices"]),
    ]
    values = [
        [text, *map(_c, full["horizons"]), *(f"{p['mean']:.3g}" for p in full["prices"])]
        for text, full in every
    ]
    parts = dict.fromkeys(p for _, full in every for p in full["reliability"])
    names = [f"r({Fraction(p)})" for p in parts]
    trust = [
        [
            text,
            *(f"{full[name]['mean']:.3g}" for name in ("objective", "gain", "certificate", "model_gain")),
            *(_mean(full["reliability"].get(p)) for p in parts),
            "-" if full["reach"] is None else str(Fraction(full["reach"]) or "none"),
            _mean(full["kappa"]),
            *(_mean(full[name]) for name in ("C_rho", "cosine", "growth")),
        ]
        for text, full in every
    ]
    seed, looks = entries[0][1]["runs"][0]["seed"], result["settings"]["looks"]
    return [
        "## The full criterion\n\nFrom costates that start at the end of windows of h steps: h = 1 looks one "
        f"step ahead, the whole run is (13). Up to {looks} steps of each epoch were looked at; mean over "
        "seeds, 95 % interval over these steps, ± standard deviation over seeds.",
        table(["schedule", *heads], values),
        "## What its size means\n\nG = C eta T: what all maximisers together would gain to first order. "
        "D: the largest decrease that roll-outs which go a part lambda of the way to them reached; r = "
        "(decrease reached)/(lambda G); reach: the largest lambda with r >= 1/4 for all seeds; model: the "
        "largest decrease of the parabola through J with slope -G and the roll-out at lambda = 1/2; kappa = "
        "G/(J - its lower bound), above 1 G cannot be a decrease; C_rho: C in the trust region of that "
        "parabola; cosine: between the costate and what the maximiser changes in the state, negative "
        "where it is taken for its price; growth: of |p| from the end of the run to the first step looked "
        "at. Means over seeds; - where there is none.",
        table(
            ["schedule", "J", "G", "D", "model", *names, "reach", "kappa", "C_rho", "cosine", "growth"], trust
        ),
        "## What the full maximum principle would change\n\nControl of the schedule → maximiser over the "
        f"block, and what it would gain in units of J; seed {seed}.",
        _changes([e for _, e in entries]),
    ]


def _mean(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['mean']:.3g}"


def _changes(entries: Sequence[Mapping[str, Any]]) -> str:
    """Per epoch, under the first seed: what each block of it would change."""
    runs = [schedule["runs"][0] for schedule in entries]

    def cell(run: Mapping[str, Any], epoch: int) -> str:
        parts = []
        for block in run["full"]["blocks"]:
            if int(block["t"] + 1e-9) != epoch:
                continue
            u, v = block["control"], block["maximiser"]
            names = [name for name in ("steps", "alpha") if name in u]
            better = f" → {_knobs(v, names)}, +{block['gain']:.3g}" if u != v else " is best"
            parts.append(_knobs(u, names) + better)
        return "; ".join(parts) or "-"

    heads = ["epoch", *(schedule["text"] for schedule in entries)]
    epochs = range(max(len(run["criterion"]) for run in runs))
    return table(heads, [[str(e), *(cell(run, e) for run in runs)] for e in epochs])


def _knobs(u: Mapping[str, float], names: Sequence[str]) -> str:
    symbols = {"steps": "K", "alpha": "α"}
    return " ".join(f"{symbols[name]}={u[name]:.3g}" for name in names if name in u)


def summary(result: Mapping[str, Any]) -> str:
    """summary.md: the table, what it means, more estimates of C, the accuracy after each attack, figures."""
    more_heads = ["schedule", *(f"C {f} {k}" for f in FORMS for k in ("plain", "unbiased", "cross-fitted"))]
    more, attacks, dear = [], [], []
    for schedule in result["schedules"]:
        found = schedule["summary"]["criterion"]
        estimates = [found[f][k] for f in FORMS for k in ("mean", "unbiased", "cross_fitted")]
        more.append([schedule["text"], *("-" if v is None else f"{v:.3g}" for v in estimates)])
        prices = [p["gamma"] for p in found["norm"]["prices"]]
        dear.append([schedule["text"], *(f"{p['mean']:.3g}" for f in FORMS for p in found[f]["prices"])])
        after = schedule["summary"]["after"].values()
        attacks.append([schedule["text"], *(f"{100 * a['mean']:.1f}" for a in after)])
    names = list(result["schedules"][0]["summary"]["after"])
    env = result["environment"]
    spent = sum(schedule["summary"]["criterion_gradients"] for schedule in result["schedules"])
    machine = (
        f"{env['hardware']}, {env['threads']} threads, torch {env['torch']}, controlat {env['controlat']}"
    )
    parts = [
        "# Evaluation of schedules",
        table(*rows(result)),
        "\n".join(f"- {line}" for line in notes(result)),
        "## Estimates of C\n\nplain: the maximum over noisy values, biased upward; unbiased: without the "
        "noise of the batch mean; cross-fitted: control chosen on one half of the probe, scored on the "
        "other.",
        table(more_heads, more),
        f"## C at other prices\n\nFrom the same surfaces; gamma = {result['settings']['gamma']} is above.",
        table(["schedule", *(f"C {f}, gamma {g:.3g}" for f in FORMS for g in prices)], dear),
        "## What the greedy maximum principle would have done\n\nControl of the schedule → maximiser of the "
        f"norm form, and the gap; seed {result['schedules'][0]['runs'][0]['seed']}. Both terms of each are "
        f"in result.json. All surfaces together took {count(spent)} gradient evaluations.",
        _best(result),
        *_full_parts(result),
        "## Accuracy left after each attack in turn (%)",
        table(["schedule", *names], attacks),
        "\n".join(f"![{title}]({name})" for name, title in figures(result).items()),
        f"Made on {machine}.",
    ]
    return "\n\n".join(parts) + "\n"


def write(result: Mapping[str, Any], out: Path) -> None:
    """Write summary.md and the figures beside result.json, where they are missing."""
    from controlat.report import plots

    if not (out / "summary.md").exists():
        write_text(out / "summary.md", summary(result))
    for name in figures(result):
        if not (out / name).exists():
            plots.FIGURES[name](result, out / name)
