"""Relaxed controls: a step that goes a part lambda of the way from what u_t does to what v_t would do.

    S_lambda(z) = (1 - lambda) S(z, u_t) + lambda S(z, v_t),    n_lambda = (1 - lambda) n(u_t) + lambda n(v_t)

For a method of one update this is the step with the mixed gradient. dJ/dlambda at 0 is exactly
-G = -sum_t DeltaH_t(v_t): G is the Frank-Wolfe gap of the relaxed problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from controlat._util.checks import instance, number
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.recording import Recording
from controlat.methods import Batch
from controlat.pmp.costate import momentum_tail
from controlat.pmp.objective import Outcome, outcome_at
from controlat.pmp.terminal import Terminal, check_terminal

__all__ = ["relaxed"]


@dataclass
class _Mixing(Driver):
    """A driver whose steps go a part of the way to what other controls would do."""

    part: float = 0.0
    others: Mapping[int, Control] | None = None
    per_epoch: int = 1
    evaluations: float = 0.0

    def step(self, batch: Batch, u: Control, rate: float) -> Step:
        """S_lambda where another control is given, else S."""
        v = (self.others or {}).get(batch.epoch * self.per_epoch + batch.number)
        if v is None or v == u or self.part == 0:
            done = super().step(batch, u, rate)
            self.evaluations += done.evaluations
            return done
        before = self.snapshot(batch.indices)
        other = super().step(batch, v, rate)
        theirs = self.snapshot(batch.indices)
        self.restore(before)
        del before
        done = super().step(batch, u, rate)
        self.restore(self.state().at(batch.indices).towards(theirs, self.part))
        self.evaluations += (1 - self.part) * done.evaluations + self.part * other.evaluations
        return done


def relaxed(
    recording: Recording,
    others: Mapping[int, Control],
    part: float,
    terminal: Terminal,
    *,
    progress: Callable[[], object] | None = None,
) -> Outcome:
    """Roll out a recorded training anew, with controls that go a part of the way from u_t to v_t.

    S_lambda(z) = (1 - lambda) S(z, u_t) + lambda S(z, v_t) and n_lambda alike: the step of a control that is
    u_t with probability 1 - lambda and v_t with probability lambda, in the mean. What a change of controls
    brings can be looked at for any lambda, where C sees only its derivative at 0.

    Args:
        recording: of the roll-out under u; its driver is left at its end.
        others: v_t by the number of the step, counted over the whole run; steps without one keep u_t.
        part: lambda; 0 is the recorded roll-out, 1 takes the steps under v.
        terminal: Phi.
        progress: called after every step.

    Returns:
        Phi, sum n and the evaluations spent; ``objective(price)`` is J.

    Raises:
        ValueError: part is no finite number.
        NonFiniteError: training diverged.

    Source:
        Warga (1962), for relaxed controls; Frank and Wolfe (1956), for the gap.

    >>> import torch
    >>> from controlat import Ball, Split, parse_schedule
    >>> from controlat.control import parse_rate
    >>> from controlat.dynamics import Driver, Recording, RunSpec
    >>> from controlat.methods import build
    >>> from controlat.pmp import AdversarialLoss
    >>> x, y, ball = torch.rand(16, 1, 4, 4), torch.arange(16) % 3, Ball(0.05)
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> spec = RunSpec(Split(x, y), 8, 1, parse_schedule("pgd:steps=2,alpha=0.02", 1), parse_rate(0.1))
    >>> recording = Recording.of(Driver(model, build("pgd_at"), ball), spec)
    >>> half = relaxed(recording, {0: Control(alpha=0, steps=0)}, 0.5, AdversarialLoss(x, y, ball))
    >>> half.evaluations  # (3 + 1)/2 in the first step, 3 in the second
    5.0
    """
    instance(recording, Recording, "recording")
    check_terminal(terminal, "terminal")
    instance(others, Mapping, "others", "controls by the number of their step")
    part = number(part, "part")
    driver = recording.driver
    given = {f.name: getattr(driver, f.name) for f in fields(Driver)} | {"meter": Meter(), "notice": None}
    mixing = _Mixing(**given, part=part, others=others, per_epoch=recording.spec.batches_per_epoch)
    with recording.put_back():
        for n in sorted(recording.stored, reverse=True):  # rows of samples that come up later, too
            mixing.restore(recording.stored[n])
        for _ in recording.again(mixing):
            if progress is not None:
                progress()
        outcome = outcome_at(mixing, terminal, mixing.evaluations, training=mixing.meter.gradients)
        left = momentum_tail(recording, recording.last)
        if left:
            after = mixing.momentum
            driver.restore(recording.end)
            meter = Meter()
            gradient = terminal.gradient(driver, meter)[: len(driver.parameters)]
            parts = zip(gradient, after, driver.momentum, strict=True)
            phi = outcome.phi - left * sum(float((g * (a - b)).sum()) for g, a, b in parts)
            outcome = replace(outcome, phi=phi, judging=outcome.judging + meter.gradients)
    return outcome
