"""The result file of `derive`: what was derived and checked as plain data, and what is written beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlat._util.files import write_json, write_text
from controlat.app.runs import environment

if TYPE_CHECKING:
    from controlat.bolza import Bound, Verification
    from controlat.control.handover import Handover
    from controlat.symbolic import Derivation

__all__ = ["content", "write"]

FORMAT, VERSION = "controlat derivation", 1
_POINTS = 101  # of t in the result file


def content(
    settings: dict[str, Any],
    derivation: Derivation,
    *,
    verification: Verification | None,
    bound: Bound | None,
    calibration: dict[str, Any] | None,
    handover: Handover,
) -> dict[str, Any]:
    """What result.json holds, but for what was left out and the seconds.

    Args:
        settings: those of the command.
        derivation: formulas and functions of time.
        verification: the check against the maximum principle, if it was made.
        bound: Theorem 1 beside actual runs, if they were made.
        calibration: the fit and what was measured, if there was a run.
        handover: the network's schedule.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "environment": environment(),
        "task": _task(derivation),
        **_solution(derivation),
        "verification": None if verification is None else verification.to_json(),
        "bound": None if bound is None else bound.to_json(),
        "calibration": calibration,
        "network": handover.to_json(),
    }


def _task(derivation: Derivation) -> dict[str, Any]:
    import sympy  # slow to import, as whatever is symbolic

    task, landscape = derivation.task, derivation.landscape
    names = ("theta0", "tau", "horizon", "gamma")
    return {
        "landscape": landscape.text,
        "latex": sympy.latex(landscape.expression),
        "x0": landscape.point,
        "parameters": {str(k): float(v) for k, v in landscape.values.items()},
        "x_range": list(landscape.ends),
        "theta_range": list(task.reach),
        **{name: float(getattr(task, name)) for name in names},
        "order": task.order,
        "quadratic": landscape.quadratic,
    }


def _solution(derivation: Derivation) -> dict[str, Any]:
    """Formulas, curves and what the figures need, as plain data."""
    t = np.linspace(0, float(derivation.task.horizon), _POINTS)
    curves = {
        "theta": derivation.theta,
        "alpha": derivation.alpha,
        "K": derivation.K,
        "linear": derivation.linear,
    }
    return {
        "formulas": {key: answer.to_json() for key, answer in derivation.answers.items()},
        "stationary": [point._asdict() for point in derivation.points],
        "branch": {
            "rank": derivation.index,
            "x": derivation.point.x,
            "domain": list(derivation.branch.domain),
        },
        "minima": derivation.minima,
        "series": {
            "values": derivation.series_numbers,
            "formulas": [str(c) for c in derivation.coefficients],
        },
        "curves": {"t": t.tolist(), **{name: f(t).tolist() for name, f in curves.items()}}
        | {"series": derivation.series(t).tolist()},
        "rising": derivation.rising,
        "cost": {"J": derivation.cost, **derivation.parts},
        "pictures": derivation.pictures(),
        "notes": derivation.notes,
    }


def write(result: dict[str, Any], out: Path) -> None:
    """Schedule, figures, summary.md and result.json in a directory."""
    from controlat.report.derivation.document import markdown
    from controlat.report.derivation.figures import FIGURES

    write_json(out / "schedule.json", result["network"]["schedule"])
    for name, figure in FIGURES.items():
        if figure.wanted(result):
            figure.draw(result, out / name)
    write_text(out / "summary.md", markdown(result))
    write_json(out / "result.json", result)  # last: where it is, the others are
