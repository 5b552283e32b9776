"""The controller ``ratio``: one more inner step where the inner problem is no longer solved well enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlat._util.checks import number, whole
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Method
from controlat.pmp.controllers._held import Held, at_least
from controlat.pmp.greedy import probe_positions
from controlat.pmp.terminal import AdversarialLoss

__all__ = ["Ratio", "build"]


@dataclass(frozen=True, kw_only=True)
class Ratio(Held):
    """K <- K + 1 at the start of an epoch where l(x_most) > threshold l(x_K), on a probe of training samples.

    x_K is what K steps of PGD from a random start reach, and x_most what `most` steps do: the ratio of their
    losses is how much of the inner maximum the present attack misses. K begins at `start`, which may be no
    attack, and never falls.

    In the spirit of DEAT (Wang et al., 2021): it begins with one pass over a batch and adds another after an
    epoch in which the l_1 norm of the gradient in the inputs exceeded a threshold, which is then set anew, to
    a multiple of that norm. The norm comes for free, but has units, as FOSC has, and both are small wherever
    the gradient is masked. The ratio of losses has no units, so that one threshold means the same for every
    network and data set: the share of the inner maximum that is missed. It rises steeply in catastrophic
    overfitting, where one step fails against several (Wong et al., 2020). It costs K + most gradient
    evaluations per sample of the probe.

    Args:
        threshold: of the ratio, > 1.
        most: largest K.
        start: K before the first decision; the least that the method has by default.
        alpha: step size, fixed; or else `tau`.
        tau: the step size is tau/K.
        others: values of the other knobs; defaults if left out.
        probe: training samples that losses are taken on.

    Raises:
        ValueError: a number is out of range, the method has no steps, or a knob no value.

    Source:
        Wang et al. (2021), Gradient-Guided Dynamic Efficient Adversarial Training (arXiv 2103.03076), for
        the rule.
    """

    threshold: float = 1.1
    most: int = 10
    start: int | None = None
    alpha: float | None = None
    tau: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    probe: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        space = self.method.controls
        varying = [name for name, knob in space.items() if knob.low < knob.high]
        if "steps" not in varying:
            raise ValueError(f"the method has no steps that could grow; it has {', '.join(sorted(varying))}")
        object.__setattr__(self, "threshold", number(self.threshold, "threshold"))
        if not self.threshold > 1:
            raise ValueError(f"threshold must be > 1, got {self.threshold:g}")
        object.__setattr__(self, "most", whole(self.most, "most", 1))
        object.__setattr__(self, "probe", whole(self.probe, "probe", 2))
        if self.least >= self.most:
            raise ValueError(f"most must be above the K to start from, {self.least}, got {self.most}")
        if (self.alpha is None) == (self.tau is None):
            raise ValueError("give one of alpha (fixed) and tau (alpha = tau/K)")
        for name in ("alpha", "tau"):
            if (value := getattr(self, name)) is not None and not number(value, name) > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for k in (self.least, self.most):
            self.with_steps(k)  # raises

    @property
    def least(self) -> int:
        """K before the first decision."""
        low = int(self.method.controls["steps"].low)
        return low if self.start is None else whole(self.start, "start", low)

    def with_steps(self, k: int) -> Control:
        """The control with K steps."""
        known = {"alpha": self.step_size(k)} if "alpha" in self.method.controls else {}
        return self.method.controls.check({**self.others, **known, "steps": k})

    def step_size(self, k: int) -> float:
        """The step size of K steps."""
        return self.tau / max(k, 1) if self.alpha is None else self.alpha  # type: ignore[operator]

    @property
    def first(self) -> Control:
        """That with the least K."""
        return self.with_steps(self.least)

    @property
    def most_expensive(self) -> Control:
        """That with `most` steps."""
        return self.with_steps(self.most)

    def decision_evaluations(self, run: RunSpec) -> float:
        """Two attacks on the probe, of K < most and of `most` steps."""
        return (2 * self.most - 1) * min(self.probe, len(run.data))

    def decide(self, now: Moment, z: Driver, u: Control) -> Control:
        """One more step, if u misses too much of the inner maximum; no more than `most`."""
        k = int(u["steps"])
        if k < self.most and self.loss(z, self.most) > self.threshold * self.loss(z, k):
            k += 1
        return self.with_steps(k)

    def loss(self, z: Driver, k: int) -> float:
        """Mean cross-entropy on the probe after K steps of PGD, in eval mode; the random start is common."""
        data, seed = self.running.data, self.running.seed
        x, y = data.take(probe_positions(data, self.probe))
        loss = AdversarialLoss(x, y, z.ball, steps=k, alpha=self.step_size(k), seed=seed)
        return loss.value(z, z.meter)


def build(
    method: Method,
    ball: Ball,
    *,
    threshold: str = "1.1",
    most: str = "10",
    start: str = "",
    alpha: str = "",
    tau: str = "",
    every: str = "1",
    probe: str = "256",
    knobs: Mapping[str, str],
) -> Ratio:
    """K grows by one, up to `most`, where `most` steps reach over `threshold` times the loss of K steps.

    Args:
        method: the training system.
        ball: the perturbation set.
        threshold: of the ratio of losses, > 1.
        most: largest K.
        start: K to start from; the least that the method has if left out.
        alpha: step size; eps/2 if neither it nor tau is given.
        tau: the step size is tau/K.
        every: epochs from one decision to the next.
        probe: training samples that losses are taken on.
        knobs: values of the other knobs.

    Raises:
        ValueError: a number is out of range, the method has no steps, or a knob no value.

    Source:
        In the spirit of Wang et al. (2021), arXiv 2103.03076.
    """
    return Ratio(
        method=method,
        threshold=number(threshold, "threshold"),
        most=whole(at_least(most, "most", 1), "most"),
        start=whole(at_least(start, "start", 0), "start") if start else None,
        alpha=number(alpha, "alpha") if alpha else None if tau else ball.eps / 2,
        tau=number(tau, "tau") if tau else None,
        others={name: number(value, name) for name, value in knobs.items()},
        every=whole(at_least(every, "every", 1), "every"),
        probe=whole(at_least(probe, "probe", 2), "probe"),
    )
