"""A derivation in words, from its result only: for the terminal and as summary.md."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from controlat.texts import count, table

__all__ = ["greek", "markdown", "printed"]

Result = Mapping[str, Any]
_WIDTH = 100
_TALL = 11  # lines of a formula that is still drawn
_LOWEST = ", where the measure is lowest"
_MANY = 60  # stationary points: a loss has so many only where it is constant
_LETTERS = {
    "theta_0": "θ₀",
    **{"theta": "θ", "alpha": "α", "tau": "τ", "gamma": "γ", "rho": "ρ", "sigma": "σ", "<=": "≤"},
}
# key: left side in characters, in LaTeX, what it is
_QUANTITIES = {
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
_C = "C: mean over time of max H − H(u), 0 where the principle holds"
_HOLDS = {True: "yes", False: "NO", None: "undecided"}


def greek(text: str) -> str:
    """Names of Greek letters as letters.

    >>> greek("alpha K = tau, 0 < alpha <= alpha*(theta)")
    'α K = τ, 0 < α ≤ α*(θ)'
    """
    return re.sub(r"\b(theta_0|theta|alpha|tau|gamma|rho|sigma)\b|<=", lambda m: _LETTERS[m[0]], text)


def _n(value: float | str | None) -> str:
    """Four significant digits; a dash for what is missing or not finite, which a file holds as text."""
    value = math.nan if value is None else float(value)
    return f"{value + 0.0:.4g}" if math.isfinite(value) else "-"


def _answers(result: Result) -> list[tuple[str, Result]]:
    """The derived quantities, in the order of reading."""
    return [(key, result["formulas"][key]) for key in _QUANTITIES if key in result["formulas"]]


def _line(text: str) -> str:
    """A formula of Python on one line: 2*tau**2 as 2·τ^2."""
    return greek(text.replace("**", "^").replace("*", "·"))


def _known(answer: Result) -> str:
    """How a quantity without a formula is known."""
    head = "numerically (scipy)" if answer["by"] == "scipy" else answer["by"]
    return f"{head}: {greek(answer['why'])}"


def _given(result: Result) -> str:
    """The numbers behind the symbols."""
    task = result["task"]
    told = {"x0": task["x0"], "θ₀": task["theta0"], "τ = α K": task["tau"], "T": task["horizon"]}
    told |= {"γ": task["gamma"]} | task["parameters"]
    return ", ".join(f"{name} = {value:.6g}" for name, value in told.items())


def _zeros(zeros: Sequence[Result], form: str) -> str:
    """Minima of a loss of theta, then its other stationary points: formula and number."""
    if len(zeros) > _MANY:
        return f"stationary for θ from {_n(zeros[0]['theta'])} to {_n(zeros[-1]['theta'])}, where it is flat"
    told: dict[str, list[str]] = {}
    for zero in sorted(zeros, key=lambda z: (z["kind"] != "minimum", z["theta"])):
        value = _n(zero["theta"])
        exact = f"${zero['latex']}$" if form == "latex" and "latex" in zero else _line(zero.get("text", ""))
        plain = not exact or exact.strip("$") == value
        told.setdefault(zero["kind"], []).append(value if plain else f"{exact} = {value}")
    kinds = {"minimum": "minima", "maximum": "maxima", "inflection": "inflections"}
    parts = [f"{kinds[k] if len(v) > 1 else k} at θ = {' and '.join(v)}" for k, v in told.items()]
    return "; ".join(parts) or "no stationary point where the inner maximum is followed"


def _followed(result: Result) -> str:
    """Which inner maximum is followed."""
    maxima = [p for p in result["stationary"] if p["kind"] == "maximum"]
    rank = f"number {result['branch']['rank'] + 1} of {len(maxima)} by the value of l"
    which = "the only one found" if len(maxima) < 2 else rank
    low, high = result["branch"]["domain"]
    where = f"followed for θ from {_n(low)} to {_n(high)}"
    return f"x* = {_n(result['branch']['x'])} at θ₀, {which}; {where}"


def _rising(result: Result) -> str:
    k, t = result["curves"]["K"], result["task"]["horizon"]
    parts = [f"[{_n(a)}, {_n(b)}]" for a, b in result["rising"]]
    if result["rising"] == [[0, t]]:
        return f"K* increases on all of [0, {_n(t)}], from {_n(k[0])} to {_n(k[-1])}"
    ends = f"{_n(k[0])} at t = 0, {_n(k[-1])} at t = {_n(t)}"
    return f"K* increases on {', '.join(parts)} ({ends})" if parts else f"K* increases nowhere ({ends})"


def _polynomial(values: Sequence[float], power: str) -> str:
    """10 + 10 t - 2 t^2."""
    terms = [(f"{'-' if v < 0 else '+'} ", f"{abs(v):.4g}", n) for n, v in enumerate(values)]
    shown = [
        sign + size + (" t" if n else "") + (power.format(n) if n > 1 else "") for sign, size, n in terms
    ]
    return " ".join(shown).removeprefix("+ ")


def _spent(result: Result) -> str:
    cost, gamma = result["cost"], result["task"]["gamma"]
    parts = f"{_n(cost['terminal'])} + {_n(gamma)} × {_n(cost['inner'])}"
    return f"J = L(θ(T)) + γ ∫ K* dt = {parts} = {_n(cost['J'])}"


def _course(result: Result) -> str:
    """theta, alpha* and K* at some times."""
    curves = result["curves"]
    last = len(curves["t"]) - 1
    rows = [[_n(curves[name][last * i // 6]) for name in ("t", "theta", "alpha", "K")] for i in range(7)]
    return table(["t", "θ(t)", "α*", "K*"], rows, words=())


# ---- formulas for the terminal


def _block(left: str, answer: Result) -> list[str]:
    """Left side and drawn formula, lines of one width; the left side stands at the main fraction bar."""
    lines = answer["drawn"].split("\n")
    bars = [max(map(len, re.findall("─+", line)), default=0) for line in lines]
    at = bars.index(max(bars)) if max(bars) else len(lines) - 1
    width = max(map(len, lines))
    if len(lines) > _TALL or width + len(left) > _WIDTH - 6:
        lines, at = textwrap.wrap(_line(answer["text"]), _WIDTH - 8 - len(left)), 0
        width = max(map(len, lines))
    return [
        (f"{left} = " if i == at else " " * (len(left) + 3)) + s.ljust(width) for i, s in enumerate(lines)
    ]


def _beside(blocks: Sequence[list[str]]) -> str:
    """Blocks side by side, aligned where their left sides stand, as many in a row as fit."""
    rows: list[list[list[str]]] = []
    for block in blocks:
        if rows and sum(len(b[0]) + 5 for b in rows[-1]) + len(block[0]) < _WIDTH - 3:
            rows[-1].append(block)
        else:
            rows.append([block])
    return "\n\n".join(map(_row, rows))


def _row(blocks: Sequence[list[str]]) -> str:
    at = [next(i for i, s in enumerate(b) if s[0] != " ") for b in blocks]
    above, below = max(at), max(len(b) - i for b, i in zip(blocks, at, strict=True))
    padded = [
        [" " * len(b[0])] * (above - i) + b + [" " * len(b[0])] * (below - len(b) + i)
        for b, i in zip(blocks, at, strict=True)
    ]
    return "\n".join("   " + "     ".join(line).rstrip() for line in zip(*padded, strict=True))


def _formulas(result: Result) -> list[str]:
    """One-line formulas, drawn ones, and what is known by numbers only."""
    found = result["formulas"]
    blocks = [_block(_QUANTITIES[k][0], found[k]) for k in ("alpha", "theta", "K") if "drawn" in found[k]]
    for key, left in (("series", "K*(t) near 0"), ("J", "J")):
        if "drawn" in found[key]:
            blocks.append(_block(left, found[key]))
    missing: dict[str, list[str]] = {}
    for key, answer in _answers(result):
        if "text" not in answer:
            missing.setdefault(_known(answer), []).append(_QUANTITIES[key][0] + " near 0" * (key == "series"))
    told = [f"{', '.join(names)}: {why}" for why, names in missing.items()]
    return [part for part in (_lines(result), _beside(blocks), _bullets(told)) if part]


def _lines(result: Result) -> str:
    """The formulas of one line, each with what it is."""
    near = "" if result["task"]["quadratic"] else " near x*"
    told = {name: _zeros(result["minima"][name], "text") for name in ("robust", "plain")}
    told["rho"] = f"K inner steps of size α: x_K = x* + ρ^K (x0 - x*){near}"
    lines = []
    for key in ("x", "robust", "plain", "curvature", "rho", "newton", "speed"):
        if "text" in (answer := result["formulas"].get(key, {})):
            left, _, what = _QUANTITIES[key]
            lines.append((f"{left} = {_line(answer['text'])}", told.get(key, what)))
    width = min(max((len(a) for a, _ in lines), default=0), 42)
    indent = " " * (width + 5)
    return "\n".join(
        textwrap.fill(f"  {a.ljust(width)}   {b}", _WIDTH, subsequent_indent=indent, drop_whitespace=True)
        for a, b in lines
    )


def _bullets(lines: Iterable[str]) -> str:
    fill = {"width": _WIDTH, "subsequent_indent": "  ", "break_long_words": False}
    return "\n".join(textwrap.fill(f"- {line}", **fill) for line in lines)  # type: ignore[arg-type]


# ---- parts that both texts have


def _network(result: Result, whole: bool) -> str:
    """The network's schedule; rows in which nothing new begins are left out of a long one."""
    found = result["network"]
    heads = ["epoch", "K* of the landscape", "mapped", "K", "α (pixels)", "cut off"]
    columns = zip(*(found[name] for name in ("t", "real", "mapped", "controls", "clipped")), strict=True)
    rows = [
        [f"{t:g}", _n(real), _n(mapped), f"{u['steps']:g}", _n(u["alpha"]), "yes" if cut else ""]
        for t, real, mapped, u, cut in columns
    ]
    if whole or len(rows) <= 16:
        return table(heads, rows, words=())
    kept = [row for i, row in enumerate(rows) if i == 0 or row[3:] != rows[i - 1][3:]]
    left_out = len(rows) - len(kept)
    return table(heads, kept, words=()) + f"\n({left_out} pieces like the one before them are not shown)"


