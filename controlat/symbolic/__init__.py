"""Landscapes l(theta, x): schedules derived from them with sympy.

`Landscape` is the loss, `Task` what a schedule is derived for, `Derivation` what follows from it; `fit`
calibrates it to a network. `controlat.bolza` checks the schedule, `controlat.control.handover` makes it one
of the trainer; `controlat.derive` does all of it. Modules load when a name is first used: sympy is slow to
import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlat.symbolic.branch import Branch
    from controlat.symbolic.derivation import Derivation
    from controlat.symbolic.fitting import Fit, fit
    from controlat.symbolic.formula import FormulaError, parse
    from controlat.symbolic.landscape import Landscape, LandscapeError
    from controlat.symbolic.task import Task

__all__ = ["AMATA", "Branch", "Derivation", "Fit", "FormulaError", "Landscape", "LandscapeError", "Task"]
__all__ += ["fit", "parse"]

AMATA = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"  # Ye et al. (2021), equation 11

_HOMES = {  # modules, by the names that they define
    "Branch": "branch",
    "Derivation": "derivation",
    "Fit fit": "fitting",
    "FormulaError parse": "formula",
    "Landscape LandscapeError": "landscape",
    "Task": "task",
}


def __getattr__(name: str) -> Any:
    for names, module in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"controlat.symbolic.{module}"), name)
    raise AttributeError(f"module 'controlat.symbolic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
