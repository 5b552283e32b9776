"""The Bolza problem of a landscape l(theta, x): min of L(theta_T) + gamma int K dt, solved by numbers.

`Bolza` is the problem with its admissible set, `verify` checks the derived schedule by the maximum principle
and by dynamic programming, `convergence` compares Theorem 1 with actual runs. Modules load when a name is
first used: sympy, which landscapes are written in, is slow to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlat.bolza.admissible import SETS
    from controlat.bolza.bound import Bound, convergence
    from controlat.bolza.problem import Bolza
    from controlat.bolza.verification import Verification, verify

__all__ = ["SETS", "Bolza", "Bound", "Verification", "convergence", "verify"]

_HOMES = {  # modules, by the names that they define
    "Bound convergence": "bound",
    "Bolza SETS": "problem",
    "Verification verify": "verification",
}


def __getattr__(name: str) -> Any:
    for names, module in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"controlat.bolza.{module}"), name)
    raise AttributeError(f"module 'controlat.bolza' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