def _cut(result: Result) -> str:
    """What became of K* on the way to the network."""
    found = result["network"]
    tau = found["schedule"]["knobs"]["alpha"]["values"][0]
    epochs = f"{found['schedule']['epochs']:g} epochs in pieces of {found['schedule']['resolution']:g}"
    held = ""
    if result["calibration"] is not None and (times := result["calibration"]["fit"]["times"])[0] > 0:
        until = times[0] / times[-1] * found["schedule"]["epochs"]
        held = f"; K* at t = 0 is held until epoch {until:.4g}, where the fit begins"
    return f"{greek(found['note'])}{held}; K rounded half up, α = {_n(tau)}/K pixels; {epochs}"


def _compared(result: Result) -> str:
    """J and C of the derived schedule and of others."""
    found = result["verification"]
    rows = [["derived: α*, K*", _n(found["derived"]["J"]), _n(found["derived"]["C"]), ""]]
    for row in found["comparisons"]:
        values = [_n(row["J"]), _n(row["C"]), f"{row['raised']:.0%}"] if "error" not in row else ["-"] * 3
        rows.append([row["name"], *values])
    return table(["schedule", "J", "C", "time with K raised to K*"], rows)


def _checks(found: Result) -> list[str]:
    """The boundary problem and the direct minimisation, in words."""
    lines = []
    if (b := found["boundary"]) is not None and b.get("success"):
        differences = f"{_n(b['theta_difference'])} in θ, {_n(b['p_difference'])} in p"
        lines.append(f"Two-point boundary problem (scipy): differs by at most {differences}.")
    elif b is not None:
        lines.append("Two-point boundary problem (scipy): no solution found.")
    d = found["transcription"]
    if d is not None and "error" in d:
        lines.append(f"Direct transcription: {d['error']}.")
    elif d is not None:
        values = f"J = {_n(d['found'])} found, {_n(d['derived'])} derived by the same discretisation"
        done = "" if d["success"] else "; the minimiser stopped before it converged"
        lines.append(
            f"Direct transcription, {d['intervals']} intervals, {d['starts']} starts: {values}{done}."
        )
    return lines


