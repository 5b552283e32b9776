"""controlat: optimal-control analysis of adversarial training.

Symbols, here and in every docstring:

    theta, z      parameters; the whole state (parameters, buffers, optimiser buffers, memory of a method)
    u, G          control: the knobs of the inner loop, (alpha, K) for PGD; the set of admissible controls
    alpha, steps  step size (pixel units) and number K of the inner ascent
    eps           radius of the perturbation set, in pixel units of [0, 1]
    A_{theta,u}   the inner solver: clean batch -> adversarial batch
    S(z, u)       one outer step of training
    F(theta, u)   the controlled field, -grad_theta l(h_theta(A_{theta,u}(x)), y) for SGD
    n(u), gamma   gradient evaluations per sample of one outer step; price of one of them
    Phi           terminal cost (adversarial loss on held-out data that nothing decided in training sees)
    J             objective, Phi + gamma eta sum n
    H, C          Hamiltonian; Amata's criterion, the mean of max_v H(v) - H(u) over training
    eta, mu       learning rate, momentum
    t, T          time in epochs, length of training; in a landscape, time of its flow and horizon
    l(theta, x)   a one-dimensional landscape: loss of one parameter and one input, x0 its data point
    x*, alpha*    its inner maximum; the step that lands on it from x0. K* = tau/alpha*, tau = alpha K

Everything public can be imported from here; submodules load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlat._util.errors import NonFiniteError as NonFiniteError
    from controlat.app.attack import attack as attack
    from controlat.app.derive import Derived as Derived
    from controlat.app.derive import derive as derive
    from controlat.app.evaluate import evaluate as evaluate
    from controlat.app.objective import objective as objective
    from controlat.app.search import search as search
    from controlat.app.train import train as train
    from controlat.attacks.balls import Ball as Ball
    from controlat.attacks.pgd import fgsm as fgsm
    from controlat.attacks.pgd import pgd as pgd
    from controlat.control.schedule_text import parse_schedule as parse_schedule
    from controlat.control.schedules import Schedule as Schedule
    from controlat.control.schedules import load_schedule as load_schedule
    from controlat.control.space import Control as Control
    from controlat.control.space import ControlSpace as ControlSpace
    from controlat.data import Dataset as Dataset
    from controlat.data import Split as Split
    from controlat.pmp import Surface as Surface
    from controlat.pmp import criterion as criterion
    from controlat.pmp import relaxed as relaxed
    from controlat.robust_accuracy import robustness as robustness

__version__ = "0.1.0"

_HOME = {
    "Ball": "attacks.balls",
    "Control": "control.space",
    "ControlSpace": "control.space",
    "Dataset": "data",
    "Derived": "app.derive",
    "NonFiniteError": "_util.errors",
    "Schedule": "control.schedules",
    "Split": "data",
    "Surface": "pmp",
    "attack": "app.attack",
    "criterion": "pmp",
    "derive": "app.derive",
    "evaluate": "app.evaluate",
    "fgsm": "attacks",
    "load_schedule": "control.schedules",
    "objective": "app.objective",
    "parse_schedule": "control.schedule_text",
    "pgd": "attacks",
    "relaxed": "pmp",
    "robustness": "robust_accuracy",
    "search": "app.search",
    "train": "app.train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'controlat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"controlat.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
