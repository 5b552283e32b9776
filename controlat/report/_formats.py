"""Numbers and controls as texts, for several sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from controlat._util.texts import table

__all__ = ["by_epoch", "estimate", "knobs", "mean", "percent"]

_SYMBOLS = {"steps": "K", "alpha": "α"}


def estimate(value: Mapping[str, Any]) -> str:
    """A mean with its interval, and its deviation over seeds.

    >>> estimate({"mean": 1.234, "interval": [1.1, 1.3], "sd_over_seeds": None})
    '1.23 [1.1, 1.3]'
    """
    text = f"{value['mean']:.3g}"
    if value["interval"] is not None:
        text += " [{:.3g}, {:.3g}]".format(*value["interval"])
    return text + ("" if value["sd_over_seeds"] is None else f" ±{value['sd_over_seeds']:.2g}")


def percent(share: Mapping[str, Any]) -> str:
    """A share in per cent, with its interval and its deviation over seeds.

    >>> percent({"mean": 0.5, "interval": [0.4, 0.6], "sd_over_seeds": 0.01})
    '50.0 [40.0, 60.0] ±1.0'
    """
    text = "{:.1%} [{:.1%}, {:.1%}]".format(share["mean"], *share["interval"]).replace("%", "")
    return text + (f" ±{100 * share['sd_over_seeds']:.1f}" if share["sd_over_seeds"] is not None else "")


def mean(value: Mapping[str, Any] | None) -> str:
    """A mean alone, - where there is none."""
    return "-" if value is None else f"{value['mean']:.3g}"


def knobs(u: Mapping[str, float], names: Sequence[str]) -> str:
    """A control, as far as these names are in it.

    >>> knobs({"steps": 3, "alpha": 0.05, "fosc": 0.5}, ["steps", "alpha"])
    'K=3 α=0.05'
    """
    return " ".join(f"{_SYMBOLS.get(name, name)}={u[name]:.3g}" for name in names if name in u)


def by_epoch(entries: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any], int], str]) -> str:
    """A table with a row for each epoch and a column for each schedule, of its first run."""
    runs = [entry["runs"][0] for entry in entries]
    epochs = range(max(len(run["criterion"]) for run in runs))
    heads = ["epoch", *(entry["text"] for entry in entries)]
    return table(heads, [[str(e), *(cell(run, e) for run in runs)] for e in epochs])