def _verdict(result: Result) -> list[str]:
    found = result["verification"]
    told = [greek(line) for line in found["conclusion"]]
    same = [row["name"] for row in found["comparisons"] if row.get("raised", 0) > 0.999]
    if same:
        told.append(
            f"nowhere above K*(θ), the least admissible K, and so the derived schedule: {', '.join(same)}."
        )
    return [line[0].upper() + line[1:] for line in told]


def _theorem(result: Result) -> str:
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


def _fitted(result: Result) -> list[str]:
    """The calibration, in lines."""
    fit, m = result["calibration"]["fit"], result["calibration"]["measured"]
    name, whose = result["settings"]["measure"], f"{m['schedule']}, seed {m['seed']}, {m['epochs']} epochs"
    names = ("θ₀", "c", "s")
    values = zip(names, (fit["theta0"], fit["scale"], fit["amplitude"]), strict=True)
    errors = "standard errors: the three numbers cannot be told apart"
    if fit["errors"] is not None:
        every = zip(("θ₀", "log c", "log s"), fit["errors"], strict=True)
        errors = f"standard errors {', '.join(f'{_n(e)} of {which}' for which, e in every)}"
    residuals = ", ".join(f"{r:+.2g}" for r in fit["residuals"])
    spent = f"{count(m['gradients'])} gradient evaluations, {count(m['forwards'])} forward passes, "
    trained = f"{count(m['training_gradients'])} gradient evaluations, {m['training_seconds']:.1f} seconds"
    same = "Training, done again to measure, ended with the run's bits"
    others = (
        f"of the best constant {_n(fit['rms_constant'])}, of the best straight line {_n(fit['rms_line'])}"
    )
    fitted = ", ".join(f"{which} = {_n(v)}" for which, v in values)
    lines = [
        f"Fitted to {name} ({m['measures'][name]['what']}) of {whose}, on {m['probe']} training samples.",
        f"{fitted} in v = s/α*(θ(c (t - t₀))), t in epochs from t₀ = {fit['times'][0]:g} on; {errors}.",
        f"Residuals log(measured/fitted) by epoch: {residuals}.",
        f"Root mean square {_n(fit['rms'])}; {others}. Share of variance explained: {_n(fit['explained'])}.",
        f"{same if m['same'] else 'WARNING: ' + str(m['warning'])}.",
        f"Measuring took {spent}{m['seconds']:.1f} seconds; training {trained}.",
    ]
    return lines + [f"NOTE: {greek(note)}." for note in fit["notes"]]


