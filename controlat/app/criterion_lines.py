"""From a line of criterion.jsonl to an epoch's entry of result.json: gaps from the stored surface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlat.control.space import Control
from controlat.pmp import FORMS, Gap, Surface

__all__ = ["gaps_of"]


def gaps_of(line: Mapping[str, Any], gamma: float) -> dict[str, Any]:
    """The gap of an epoch's control in both forms, at the price gamma and around it."""
    surface, u = Surface.from_json(line["surface"]), Control(**line["control"])
    gaps: dict[str, Gap] = {form: surface.gap(u, gamma, form) for form in FORMS}
    return {
        "epoch": line["epoch"],
        **{form: gap.to_json() for form, gap in gaps.items()},
        "prices": [
            {"gamma": g} | {form: surface.gap(gaps[form].control, g, form).value for form in FORMS}
            for g in (gamma / 4, 4 * gamma)
        ],
        "scale": surface.scale,
        "candidates": len(surface.controls),
        "gradients": surface.spent,
        "seconds": line["seconds"],
    }
