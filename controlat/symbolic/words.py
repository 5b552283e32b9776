"""A derivation in words, from its result only: what the terminal and summary.md have in common."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from controlat._util.texts import count, table

__all__ = ["greek"]

Result = Mapping[str, Any]
WIDTH = 100
_MANY = 60  # stationary points: a loss has so many only where it is constant
_LETTERS = {
    "theta_0": "θ₀",
    **{"theta": "θ", "alpha": "α", "tau": "τ", "gamma": "γ", "rho": "ρ", "sigma": "σ", "<=": "≤"},
}
# key: left side in characters, in LaTeX, what it is
QUANTITIES = {
    "x": ("x*(θ)", r"x^*(\theta)", "inner maximum that is followed"),
    "robust": ("L(θ)", r"L(\theta) = l(\theta, x^*(\theta))", "robust loss"),
    "plain": ("l(θ, x0)", r"l(\theta, x_0)", "non-robust loss"),
    "curvature": ("l_xx(θ, x*)", r"l_{xx}(\theta, x^*)", "curvature at the inner maximum"),
    "rho": ("ρ", r"x_K = x^* + \rho^K (x_0 - x^*), \qquad \rho", "contraction of one inner step of size α"),
    "alpha": ("α*(θ)", r"\alpha^*(\theta)", "exact step: from the data point to x* at once"),
    "newton": (
        "-1/l_xx(θ, x0)",
        r"-\frac{1}{l_{xx}(\theta, x_0)}",
        "Newton step; not exact, l is not quadratic",
    ),
    "speed": ("θ'", r"\dot\theta = -L'(\theta)", "robust flow"),
    "time": ("t(θ)", r"t = t(\theta) - t(\theta_0), \qquad t(\theta)", "time that the flow takes"),
    "theta": ("θ(t)", r"\theta(t)", "solution of the flow"),
    "K": ("K*(t)", r"K^*(t) = \frac{\tau}{\alpha^*(\theta(t))}", "inner steps"),
    "series": ("K*(t)", r"K^*(t)", "Taylor series at t = 0"),
    "J": ("J", r"J = L(\theta(T)) + \gamma \int_0^T K^*\,dt", "cost of the schedule"),
}
CRITERION = "C: mean over time of max H − H(u), 0 where the principle holds"
HOLDS = {True: "yes", False: "NO", None: "undecided"}


def greek(text: str) -> str:
    """Names of Greek letters as letters.

    >>> greek("alpha K = tau, 0 < alpha <= alpha*(theta)")
    'α K = τ, 0 < α ≤ α*(θ)'
    """
    return re.sub(r"\b(theta_0|theta|alpha|tau|gamma|rho|sigma)\b|<=", lambda m: _LETTERS[m[0]], text)


def num(value: float | str | None) -> str:
    """Four significant digits; a dash for what is missing or not finite, which a file holds as text."""
    value = math.nan if value is None else float(value)
    return f"{value + 0.0:.4g}" if math.isfinite(value) else "-"


def answers_of(result: Result) -> list[tuple[str, Result]]:
    """The derived quantities, in the order of reading."""
    return [(key, result["formulas"][key]) for key in QUANTITIES if key in result["formulas"]]


def on_a_line(text: str) -> str:
    """A formula of Python on one line: 2*tau**2 as 2·τ^2."""
    return greek(text.replace("**", "^").replace("*", "·"))


def say_known(answer: Result) -> str:
    """How a quantity without a formula is known."""
    head = {"scipy": "numerically (scipy): ", "": ""}.get(answer["by"], f"{answer['by']}: ")
    return f"{head}{greek(answer['why'])}"


def say_given(result: Result) -> str:
    """The numbers behind the symbols."""
    task = result["task"]
    told = {"x0": task["x0"], "θ₀": task["theta0"], "τ = α K": task["tau"], "T": task["horizon"]}
    told |= {"γ": task["gamma"]} | task["parameters"]
    return ", ".join(f"{name} = {value:.6g}" for name, value in told.items())


def say_zeros(zeros: Sequence[Result], form: str) -> str:
    """Minima of a loss of theta, then its other stationary points: formula and number."""
    if len(zeros) > _MANY:
        return (
            f"stationary for θ from {num(zeros[0]['theta'])} to {num(zeros[-1]['theta'])}, where it is flat"
        )
    told: dict[str, list[str]] = {}
    for zero in sorted(zeros, key=lambda z: (z["kind"] != "minimum", z["theta"])):
        value = num(zero["theta"])
        exact = (
            f"${zero['latex']}$" if form == "latex" and "latex" in zero else on_a_line(zero.get("text", ""))
        )
        plain = not exact or exact.strip("$") == value
        told.setdefault(zero["kind"], []).append(value if plain else f"{exact} = {value}")
    kinds = {"minimum": "minima", "maximum": "maxima", "inflection": "inflections"}
    parts = [f"{kinds[k] if len(v) > 1 else k} at θ = {' and '.join(v)}" for k, v in told.items()]
    return "; ".join(parts) or "no stationary point where the inner maximum is followed"


def say_left_out(result: Result) -> list[str]:
    """What the time limit left out: a line, or none."""
    lost, seconds = result.get("left_out"), result["settings"]["seconds"]
    if not lost:
        return []
    return [f"left out at the time limit of {num(seconds)} seconds (--seconds): {greek('; '.join(lost))}"]


def say_followed(result: Result) -> str:
    """Which inner maximum is followed."""
    maxima = [p for p in result["stationary"] if p["kind"] == "maximum"]
    rank = f"number {result['branch']['rank'] + 1} of {len(maxima)} by the value of l"
    which = "the only one found" if len(maxima) < 2 else rank
    low, high = result["branch"]["domain"]
    where = f"followed for θ from {num(low)} to {num(high)}"
    return f"x* = {num(result['branch']['x'])} at θ₀, {which}; {where}"


def say_rising(result: Result) -> str:
    k, t = result["curves"]["K"], result["task"]["horizon"]
    parts = [f"[{num(a)}, {num(b)}]" for a, b in result["rising"]]
    if result["rising"] == [[0, t]]:
        return f"K* increases on all of [0, {num(t)}], from {num(k[0])} to {num(k[-1])}"
    if max(k) - min(k) <= 1e-9 * max(k):
        return f"K* is constant, {num(k[0])}"
    if not parts:
        return f"K* decreases on all of [0, {num(t)}], from {num(k[0])} to {num(k[-1])}"
    ends = f"{num(k[0])} at t = 0, {num(k[-1])} at t = {num(t)}"
    return f"K* increases on {', '.join(parts)} and nowhere else ({ends})"


def say_polynomial(values: Sequence[float], power: str) -> str:
    """10 + 10 t - 2 t^2."""
    terms = [(f"{'-' if v < 0 else '+'} ", f"{abs(v):.4g}", n) for n, v in enumerate(values)]
    shown = [
        sign + size + (" t" if n else "") + (power.format(n) if n > 1 else "") for sign, size, n in terms
    ]
    return " ".join(shown).removeprefix("+ ")


def say_spent(result: Result) -> str:
    cost, gamma = result["cost"], result["task"]["gamma"]
    parts = f"{num(cost['terminal'])} + {num(gamma)} × {num(cost['inner'])}"
    return f"J = L(θ(T)) + γ ∫ K* dt = {parts} = {num(cost['J'])}"


def course_table(result: Result) -> str:
    """theta, alpha* and K* at some times."""
    curves = result["curves"]
    last = len(curves["t"]) - 1
    rows = [[num(curves[name][last * i // 6]) for name in ("t", "theta", "alpha", "K")] for i in range(7)]
    return table(["t", "θ(t)", "α*", "K*"], rows, words=())


def bullets(lines: Iterable[str]) -> str:
    fill = {"width": WIDTH, "subsequent_indent": "  ", "break_long_words": False}
    return "\n".join(textwrap.fill(f"- {line}", **fill) for line in lines)  # type: ignore[arg-type]


def network_table(result: Result, whole: bool) -> str:
    """The network's schedule; rows in which nothing new begins are left out of a long one."""
    found = result["network"]
    heads = ["epoch", "K* of the landscape", "mapped", "K", "α (pixels)", "cut off"]
    columns = zip(*(found[name] for name in ("t", "real", "mapped", "controls", "clipped")), strict=True)
    rows = [
        [f"{t:g}", num(real), num(mapped), f"{u['steps']:g}", num(u["alpha"]), "yes" if cut else ""]
        for t, real, mapped, u, cut in columns
    ]
    if whole or len(rows) <= 16:
        return table(heads, rows, words=())
    kept = [row for i, row in enumerate(rows) if i == 0 or row[3:] != rows[i - 1][3:]]
    left_out = len(rows) - len(kept)
    return table(heads, kept, words=()) + f"\n({left_out} pieces like the one before them are not shown)"