def printed(result: Result) -> str:
    """For the terminal.

    Args:
        result: the content of result.json.
    """
    calibrated = " (θ₀, τ and T from the calibration)" if result["calibration"] is not None else ""
    head = (
        f"Schedule derived from l(θ, x) = {greek(result['task']['landscape'])}\n{_given(result)}{calibrated}"
    )
    followed = textwrap.fill(f"inner maximum: {_followed(result)}", _WIDTH, subsequent_indent="  ")
    parts = [f"{head}\n{followed}", *_formulas(result)]
    if "text" not in result["formulas"]["K"]:
        parts.append(_course(result))
    lines = [_rising(result), _spent(result)]
    if values := result["series"]["values"]:
        lines.insert(0, f"K*(t) near 0 in numbers: {_polynomial(values, '^{}')}")
    parts += [
        _bullets(lines),
        textwrap.fill(f"For the network: {_cut(result)}", _WIDTH),
        _network(result, False),
    ]
    if result["verification"] is not None:
        told = [*_verdict(result), *_checks(result["verification"])]
        parts += [f"Check against the maximum principle ({_C})", _bullets(told), _compared(result)]
    if result["bound"] is not None:
        parts.append(_bullets([_theorem(result)]))
    if result["calibration"] is not None:
        parts += ["Calibration to a network", _bullets(_fitted(result))]
    if result["notes"]:
        parts.append(_bullets(f"NOTE: {greek(note)}" for note in result["notes"]))
    return "\n\n".join(parts)


