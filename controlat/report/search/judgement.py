"""The judgement of a search: what was found and its contenders under the judging seeds, and which to use."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlat._util.texts import count, short, table
from controlat.schedule_search.loop import Difference, paired

__all__ = ["against", "finished", "label", "recommended", "search_table", "search_use", "verdict"]

Row = Mapping[str, Any]
_NAME = 30  # letters of a name in the table, which then has at most 110 columns
_LISTED = 3  # contenders that a sentence names


def label(row: Row) -> str:
    """The name of a contender, short."""
    return short(row["name"], _NAME)


def finished(result: Mapping[str, Any]) -> list[Row]:
    """The contenders of which no training failed."""
    return [row for row in result["rows"] if not row["errors"]]


def against(row: Row, other: Row, key: str) -> Difference:
    """The paired difference of a quantity, row minus other, over the judging seeds."""
    return paired(row[key], other[key])


def search_table(result: Mapping[str, Any]) -> str:
    """Every contender under the judging seeds, the found one first."""
    heads = ["schedule", "J", "robust %", "against found", "clean %", "n", "evals"]
    return table(heads, [_cells(row, result["rows"][0]) for row in result["rows"]])


def _cells(row: Row, first: Row) -> list[str]:
    if row["errors"]:
        return [label(row), "failed", *["-"] * 5]
    return [
        label(row),
        _spread(row["J"], 1, 3),
        _spread(row["robust"], 100, 1),
        "" if row is first or first["errors"] else _points(against(row, first, "robust")),
        f"{100 * np.mean(row['clean']):.1f}",
        f"{np.mean(row['mean_cost']):.1f}",
        count(row["gradients"]),
    ]


def _spread(values: Sequence[float], unit: float, digits: int) -> str:
    """Mean and deviation over seeds."""
    text = f"{unit * np.mean(values):.{digits}f}"
    return text + (f" ±{unit * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def _points(difference: Difference) -> str:
    """A difference of shares in percentage points, with its interval where there is one."""
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else "")


def verdict(result: Mapping[str, Any]) -> str:
    """Which schedule to use, whether that is decided, and what it gains on PGD-K_max.

    The one of lowest mean J is recommended, whether it was found or stood among the contenders. Another
    cannot be told apart from it where the 95 % interval of their paired difference of J holds 0.
    """
    rows = finished(result)
    if not rows:
        return "No schedule can be recommended: trainings of all of them failed under the judging seeds."
    best = _lowest(rows)
    others = [row for row in rows if row is not best]
    sentences = [_choice(result["rows"][0], best), *_decided(best, others), *_gain(result, best)]
    return " ".join(sentences)


def recommended(result: Mapping[str, Any]) -> Row | None:
    """The row of the schedule that `verdict` recommends, None where all failed."""
    rows = finished(result)
    return _lowest(rows) if rows else None


def search_use(result: Mapping[str, Any], schedule: Path) -> str:
    """How to train under what is recommended, a line for the terminal; `schedule` holds what was found."""
    best = recommended(result)
    if best is None or best is result["rows"][0]:
        return f"Train under it: controlat train --out RUN --schedule {schedule} ..."
    method = f" --method {best['method']}" if best.get("method") else ""
    text = shlex.quote(best["schedule"])
    return (
        f"Train under what is recommended: controlat train --out RUN{method} --schedule {text} ...\n"
        f"{schedule} is what was found."
    )


def _lowest(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: float(np.mean(row["J"])))


def _choice(first: Row, best: Row) -> str:
    """The recommendation; `first` is what was found."""
    mean = f"{np.mean(best['J']):.3f}"
    if best is first:
        return f"Use {best['schedule']}, which was found: its J, {mean}, is the lowest."
    name = best["schedule"] if best["name"] in best["schedule"] else f"{best['name']}, {best['schedule']}"
    if first["errors"]:
        return f"Use {name} (J {mean}): what was found failed under a judging seed."
    told = f"its J is {mean}, that of what was found {np.mean(first['J']):.3f}."
    if len(best["J"]) > 1 and not against(first, best, "J").decided:
        return f"Use {name}, or what was found: {told}"
    return f"Use {name}, not what was found: {told}"


def _decided(best: Row, others: Sequence[Row]) -> list[str]:
    """Which of the others could be as good."""
    if not others:
        return []
    if len(best["J"]) < 2:
        return ["One judging seed decides nothing."]
    near = [row for row in others if not against(row, best, "J").decided]
    if not near:
        return ["That is decided against all others."]
    names = [
        "what was found" if row["name"] == "found" else label(row)
        for row in sorted(near, key=lambda row: float(np.mean(row["J"])))
    ]
    if len(names) > _LISTED:
        names = [*names[:_LISTED], f"{len(names) - _LISTED} more"]
    listed = " and ".join(filter(None, ("; ".join(names[:-1]), names[-1])))
    rest = len(others) - len(near)
    told = f", {'the other is' if rest == 1 else f'the {rest} others are'} decidedly worse" * bool(rest)
    listed = listed.replace("what", "What") if listed.startswith("what was") else listed
    return [f"{listed} cannot be told apart from it by J{told}."]


def _gain(result: Mapping[str, Any], best: Row) -> list[str]:
    """Robust accuracy and cost against PGD-K_max, where that was judged."""
    unit = result.get("unit", {}).get("schedule")
    rows = [r for r in finished(result) if r["schedule"] == unit and not r.get("method") and r is not best]
    if not rows:
        return []
    share = best["gradients"] / rows[0]["gradients"]
    d = against(best, rows[0], "robust")
    decided = ", undecided" * (not d.decided)
    return [
        f"Robust accuracy against {label(rows[0])}: {_points(d)} points{decided}, at {share:.2f} of its "
        "gradient evaluations."
    ]
