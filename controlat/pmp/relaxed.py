"""Relaxed controls: the convex combination of the steps under u_t and under v_t.

    S_lambda(z) = (1 - lambda) S(z, u_t) + lambda S(z, v_t),    n_lambda = (1 - lambda) n(u_t) + lambda n(v_t)

For a method with one update per step this is the step with (1 - lambda) times the gradient under u_t plus
lambda times that under v_t. dJ/dlambda at lambda = 0 is exactly -G, G = sum_t DeltaH_t(v_t): with v_t the
maximisers of the Hamiltonian, G is the Frank-Wolfe gap of the relaxed problem.
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
    """A driver that takes relaxed steps S_lambda.

    Args:
        part: lambda.
        others: v_t by the number of the step in the run.
        per_epoch: steps per epoch.
        evaluations: sum of n_lambda so far.
    """

    part: float = 0.0
    others: Mapping[int, Control] | None = None
    per_epoch: int = 1
    evaluations: float = 0.0

    def step(self, batch: Batch, u: Control, rate: float) -> Step:
        """S_lambda if there is a v_t for the step, else S(z, u)."""
        v = (self.others or {}).get(batch.epoch * self.per_epoch + batch.number)
        if v is None or v == u or self.part == 0:
            step_u = super().step(batch, u, rate)
            self.evaluations += step_u.evaluations
            return step_u
        before = self.snapshot(batch.indices)
        step_v = super().step(batch, v, rate)
        state_v = self.snapshot(batch.indices)
        self.restore(before)
        del before  # its memory is needed for the second step
        step_u = super().step(batch, u, rate)
        self.restore(self.state().at(batch.indices).towards(state_v, self.part))
        self.evaluations += (1 - self.part) * step_u.evaluations + self.part * step_v.evaluations
        return step_u


def relaxed(
    recording: Recording,
    others: Mapping[int, Control],
    part: float,
    terminal: Terminal,
    *,
    progress: Callable[[], object] | None = None,
) -> Outcome:
    """Roll out a recorded training again with relaxed controls between u_t and v_t.

    S_lambda(z) = (1 - lambda) S(z, u_t) + lambda S(z, v_t), and n_lambda likewise: the mean step of a control
    that is u_t with probability 1 - lambda and v_t with probability lambda. The criterion C gives the
    derivative of J in lambda at 0; the roll-out gives J at any lambda.

    Args:
        recording: the recorded roll-out under u; its driver is at the end of it afterwards.
        others: v_t by the number of the step in the run; a step without one is taken under u_t.
        part: lambda; 0 for the recorded roll-out, 1 for the steps under v_t.
        terminal: Phi.
        progress: called after every step.

    Returns:
        Phi, sum n and the evaluations spent; ``objective(price)`` is J.

    Raises:
        ValueError: part is not a finite number.
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
    settings = {f.name: getattr(driver, f.name) for f in fields(Driver)} | {"meter": Meter(), "notice": None}
    mixing = _Mixing(**settings, part=part, others=others, per_epoch=recording.spec.batches_per_epoch)
    with recording.put_back():
        for n in sorted(recording.stored, reverse=True):  # a stored state has the rows of some samples only
            mixing.restore(recording.stored[n])
        for _ in recording.again(mixing):
            if progress is not None:
                progress()
        outcome = outcome_at(mixing, terminal, mixing.evaluations, training_gradients=mixing.meter.gradients)
        tail = momentum_tail(recording, recording.last)
        if tail:
            momentum = mixing.momentum
            driver.restore(recording.end)
            meter = Meter()
            with driver.full_precision():
                gradient = terminal.gradient(driver, meter)[: len(driver.parameters)]
            triples = zip(gradient, momentum, driver.momentum, strict=True)
            phi = outcome.phi - tail * sum(float((g * (m - recorded)).sum()) for g, m, recorded in triples)
            outcome = replace(
                outcome, phi=phi, terminal_gradients=outcome.terminal_gradients + meter.gradients
            )
    return outcome
