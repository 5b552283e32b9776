"""Landscapes l(theta, x): derived with sympy, checked against the maximum principle, handed to the trainer.

`Landscape` is the loss, `Task` what a schedule is derived for, `Derivation` what follows from it; `verify`
checks it, `convergence` compares Theorem 1 with actual runs, `fit` calibrates it to a network, `hand_over`
makes it a schedule of the trainer. `controlat.derive` does all of it. Modules load when a name is first used:
sympy is slow to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlat.symbolic.bound import Bound, convergence
    from controlat.symbolic.branch import Branch
    from controlat.symbolic.derivation import Derivation
    from controlat.symbolic.fitting import Fit, fit
    from controlat.symbolic.formula import FormulaError, parse
    from controlat.symbolic.handover import Handover, hand_over
    from controlat.symbolic.landscape import Landscape, LandscapeError
    from controlat.symbolic.task import Task
    from controlat.symbolic.verification import Verification, verify

__all__ = ["AMATA", "Bound", "Branch", "Derivation", "Fit", "FormulaError", "Handover", "Landscape"]
__all__ += ["LandscapeError", "Task", "Verification", "convergence", "fit", "hand_over", "parse", "verify"]

AMATA = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"  # Ye et al. (2021), equation 11

_HOMES = {  # modules, by the names that they define
    "Bound convergence": "bound",
    "Branch": "branch",
    "Derivation": "derivation",
    "Fit fit": "fitting",
    "FormulaError parse": "formula",
    "Handover hand_over": "handover",
    "Landscape LandscapeError": "landscape",
    "Task": "task",
    "Verification verify": "verification",
}


def __getattr__(name: str) -> Any:
    for names, module in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"controlat.symbolic.{module}"), name)
    raise AttributeError(f"module 'controlat.symbolic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
