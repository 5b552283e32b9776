"""A derivation for the terminal: drawn formulas, the checks, and the schedule."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from controlat.symbolic.words import (
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
    say_checks,
    say_cut,
    say_fitted,
    say_followed,
    say_given,
    say_known,
    say_left_out,
    say_polynomial,
    say_rising,
    say_spent,
    say_theorem,
    say_verdict,
    say_zeros,
    schedule_table,
)

__all__ = ["printed"]

_COPIED = ("alpha", "theta", "K", "series", "J")
_TALL = 11  # lines of a formula that is still drawn


def _block(left: str, answer: Result) -> list[str]:
    """Left side and drawn formula, lines of one width; the left side stands at the main fraction bar."""
    lines = answer["drawn"].split("\n")
    bars = [max(map(len, re.findall("─+", line)), default=0) for line in lines]
    at = bars.index(max(bars)) if max(bars) else len(lines) - 1
    width = max(map(len, lines))
    if len(lines) > _TALL or width + len(left) > WIDTH - 6:
        lines, at = textwrap.wrap(on_a_line(answer["text"]), WIDTH - 8 - len(left)), 0
        width = max(map(len, lines))
    return [
        (f"{left} = " if i == at else " " * (len(left) + 3)) + s.ljust(width) for i, s in enumerate(lines)
    ]


def _beside(blocks: Sequence[list[str]]) -> str:
    """Blocks side by side, aligned where their left sides stand, as many in a row as fit."""
    rows: list[list[list[str]]] = []
    for block in blocks:
        if rows and sum(len(b[0]) + 5 for b in rows[-1]) + len(block[0]) < WIDTH - 3:
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
    blocks = [_block(QUANTITIES[k][0], found[k]) for k in ("alpha", "theta", "K") if "drawn" in found[k]]
    for key, left in (("series", "K*(t) near 0"), ("J", "J")):
        if "drawn" in found[key]:
            blocks.append(_block(left, found[key]))
    missing: dict[str, list[str]] = {}
    for key, answer in answers_of(result):
        if "text" not in answer:
            missing.setdefault(say_known(answer), []).append(
                QUANTITIES[key][0] + " near 0" * (key == "series")
            )
    told = [f"{', '.join(names)}: {why}" for why, names in missing.items()]
    return [part for part in (_lines(result), _beside(blocks), bullets(told)) if part]


def _lines(result: Result) -> str:
    """The formulas of one line, each with what it is."""
    near = "" if result["task"]["quadratic"] else " near x*"
    told = {name: say_zeros(result["minima"][name], "text") for name in ("robust", "plain")}
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
    head = f"Schedule derived from l(θ, x) = {loss}\n{say_given(result)}{calibrated}"
    followed = textwrap.fill(f"inner maximum: {say_followed(result)}", WIDTH, subsequent_indent="  ")
    parts = [f"{head}\n{followed}", *_formulas(result)]
    if "text" not in result["formulas"]["K"]:
        parts.append(course_table(result))
    lines = [say_rising(result), say_spent(result)]
    if values := result["series"]["values"]:
        lines.insert(0, f"K*(t) near 0 in numbers: {say_polynomial(values, '^{}')}")
    parts += [
        bullets(lines),
        *_latex(result),
        textwrap.fill(f"For the network: {say_cut(result)}", WIDTH),
        network_table(result, False),
    ]
    if result["verification"] is not None:
        told = [*say_verdict(result), *say_checks(result["verification"])]
        parts += [f"Check against the maximum principle ({CRITERION})", bullets(told), schedule_table(result)]
    if result["bound"] is not None:
        parts.append(bullets([say_theorem(result)]))
    if result["calibration"] is not None:
        parts += ["Calibration to a network", bullets(say_fitted(result))]
    if notes := [*say_left_out(result), *map(greek, result["notes"])]:
        parts.append(bullets(f"NOTE: {note}" for note in notes))
    return "\n\n".join(parts)
