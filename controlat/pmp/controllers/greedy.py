"""The controller ``greedy``: the maximiser of Amata's greedy criterion, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlat._util.checks import whole
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Method
from controlat.pmp.candidates import Candidates
from controlat.pmp.controllers._held import Held, at_least, cheapest, most_expensive, searched
from controlat.pmp.greedy import GAMMA, epoch_scale, score, training_probe

__all__ = ["Greedy", "build"]


@dataclass(frozen=True, kw_only=True)
class Greedy(Held):
    """u_t = argmax over v of s_t ||grad_theta l(A_v)||^2 - gamma n(v), at the start of epochs.

    The criterion is that of `controlat.pmp.score` in its norm form, on training samples that are always the
    same: as `evaluate` scores a schedule at the start of an epoch. u_t stays where it ties with the best.

    Args:
        candidates: the controls that are compared.
        gamma: price of one gradient evaluation per sample, in units of the squared gradient norm.
        probe: training samples that the candidates are scored on.

    Raises:
        ValueError: a number is out of range.

    Source:
        Ye et al. (2021), equation 14.
    """

    candidates: Candidates
    gamma: float = GAMMA
    probe: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", at_least(self.gamma, "gamma", 0))
        object.__setattr__(self, "probe", whole(self.probe, "probe", 2))
        cheapest(self.method, self.candidates)  # raises

    @property
    def first(self) -> Control:
        """The cheapest candidate: it is scored as the present control of the first decision."""
        return cheapest(self.method, self.candidates)

    @property
    def most_expensive(self) -> Control:
        """The candidate with the most gradient evaluations."""
        return most_expensive(self.method, self.candidates)

    def decision_evaluations(self, run: RunSpec) -> float:
        """Scoring all candidates and the present control on the probe."""
        samples = min(self.probe, len(run.data))
        return self.candidates.cost(self.method, self.most_expensive) * samples

    def decide(self, now: Moment, z: Driver, u: Control) -> Control:
        """The maximiser among u and the candidates around it."""
        run = self.running
        batches = training_probe(
            run.data, self.probe, batch_size=run.batch_size, epoch=now.epoch, augment=run.augment
        )
        with z.full_precision():
            surface = score(
                z,
                batches,
                u,
                self.candidates,
                scale=epoch_scale(z, run, now.epoch),
                rate=run.mean_rate(now.epoch),
                meter=z.meter,
            )
        return surface.gap(u, self.gamma).maximiser


def build(
    method: Method,
    ball: Ball,
    *,
    gamma: str = f"{GAMMA}",
    every: str = "1",
    probe: str = "512",
    knobs: Mapping[str, str],
) -> Greedy:
    """The maximiser of the greedy criterion at the start of every epoch.

    Args:
        method: the training system.
        ball: the perturbation set.
        gamma: price of one gradient evaluation per sample, in units of the squared gradient norm.
        every: epochs from one decision to the next.
        probe: training samples that the candidates are scored on.
        knobs: what is searched, as `searched` reads it.

    Raises:
        ValueError: a number is out of range, or there is nothing to search.

    Source:
        Ye et al. (2021), equation 14.
    """
    return Greedy(
        method=method,
        candidates=searched(knobs, method, ball),
        gamma=at_least(gamma, "gamma", 0),
        every=whole(at_least(every, "every", 1), "every"),
        probe=whole(at_least(probe, "probe", 2), "probe"),
    )
