"""The costates of a recorded roll-out: p_T = -grad Phi(z_T), backward in time p_t = (dS_t/dz)^T p_{t+1}."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from controlat._util.checks import instance
from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.dynamics.adjoint import pullbacks
from controlat.dynamics.driver import Driver
from controlat.dynamics.kinks import Kinks
from controlat.dynamics.recording import Recording, Visit
from controlat.dynamics.state import State
from controlat.pmp.terminal import Terminal, check_terminal

__all__ = ["CostateStep", "backward", "momentum_tail", "terminal_costate"]


class CostateStep(NamedTuple):
    """A step of the backward pass; the driver is at the state z_t before it.

    Args:
        visit: the step.
        costates: p_{t+1} by horizon, restricted to what the step acts on: of the memory per sample, the rows
            of the batch.
        norms: ||p_{t+1}|| by horizon, of the whole costate.
        dropped: the dependences on the state that the costates neglect so far, by name.
    """

    visit: Visit
    costates: dict[int, State]
    norms: dict[int, float]
    dropped: tuple[str, ...]


def terminal_costate(driver: Driver, gradient: Sequence[Tensor], tail: float) -> State:
    """The costate at the end of a window: -grad Phi, and in the momentum buffer tail * grad Phi.

    A unit of the buffer still displaces theta by -tail in later steps, which counts where a window ends
    before training does.

    Args:
        driver: at the end of the window.
        gradient: grad Phi there, in theta and in running statistics, as `Terminal.gradient` returns it.
        tail: see `momentum_tail`.
    """
    n = len(driver.parameters)
    parameters, statistics = [-g for g in gradient[:n]], [-g for g in gradient[n:]]
    return State(
        parameters=parameters,
        momentum=[-tail * p for p in parameters] if driver.optimizer.momentum > 0 else [],
        statistics=statistics or [torch.zeros_like(r) for r in driver.statistics],
    )


def _before_step(p: State, part: State) -> State:
    """The whole costate before a step, from `part`, the costate of what the step acted on.

    Args:
        p: the whole costate after the step.
        part: parameters, buffers, memory and the rows of the batch before the step.
    """
    return replace(part, rows=part.with_rows(p.rows), index=None, kept=p.kept)


def _before_hook(p: State, what: str, name: str) -> State:
    """The costate before an action of the method between epochs: the transpose of its Jacobian, applied to p.

    Args:
        p: the costate after the action.
        what: ``"set"`` gave an entry of the memory a new value; ``"save"`` stored a copy of the network;
            ``"reload"`` replaced the network by a stored one.
        name: of the entry of the memory, or of the stored network.
    """
    if what == "set":
        return replace(p, memory={n: t for n, t in p.memory.items() if n != name})
    if what == "save" and name in p.kept:
        kept = {n: q for n, q in p.kept.items() if n != name}
        return replace(p.plus(p.kept[name]), kept=kept)
    if what == "reload":
        network = p.network()
        stored = network.plus(p.kept[name]) if name in p.kept else network
        zero = network.zeros_like()
        return replace(
            p,
            parameters=zero.parameters,
            momentum=zero.momentum,
            statistics=zero.statistics,
            kept=p.kept | {name: stored},
        )
    return p


def backward(
    recording: Recording,
    terminal: Terminal,
    horizons: Sequence[int] | None = None,
    *,
    steps: Sequence[int] | None = None,
    meter: Meter | None = None,
) -> Iterator[CostateStep]:
    """Compute the costates of a recorded roll-out by the adjoint equation, from its last step to its first.

    For a horizon of h steps the roll-out is divided into windows of h steps. At the end of each window the
    costate is the `terminal_costate` of the state there, as if training ended, apart from the momentum
    buffer. h = 1 gives the greedy form of the criterion, h = the length of the roll-out Amata's (13).

    Args:
        recording: the roll-out. Its driver is at the state of each step that is yielded.
        terminal: Phi.
        horizons: the horizons h in steps; a longer one than the roll-out is cut to its length, which is the
            default.
        steps: numbers of the steps at which costates are wanted; all by default. Costates that none of them
            needs are not computed.
        meter: where evaluations of the backward pass are counted. Those of recomputing states are counted in
            ``recording.spent``.

    Yields:
        A `CostateStep` for every step with a costate. The caller may move the driver in between.

    Raises:
        ValueError: a horizon below 1, or a step that the roll-out does not have.
        NonFiniteError: a costate is not finite; the message names the step and the horizon.

    Source:
        Ye et al. (2021), equations 8-9, in discrete time.
    """
    instance(recording, Recording, "recording")
    check_terminal(terminal, "terminal")
    instance(horizons, (Sequence, type(None)), "horizons", "a list of numbers of steps")
    length = recording.last - recording.first
    for h in horizons or []:
        if not isinstance(h, int) or h < 1:
            raise ValueError(f"a horizon must be a whole number of at least one step, got {h!r}")
    wanted = range(recording.first, recording.last) if steps is None else sorted(steps)
    for n in {*wanted[:1], *wanted[-1:]}:
        if not recording.first <= n < recording.last:
            raise ValueError(f"the roll-out has the steps {recording.first}..{recording.last - 1}, not {n}")
    windows = _Windows(
        recording=recording,
        terminal=terminal,
        horizons=sorted({min(h, length) for h in (horizons or [length])}),
        wanted=wanted,
        meter=Meter() if meter is None else meter,
    )
    driver = recording.driver
    driver.restore(recording.end)
    windows.begin(recording.last)
    for visit in recording.backward(min(wanted, default=recording.last)):
        windows.pass_hooks(visit.number + 1)
        if windows.costates:
            step = windows.step(visit)
            before = driver.snapshot(visit.batch.indices)
            yield step
            driver.restore(before)
            windows.pass_step(step)
        windows.begin(visit.number)


@dataclass
class _Windows:
    """The costates during the backward pass, one for each horizon, which belongs to the present window.

    Args:
        recording: the roll-out; its driver is at the present state.
        terminal: Phi.
        horizons: lengths of the windows, in steps.
        wanted: numbers of the steps at which costates are wanted, in order.
        meter: where evaluations are counted.
        costates: by horizon; those that no wanted step needs are absent.
        dropped: dependences that the costates neglect, by name.
        kinks: points of non-differentiability that were met; they are named with `dropped`.
    """

    recording: Recording
    terminal: Terminal
    horizons: Sequence[int]
    wanted: Sequence[int]
    meter: Meter
    costates: dict[int, State] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    kinks: Kinks = field(default_factory=Kinks)

    def __post_init__(self) -> None:
        driver = self.recording.driver
        self._events: dict[int, list[tuple[str, str]]] = {}
        for number, what, name in self.recording.events:
            self._events.setdefault(number, []).append((what, name))
        self.dropped |= set(self.terminal.dropped(driver))
        if driver.autocast is not None:
            self.dropped.add(f"rounding to {str(driver.autocast).removeprefix('torch.')}")

    def begin(self, number: int) -> None:
        """Start the windows that end before step `number`; the driver is at the state there."""
        recording, driver = self.recording, self.recording.driver
        first = recording.first
        ending = [h for h in self.horizons if number == recording.last or (number - first) % h == 0]
        for h in ending:
            self.costates.pop(h, None)
        needed = [h for h in ending if self._needed(h, number - 1, number)]
        if not needed:
            return
        with driver.full_precision():
            gradient = self.terminal.gradient(driver, self.meter)
        tail = momentum_tail(recording, number)
        if len(gradient) < len(driver.parameters) + len(driver.statistics):
            self.dropped.add("BatchNorm's running statistics (Phi)")
        for h in needed:
            self.costates[h] = terminal_costate(driver, gradient, tail)
        has_memory = driver.rows or any(t.is_floating_point() for t in driver.memory.values())
        if has_memory and number < _ends(recording):
            self.dropped.add("what the method carries beyond the end of a window")

    def _needed(self, h: int, number: int, before: int) -> bool:
        """Whether a step below `before` is wanted, in the window of h steps that contains step `number`."""
        begins = self.recording.first + (number - self.recording.first) // h * h
        return bisect_left(self.wanted, begins) < bisect_left(self.wanted, before)

    def pass_hooks(self, number: int) -> None:
        """Take the costates back through what the method did between epochs before step `number`."""
        for what, name in reversed(self._events.get(number, [])):
            if self.costates and what == "moved":
                self.dropped.add(f"what the method did to {name} between epochs")
            self.costates = {h: _before_hook(p, what, name) for h, p in self.costates.items()}

    def step(self, visit: Visit) -> CostateStep:
        """The `CostateStep` of a step.

        Raises:
            NonFiniteError: a costate is not finite.
        """
        norms = {h: p.norm() for h, p in self.costates.items()}
        for h, norm in norms.items():
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"the costate after step {visit.number} (horizon {h}) is not finite: it grows backward "
                    "from the terminal cost; look at shorter windows"
                )
        costates = {h: p.at(visit.batch.indices) for h, p in self.costates.items()}
        return CostateStep(visit, costates, norms, tuple(sorted({*self.dropped, *self.kinks.names()})))

    def pass_step(self, step: CostateStep) -> None:
        """Take the costates that earlier steps need back through this one, by vector-Jacobian products."""
        driver, visit = self.recording.driver, step.visit
        number = visit.number
        self.costates = {h: p for h, p in self.costates.items() if self._needed(h, number, number)}
        if not self.costates:
            return
        before, dropped = pullbacks(
            driver,
            visit.batch,
            visit.control,
            visit.rate,
            [step.costates[h] for h in self.costates],
            self.meter,
            self.kinks,
        )
        self.dropped.update(dropped)
        after_and_before = zip(self.costates.items(), before, strict=True)
        self.costates = {h: _before_step(p, part) for (h, p), part in after_and_before}


def momentum_tail(recording: Recording, number: int) -> float:
    """The displacement of theta by a unit of the momentum buffer before step `number`, without new gradients.

    For heavy ball the sum of eta_k mu^k over the updates k = 1, 2, ... to the end of training, for Nesterov's
    form mu times that; the displacement is against the buffer. It is eta mu/(1 - mu) at a constant rate far
    from the end of training, and 0 at the end.

    Args:
        recording: the roll-out. Outer steps after its end are assumed to make one update each.
        number: of the step, at most that of the step after the roll-out.
    """
    sgd, spec = recording.driver.optimizer, recording.spec
    total, weight = 0.0, sgd.momentum if sgd.nesterov else 1.0
    for n in range(number, _ends(recording)):
        rate = spec.learning_rate(*divmod(n, spec.batches_per_epoch))
        for _ in range(recording.steps[n - recording.first].moves if n < recording.last else 1):
            weight *= sgd.momentum
            total += rate * weight
        if weight < 1e-15:
            break
    return total


def _ends(recording: Recording) -> int:
    """The number of steps of training: the recorded ones if it stopped early, else those of the plan."""
    spec = recording.spec
    return recording.last if recording.end.stopped else spec.epochs * spec.batches_per_epoch
