"""The controller ``horizon``: receding-horizon control with costates of a roll-out ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from controlat._util import rng
from controlat._util.checks import whole
from controlat._util.parallel import World
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment, OpenLoop
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.window import unobserved
from controlat.methods import Method
from controlat.pmp.candidates import Candidates
from controlat.pmp.controllers._held import Held, at_least, cheapest, most_expensive, searched
from controlat.pmp.costate import backward
from controlat.pmp.examination import looked_at
from controlat.pmp.hamiltonian import gains
from controlat.pmp.objective import WEIGHT, weighed
from controlat.pmp.surface import Array
from controlat.pmp.terminal import Terminal, build_terminal, parse_terminal

__all__ = ["Horizon", "build"]

_PULLED = 6.0  # gradient evaluations per sample of taking a costate back through a step, at most


@dataclass(frozen=True, kw_only=True)
class Horizon(Held):
    """u_t = argmax over v of the mean of DeltaH_s(v) over the h steps ahead, at the start of epochs.

    The h steps are taken in memory under the present control u, from the present state, to which the driver
    returns. The costate runs back over them from p = -grad Phi at their end, as if training ended there apart
    from what the momentum buffer will still do, and

        DeltaH_s(v) = p_{s+1} . (S(z_s, v) - S(z_s, u)) - gamma eta (n(v) - n(u)).

    u stays where it ties with the best. Phi is taken on held-out samples of the run (`RunSpec.held_out`),
    which are not those that results state Phi on.

    Args:
        candidates: the controls that are compared.
        h: steps ahead, at most to the end of training; those of one epoch by default.
        looks: steps among them at which candidates are scored, spread evenly.
        gamma: price of one gradient evaluation per sample. By default the whole run under the most expensive
            candidate costs 0.2 nats.
        terminal: Phi, as `controlat.pmp.terminal.parse_terminal` reads it.
        points: held-out samples of Phi at most.

    Raises:
        ValueError: a number is out of range, or the terminal cost is unknown.

    Source:
        Mayne et al. (2000), Constrained model predictive control, for receding horizons; Ye et al. (2021),
        equations 8-9, for the costate.
    """

    candidates: Candidates
    h: int | None = None
    looks: int = 2
    gamma: float | None = None
    terminal: str = "adversarial"
    points: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("h", "looks", "points"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole(value, name, 1))
        if self.gamma is not None:
            object.__setattr__(self, "gamma", at_least(self.gamma, "gamma", 0))
        parse_terminal(self.terminal)
        cheapest(self.method, self.candidates)  # raises

    @property
    def first(self) -> Control:
        """The cheapest candidate, under which the first steps ahead are taken."""
        return cheapest(self.method, self.candidates)

    @property
    def most_expensive(self) -> Control:
        """The candidate with the most gradient evaluations."""
        return most_expensive(self.method, self.candidates)

    def price(self, run: RunSpec) -> float:
        """gamma eta, in units of J."""
        if self.gamma is not None:
            return run.price(self.gamma)
        steps = run.epochs * run.batches_per_epoch
        return weighed(WEIGHT, steps * self.method.controls.cost(self.most_expensive))

    def decision_evaluations(self, run: RunSpec) -> float:
        """The steps ahead, taken twice and pulled back through; Phi; the candidates where they are scored.

        Phi is not counted where the terminal cost does not declare its evaluations.
        """
        steps = min(self.h or run.batches_per_epoch, run.epochs * run.batches_per_epoch)
        step = 2 * self.method.controls.cost(self.most_expensive) + _PULLED
        scored = min(self.looks, steps) * self.candidates.cost(self.method, self.most_expensive)
        declared = getattr(self._phi(run, Ball(1.0)), "evaluations", None)
        return (steps * step + scored) * run.batch_size + (0 if declared is None else declared.gradient)

    def decide(self, now: Moment, z: Driver, u: Control) -> Control:
        """The candidate with the largest mean gain over the steps ahead."""
        controls, mean = self.gains(now, z, u)
        return controls[int(np.argmax(mean))]  # the first of equal ones, and u is first of all

    def gains(self, now: Moment, z: Driver, u: Control) -> tuple[tuple[Control, ...], Array]:
        """u and the candidates, (V,), and the mean of DeltaH over the steps ahead, (V,); z stays as it is."""
        run, first = self.running, now.number
        most = run.epochs * run.batches_per_epoch
        last = min(first + (self.h or run.batches_per_epoch), most)
        spec = replace(run, controller=OpenLoop(lambda t: u), world=World())
        looks = [first + i for i in looked_at([0] * (last - first), self.looks)]
        phi, before = self._phi(run, z.ball), z.snapshot()
        with unobserved(z, z.meter):
            try:
                stride = math.isqrt(last - first - 1) + 1
                recording = Recording.of(z, spec, first=first, last=last, stride=stride)
                looks = [n for n in looks if n < recording.last]  # the method may end training before
                scored = [
                    gains(z, step.visit, step.costates, step.norms, self.candidates, z.meter)
                    for step in backward(recording, phi, steps=looks, meter=z.meter)
                    if step.visit.number in looks
                ]
            finally:
                z.restore(before)
        z.meter.add(recording.spent)
        (horizon,), price = {*scored[0].rewards}, self.price(run)
        return scored[0].controls, np.mean([g.value(horizon, price) for g in scored], axis=0)

    def _phi(self, run: RunSpec, ball: Ball) -> Terminal:
        """Phi on held-out samples of the run.

        Raises:
            ValueError: the run has none.
        """
        if run.held_out is None:
            raise ValueError("controller 'horizon' takes Phi on held-out samples: give the run held_out")
        n = len(run.held_out)
        order = torch.randperm(n, generator=rng.generator(0, "horizon"))[: self.points]
        return build_terminal(self.terminal, *run.held_out.take(order), ball, run.seed)


def build(
    method: Method,
    ball: Ball,
    *,
    h: str = "",
    looks: str = "2",
    gamma: str = "",
    every: str = "1",
    terminal: str = "adversarial",
    points: str = "256",
    knobs: Mapping[str, str],
) -> Horizon:
    """The largest mean gain by costates over h steps ahead (an epoch), at the start of every epoch.

    Args:
        method: the training system.
        ball: the perturbation set.
        h: steps ahead; those of an epoch if left out.
        looks: steps among them at which candidates are scored.
        gamma: price of one gradient evaluation per sample; see `Horizon` for the default.
        every: epochs from one decision to the next.
        terminal: Phi.
        points: held-out samples of Phi at most.
        knobs: what is searched, as `searched` reads it.

    Raises:
        ValueError: a number is out of range, or there is nothing to search.

    Source:
        Mayne et al. (2000), for receding horizons; Ye et al. (2021), equations 8-9, for costates.
    """
    return Horizon(
        method=method,
        candidates=searched(knobs, method, ball),
        h=whole(at_least(h, "h", 1), "h") if h else None,
        looks=whole(at_least(looks, "looks", 1), "looks"),
        gamma=at_least(gamma, "gamma", 0) if gamma else None,
        every=whole(at_least(every, "every", 1), "every"),
        terminal=terminal,
        points=whole(at_least(points, "points", 1), "points"),
    )