def say_cut(result: Result) -> str:
    """What became of K* on the way to the network."""
    found = result["network"]
    tau = found["schedule"]["knobs"]["alpha"]["values"][0]
    epochs = f"{found['schedule']['epochs']:g} epochs in pieces of {found['schedule']['resolution']:g}"
    held = ""
    if result["calibration"] is not None and (times := result["calibration"]["fit"]["times"])[0] > 0:
        until = times[0] / times[-1] * found["schedule"]["epochs"]
        held = f"; K* at t = 0 is held until epoch {until:.4g}, where the fit begins"
    return f"{greek(found['note'])}{held}; K rounded half up, α = {num(tau)}/K pixels; {epochs}"


def schedule_table(result: Result) -> str:
    """J and C of the derived schedule and of others."""
    found = result["verification"]
    rows = [["derived: α*, K*", num(found["derived"]["J"]), num(found["derived"]["C"]), ""]]
    for row in found["comparisons"]:
        values = [num(row["J"]), num(row["C"]), f"{row['raised']:.0%}"] if "error" not in row else ["-"] * 3
        rows.append([row["name"], *values])
    return table(["schedule", "J", "C", "time with K raised to K*"], rows)


def say_checks(found: Result) -> list[str]:
    """The boundary problem and the direct minimisation, in words."""
    lines = []
    if (b := found["boundary"]) is not None and b.get("success"):
        differences = f"{num(b['theta_difference'])} in θ, {num(b['p_difference'])} in p"
        lines.append(f"Two-point boundary problem (scipy): differs by at most {differences}.")
    elif b is not None:
        lines.append("Two-point boundary problem (scipy): no solution found.")
    d = found["transcription"]
    if d is not None and "error" in d:
        lines.append(f"Direct transcription: {d['error']}.")
    elif d is not None:
        values = f"J = {num(d['found'])} found, {num(d['derived'])} derived by the same discretisation"
        done = f", lower by {d['difference']:.3g}" if d["better"] else ", none lower"
        done += "" if d["success"] else "; the minimiser stopped before it converged"
        lines.append(
            f"Direct transcription, {d['intervals']} intervals, {d['starts']} starts: {values}{done}."
        )
    return lines


