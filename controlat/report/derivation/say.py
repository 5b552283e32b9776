"""What there is to say about a derivation, a sentence a function: the terminal and summary.md share them."""

from __future__ import annotations

from collections.abc import Sequence

from controlat._util.texts import count
from controlat.report.derivation.words import Result, greek, num, on_a_line

_MANY = 60  # stationary points: a loss has so many only where it is constant


def known(answer: Result) -> str:
    """How a quantity without a formula is known."""
    head = {"scipy": "numerically (scipy): ", "": ""}.get(answer["by"], f"{answer['by']}: ")
    return f"{head}{greek(answer['why'])}"


def given(result: Result) -> str:
    """The numbers behind the symbols."""
    task = result["task"]
    told = {"x0": task["x0"], "θ₀": task["theta0"], "τ = α K": task["tau"], "T": task["horizon"]}
    told |= {"γ": task["gamma"]} | task["parameters"]
    return ", ".join(f"{name} = {value:.6g}" for name, value in told.items())


def zeros(points: Sequence[Result], form: str) -> str:
    """Minima of a loss of theta, then its other stationary points: formula and number."""
    if len(points) > _MANY:
        low, high = num(points[0]["theta"]), num(points[-1]["theta"])
        return f"stationary for θ from {low} to {high}, where it is flat"
    told: dict[str, list[str]] = {}
    for zero in sorted(points, key=lambda z: (z["kind"] != "minimum", z["theta"])):
        value, exact = num(zero["theta"]), on_a_line(zero.get("text", ""))
        if form == "latex" and "latex" in zero:
            exact = f"${zero['latex']}$"
        plain = exact.strip("$") in ("", value)
        told.setdefault(zero["kind"], []).append(value if plain else f"{exact} = {value}")
    kinds = {"minimum": "minima", "maximum": "maxima", "inflection": "inflections"}
    parts = [f"{kinds[k] if len(v) > 1 else k} at θ = {' and '.join(v)}" for k, v in told.items()]
    return "; ".join(parts) or "no stationary point where the inner maximum is followed"


def left_out(result: Result) -> list[str]:
    """What the time limit left out: a line, or none."""
    lost, seconds = result.get("left_out"), num(result["settings"]["seconds"])
    told = f"left out at the time limit of {seconds} seconds (--seconds): "
    return [told + greek("; ".join(lost))] if lost else []


def followed(result: Result) -> str:
    """Which inner maximum is followed."""
    maxima = [p for p in result["stationary"] if p["kind"] == "maximum"]
    rank = f"number {result['branch']['rank'] + 1} of {len(maxima)} by the value of l"
    which = "the only one found" if len(maxima) < 2 else rank
    low, high = result["branch"]["domain"]
    where = f"followed for θ from {num(low)} to {num(high)}"
    return f"x* = {num(result['branch']['x'])} at θ₀, {which}; {where}"


def rising(result: Result) -> str:
    """Where K* increases."""
    k, intervals, horizon = result["curves"]["K"], result["rising"], result["task"]["horizon"]
    first, last, end = num(k[0]), num(k[-1]), num(horizon)
    if intervals != [[0, horizon]] and max(k) - min(k) <= 1e-9 * max(k):
        return f"K* is constant, {first}"
    if intervals in ([], [[0, horizon]]):
        return f"K* {'increases' if intervals else 'decreases'} on all of [0, {end}], from {first} to {last}"
    parts = ", ".join(f"[{num(a)}, {num(b)}]" for a, b in intervals)
    return f"K* increases on {parts} and nowhere else ({first} at t = 0, {last} at t = {end})"


def polynomial(values: Sequence[float], power: str) -> str:
    """10 + 10 t - 2 t^2."""
    variables = ["", " t", *(f" t{power.format(n)}" for n in range(2, len(values)))]
    terms = [f"{'-' if v < 0 else '+'} {abs(v):.4g}{t}" for v, t in zip(values, variables, strict=False)]
    return " ".join(terms).removeprefix("+ ")


def spent(result: Result) -> str:
    """The cost of the schedule."""
    cost, gamma = result["cost"], result["task"]["gamma"]
    parts = f"{num(cost['terminal'])} + {num(gamma)} × {num(cost['inner'])}"
    return f"J = L(θ(T)) + γ ∫ K* dt = {parts} = {num(cost['J'])}"


def cut(result: Result) -> str:
    """What became of K* on the way to the network."""
    note, schedule = greek(result["network"]["note"]), result["network"]["schedule"]
    tau, epochs = schedule["knobs"]["alpha"]["values"][0], schedule["epochs"]
    held = ""
    if result["calibration"] is not None and (times := result["calibration"]["fit"]["times"])[0] > 0:
        until = times[0] / times[-1] * epochs
        held = f"; K* at t = 0 is held until epoch {until:.4g}, where the fit begins"
    pieces = f"{epochs:g} epochs in pieces of {schedule['resolution']:g}"
    return f"{note}{held}; K rounded half up, α = {num(tau)}/K pixels; {pieces}"


