"""The objective of training, J = Phi(theta_T) + gamma eta sum_t n(u_t), and what it costs to know it.

gamma eta is the price of one gradient evaluation per sample in units of J, eta the mean learning rate. It can
be stated by what the whole cost of the most expensive run weighs in J (`weighed`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from controlat._util.checks import instance
from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, Step
from controlat.dynamics.rollout import check_parameters, rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Method
from controlat.pmp.terminal import Terminal, check_terminal

__all__ = [
    "WEIGHT",
    "Outcome",
    "evaluations",
    "objective",
    "outcome_at",
    "planned_evaluations",
    "rollout_cost",
    "weighed",
]

WEIGHT = 0.2  # nats: what the whole cost of the most expensive run weighs in J, unless it is said


@dataclass(frozen=True)
class Outcome:
    """Where a roll-out ended, and what it took to know that.

    Args:
        phi: the terminal cost; where the roll-out ends before training, with what the optimiser's buffer will
            still do, to first order around the recorded end: there the slope of J is -G, too.
        evaluations: sum over steps of n, gradient evaluations per sample.
        training_gradients: gradient evaluations that the roll-out took, in samples, hooks between epochs
            included.
        terminal_gradients: gradient evaluations that Phi took, in samples.
        seconds: wall time of both.
        controls: of the steps that `objective` has trained.

    >>> Outcome(phi=0.5, evaluations=12.0).objective(0.01)
    0.62
    """

    phi: float
    evaluations: float
    training_gradients: int = 0
    terminal_gradients: int = 0
    seconds: float = 0.0
    controls: tuple[Control, ...] = field(default=(), repr=False, compare=False)

    def objective(self, price: float) -> float:
        """J = Phi + gamma eta sum n, at a price of gamma eta per evaluation (`RunSpec.price`)."""
        return self.phi + price * self.evaluations

    @property
    def spent(self) -> int:
        """All gradient evaluations that it took, in samples."""
        return self.training_gradients + self.terminal_gradients

    def to_json(self, price: float) -> dict[str, Any]:
        """J at a price, its parts and its cost, as plain data."""
        return {
            "J": self.objective(price),
            "phi": self.phi,
            "evaluations": self.evaluations,
            "price": price,
            "gradients": {"training": self.training_gradients, "Phi": self.terminal_gradients},
            "seconds": self.seconds,
        }


def objective(
    driver: Driver,
    spec: RunSpec,
    terminal: Terminal,
    *,
    epoch: int = 0,
    before: float = 0.0,
    until: int | None = None,
    progress: Callable[[], object] | None = None,
) -> Outcome:
    """Train under a controller, nothing recorded, and take Phi at the end: J without costates.

        J = Phi(theta_T) + gamma eta sum_t n(u_t)

    gamma enters by the price alone, so that one outcome serves for all of them.

    Args:
        driver: the system at its state at the beginning of `epoch`; it is left at the end of training.
        spec: data, controller, learning rate, seed.
        terminal: Phi.
        epoch: the first that is trained; the cost of training those before it is not counted in the outcome.
        before: sum n over the steps before it.
        until: epoch before which to end: then Phi is that of the state there, and sum n that of the steps up
            to there; by default the end of the run.
        progress: called after every step.

    Returns:
        Phi, sum n and the cost of both; ``objective(spec.price(gamma))`` is J.

    Raises:
        NonFiniteError: training diverged, or Phi is not finite; the message names the step.

    Source:
        Ye et al. (2021), equation 6.

    >>> import torch
    >>> from controlat.attacks.balls import Ball
    >>> from controlat.control.learning_rate import parse_rate
    >>> from controlat.control.schedule_text import parse_schedule
    >>> from controlat.data import Split
    >>> from controlat.methods import build
    >>> from controlat.pmp.terminal import AdversarialLoss
    >>> x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> driver = Driver(model, build("pgd_at"), Ball(0.1))
    >>> schedule, rate = parse_schedule("pgd:steps=2,alpha=0.1", 3), parse_rate(0.1)
    >>> spec = RunSpec(Split(x, y), 4, 3, schedule, rate)
    >>> outcome = objective(driver, spec, AdversarialLoss(x, y, Ball(0.1), steps=5))
    >>> outcome.evaluations  # 6 steps of n = 2 + 1
    18.0
    >>> outcome.training_gradients, outcome.terminal_gradients
    (72, 40)
    >>> outcome.objective(spec.price(0.01)) == outcome.phi + 0.01 * 0.1 * 18
    True
    """
    instance(driver, Driver, "driver")
    instance(spec, RunSpec, "spec")
    check_terminal(terminal, "terminal")
    began, meter, total, step = time.perf_counter(), driver.meter.copy(), before, None
    controls: list[Control] = []
    for step in rollout(driver, spec, epoch=epoch, until=until):
        total += step.evaluations
        controls.append(step.control)
        if progress is not None:
            progress()
    if step is not None:  # the method may have stopped before
        check_parameters(driver, step)
    training, seconds = driver.meter.since(meter).gradients, time.perf_counter() - began
    outcome = outcome_at(driver, terminal, total, training_gradients=training, seconds=seconds)
    return replace(outcome, controls=tuple(controls))


def weighed(weight: float, evaluations: float) -> float:
    """gamma eta at which a cost weighs so much in J: gamma eta sum n = weight.

    Args:
        weight: in units of J, such as nats.
        evaluations: sum n of the run that it is the cost of, gradient evaluations per sample.

    Raises:
        ValueError: the run takes no gradient evaluations.

    >>> price = weighed(0.2, 1000.0)
    >>> Outcome(phi=0.5, evaluations=500.0).objective(price)  # half the cost weighs half as much
    0.6
    """
    if not evaluations > 0:
        raise ValueError(f"a run of {evaluations:g} gradient evaluations decides no price: give gamma")
    return weight / evaluations


def planned_evaluations(spec: RunSpec, method: Method) -> float:
    """sum over steps of n, at most: by the controls that are planned and the declared cost of the method."""
    return sum(map(method.controls.cost, spec.plan()))


def rollout_cost(spec: RunSpec, method: Method) -> float:
    """Gradient evaluations of a roll-out, in samples, at most, by the cost that its method declares."""
    return planned_evaluations(spec, method) * len(spec.data) / spec.batches_per_epoch


def outcome_at(
    driver: Driver, terminal: Terminal, total: float, *, training_gradients: int = 0, seconds: float = 0.0
) -> Outcome:
    """The outcome of a roll-out that has led to the driver's present state.

    Args:
        driver: at the end of the roll-out.
        terminal: Phi.
        total: sum over its steps of n.
        training_gradients: gradient evaluations that it took, in samples.
        seconds: wall time that it took.

    Raises:
        NonFiniteError: Phi is not finite.
    """
    meter, began = Meter(), time.perf_counter()
    with driver.full_precision():
        phi = float(terminal.value(driver, meter))
    if not math.isfinite(phi):
        raise NonFiniteError(f"the terminal cost is {phi}")
    seconds += time.perf_counter() - began
    return Outcome(
        phi=phi,
        evaluations=total,
        training_gradients=training_gradients,
        terminal_gradients=meter.gradients,
        seconds=seconds,
    )


def evaluations(steps: Iterable[Step]) -> float:
    """sum over steps of n, added one by one: the same bits wherever the same steps are counted."""
    total = 0.0
    for step in steps:  # not sum(), which makes up for rounding from Python 3.12 on
        total += step.evaluations
    return total
