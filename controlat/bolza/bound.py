"""The convergence bound of adversarial training, measured: does it hold on a given landscape, as printed?

Ye et al. (2021, Theorem 1) after Wang et al. (2019, Theorem 1), for steps
theta' = theta - eta (g + sigma xi) with g = l_theta(theta, xhat), |xhat - x*(theta)| <= delta:

    printed:    (1/T) sum E L'(theta_t)^2 <= 4 sigma sqrt(beta Delta/T) + 5 L_tx^2 delta^2
    corrected:  the same with + 2 beta Delta/T, and 2 in place of 5
    sharper:    2 Delta/(eta T) + beta eta sigma^2 + L_tx^2 delta^2

Where the last two come from. L' = l_theta(theta, x*(theta)) (Danskin) and |dx*/dtheta| <= L_xt/mu, so L' has
the Lipschitz constant beta, and with e = g - L', |e| <= L_tx delta, the mean over xi is
E L(theta') - L <= -eta L'(L' + e) + (beta eta^2/2) ((L' + e)^2 + sigma^2)
                 = -eta (1 - beta eta/2) L'^2 - eta (1 - beta eta) L' e + (beta eta^2/2)(e^2 + sigma^2).
As eta <= 1/beta, -L' e <= (L'^2 + e^2)/2 may be used on the middle term; what is left is
-(eta/2) L'^2 + (eta/2) e^2 + (beta eta^2/2) sigma^2. Summed over t and divided by eta T/2: "sharper".
With 1/eta <= beta + sigma sqrt(beta T/Delta) and eta <= sqrt(Delta/(T beta))/sigma it is at most
3 sigma sqrt(beta Delta/T) + 2 beta Delta/T + L_tx^2 delta^2, inside "corrected". Where
T >= beta Delta/sigma^2, 1/eta is sigma sqrt(beta T/Delta) alone, the middle term is not needed, and the
printed form holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from controlat._util.checks import whole
from controlat._util.limits import TimeLimit
from controlat.bolza.constants import FLAT, LINE, Constants, Range, constants_on, interval, peak
from controlat.bolza.descent import Case, Seen, inner_ascent, minimiser, run
from controlat.symbolic.branch import Branch
from controlat.symbolic.landscape import LandscapeError

__all__ = ["Bound", "convergence"]

_ENLARGEMENTS, _MARGIN = 60, 0.25
Known = dict[tuple[Range, Range], "Constants"]
_BOUNDS = ("printed", "corrected", "sharper", "fosc_bound")
_KEYS = ["theta_range", "x_range", "enlarged", "L_tt", "L_tx", "mu", "beta", "Delta", "eta", "delta", "fosc"]
_KEYS += ["left", "standard_error", "long_enough", *_BOUNDS, *(f"{name}_holds" for name in _BOUNDS)]


@dataclass(frozen=True)
class Bound:
    """Both sides of the bound for every sigma and every horizon T.

    A row has T, sigma and reason (empty if the theorem applies; else all that follows is None); theta_range,
    x_range and enlarged (how often); L_tt, L_tx, mu, beta, Delta, eta; delta and fosc, the largest
    |xhat - x*| and first-order gap over x_range that were met; left and its standard_error; long_enough
    (T >= beta Delta/sigma^2); printed, corrected, sharper, fosc_bound, each with ..._holds: True, False, or
    None where the left side is within two standard errors of the bound.

    Args:
        formula: l(theta, x), with its parameters put in.
        theta0: where runs begin.
        x0: the data point.
        inner: alpha and steps of the inner ascent, or delta.
        runs: how many, where there is noise.
        seed: of the noise; all rows share it.
        rows: one a sigma and T.
        reason: why there are no rows at all; empty if there are.
    """

    formula: str
    theta0: float
    x0: float
    inner: dict[str, float | int | None]
    runs: int
    seed: int
    rows: tuple[dict[str, Any], ...]
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self) | {"rows": [dict(row) for row in self.rows]}


def _covering(old: Range, seen: Range, most: Range = LINE) -> Range:
    """A range around both, with a margin where the old one was left, but within what is possible."""
    slack = 1e-9 * (old[1] - old[0]) + 1e-12 * max(map(abs, old))
    low, high = seen[0] - _MARGIN * (old[0] - seen[0]), seen[1] + _MARGIN * (seen[1] - old[1])
    return (
        max(low, most[0]) if seen[0] < old[0] - slack else old[0],
        min(high, most[1]) if seen[1] > old[1] + slack else old[1],
    )


def _checked(k: Constants, seen: Seen, eta: float, T: int, sigma: float) -> dict[str, Any]:
    """Both sides: the measured one with its standard error, and every bound with whether it holds."""
    left, drop = float(seen.left.mean()), k.beta * k.drop
    error = float(seen.left.std(ddof=1) / math.sqrt(len(seen.left))) if len(seen.left) > 1 else 0.0
    noise, wrong = 4 * sigma * math.sqrt(drop / T), (k.l_tx * seen.delta) ** 2
    descent = 2 * k.drop / (eta * T) + k.beta * eta * sigma**2 if eta > 0 else 0.0
    fosc = 5 * k.l_tx**2 * seen.fosc / k.mu
    values = noise + 5 * wrong, noise + 2 * drop / T + 2 * wrong, descent + wrong, noise + fosc
    row: dict[str, Any] = {"left": left, "standard_error": error, "long_enough": T * sigma**2 >= drop}
    for name, value in zip(_BOUNDS, values, strict=True):
        if not math.isfinite(value):
            told = name.replace("_", " ")
            raise LandscapeError(f"the {told} is not finite: its constants are too large for floats")
        slack = 1e-9 * value + 2 * k.beta * k.rounding / T + 2 * error
        # the left side is a mean over runs: within two standard errors of the bound it decides nothing
        near = error > 0 and abs(left - value) <= slack
        row |= {name: value, f"{name}_holds": None if near else left <= value + slack}
    return row


def _row(case: Case, T: int, sigma: float, theta: Range, x: Range, known: Known) -> dict[str, Any]:
    """One horizon and one sigma: constants, runs, and again on a larger range while runs leave it."""
    branch, most = case.branch, case.branch.domain
    for enlarged in range(_ENLARGEMENTS):  # noqa: B007
        high = peak("x*(theta)", lambda t, _: branch(t), theta, FLAT)[0]
        low = -peak("x*(theta)", lambda t, _: -branch(t), theta, FLAT)[0]
        x = min(x[0], low), max(x[1], high)
        if (theta, x) not in known:
            known[theta, x] = constants_on(branch, case.theta0, theta, x)
        k = known[theta, x]
        eta = 1 / k.beta if sigma == 0 else min(1 / k.beta, math.sqrt(k.drop / (T * k.beta)) / sigma)
        seen = run(case, k, eta, T, sigma)
        wider = _covering(theta, seen.theta, most), _covering(x, seen.x)
        if wider == (theta, x):
            break
        theta, x = wider
    else:
        raise LandscapeError(
            f"runs still leave theta in {theta}, x in {x} after {_ENLARGEMENTS} enlargements"
        )
    if not seen.finite:
        raise LandscapeError(
            f"a run leaves theta in [{most[0]:.6g}, {most[1]:.6g}], where the inner maximum is followed, "
            "or its inner ascent diverges"
        )
    values = list(theta), list(x), enlarged, k.l_tt, k.l_tx, k.mu, k.beta, k.drop, eta, seen.delta, seen.fosc
    return dict(zip(_KEYS, values, strict=False)) | _checked(k, seen, eta, T, sigma)


@np.errstate(all="ignore")  # what is not finite is named
def convergence(
    branch: Branch,
    theta0: float,
    horizons: Sequence[int] = (1, 10, 100, 1000),
    sigma: float | Sequence[float] = 0.0,
    *,
    alpha: float | None = None,
    steps: int | None = None,
    delta: float = 0.0,
    runs: int = 256,
    seed: int = 0,
    theta_range: Range | None = None,
    x_range: Range | None = None,
) -> Bound:
    """Run the discrete descent with the theorem's step size and compare both sides of its bound.

    The range of the constants begins as [theta_0, the minimiser that the robust flow from theta_0 reaches]
    and the hull of x0 and x* over it, or as given; where runs or inner points leave it, it is enlarged and
    all is repeated. The theorem wants its constants everywhere, which with Gaussian noise no bounded range
    gives: what is checked is the bound with the constants of where these runs are.

    Args:
        branch: the inner maximum x*(theta).
        theta0: where runs begin.
        horizons: numbers of outer steps T; eta depends on T, so each has runs of its own.
        sigma: standard deviation of the noise in the gradient, in units of l_theta; one or several.
        alpha: step size of an inexact inner ascent from the data point; the exact maximiser if left out.
        steps: its number of steps K.
        delta: instead, a distance in x of the inner point from the maximiser, on the side that hinders most.
        runs: how many, where sigma > 0.
        seed: of the noise.
        theta_range: where the range of theta begins.
        x_range: where the range of x begins.

    Returns:
        A row for every sigma and T; a reason instead where the theorem says nothing.

    Raises:
        ValueError: a setting is out of range.

    Source: Ye et al. (2021), Theorem 1; Wang et al. (2019), Theorem 1.

    >>> from controlat.symbolic.landscape import Landscape
    >>> bound = convergence(Branch(Landscape(), 1.0, 1.0, (-3, 3)), 1.0, (1, 10), x_range=(-2, 2))
    >>> [(round(row["left"], 2), row["printed"], round(row["corrected"], 2)) for row in bound.rows]
    [(1.0, 0.0, 23.14), (0.69, 0.0, 2.31)]
    """
    if not branch.domain[0] <= theta0 <= branch.domain[1]:
        raise ValueError(f"theta0 must be where the inner maximum is followed, {branch.domain}, got {theta0}")
    end, count = inner_ascent(branch, alpha, steps, delta), whole(runs, "runs", 2)
    case = Case(branch, float(theta0), inner=end, runs=count, seed=whole(seed, "seed", 0))
    sigmas = [float(s) for s in np.atleast_1d(np.asarray(sigma, dtype=float))]
    if not sigmas or not all(0 <= s < math.inf for s in sigmas):
        raise ValueError(f"sigma must be one or several finite numbers of at least 0, got {sigma}")
    if len(horizons) == 0:
        raise ValueError("horizons must hold at least one number of outer steps, got none; 100 for example")
    horizons, x0 = [whole(T, "horizons", 1) for T in horizons], branch.landscape.point
    x = (x0, x0) if x_range is None else interval("x_range", x_range, x0)
    begin = None if theta_range is None else interval("theta_range", theta_range, theta0, branch.domain)
    reason, rows, known = "", list[dict[str, Any]](), Known()
    try:
        theta = begin or (min(ends := (case.theta0, minimiser(branch, case.theta0))), max(ends))
        for s, T in itertools.product(sigmas, horizons):
            rows.append({"T": T, "sigma": s, "reason": ""} | dict.fromkeys(_KEYS))
            try:
                rows[-1] |= _row(case, T, s, theta, x, known)
            except (LandscapeError, TimeLimit) as why:
                rows[-1]["reason"] = str(why)
    except (LandscapeError, TimeLimit) as why:
        reason = str(why)
    inner: dict[str, float | int | None] = {"alpha": alpha, "steps": steps, "delta": float(delta)}
    formula = str(branch.landscape.expression.subs(branch.landscape.values))
    return Bound(formula, case.theta0, x0, inner, case.runs, case.seed, tuple(rows), reason)