# ---- summary.md


def _display(key: str, answer: Result) -> str:
    """One quantity: its formula in LaTeX, or how it is known."""
    left, latex, what = _QUANTITIES[key]
    head = f"{what[0].upper()}{what[1:]}"
    if "latex" not in answer:
        return f"{head}, {left}: {_known(answer)}."
    told = f" ({greek(answer['why'])})" if answer["why"] else ""
    rest = r" + \dots" if key == "series" else ""
    return f"{head}{told}:\n\n$$ {latex} = {answer['latex']}{rest} $$"


def _settings(result: Result) -> str:
    """What decides the result: name, value and meaning."""
    task, s, network = result["task"], result["settings"], result["network"]["schedule"]
    fitted = "; fitted to the run" if result["calibration"] is not None else ""
    ends = {name: f"{_n(task[name][0])} .. {_n(task[name][1])}" for name in ("x_range", "theta_range")}
    tau = network["knobs"]["alpha"]["values"][0]
    branch = "largest that the ascent reaches" if s["branch"] is None else str(s["branch"])
    rows = [
        ["x0", _n(task["x0"]), "data point, where the inner ascent starts"],
        *([name, _n(value), "parameter of the landscape"] for name, value in task["parameters"].items()),
        ["theta0", _n(task["theta0"]), f"θ at t = 0{fitted}"],
        ["tau", _n(task["tau"]), f"α K of the landscape, held fixed{fitted}"],
        ["horizon", _n(task["horizon"]), f"T, in the landscape's time{fitted}"],
        ["gamma", _n(task["gamma"]), "price of one inner step per unit of time"],
        ["order", str(task["order"]), "highest power of t in the series of K*"],
        ["branch", branch, "inner maximum at θ₀, by the value of l (0 is the largest)"],
        ["x_range", ends["x_range"], "where inner maxima are looked for"],
        ["theta_range", ends["theta_range"], "how far the inner maximum is followed"],
        ["admissible", s["admissible"], "admissible set of the check"],
        ["overshoot", _n(s["overshoot"]), "c of the set 'overshoot'"],
        ["checks", "yes" if s["checks"] else "no", "maximum principle and Theorem 1"],
        ["epochs", _n(network["epochs"]), "length of the network's training"],
        ["k_min, k_max", f"{_n(s['k_min'])}, {_n(s['k_max'])}", "bounds on K of the network"],
        ["tau_net", _n(tau), "α K of the network, in pixels"],
        ["mapping", s["mapping"], "affine: K* is stretched to the bounds; clip: it is cut off there"],
        ["resolution", _n(network["resolution"]), "length of a piece of the schedule, in epochs"],
    ]
    if result["calibration"] is not None:
        rows.append(["calibrate", result["calibration"]["measured"]["run"], "run that was measured"])
        rows.append(["measure", s["measure"], "what was fitted"])
        since = f"{result['calibration']['fit']['times'][0]:g}"
        rows.append(
            ["since", since, "epoch from which on it was fitted" + _LOWEST * (s.get("since") is None)]
        )
    return table(["setting", "value", "meaning"], rows, words=(0, 2))


def _inner(result: Result) -> list[str]:
    """The inner problem: stationary points, branch, formulas."""
    rows = [[_n(p["x"]), p["kind"], _n(p["value"]), _n(p["curvature"])] for p in result["stationary"]]
    shown = [_display(k, result["formulas"][k]) for k in ("x", "curvature") if k in result["formulas"]]
    near = "" if result["task"]["quadratic"] else " Near x* only: l is not quadratic in x."
    steps = [
        _display(k, result["formulas"][k]) for k in ("rho", "alpha", "newton") if k in result["formulas"]
    ]
    if "rho" not in result["formulas"]:
        steps.insert(0, "Contraction near x*: ρ = 1 + α l_xx(θ, x*), numerically (scipy).")
    return [
        "## Inner problem\n\nStationary points of l(θ₀, ·):",
        table(["x", "kind", "l(θ₀, x)", "l_xx(θ₀, x)"], rows, words=(1,)),
        f"Followed: {_followed(result)}.",
        *shown,
        f"K steps of size α from the data point contract the distance to x* by ρ each.{near}",
        *steps,
    ]


