"""The admissible sets G(theta) of controls u = (alpha, K): what each asks for, and which is offered where."""

from __future__ import annotations

from typing import NamedTuple

from controlat._util.checks import choice
from controlat.symbolic.landscape import Landscape, LandscapeError

__all__ = ["SETS", "AdmissibleSet", "chosen_set"]


class AdmissibleSet(NamedTuple):
    """G(theta): its formula in words, whether K is whole, whether alpha K = tau."""

    formula: str
    whole: bool
    tied: bool


_BOUND, _FREE, _OUT = "alpha <= alpha*(theta)", "K = 1, 2, ..., not tied", "no step out of x_range"
SETS = {
    name: AdmissibleSet(formula, whole, tied)
    for name, formula, whole, tied in (
        ("product", f"alpha K = tau, 0 < {_BOUND}, K real, no step beyond x*", False, True),
        ("integer", f"alpha K = tau, {_BOUND}, K = 1, 2, ..., no step beyond x*", True, True),
        ("free", f"0 < {_BOUND}, {_FREE} to each other, no step beyond x*", True, False),
        ("overshoot", f"0 < alpha <= c alpha*(theta) with 1 < c < 2, {_FREE}, {_OUT}", True, False),
    )
}


def chosen_set(landscape: Landscape, name: str | None = None) -> str:
    """The name of a set; if left out, the one in which alpha K = tau: "product", or "integer" with whole K.

    Raises:
        LandscapeError: K is real in the set, and l is not quadratic in x.
        ValueError: there is no such set.
    """
    if name is None:
        return "product" if landscape.quadratic else "integer"
    if not SETS[choice(name, "admissible", SETS)].whole and not landscape.quadratic:
        wholes = ", ".join(each for each in SETS if SETS[each].whole)
        raise LandscapeError(
            f"admissible: real K (set {name!r}) is not offered where l is not quadratic in x, as an ascent "
            f"of part of a step is not defined; take one of {wholes}"
        )
    return name
