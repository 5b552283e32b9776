"""What the size of the criterion means: the decrease of J that it predicts against the one that is reached.

G predicts to first order what all maximisers together would gain. Relaxed roll-outs that go a part lambda of
the way to them tell how much of it comes true, as a trust-region method compares actual and predicted
reduction before it believes its model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlat._util.errors import NonFiniteError
from controlat.control.space import Control
from controlat.dynamics.recording import Recording
from controlat.pmp.full_criterion import Criterion
from controlat.pmp.objective import Outcome
from controlat.pmp.relaxed import relaxed
from controlat.pmp.terminal import Terminal

__all__ = ["HALVINGS", "LAMBDAS", "Trust", "trust"]

LAMBDAS = (0.5,)
HALVINGS = 2
RELIABLE = 0.25


@dataclass(frozen=True)
class Trust:
    """The decrease of J that G predicts against what relaxed roll-outs towards its maximisers reached.

    The roll-outs go a part lambda of the way. While one reaches less than a quarter of what G promises for
    it, lambda is halved (Armijo's rule).

    Args:
        gain: G.
        objective: J of the roll-out.
        outcomes: J(lambda) of the relaxed roll-outs; inf where training diverged.
        sizes: sum over all steps of ||S(z, v) - S(z, u)||^2.
        bound: a lower bound of J.
        spent: gradient evaluations that it took, in samples.
    """

    gain: float
    objective: float
    outcomes: Mapping[float, float]
    sizes: float
    bound: float
    spent: int

    @property
    def certificate(self) -> float:
        """D = max over lambda of [J - J(lambda)]_+: the largest decrease that was really reached."""
        return max(0.0, *(self.objective - j for j in self.outcomes.values()))  # inf where one diverged

    def reliability(self, part: float) -> float:
        """r(lambda) = (J - J(lambda)) / (lambda G): near 1 where first order rules; NaN where G is 0."""
        if self.gain <= 0:
            return math.nan
        return (self.objective - self.outcomes[part]) / (part * self.gain)

    @property
    def trusted(self) -> bool:
        """Whether r(1/4) >= 1/4, or that at the lambda nearest below (else the smallest); also if G is 0."""
        parts = [part for part in self.outcomes if part <= 0.25]
        return self.gain <= 0 or self.reliability(max(parts, default=min(self.outcomes))) >= RELIABLE

    @property
    def reach(self) -> float | None:
        """The largest lambda with r >= 1/4: how far first order reaches. None without one, or if G is 0."""
        parts = [part for part in self.outcomes if self.gain > 0 and self.reliability(part) >= RELIABLE]
        return max(parts, default=None)

    @property
    def kappa(self) -> float:
        """G / (J - its lower bound): above 1, G cannot be a decrease. NaN without a bound."""
        room = self.objective - self.bound
        return self.gain / room if 0 < room < math.inf else math.nan

    @property
    def curvature(self) -> float:
        """M = 2 [J(lambda) - J + lambda G] / lambda^2, at the largest lambda; inf where that diverged."""
        part = max(self.outcomes)
        return 2 * (self.outcomes[part] - self.objective + part * self.gain) / part**2

    @property
    def model_gain(self) -> float:
        """The largest decrease of J - lambda G + lambda^2 M / 2 over lambda in [0, 1]: an estimate."""
        m = self.curvature
        return self.gain**2 / (2 * m) if m > self.gain else self.gain - m / 2

    @property
    def rho(self) -> float:
        """[M]_+ / sum ||DeltaS||^2: the trust region's price of leaving the roll-out."""
        return max(0.0, self.curvature) / self.sizes if self.sizes > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them, as plain data."""
        names = ("gain", "objective", "sizes", "bound", "spent", "certificate")
        more = ("kappa", "curvature", "model_gain", "rho")
        return {
            **{name: _finite(getattr(self, name)) for name in (*names, *more)},
            "calibrated": self.trusted,
            "reach": self.reach,
            "outcomes": {str(k): _finite(v) for k, v in self.outcomes.items()},
            "reliability": {str(k): _finite(self.reliability(k)) for k in self.outcomes},
        }


def _finite(value: float) -> float | None:
    """A number, or None where it means nothing."""
    return value if math.isfinite(value) else None


def trust(
    recording: Recording,
    criterion: Criterion,
    terminal: Terminal,
    *,
    lambdas: Sequence[float] = LAMBDAS,
    halvings: int = HALVINGS,
    progress: Callable[[float], object] | None = None,
) -> Trust:
    """Roll out relaxed controls towards the maximisers of a criterion, one roll-out for each lambda.

    From the smallest lambda on it is halved while r < 1/4 (Armijo's rule): a decrease of that size is certain
    for lambda -> 0 where G is exact, and how small lambda has to be says how far first order reaches. By
    default lambda = 1/2 is tried first, and 1/4 and 1/8 only where they are needed: each roll-out costs more
    than a training. Where J(lambda) is a parabola, r >= 1/4 at 1/2 implies r >= 5/8 at 1/4.

    Args:
        recording: of the roll-out that `criterion` is of.
        criterion: what `examine` returned; its maximisers over the whole roll-out are gone towards.
        terminal: Phi.
        lambdas: parts of the way that are rolled out in any case, in (0, 1].
        halvings: how often the smallest of them is halved at most. Below about 0.1 rounding to float32 and
            signs that change rule.
        progress: called with lambda after every step.

    Raises:
        ValueError: a lambda is out of range.

    Source:
        Armijo (1966), for the rule; `relaxed` for the gap.
    """
    _check(recording, criterion, lambdas)
    best = {b.index: b for b in criterion.best()}
    positions = enumerate(criterion.blocks, criterion.first)
    others = {n: best[index].maximiser for n, index in positions if best[index].gain > 0}
    gain, outcomes = sum(b.gain for b in best.values()), {}

    def roll_out(part: float) -> float:
        """r(lambda)."""
        if not others:  # G = 0: nothing to go towards
            outcomes[part] = Outcome(phi=criterion.phi, evaluations=criterion.evaluations)
            return 1.0
        told = None if progress is None else functools.partial(progress, part)
        outcomes[part] = _relaxed(recording, others, part, terminal, told)
        return (criterion.objective - outcomes[part].objective(criterion.price)) / (part * gain)

    part = min(lambdas)
    reliability = [roll_out(part) for part in sorted(lambdas, reverse=True)][-1]
    for _ in range(halvings):
        if reliability < RELIABLE:
            part /= 2
            reliability = roll_out(part)
    cheapest = min(float(g.evaluations.min()) for g in criterion.looked)
    return Trust(
        gain=gain,
        objective=criterion.objective,
        outcomes={part: outcome.objective(criterion.price) for part, outcome in outcomes.items()},
        sizes=sum(b.size for b in best.values() if b.gain > 0),
        bound=criterion.lower + criterion.price * criterion.steps * cheapest,
        spent=sum(outcome.spent for outcome in outcomes.values()),
    )


def _relaxed(
    recording: Recording,
    others: Mapping[int, Control],
    part: float,
    terminal: Terminal,
    progress: Callable[[], object] | None,
) -> Outcome:
    """The outcome of a relaxed roll-out, with Phi = inf where training diverges."""
    try:
        return relaxed(recording, others, part, terminal, progress=progress)
    except NonFiniteError:  # the maximisers promise what training does not survive: that is an answer
        return Outcome(phi=math.inf, evaluations=0.0)


def _check(recording: Recording, criterion: Criterion, lambdas: Sequence[float]) -> None:
    if criterion.first != recording.first or criterion.steps != recording.last - recording.first:
        raise ValueError(
            f"the criterion is of steps {criterion.first}..{criterion.first + criterion.steps - 1}, the "
            f"roll-out has {recording.first}..{recording.last - 1}: they do not belong together"
        )
    if not lambdas or not all(0 < part <= 1 for part in lambdas):
        raise ValueError(f"lambdas must be in (0, 1], got {list(lambdas)}")