def _outer(result: Result) -> list[str]:
    """Losses, flow, K*, series and cost."""
    found, parts = result["formulas"], ["## Losses"]
    for key in ("robust", "plain"):
        zeros = _zeros(result["minima"][key], "latex")
        parts += [_display(key, found[key]), f"{zeros[0].upper()}{zeros[1:]}."]
        parts += [f"({greek(z['why'])}.)" for z in result["minima"][key][:1] if "why" in z]
    parts.append("## Flow and schedule")
    parts += [_display(key, found[key]) for key in ("speed", "time", "theta", "K", "series") if key in found]
    if values := result["series"]["values"]:
        parts.append(f"In numbers: $K^*(t) = {_polynomial(values, '^{{{}}}')} + \\dots$")
    return [*parts, f"{_rising(result)}.", _course(result), _display("J", found["J"]), f"{_spent(result)}."]


def _sources(result: Result) -> str:
    """Who found what."""
    rows = [
        [_QUANTITIES[key][0] + " near 0" * (key == "series"), answer["by"], greek(answer["why"])]
        for key, answer in _answers(result)
    ]
    return table(["quantity", "by", "remark"], rows, words=range(3))


def _verification(result: Result) -> list[str]:
    found = result["verification"]
    rows = []
    for row in found["sets"]:
        name, formula = row["admissible"], greek(row["formula"])
        if "error" in row:
            rows.append([name, formula, *["-"] * 5, row["error"]])
            continue
        told = "yes" if row["better_exists"] else "none found"
        values = [_n(row[k]) for k in ("derived_J", "policy", "value", "given_away", "tolerance")]
        rows.append([name, formula, *values, told])
    heads = ["set", "admissible", "J, derived", "same on the grid", "best on the grid", "given away"]
    m = found["derived"]["m_nonnegative"]
    lines = [*_verdict(result), *_checks(found), f"Looked at: {greek(found['derived']['searched'])}."]
    lines.append(f"Largest max H − H(u): {_n(found['derived']['largest_violation'])}.")
    if m is not None:
        lines.append(
            f"Multiplier of α ≤ α*: {'nowhere negative' if m else 'negative or undefined somewhere'}."
        )
    parts = [f"## Check against the maximum principle\n\n{_C[0].upper()}{_C[1:]}.", _bullets(lines)]
    if found["better"] is not None:
        better = found["better"]
        parts.append(f"Better: J = {_n(better['J'])}, by {better['by']}, lower by {_n(better['gain'])}.")
    parts += [
        _compared(result),
        _errors(found["comparisons"]),
        "Given each admissible set, by dynamic programming:",
    ]
    parts.append(table([*heads, "tolerance", "better"], rows, words=(0, 1, 7)))
    return [part for part in parts if part]


def _errors(rows: Sequence[Result]) -> str:
    return _bullets(f"{row['name']}: {row['error']}" for row in rows if "error" in row)


def _bound(result: Result) -> list[str]:
    """Theorem 1: both sides, and the constants."""
    found = result["bound"]
    parts = ["## Theorem 1", _theorem(result)]
    if not any(row["left"] is not None for row in found["rows"]):
        return parts
    inner = found["inner"]
    exact = f"The inner problem is solved to |x̂ − x*| = {_n(inner['delta'])}"
    if inner["alpha"] is not None:
        exact = f"The inner ascent takes {inner['steps']} steps of size {_n(inner['alpha'])}"
    formulas = (
        r"$$ \frac1T \sum_t E\,L'(\theta_t)^2 \;\le\; 4\sigma\sqrt{\beta\Delta/T} + 5 L_{\theta x}^2\delta^2"
        r" \quad\text{(printed)}, \qquad 4\sigma\sqrt{\beta\Delta/T} + 2\beta\Delta/T +"
        r" 2 L_{\theta x}^2\delta^2 \quad\text{(corrected)} $$"
    )
    sides, constants = _sides(found["rows"])
    return [
        *parts,
        f"{exact}; {found['runs']} runs where there is noise, seed {found['seed']}. Undecided: within two "
        "standard errors of the bound.",
        formulas,
        sides,
        "Constants, on the range of θ and x that runs visited: β = L_θx²/μ + L_θθ, Δ = L(θ₀) − min L, η the "
        "step size, δ the largest |x̂ − x*| met.",
        constants,
    ]


