"""Successive approximations: a maximiser of the Hamiltonian along runs under the incumbent is tried next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats.qmc import Sobol

from controlat._util.checks import number, whole
from controlat.schedule_search.gain_model import GainModel, check_knobs, usable
from controlat.schedule_search.proposers import Told, price_of
from controlat.schedule_search.space import Space

__all__ = ["MSA", "PROPOSER"]

_POOL = 7  # 2^7 points of the trust region on which the model is compared
_ROUNDS, _NEAR = 4, 48  # of refinement near the best of them, and points in each
_LEAST = 0.02  # smallest radius
Array = NDArray[np.float64]


class MSA:
    """Successive approximations with the augmented Hamiltonian, in a trust region, over a space's parameters.

    From the incumbent x0, judged under several seeds with the gains of other controls along its runs, a
    smooth model of the Hamiltonian is regressed (`GainModel`), and the next point is

        argmax over |x - x0|_inf <= r of  sum_t [H(t, u_t(x)) - H(t, u_t(x0))] - (rho/2) |x - x0|^2

    in the unit cube. It is judged under the same seeds and becomes the incumbent if J decreases. With A the
    decrease, s its standard error (paired over seeds) and P the decrease that the model predicted,

        ratio = (A + s) / (P + s),

    r doubles where the ratio is at least 3/4, and halves where it is below 1/4. rho is the curvature with
    which the model would have predicted A. The first incumbent is the best of a few points of the space's
    design; where r becomes too small, or the incumbent maximises the Hamiltonian, the next one is.

    Args:
        space: what is searched; its schedules set alpha and steps.
        seed: of its random numbers.
        startup: points of the space's design, of which incumbents are taken, the best first.
        seeds: under which an incumbent and what follows from it are judged.
        radius: r at the beginning, in units of the cube.

    Raises:
        ValueError: a number is out of its range, or the schedules do not set alpha and steps.

    Source:
        Li et al. (2018), section 4, the augmented Hamiltonian; Conn et al. (2000), trust regions; Sun and
        Nocedal (2023), the ratio under noise.
    """

    def __init__(
        self, space: Space, seed: int, startup: int = 4, seeds: int = 3, radius: float = 0.25
    ) -> None:
        check_knobs(space, "msa")
        self.space, self._startup = space, whole(startup, "startup", 1)
        self._seeds = whole(seeds, "seeds", 1)
        self._first_radius = number(radius, "radius")
        if not 0 < self._first_radius <= 1:
            raise ValueError(f"radius must be above 0 and at most 1, got {self._first_radius:g}")
        self._rng = np.random.default_rng(seed)
        self._sobol, self._design = Sobol(len(space.parameters), rng=self._rng), space.design(seed)
        self._waiting: list[tuple[float, Array]] = []  # startup points that are not incumbents yet
        self._begin()

    # ------------------------------------------------------------------------------------ ask and tell

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points of the startup, or the one that is wanted next."""
        if self._stage == "startup":
            return list(itertools.islice(self._design, min(count, self._left)))
        return [self.space.point(self._next)]

    def tell(self, trials: Sequence[Told]) -> None:
        """Take in what was found, and decide what is asked for next."""
        if self._stage == "startup":
            self._left -= len(trials)
            self._waiting += [(t.value, self._shares(t)) for t in trials if t.value is not None]
            if self._left <= 0:
                self._next_start()
            return
        (told,) = trials
        if self._stage == "incumbent":
            self._look_back(told)
        else:
            self._compare(told)

    @property
    def fidelity(self) -> dict[str, Any]:
        """How the points of the last `ask` are judged."""
        several = {"seeds": self._seeds}
        return {"startup": {}, "incumbent": several | {"surface": True}, "step": several}[self._stage]

    # ------------------------------------------------------------------------------------ what comes next

    def _begin(self) -> None:
        """Ask for the next points of the design."""
        self._stage, self._left = "startup", self._startup

    def _next_start(self) -> None:
        """Go on from the best startup point that is left, or from new ones."""
        self._radius, self._rho = self._first_radius, 0.0
        if not self._waiting:
            self._begin()
            return
        best = min(range(len(self._waiting)), key=lambda i: self._waiting[i][0])
        self._want("incumbent", self._waiting.pop(best)[1])

    def _want(self, stage: str, x: Array) -> None:
        self._stage, self._next = stage, x

    def _look_back(self, told: Told) -> None:
        """Regress the Hamiltonian along the incumbent's runs."""
        surfaces = [a.surface for a in told.answers if a.surface is not None and usable(a.surface)]
        if told.value is None or not surfaces:
            self._next_start()
            return
        self._incumbent, self._x0 = told, self._shares(told)
        self._price, self._model = price_of(told), GainModel.of(surfaces)
        self._base = self._hamiltonian(self._x0)
        self._step()

    def _step(self) -> None:
        """Ask for the maximiser within the trust region, or give the incumbent up."""
        x = self._maximiser()
        gain = self._gain(x)
        if self._radius < _LEAST or gain - self._augmentation(x) <= 0:
            self._next_start()
            return
        self._predicted = gain
        self._want("step", x)

    def _compare(self, told: Told) -> None:
        """Take the step or not, and adapt the trust region and rho."""
        x = self._shares(told)
        decrease, error = _decrease(self._incumbent, told)
        model = self._predicted - self._augmentation(x)
        ratio = (decrease + error) / (model + error)
        if math.isfinite(decrease):
            self._rho = 2 * max(0.0, self._predicted - decrease) / float(np.square(x - self._x0).sum())
        if ratio >= 0.75:
            self._radius = min(2 * self._radius, 1.0)
        elif not ratio >= 0.25:
            self._radius /= 2
        if decrease > 0:
            self._want("incumbent", x)
        else:
            self._step()

    # ------------------------------------------------------------------------------------ the model

    def _gain(self, x: Array) -> float:
        """The predicted gain of x over the incumbent, to first order in the state."""
        return self._hamiltonian(x) - self._base

    def _hamiltonian(self, x: Array) -> float:
        return self._model.value(self.space.schedule(self.space.point(x)), self._price)

    def _augmentation(self, x: Array) -> float:
        return self._rho / 2 * float(np.square(x - self._x0).sum())

    def _maximiser(self) -> Array:
        """The best of a Sobol sequence in the trust region and of points ever nearer to the best."""
        low, high = np.maximum(self._x0 - self._radius, 0), np.minimum(self._x0 + self._radius, 1)
        pool = low + (high - low) * self._sobol.random(2**_POOL)
        best, value = self._x0, 0.0
        for i in range(_ROUNDS + 1):
            values = np.array([self._gain(x) - self._augmentation(x) for x in pool])
            if values.max() > value:
                best, value = pool[int(values.argmax())], float(values.max())
            spread = self._radius / 4 ** (i + 1)
            near = best + spread * self._rng.standard_normal((_NEAR, len(best)))
            pool = np.clip(near, low, high)
        return best

    def _shares(self, told: Told) -> Array:
        return np.array(self.space.shares(told.point))


def _decrease(before: Told, after: Told) -> tuple[float, float]:
    """The decrease of J with its standard error, paired where both were judged under several seeds."""
    if before.value is None or after.value is None:
        return -math.inf, 0.0
    price, decrease = price_of(before), before.value - after.value
    a, b = ([r.phi + price * r.mean_cost for r in t.answers if r.phi is not None] for t in (before, after))
    if len(a) != len(b) or len(a) < 2:
        return decrease, 0.0
    return decrease, float(np.std(np.subtract(a, b), ddof=1) / math.sqrt(len(a)))


PROPOSER = MSA
