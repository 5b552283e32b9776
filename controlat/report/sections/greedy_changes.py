"""What the greedy maximum principle would have done in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from controlat._util.texts import count
from controlat.report._contents import first_seed, searched_knobs, summaries
from controlat.report._formats import by_epoch, knobs
from controlat.report.sections import Result, Section

__all__ = ["SECTION"]


def text(result: Result) -> str:
    """Per epoch, under the first seed: the schedule's control, and where the norm form has its maximum."""
    spent = sum(s["criterion_gradients"] for s in summaries(result))
    return (
        "## What the greedy maximum principle would have done\n\nControl of the schedule → maximiser of the "
        f"norm form, and the gap; seed {first_seed(result)}. Both terms of each are "
        f"in result.json. All surfaces together took {count(spent)} gradient evaluations.\n\n"
        f"{by_epoch(result['schedules'], partial(_cell, searched_knobs(result)))}"
    )


def _cell(names: Sequence[str], run: Mapping[str, Any], epoch: int) -> str:
    if epoch >= len(run["criterion"]):
        return "-"
    gap = run["criterion"][epoch]["norm"]
    u, v = gap["control"], gap["maximiser"]
    planned, taken = knobs(run["epochs"][epoch]["control"], names), knobs(u, names)
    dithered = planned != taken  # the control of an epoch is real, that of its first step is scored
    if u == v:
        return f"{knobs(u, ['steps'])} is best" + f" (of {planned})" * dithered
    return f"{planned}" + f" (here {taken})" * dithered + f" → {knobs(v, names)}, +{gap['value']:.3g}"


SECTION = Section(order=40, text=text)
