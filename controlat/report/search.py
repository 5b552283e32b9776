"""What a search found, as a table with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlat._util.texts import count, short, table

__all__ = ["search_table", "search_text"]


def search_table(result: Mapping[str, Any]) -> str:
    """Every contender under the judging seeds, the found one first."""
    heads = ["schedule", "J", "robust %", "against found", "clean %", "n", "evaluations"]
    return table(heads, [_cells(row) for row in result["rows"]])


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = short(row["schedule"], 60) + ("" if row["name"] == row["schedule"] else f" ({row['name']})")
    if row["errors"]:
        return [name, "failed", *["-"] * 5]
    difference = row.get("difference", {}).get("robust")
    return [
        name,
        _spread(row["J"], 1, 3),
        _spread(row["robust"], 100, 1),
        "" if difference is None else _interval(difference, -100),
        f"{100 * np.mean(row['clean']):.1f}",
        f"{np.mean(row['mean_cost']):.1f}",
        count(row["gradients"]),
    ]


def _spread(values: Sequence[float], unit: float, digits: int) -> str:
    """Mean and deviation over seeds."""
    text = f"{unit * np.mean(values):.{digits}f}"
    return text + (f" ±{unit * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def _interval(difference: Mapping[str, float], unit: float) -> str:
    ends = sorted(unit * difference[end] for end in ("low", "high"))
    return f"{unit * difference['mean']:+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]"


def _verdict(result: Mapping[str, Any]) -> str:
    """Which schedule to use, and whether that is decided."""
    rows = [row for row in result["rows"] if not row["errors"]]
    found = rows[0]
    best = min(rows, key=lambda row: float(np.mean(row["J"])))
    if best is not found:
        d = best["difference"]["J"]
        how = "decidedly" if d["low"] > 0 else "but the difference is not decided"
        return f"Use {best['schedule']}: its J is lower than that of what was found, {how}."
    behind = [row for row in rows[1:] if row["difference"]["J"]["high"] < 0]
    told = "all others" if len(behind) == len(rows) - 1 else f"{len(behind)} of {len(rows) - 1} others"
    return f"Use {found['schedule']}: its J is the lowest, decidedly so against {told}."


def search_text(result: Mapping[str, Any]) -> str:
    """The table, what it means, and which schedule to use."""
    seeds, spent = result["settings"]["judge_seeds"], result["spent"]
    lines = [
        search_table(result),
        "",
        _verdict(result),
        f"- {len(seeds)} judging seeds, none of which the search used: mean ± deviation; differences are "
        "paired, with 95 % intervals.",
        f"- J = Phi + {result['price']:.4g} n, n gradient evaluations per sample and step.",
        f"- The search took {spent['trainings']} trainings, {count(spent['gradients'])} gradient "
        "evaluations.",
    ]
    return "\n".join(lines)
