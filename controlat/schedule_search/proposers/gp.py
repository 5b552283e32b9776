"""Bayesian optimisation with a Gaussian process that expects noise (scikit-learn's)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats.qmc import Sobol

from controlat._util.checks import whole
from controlat.schedule_search.gain_model import GainModel, check_knobs, usable
from controlat.schedule_search.proposers import Told, price_of
from controlat.schedule_search.space import Space

__all__ = ["GP", "PROPOSER"]

_POOL = 10  # 2^10 points of the cube on which the acquisition is compared, and as many near the best
_SMALL_POOL = 8  # the same under a trend, which takes half a millisecond at a point
_DOUBT = 5.0  # beta counts as if so many more trials had shown no relation
_SPREAD = 0.1  # standard deviation of those, in units of the cube
_UNKNOWN = 1e-3  # smallest variance of the noise, J being scaled to variance 1
Array = NDArray[np.float64]


class GP:
    """Expected improvement over the best posterior mean, under a Gaussian process with a noise term.

        J(x) = m + f(x) + e,    f ~ GP(0, Matern 5/2, one length for each parameter),    e ~ N(0, s^2)

    m, s and the lengths maximise the likelihood after every call of `tell`. The improvement is over the
    smallest posterior mean at a point that was tried, as the smallest J that was seen owes much to luck.
    Points of one `ask` are spread by believing the posterior mean at those before (kriging believer). Failed
    trials count as the largest J that was seen.

    With `costates`, the best points of the startup are judged once more with the gains of other controls
    along their runs, whose cost counts. The smooth model of the Hamiltonian H that is regressed on these
    (`GainModel`) gives a trend, and the process is that of what is left:

        J(x) = m - beta H(x) + f(x) + e,    beta >= 0

    beta is the slope of a regression of J on -H, shrunk towards 0: it is small where H does not predict J.

    Args:
        space: what is searched.
        seed: of its random numbers.
        startup: points of the space's design before the model is used.
        costates: how many of them are looked back upon with costates; 0 for no help from them.

    Raises:
        ValueError: a number is out of its range, or costates are wanted where schedules do not set alpha and
            steps.
        ModuleNotFoundError: scikit-learn is not installed; the message says how.

    Source:
        Jones et al. (1998); Ginsbourger et al. (2010), kriging believer; Vazquez et al. (2008), expected
        improvement under noise.
    """

    def __init__(self, space: Space, seed: int, startup: int = 10, costates: int = 0) -> None:
        try:
            import sklearn.gaussian_process  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the proposer gp needs scikit-learn: pip install 'controlat[gp]', or take tpe"
            ) from error
        self.space, self._startup = space, whole(startup, "startup", 2)
        self._wanted = whole(costates, "costates", 0)
        if self._wanted:
            check_knobs(space, "gp with costates")
        self._gains: GainModel | None = None
        self._price = self._beta = 0.0
        self._rng = np.random.default_rng(seed)
        self._sobol, self._design = Sobol(len(space.parameters), rng=self._rng), space.design(seed)
        self._x, self._y = list[list[float]](), list[float | None]()

    @property
    def _looks_back(self) -> bool:
        """Whether the next points are the best of the startup once more, with surfaces."""
        started = len(self._y) >= self._startup and any(y is not None for y in self._y)
        return self._wanted > 0 and started

    @property
    def fidelity(self) -> dict[str, Any]:
        """How the points of the last `ask` are judged."""
        return {"surface": True} if self._looks_back else {}

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points, one after the other with the model's mean in place of what is not told yet."""
        if self._looks_back:
            best = np.argsort(self._targets(), kind="stable")[: min(count, self._wanted)]
            return [self.space.point(self._x[i]) for i in best]
        known = [y for y in self._y if y is not None]
        chosen: list[Array] = []
        model = self._fitted() if len(self._y) >= self._startup and len(set(known)) > 1 else None
        if model is None:
            return list(itertools.islice(self._design, count))
        for _ in range(count):
            x = np.array([*self._x, *chosen])
            rest = model.predict(x)
            mean_at = self._trend(x) + rest
            pool = self._pool(x[int(mean_at.argmin())])
            believed = self._believing(model, x, rest)
            mean, total = believed.predict(pool, return_std=True)
            noise = believed.kernel_.k2.noise_level * believed._y_train_std**2  # part of sklearn's deviation
            deviation = np.sqrt(np.maximum(total**2 - noise, 0.0))
            improvement = _improvement(float(mean_at.min()), self._trend(pool) + mean, deviation)
            chosen.append(pool[int(improvement.argmax())])
        return [self.space.point(x) for x in chosen]

    def tell(self, trials: Sequence[Told]) -> None:
        """Take in what was found; a point that was judged once more with its surface is known already."""
        if self._looks_back:
            self._wanted = 0
            surfaces = [a.surface for t in trials for a in t.answers if a.surface and usable(a.surface)]
            if surfaces:
                self._gains = GainModel.of(surfaces)
                self._price = next(price_of(t) for t in trials if t.value is not None)
            return
        for told in trials:
            self._x.append(self.space.shares(told.point))
            self._y.append(told.value)

    def _trend(self, x: Array) -> Array:
        """-beta H at points of the cube."""
        return -self._beta * self._hamiltonian(x) if self._beta else np.zeros(len(x))

    def _hamiltonian(self, x: Array) -> Array:
        if self._gains is None:
            return np.zeros(len(x))
        schedules = (self.space.schedule(self.space.point(row)) for row in x)
        return np.array([self._gains.value(s, self._price) for s in schedules])

    def _targets(self) -> Array:
        known = [y for y in self._y if y is not None]
        return np.array([max(known) if y is None else y for y in self._y])

    def _fitted(self) -> Any:
        """The process with the parameters of largest likelihood."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        lengths = np.full(len(self.space.parameters), 0.5)
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(lengths, (0.05, 20.0), nu=2.5)
        kernel = kernel + WhiteKernel(0.1, (_UNKNOWN, 10.0))
        draw = int(self._rng.integers(2**31 - 1))
        model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=draw)
        x, targets = np.array(self._x), self._targets()
        self._beta = _slope(-self._hamiltonian(x), targets)
        self._rest = targets - self._trend(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length at the end of its range is fine
            return model.fit(x, self._rest)

    def _believing(self, model: Any, x: Array, rest: Array) -> Any:
        """The process given its own mean at points that were asked for and not told."""
        from sklearn.base import clone

        if len(x) == len(self._x):
            return model
        believed = clone(model).set_params(kernel=model.kernel_, optimizer=None)
        return believed.fit(x, np.append(self._rest, rest[len(self._x) :]))

    def _pool(self, best: Array) -> Array:
        """Where the acquisition is compared: everywhere, and near the best."""
        far = np.asarray(self._sobol.random(2 ** (_SMALL_POOL if self._beta else _POOL)))
        near = best + _SPREAD * self._rng.standard_normal(far.shape)
        return np.asarray(np.clip(np.concatenate([far, near]), 0, 1))


def _improvement(best: float, mean: Array, deviation: Array) -> Array:
    """Expected improvement E max(best - f, 0) of f ~ N(mean, deviation^2)."""
    deviation = np.maximum(deviation, 1e-12)
    z = (best - mean) / deviation
    return np.asarray((best - mean) * norm.cdf(z) + deviation * norm.pdf(z))


def _slope(x: Array, y: Array) -> float:
    """The slope of y over x, not below 0 and shrunk towards it; 0 where either is constant.

    >>> _slope(np.arange(5.0), 2 * np.arange(5.0)), _slope(np.arange(5.0), -np.arange(5.0))
    (1.0, 0.0)
    """
    x, y = x - x.mean(), y - y.mean()
    square = float(x @ x)
    if square == 0:
        return 0.0
    return max(0.0, float(x @ y) / square) * len(x) / (len(x) + _DOUBT)


PROPOSER = GP
