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
    from controlat.symbolic.bound import Bound as Bound
    from controlat.symbolic.bound import convergence as convergence
    from controlat.symbolic.branch import Branch as Branch
    from controlat.symbolic.derivation import Derivation as Derivation
    from controlat.symbolic.fitting import Fit as Fit
    from controlat.symbolic.fitting import fit as fit
    from controlat.symbolic.formula import FormulaError as FormulaError
    from controlat.symbolic.formula import parse as parse
    from controlat.symbolic.handover import Handover as Handover
    from controlat.symbolic.handover import hand_over as hand_over
    from controlat.symbolic.landscape import Landscape as Landscape
    from controlat.symbolic.landscape import LandscapeError as LandscapeError
    from controlat.symbolic.task import Task as Task
    from controlat.symbolic.verification import Verification as Verification
    from controlat.symbolic.verification import verify as verify

AMATA = "theta^2/2 - (x - theta)^2/(theta^2 + 1)"  # Ye et al. (2021), equation 11

_HOME = {
    "Bound": "bound",
    "Branch": "branch",
    "Derivation": "derivation",
    "Fit": "fitting",
    "FormulaError": "formula",
    "Handover": "handover",
    "Landscape": "landscape",
    "LandscapeError": "landscape",
    "Task": "task",
    "Verification": "verification",
    "convergence": "bound",
    "fit": "fitting",
    "hand_over": "handover",
    "parse": "formula",
    "verify": "verification",
}

__all__ = ["AMATA", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'controlat.symbolic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"controlat.symbolic.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