def _sides(every: Sequence[Result]) -> tuple[str, str]:
    """The table of both sides, and that of the constants."""
    rows, constants = [], []
    for row in every:
        if row["left"] is None:
            continue
        where = [f"{row['sigma']:g}", str(row["T"])]
        sides = [f"{_n(row['left'])} ± {row['standard_error']:.2g}"]
        for name in ("printed", "corrected", "sharper", "fosc_bound"):
            sides += [_n(row[name]), _HOLDS[row[f"{name}_holds"]]]
        rows.append([*where, *sides, "yes" if row["long_enough"] else "no"])
        ends = [f"{_n(a)} .. {_n(b)}" for a, b in (row["theta_range"], row["x_range"])]
        values = (row[name] for name in ("L_tt", "L_tx", "mu", "beta", "Delta", "eta", "delta"))
        constants.append([*where, *ends, *map(_n, values)])
    bounds = [head for name in ("printed", "corrected", "sharper", "FOSC") for head in (name, "holds")]
    heads = ["σ", "T", "measured ± standard error", *bounds, "T ≥ βΔ/σ²"]
    names = ["σ", "T", "θ", "x", "L_θθ", "L_θx", "μ", "β", "Δ", "η", "δ"]
    return table(heads, rows, words=()), table(names, constants, words=())


def _calibration(result: Result) -> list[str]:
    fit, m = result["calibration"]["fit"], result["calibration"]["measured"]
    measure = m["measures"][result["settings"]["measure"]]
    known = dict(zip(fit["times"], zip(fit["fitted"], fit["residuals"], strict=True), strict=True))
    rows = []
    for t, value, mark in zip(m["times"], measure["values"], measure["marks"], strict=True):
        fitted = [_n(known[t][0]), f"{known[t][1]:+.3g}"] if t in known else ["not used", ""]
        rows.append([f"{t:g}", _n(value), *fitted, mark])
    heads = ["epoch", "measured", "fitted", "residual (log)", "bound only"]
    return [
        "## Calibration to a network",
        r"$$ \log v_e = \log\frac{s}{\alpha^*(\theta(c\,(t_e - t_0)))} + r_e $$",
        _bullets(_fitted(result)),
        table(heads, rows, words=(4,)),
    ]


def markdown(result: Result) -> str:
    """The content of summary.md.

    Args:
        result: the content of result.json.
    """
    from controlat.symbolic.figures import FIGURES

    env = result["environment"]
    machine = f"{env['hardware']}, {env['threads']} threads, python {env['python']}, numpy {env['numpy']}"
    parts = [
        "# Schedule derived from a landscape",
        f"    l(theta, x) = {result['task']['landscape']}",
        _settings(result),
        *_inner(result),
        *_outer(result),
        "## What is symbolic and what is numerical\n\nEvery quantity is computed numerically (scipy); a "
        "formula (sympy) stands only where it agrees with the numbers to seven digits.",
        _sources(result),
        f"## The network's schedule\n\n{_cut(result)}.",
        _network(result, True),
    ]
    parts += _verification(result) if result["verification"] is not None else []
    parts += _bound(result) if result["bound"] is not None else []
    parts += _calibration(result) if result["calibration"] is not None else []
    if result["notes"]:
        parts += ["## Notes", _bullets(greek(note) for note in result["notes"])]
    shown = [f"![{figure.title}]({name})" for name, figure in FIGURES.items() if figure.wanted(result)]
    made = f"Made on {machine}, controlat {env['controlat']}; {result['seconds']:.1f} seconds."
    return "\n\n".join([*parts, "## Figures", "\n".join(shown), made]) + "\n"
