"""Names, numbers, lists and tables of a derivation, as the terminal and summary.md have them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from controlat._util.texts import table

__all__ = ["greek"]

Result = Mapping[str, Any]
WIDTH = 100
_LETTERS = {"theta_0": "θ₀", "theta": "θ", "alpha": "α", "tau": "τ", "gamma": "γ", "rho": "ρ", "sigma": "σ"}
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
    return re.sub(rf"\b({'|'.join(_LETTERS)})\b", lambda m: _LETTERS[m[0]], text).replace("<=", "≤")


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


def course_table(result: Result) -> str:
    """theta, alpha* and K* at some times."""
    curves = result["curves"]
    last = len(curves["t"]) - 1
    rows = [[num(curves[name][last * i // 6]) for name in ("t", "theta", "alpha", "K")] for i in range(7)]
    return table(["t", "θ(t)", "α*", "K*"], rows, words=())


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences, wrapped."""
    fill = {"width": WIDTH, "subsequent_indent": "  ", "break_long_words": False}
    return "\n".join(textwrap.fill(f"- {line}", **fill) for line in lines)  # type: ignore[arg-type]


def network_table(result: Result, whole: bool) -> str:
    """The network's schedule; rows in which nothing new begins are left out of a long one."""
    network = result["network"]
    heads = ["epoch", "K* of the landscape", "mapped", "K", "α (pixels)", "cut off"]
    columns = zip(*(network[name] for name in ("t", "real", "mapped", "controls", "clipped")), strict=True)
    rows = [
        [f"{t:g}", num(real), num(mapped), f"{u['steps']:g}", num(u["alpha"]), "yes" if cut else ""]
        for t, real, mapped, u, cut in columns
    ]
    if whole or len(rows) <= 16:
        return table(heads, rows, words=())
    kept = [row for i, row in enumerate(rows) if i == 0 or row[3:] != rows[i - 1][3:]]
    note = f"({len(rows) - len(kept)} pieces like the one before them are not shown)"
    return f"{table(heads, kept, words=())}\n{note}"


def schedule_table(result: Result) -> str:
    """J and C of the derived schedule and of others."""
    checked = result["verification"]
    rows = [["derived: α*, K*", num(checked["derived"]["J"]), num(checked["derived"]["C"]), ""]]
    for row in checked["comparisons"]:
        values = [num(row["J"]), num(row["C"]), f"{row['raised']:.0%}"] if "error" not in row else ["-"] * 3
        rows.append([row["name"], *values])
    return table(["schedule", "J", "C", "time with K raised to K*"], rows)