def say_verdict(result: Result) -> list[str]:
    found = result["verification"]
    told = [greek(line) for line in found["conclusion"]]
    same = [row["name"] for row in found["comparisons"] if row.get("raised", 0) > 0.999]
    if same:
        told.append(
            f"nowhere above K*(θ), the least admissible K, and so the derived schedule: {', '.join(same)}."
        )
    return [line[0].upper() + line[1:] for line in told]


def say_theorem(result: Result) -> str:
    """Which bounds held, in one sentence or two."""
    rows = [row for row in result["bound"]["rows"] if not row["reason"]]
    if not rows:
        reasons = dict.fromkeys([result["bound"]["reason"], *(r["reason"] for r in result["bound"]["rows"])])
        return "Theorem 1 says nothing here: " + "; ".join(greek(r) for r in reasons if r) + "."
    told = []
    for sigma in sorted({row["sigma"] for row in rows}):
        here = [row for row in rows if row["sigma"] == sigma]
        parts = []
        for name, label in (("printed", "as printed"), ("corrected", "corrected")):
            held = [row[f"{name}_holds"] for row in here]
            near = f" ({held.count(None)} undecided)" if None in held else ""
            parts.append(f"{label} it holds for {held.count(True)} of {len(held)} T{near}")
        told.append(f"σ = {sigma:g}: {', '.join(parts)}")
    steps = ", ".join(f"{v}" for v in sorted({row["T"] for row in rows}))
    without = [row for row in result["bound"]["rows"] if row["reason"]]
    others = "".join(
        f" No answer for σ = {r['sigma']:g}, T = {r['T']}: {greek(r['reason'])}." for r in without
    )
    return f"Theorem 1 against actual runs of T = {steps} steps. {'; '.join(told)}.{others}"


def say_fitted(result: Result) -> list[str]:
    """The calibration, in lines."""
    fit, m = result["calibration"]["fit"], result["calibration"]["measured"]
    name, whose = result["settings"]["measure"], f"{m['schedule']}, seed {m['seed']}, {m['epochs']} epochs"
    names = ("θ₀", "c", "s")
    values = zip(names, (fit["theta0"], fit["scale"], fit["amplitude"]), strict=True)
    errors = "standard errors: the three numbers cannot be told apart"
    if fit["errors"] is not None:
        every = zip(("θ₀", "log c", "log s"), fit["errors"], strict=True)
        errors = f"standard errors {', '.join(f'{num(e)} of {which}' for which, e in every)}"
    residuals = ", ".join(f"{r:+.2g}" for r in fit["residuals"])
    spent = f"{count(m['gradients'])} gradient evaluations, {count(m['forwards'])} forward passes, "
    trained = f"{count(m['training_gradients'])} gradient evaluations, {m['training_seconds']:.1f} seconds"
    same = "Training, done again to measure, ended with the run's bits"
    others = (
        f"of the best constant {num(fit['rms_constant'])}, of the best straight line {num(fit['rms_line'])}"
    )
    fitted = ", ".join(f"{which} = {num(v)}" for which, v in values)
    lines = [
        f"Fitted to {name} ({m['measures'][name]['what']}) of {whose}, on {m['probe']} training samples.",
        f"{fitted} in v = s/α*(θ(c (t - t₀))), t in epochs from t₀ = {fit['times'][0]:g} on; {errors}.",
        f"Residuals log(measured/fitted) by epoch: {residuals}.",
        f"Root mean square {num(fit['rms'])}; {others}. Share of the variance explained: "
        f"{num(fit['explained'])}.",
        f"{same if m['same'] else 'WARNING: ' + str(m['warning'])}.",
        f"Measuring took {spent}{m['seconds']:.1f} seconds; training {trained}.",
    ]
    early = [
        f"{num(v)} in epoch {t:g}"
        for t, v in zip(m["times"], m["measures"][name]["values"], strict=True)
        if t < fit["times"][0]
    ]
    if early:
        lines.append(f"NOTE: not fitted, as no such landscape describes it: {', '.join(early)}.")
    return lines + [f"NOTE: {greek(note)}." for note in fit["notes"]]
