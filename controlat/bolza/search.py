"""What searches for better schedules have in common: the controls that they look at, and their result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from controlat.bolza.problem import Bolza
from controlat.symbolic.landscape import Array

__all__ = ["Q_MIN", "Search", "candidates", "grid_of_q", "whole_cap"]

Q_MIN = 0.02  # the smallest alpha/alpha* looked at: K up to 50 K*(theta), where x_K hardly moves any more


@dataclass(frozen=True)
class Search:
    """The best schedule that a search found, beside the derived one by the same scheme.

    Args:
        best: the smallest J.
        derived: J of the derived schedule.
        better: best is lower by more than the scheme's errors.
        t, theta, q, k: the best schedule, one q and K per interval, with the state where it begins.
        about: how it was looked for.
    """

    best: float
    derived: float
    better: bool
    t: Array
    theta: Array
    q: Array
    k: Array
    about: dict[str, Any]

    @property
    def difference(self) -> float:
        """What the derived schedule gives away."""
        return self.derived - self.best


def whole_cap(problem: Bolza) -> int:
    """How many whole K are tried: 1..cap, or ceil(K*)..ceil(K*) + cap - 1 where alpha = tau/K.

    Free alpha and l quadratic in x: every rho^K that K > 1 steps reach is reached by 1 step: 5 is plenty.
    """
    if not problem.tied and problem.landscape.quadratic:
        return 5
    return max(20, min(100, 2 * math.ceil(float(problem.count(problem.theta0)))))


def grid_of_q(reach: float, points: int) -> Array:
    """alpha/alpha* from Q_MIN to reach: log-spaced, linear, and dense towards 1 from below; 1 exactly."""
    logs = np.geomspace(Q_MIN, 1.0, points)
    near = 1.0 - np.geomspace(1e-9, 0.1, points // 4)
    line = np.linspace(reach / points, reach, points)
    return np.unique(np.concatenate([logs, near, line[line >= Q_MIN], [1.0, reach]]))


def candidates(problem: Bolza, theta: Array, points: int = 100, thin: bool = False) -> tuple[Array, Array]:
    """Controls to look at, as arrays (q, K) of shape (theta, candidates); q = 1 is among the q.

    Those of a landscape that is not quadratic in x belong to G(theta) only where `Bolza.admits` them. The q
    are spaced by `points`; `thin` leaves out most of the larger K (1, 2, 3, 4, 6, 8, 12, ...).
    """
    cap = whole_cap(problem)
    counts = np.arange(1.0, cap + 1)
    if thin:
        counts = np.unique(np.round(np.concatenate([counts[:4], np.geomspace(1, cap, 9)])))
    if problem.admissible == "integer":
        k = problem.policy(theta)[1][:, None] + (counts - 1)
        return problem.ratio(theta[:, None], k), k
    if problem.admissible == "product":
        q = np.tile(grid_of_q(1.0, points), (len(theta), 1))
        with np.errstate(all="ignore"):
            return q, problem.count(theta)[:, None] / q
    q, k = np.meshgrid(grid_of_q(problem.reach, points // 2), counts, indexing="ij")
    return np.tile(q.ravel(), (len(theta), 1)), np.tile(k.ravel(), (len(theta), 1))
