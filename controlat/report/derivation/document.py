"""A derivation as summary.md: all of it, formulas in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from controlat._util.texts import table
from controlat.report.derivation import say
from controlat.report.derivation.words import (
    CRITERION,
    HOLDS,
    QUANTITIES,
    Result,
    answers_of,
    bullets,
    course_table,
    greek,
    network_table,
    num,
    schedule_table,
)

__all__ = ["markdown"]


def _display(key: str, answer: Result) -> str:
    """One quantity: its formula in LaTeX, or how it is known."""
    left, latex, what = QUANTITIES[key]
    head = f"{what[0].upper()}{what[1:]}"
    if "latex" not in answer:
        return f"{head}, {left}: {say.known(answer)}."
    told = f" ({greek(answer['why'])})" if answer["why"] else ""
    rest = r" + \dots" if key == "series" else ""
    return f"{head}{told}:\n\n$$ {latex} = {answer['latex']}{rest} $$"


def _displays(result: Result, *keys: str) -> list[str]:
    return [_display(key, result["formulas"][key]) for key in keys if key in result["formulas"]]


def _settings(result: Result) -> str:
    """What decides the result: name, value and meaning."""
    task, s, network = result["task"], result["settings"], result["network"]["schedule"]
    calibration = result["calibration"]
    fitted = "; fitted to the run" if calibration is not None else ""
    ends = {name: f"{num(task[name][0])} .. {num(task[name][1])}" for name in ("x_range", "theta_range")}
    branch = "largest that the ascent reaches" if s["branch"] is None else str(s["branch"])
    rows = [
        ("x0", num(task["x0"]), "data point, where the inner ascent starts"),
        *((name, num(value), "parameter of the landscape") for name, value in task["parameters"].items()),
        ("theta0", num(task["theta0"]), f"θ at t = 0{fitted}"),
        ("tau", num(task["tau"]), f"α K of the landscape, held fixed{fitted}"),
        ("horizon", num(task["horizon"]), f"T, in the landscape's time{fitted}"),
        ("gamma", num(task["gamma"]), "price of one inner step per unit of time"),
        ("order", str(task["order"]), "highest power of t in the series of K*"),
        ("branch", branch, "inner maximum at θ₀, by the value of l (0 is the largest)"),
        ("x_range", ends["x_range"], "where inner maxima are looked for"),
        ("theta_range", ends["theta_range"], "how far the inner maximum is followed"),
        ("admissible", s["admissible"], "admissible set of the check"),
        ("overshoot", num(s["overshoot"]), "c of the set 'overshoot'"),
        ("checks", "yes" if s["checks"] else "no", "maximum principle and Theorem 1"),
        ("epochs", num(network["epochs"]), "length of the network's training"),
        ("k_min, k_max", f"{num(s['k_min'])}, {num(s['k_max'])}", "bounds on K of the network"),
        ("tau_net", num(network["knobs"]["alpha"]["values"][0]), "α K of the network, in pixels"),
        ("mapping", s["mapping"], "affine: K* is stretched to the bounds; clip: it is cut off there"),
        ("resolution", num(network["resolution"]), "length of a piece of the schedule, in epochs"),
    ]
    if calibration is not None:
        lowest = ", where the measure is lowest" if s.get("since") is None else ""
        rows += [
            ("calibrate", calibration["measured"]["run"], "run that was measured"),
            ("measure", s["measure"], "what was fitted"),
            ("since", f"{calibration['fit']['times'][0]:g}", f"epoch from which on it was fitted{lowest}"),
        ]
    return table(["setting", "value", "meaning"], rows, words=(0, 2))


def _inner(result: Result) -> list[str]:
    """The inner problem: stationary points, branch, formulas."""
    rows = [[num(p["x"]), p["kind"], num(p["value"]), num(p["curvature"])] for p in result["stationary"]]
    near = "" if result["task"]["quadratic"] else " Near x* only: l is not quadratic in x."
    steps = _displays(result, "rho", "alpha", "newton")
    if "rho" not in result["formulas"]:
        steps.insert(0, "Contraction near x*: ρ = 1 + α l_xx(θ, x*), numerically (scipy).")
    return [
        "## Inner problem\n\nStationary points of l(θ₀, ·):",
        table(["x", "kind", "l(θ₀, x)", "l_xx(θ₀, x)"], rows, words=(1,)),
        f"Followed: {say.followed(result)}.",
        *_displays(result, "x", "curvature"),
        f"K steps of size α from the data point contract the distance to x* by ρ each.{near}",
        *steps,
    ]


def _outer(result: Result) -> list[str]:
    """Losses, flow, K*, series and cost."""
    parts = ["## Losses"]
    for key in ("robust", "plain"):
        zeros = say.zeros(result["minima"][key], "latex")
        parts += [*_displays(result, key), f"{zeros[0].upper()}{zeros[1:]}."]
        parts += [f"({greek(z['why'])}.)" for z in result["minima"][key][:1] if "why" in z]
    parts += ["## Flow and schedule", *_displays(result, "speed", "time", "theta", "K", "series")]
    if values := result["series"]["values"]:
        parts.append(f"In numbers: $K^*(t) = {say.polynomial(values, '^{{{}}}')} + \\dots$")
    return [
        *parts,
        f"{say.rising(result)}.",
        course_table(result),
        *_displays(result, "J"),
        f"{say.spent(result)}.",
    ]


def _sources(result: Result) -> str:
    """Who found what."""
    rows = [
        [QUANTITIES[key][0] + " near 0" * (key == "series"), answer["by"], greek(answer["why"])]
        for key, answer in answers_of(result)
    ]
    return table(["quantity", "by", "remark"], rows, words=range(3))


def _verification(result: Result) -> list[str]:
    """The check against the maximum principle: conclusions, schedules, admissible sets."""
    checked = result["verification"]
    derived, better, compared = checked["derived"], checked["better"], checked["comparisons"]
    lines = [*say.verdict(result), *say.checks(checked), f"Looked at: {greek(derived['searched'])}."]
    lines.append(f"Largest max H − H(u): {num(derived['largest_violation'])}.")
    if derived["m_nonnegative"] is not None:
        sign = "nowhere negative" if derived["m_nonnegative"] else "negative or undefined somewhere"
        lines.append(f"Multiplier of α ≤ α*: {sign}.")
    parts = [
        f"## Check against the maximum principle\n\n{CRITERION[0].upper()}{CRITERION[1:]}.",
        bullets(lines),
    ]
    if better is not None:
        parts.append(f"Better: J = {num(better['J'])}, by {better['by']}, lower by {num(better['gain'])}.")
    parts.append(schedule_table(result))
    if compared:
        parts.append(
            "Schedules below K* are not admissible: 'raised by' says how far a line was shifted, the last "
            "column for which share of the time K was raised to K*(θ)."
        )
    parts += [
        bullets(f"{row['name']}: {row['error']}" for row in compared if "error" in row),
        "Given each admissible set, by dynamic programming. 'J, derived' is exact, of the derived schedule "
        "with K rounded up where it must be whole; 'same on the grid' is its J by the scheme that looked for "
        "the best.",
        _sets(checked["sets"]),
    ]
    return [part for part in parts if part]


def _sets(sets: Sequence[Result]) -> str:
    """The best found given each admissible set."""
    rows = []
    for row in sets:
        told = (
            ["-"] * 5 + [row["error"]]
            if "error" in row
            else [
                *(num(row[k]) for k in ("derived_J", "policy", "value", "given_away", "tolerance")),
                "yes" if row["better_exists"] else "none found",
            ]
        )
        rows.append([row["admissible"], greek(row["formula"]), *told])
    heads = ["set", "admissible", "J, derived", "same on the grid", "best on the grid", "given away"]
    return table([*heads, "tolerance", "better"], rows, words=(0, 1, 7))


def _bound(result: Result) -> list[str]:
    """Theorem 1: both sides, and the constants."""
    bound = result["bound"]
    parts = ["## Theorem 1", say.theorem(result)]
    if not any(row["left"] is not None for row in bound["rows"]):
        return parts
    inner = bound["inner"]
    exact = f"The inner problem is solved to |x̂ − x*| = {num(inner['delta'])}"
    if inner["alpha"] is not None:
        exact = f"The inner ascent takes {inner['steps']} steps of size {num(inner['alpha'])}"
    formulas = (
        r"$$ \frac1T \sum_t E\,L'(\theta_t)^2 \;\le\; 4\sigma\sqrt{\beta\Delta/T} + 5 L_{\theta x}^2\delta^2"
        r" \quad\text{(printed)}, \qquad 4\sigma\sqrt{\beta\Delta/T} + 2\beta\Delta/T +"
        r" 2 L_{\theta x}^2\delta^2 \quad\text{(corrected)} $$"
    )
    sides, constants = _sides(bound["rows"])
    return [
        *parts,
        f"{exact}; {bound['runs']} runs where there is noise, seed {bound['seed']}. Undecided: within two "
        "standard errors of the bound.",
        formulas,
        sides,
        "Sharper: what the argument gives at once, 2 Δ/(η T) + β η σ² + L_θx² δ². FOSC: the form of Wang et "
        "al., 4 σ √(β Δ/T) + 5 L_θx² δ_F/μ, δ_F the largest FOSC met.",
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
        sides = [f"{num(row['left'])} ± {row['standard_error']:.2g}"]
        for name in ("printed", "corrected", "sharper", "fosc_bound"):
            sides += [num(row[name]), HOLDS[row[f"{name}_holds"]]]
        rows.append([*where, *sides, "yes" if row["long_enough"] else "no"])
        ends = [f"{num(a)} .. {num(b)}" for a, b in (row["theta_range"], row["x_range"])]
        values = (row[name] for name in ("L_tt", "L_tx", "mu", "beta", "Delta", "eta", "delta"))
        constants.append([*where, *ends, *map(num, values)])
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
        fitted = [num(known[t][0]), f"{known[t][1]:+.3g}"] if t in known else ["not used", ""]
        rows.append([f"{t:g}", num(value), *fitted, mark])
    heads = ["epoch", "measured", "fitted", "residual (log)", "bound only"]
    return [
        "## Calibration to a network",
        r"$$ \log v_e = \log\frac{s}{\alpha^*(\theta(c\,(t_e - t_0)))} + r_e $$",
        bullets(say.fitted(result)),
        table(heads, rows, words=(4,)),
    ]


def markdown(result: Result) -> str:
    """The content of summary.md.

    Args:
        result: the content of result.json.
    """
    from controlat.report.derivation.figures import FIGURES

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
        f"## The network's schedule\n\n{say.cut(result)}.",
        network_table(result, True),
    ]
    parts += _verification(result) if result["verification"] is not None else []
    parts += _bound(result) if result["bound"] is not None else []
    parts += _calibration(result) if result["calibration"] is not None else []
    if notes := [*say.left_out(result), *map(greek, result["notes"])]:
        parts += ["## Notes", bullets(notes)]
    shown = [f"![{figure.title}]({name})" for name, figure in FIGURES.items() if figure.wanted(result)]
    made = f"Made on {machine}, controlat {env['controlat']}; {result['seconds']:.1f} seconds."
    return "\n\n".join([*parts, "## Figures", "\n".join(shown), made]) + "\n"
