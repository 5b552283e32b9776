"""The greedy forms of C, which look one step ahead at the start of every epoch."""

from __future__ import annotations

from pathlib import Path

from controlat._util.drawing import panels, save
from controlat._util.texts import table
from controlat.pmp import FORMS
from controlat.report._contents import greedy_gamma, has_objective, over_seeds, summaries, terminal
from controlat.report._curves import finished, legend, over_time, seeds
from controlat.report._formats import estimate
from controlat.report.sections import Figure, Result, Section

__all__ = ["SECTION"]


def numbers(result: Result) -> dict[str, list[str]]:
    """C in both forms."""
    return {f"C {form}": [estimate(s["criterion"][form]) for s in summaries(result)] for form in FORMS}


def notes(result: Result) -> list[str]:
    """What the forms are, and what was searched."""
    s = result["settings"]
    scale = "1" if s["momentum"] == 0 else f"{1 / (1 - s['momentum']):.3g}"
    phi = "as above" if has_objective(result) else terminal(result)
    return [
        "C norm, C costate: mean over epochs (at the start of each) of max over the candidates of "
        "[s q - gamma n] minus its value at the schedule's own control; 0 is a schedule that the greedy "
        f"maximum principle cannot improve. gamma {greedy_gamma(result)}, n = gradient evaluations per "
        f"sample, s = {scale} times the epoch's learning rate over the mean one.",
        f"norm: q = |grad l(A)|^2 (Amata, eq. 14); costate: q = <grad Phi, grad l(A)>, Phi {phi} "
        "(eval mode; the greedy forms hold BatchNorm's running statistics fixed). "
        f"Searched: {_searched(result)}. Intervals: 95 % over probe batches{over_seeds(result)}",
    ]


def _searched(result: Result) -> str:
    """The admissible set G in words."""
    s, g = result["settings"], result["grid"]
    others, values = g.get("others", []), {"alpha": g["alphas"]} | g.get("more", {})
    steps = [] if "steps" in others else [f"K = {g.get('least', 0)}..{g['max_steps']}"]
    if s["maximiser"] == "tpe":
        ranges = [f"{name} from {v[0]:.3g} to {v[-1]:.3g}" for name, v in values.items() if v]
        return (
            f"{', '.join(steps + ranges)}, by {s['trials']} trials of hyperopt's TPE on the norm form "
            "(costate form: the best of these)"
        )
    sets = [f"{name} in {{{', '.join(f'{x:.3g}' for x in v)}}}" for name, v in values.items() if v]
    rest = f"; {', '.join(others)} as in the schedule, so that rows which differ there have other maxima"
    return ", ".join([*steps, *sets, "and the schedule's own control"]) + rest * bool(others)


def text(result: Result) -> str:
    """Other estimates of C, and C at other prices of a gradient evaluation."""
    kinds = {"plain": "mean", "unbiased": "unbiased", "cross-fitted": "cross_fitted"}
    heads = ["schedule", *(f"C {form} {kind}" for form in FORMS for kind in kinds)]
    gammas = [p["gamma"] for p in summaries(result)[0]["criterion"]["norm"]["prices"]]
    dear_heads = ["schedule", *(f"C {form}, gamma {g:.3g}" for form in FORMS for g in gammas)]
    estimates, dear = [], []
    for entry in result["schedules"]:
        c = entry["summary"]["criterion"]
        values = [c[form][key] for form in FORMS for key in kinds.values()]
        estimates.append([entry["text"], *("-" if v is None else f"{v:.3g}" for v in values)])
        dear.append([entry["text"], *(f"{p['mean']:.3g}" for form in FORMS for p in c[form]["prices"])])
    return "\n\n".join(
        [
            "## Estimates of C\n\nplain: the maximum over noisy values, biased upward; unbiased: without the "
            "noise of the batch mean; cross-fitted: control chosen on one half of the probe, scored on the "
            "other.",
            table(heads, estimates),
            f"## C at other prices\n\nFrom the same surfaces; gamma = {greedy_gamma(result)} is above.",
            table(dear_heads, dear),
        ]
    )


def draw(result: Result, path: Path) -> None:
    """C per epoch in both forms; bands are the range over seeds."""
    figure, axes = panels(9, 3.9, len(FORMS))
    for axis, form in zip(axes, FORMS, strict=True):
        for i, entry in enumerate(result["schedules"]):
            t = [e["epoch"] for e in entry["runs"][0]["criterion"]]
            rows = [[e[form]["value"] for e in run["criterion"]] for run in entry["runs"]]
            over_time(axis, i, entry["text"], t, rows)
        finished(axis, f"C, {form} form{seeds(result)}")
    axes[0].set_ylabel("max H − H(u)   (0 is best)")
    legend(figure, axes[0])
    save(figure, path)


SECTION = Section(
    order=30,
    numbers=numbers,
    notes=notes,
    text=text,
    figures=lambda result: {"criterion.png": Figure("C per epoch", draw)},
)