def checks(checked: Result) -> list[str]:
    """The boundary problem and the direct minimisation, in words."""
    lines, boundary, direct = [], checked["boundary"], checked["transcription"]
    if boundary is not None:
        told = "no solution found"
        if boundary.get("success"):
            differences = (num(boundary[f"{name}_difference"]) for name in ("theta", "p"))
            told = "differs by at most {} in θ, {} in p".format(*differences)
        lines.append(f"Two-point boundary problem (scipy): {told}.")
    if direct is not None and "error" in direct:
        lines.append(f"Direct transcription: {direct['error']}.")
    elif direct is not None:
        best, derived, lower = num(direct["found"]), num(direct["derived"]), f"{direct['difference']:.3g}"
        lines.append(
            f"Direct transcription, {direct['intervals']} intervals, {direct['starts']} starts: J = {best} "
            f"found, {derived} derived by the same discretisation, "
            + (f"lower by {lower}" if direct["better"] else "none lower")
            + ("." if direct["success"] else "; the minimiser stopped before it converged.")
        )
    return lines


def verdict(result: Result) -> list[str]:
    """What the check concludes."""
    checked = result["verification"]
    told = [greek(line) for line in checked["conclusion"]]
    if same := [row["name"] for row in checked["comparisons"] if row.get("raised", 0) > 0.999]:
        least = "nowhere above K*(θ), the least admissible K, and so the derived schedule"
        told.append(f"{least}: {', '.join(same)}.")
    return [line[0].upper() + line[1:] for line in told]


def theorem(result: Result) -> str:
    """Which bounds held, in one sentence or two."""
    every = result["bound"]["rows"]
    rows = [row for row in every if not row["reason"]]
    if not rows:
        reasons = dict.fromkeys([result["bound"]["reason"], *(row["reason"] for row in every)])
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
    told = [f"{'; '.join(told)}."]
    for row in every:
        if row["reason"]:
            told.append(f"No answer for σ = {row['sigma']:g}, T = {row['T']}: {greek(row['reason'])}.")
    steps = ", ".join(str(v) for v in sorted({row["T"] for row in rows}))
    return f"Theorem 1 against actual runs of T = {steps} steps. {' '.join(told)}"


def fitted(result: Result) -> list[str]:
    """The calibration, in lines."""
    fit, m = result["calibration"]["fit"], result["calibration"]["measured"]
    measured = m["measures"][result["settings"]["measure"]]
    errors = "standard errors: the three numbers cannot be told apart"
    if fit["errors"] is not None:
        named = zip(("θ₀", "log c", "log s"), fit["errors"], strict=True)
        errors = f"standard errors {', '.join(f'{num(e)} of {name}' for name, e in named)}"
    values = ", ".join(
        f"{k} = {num(fit[v])}" for k, v in (("θ₀", "theta0"), ("c", "scale"), ("s", "amplitude"))
    )
    constant, line = num(fit["rms_constant"]), num(fit["rms_line"])
    same = "Training, done again to measure, ended with the run's bits"
    spent = f"{count(m['gradients'])} gradient evaluations, {count(m['forwards'])} forward passes"
    trained = f"{count(m['training_gradients'])} gradient evaluations, {m['training_seconds']:.1f} seconds"
    lines = [
        f"Fitted to {result['settings']['measure']} ({measured['what']}) of {m['schedule']}, seed "
        f"{m['seed']}, {m['epochs']} epochs, on {m['probe']} training samples.",
        f"{values} in v = s/α*(θ(c (t - t₀))), t in epochs from t₀ = {fit['times'][0]:g} on; {errors}.",
        f"Residuals log(measured/fitted) by epoch: {', '.join(f'{r:+.2g}' for r in fit['residuals'])}.",
        f"Root mean square {num(fit['rms'])}; of the best constant {constant}, of the best straight line "
        f"{line}. Share of the variance explained: {num(fit['explained'])}.",
        f"{same if m['same'] else 'WARNING: ' + str(m['warning'])}.",
        f"Measuring took {spent}, {m['seconds']:.1f} seconds; training {trained}.",
    ]
    pairs = zip(m["times"], measured["values"], strict=True)
    if early := [f"{num(v)} in epoch {t:g}" for t, v in pairs if t < fit["times"][0]]:
        lines.append(f"NOTE: not fitted, as no such landscape describes it: {', '.join(early)}.")
    return lines + [f"NOTE: {greek(note)}." for note in fit["notes"]]
