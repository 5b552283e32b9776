"""A derivation for the terminal: drawn formulas, the checks, and the schedule."""

from __future__ import annotations

import textwrap

from controlat.report.derivation import say
from controlat.report.derivation.words import (
    CRITERION,
    QUANTITIES,
    WIDTH,
    Result,
    answers_of,
    bullets,
    course_table,
    greek,
    network_table,
    on_a_line,
    schedule_table,
)

__all__ = ["printed"]

_COPIED = ("alpha", "theta", "K", "series", "J")
_TALL = 11  # lines of a formula that is still drawn


def _drawn(left: str, answer: Result) -> str:
    """An equation as sympy draws it; on lines of text where that is too large."""
    lines = answer["drawn"].split("\n")
    if len(lines) > _TALL or max(map(len, lines)) > WIDTH - 3:
        lines = textwrap.wrap(f"{left} = {on_a_line(answer['text'])}", WIDTH - 3, subsequent_indent="  ")
    return textwrap.indent("\n".join(line.rstrip() for line in lines), "   ")


def _formulas(result: Result) -> list[str]:
    """One-line formulas, drawn ones, and what is known by numbers only."""
    formulas = result["formulas"]
    drawn = [
        _drawn(QUANTITIES[key][0] + " near 0" * (key == "series"), formulas[key])
        for key in _COPIED
        if "drawn" in formulas[key]
    ]
    missing: dict[str, list[str]] = {}
    for key, answer in answers_of(result):
        if "text" not in answer:
            missing.setdefault(say.known(answer), []).append(
                QUANTITIES[key][0] + " near 0" * (key == "series")
            )
    told = [f"{', '.join(names)}: {why}" for why, names in missing.items()]
    return [part for part in (_lines(result), *drawn, bullets(told)) if part]


def _lines(result: Result) -> str:
    """The formulas of one line, each with what it is."""
    near = "" if result["task"]["quadratic"] else " near x*"
    told = {name: say.zeros(result["minima"][name], "text") for name in ("robust", "plain")}
    told["rho"] = f"K inner steps of size α: x_K = x* + ρ^K (x0 - x*){near}"
    lines = []
    for key in ("x", "robust", "plain", "curvature", "rho", "newton", "speed"):
        if "text" in (answer := result["formulas"].get(key, {})):
            left, _, what = QUANTITIES[key]
            lines.append((f"{left} = {on_a_line(answer['text'])}", told.get(key, what)))
    width = min(max((len(a) for a, _ in lines), default=0), 42)
    indent = " " * (width + 5)
    return "\n".join(
        textwrap.fill(f"  {a.ljust(width)}   {b}", WIDTH, subsequent_indent=indent, drop_whitespace=True)
        for a, b in lines
    )


def _latex(result: Result) -> list[str]:
    """The main formulas as LaTeX, a line each, to be copied; the others are in summary.md."""
    rows = [
        f"  {QUANTITIES[key][1]} = {answer['latex']}" + r" + \dots" * (key == "series")
        for key, answer in answers_of(result)
        if key in _COPIED and "latex" in answer
    ]
    return ["\n".join(["In LaTeX:", *rows])] if rows else []


def printed(result: Result) -> str:
    """For the terminal.

    Args:
        result: the content of result.json.
    """
    calibrated = " (θ₀, τ and T from the calibration)" if result["calibration"] is not None else ""
    loss = greek(result["task"]["landscape"])
    head = f"Schedule derived from l(θ, x) = {loss}\n{say.given(result)}{calibrated}"
    followed = textwrap.fill(f"inner maximum: {say.followed(result)}", WIDTH, subsequent_indent="  ")
    parts = [f"{head}\n{followed}", *_formulas(result)]
    if "text" not in result["formulas"]["K"]:
        parts.append(course_table(result))
    lines = [say.rising(result), say.spent(result)]
    if values := result["series"]["values"]:
        lines.insert(0, f"K*(t) near 0 in numbers: {say.polynomial(values, '^{}')}")
    parts += [
        bullets(lines),
        *_latex(result),
        textwrap.fill(f"For the network: {say.cut(result)}", WIDTH),
        network_table(result, False),
    ]
    if result["verification"] is not None:
        told = [*say.verdict(result), *say.checks(result["verification"])]
        parts += [f"Check against the maximum principle ({CRITERION})", bullets(told), schedule_table(result)]
    if result["bound"] is not None:
        parts.append(bullets([say.theorem(result)]))
    if result["calibration"] is not None:
        parts += ["Calibration to a network", bullets(say.fitted(result))]
    if notes := [*say.left_out(result), *map(greek, result["notes"])]:
        parts.append(bullets(f"NOTE: {note}" for note in notes))
    return "\n\n".join(parts)
