"""The costate of a recorded roll-out: p_t = (dS_t/dz)^T p_{t+1}, backward from the terminal cost."""

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
    """One step of a backward pass; the driver is at the state before it.

    Args:
        visit: the step.
        costates: p_{t+1} by horizon, as far as the step acts on it: its rows are those of the batch.
        norms: ||p_{t+1}|| by horizon.
        dropped: what the costates leave out so far.
    """

    visit: Visit
    costates: dict[int, State]
    norms: dict[int, float]
    dropped: tuple[str, ...]


def terminal_costate(driver: Driver, gradient: Sequence[Tensor], tail: float) -> State:
    """p at the end of a window: -grad Phi, and what the optimiser's buffer will still do after it.

    Args:
        driver: at the end of the window.
        gradient: grad Phi there, in theta and in running statistics, as `Terminal.gradient` gives it.
        tail: by how much a unit of the buffer will still move theta against it: `momentum_tail`.
    """
    n = len(driver.parameters)
    parameters, statistics = [-g for g in gradient[:n]], [-g for g in gradient[n:]]
    return State(
        parameters=parameters,
        momentum=[-tail * p for p in parameters] if driver.optimizer.momentum > 0 else [],
        statistics=statistics or [torch.zeros_like(r) for r in driver.statistics],
    )


def _before_step(p: State, part: State) -> State:
    """The costate before a step, of which `part` is what the step acted on: with the rows of its batch."""
    return replace(part, rows=part.with_rows(p.rows), index=None, kept=p.kept)


def _before_hook(p: State, what: str, name: str) -> State:
    """The costate before what a hook did with a network, or with memory.

    All of the network that is put back came from where it was saved.
    """
    if what == "set":
        return replace(p, memory={n: t for n, t in p.memory.items() if n != name})
    if what == "save" and name in p.kept:
        kept = {n: q for n, q in p.kept.items() if n != name}
        return replace(p.plus(p.kept[name]), kept=kept)
    if what == "reload":
        mine = p.network()
        whole = mine.plus(p.kept[name]) if name in p.kept else mine
        zero = mine.zeros_like()
        return replace(
            p,
            parameters=zero.parameters,
            momentum=zero.momentum,
            statistics=zero.statistics,
            kept=p.kept | {name: whole},
        )
    return p


def backward(
    recording: Recording,
    terminal: Terminal,
    horizons: Sequence[int] | None = None,
    *,
    looked: Sequence[int] | None = None,
    meter: Meter | None = None,
) -> Iterator[CostateStep]:
    """Run costates backward through a recorded roll-out, from the last step to the first.

    For a horizon of h steps the roll-out is cut into windows of h steps, and at the end of each the costate
    is that of Phi there (with the buffer's costate where training goes on). h = 1 is the greedy form, h = the
    length of the roll-out is Amata's (13).

    Args:
        recording: of the roll-out; its driver moves.
        terminal: Phi.
        horizons: numbers of steps h; the whole roll-out alone by default, and instead of longer ones.
        looked: numbers of the steps that are looked at; all by default. Costates that no such step needs are
            not computed.
        meter: where evaluations of the backward pass are counted; taking steps again is counted in
            ``recording.spent``.

    Yields:
        One `CostateStep` for every step that has a costate. The consumer may move the driver.

    Raises:
        ValueError: a horizon below 1, or a step that the roll-out does not have.
        NonFiniteError: a costate is not finite; the message names the step and the horizon.

    Source:
        Ye et al. (2021), equations 8-9, in discrete time.
    """
    instance(recording, Recording, "recording")
    check_terminal(terminal, "terminal")
    instance(horizons, (Sequence, type(None)), "horizons", "a list of numbers of steps")
    whole = recording.last - recording.first
    for h in horizons or []:
        if not isinstance(h, int) or h < 1:
            raise ValueError(f"a horizon must be a whole number of at least one step, got {h!r}")
    every = range(recording.first, recording.last) if looked is None else sorted(looked)
    for n in {*every[:1], *every[-1:]}:
        if not recording.first <= n < recording.last:
            raise ValueError(f"the roll-out has the steps {recording.first}..{recording.last - 1}, not {n}")
    windows = _Windows(
        recording=recording,
        terminal=terminal,
        horizons=sorted({min(h, whole) for h in (horizons or [whole])}),
        looked=every,
        meter=Meter() if meter is None else meter,
    )
    driver = recording.driver
    driver.restore(recording.end)
    windows.begin(recording.last)
    for visit in recording.backward(min(every, default=recording.last)):
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
    """The costates of a backward pass, by horizon, each in the window of that length that it is in.

    Args:
        recording: of the roll-out; its driver is at the state that the costates are at.
        terminal: Phi.
        horizons: lengths of windows.
        looked: numbers of the steps that are looked at, in order.
        meter: where evaluations are counted.
        costates: by horizon; those that no step needs are not there.
        dropped: what they leave out.
        kinks: alike.
    """

    recording: Recording
    terminal: Terminal
    horizons: Sequence[int]
    looked: Sequence[int]
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
        """Start the windows that end before step `number`, with the driver at the state there."""
        recording, driver = self.recording, self.recording.driver
        first = recording.first
        ending = [h for h in self.horizons if number == recording.last or (number - first) % h == 0]
        for h in ending:
            self.costates.pop(h, None)
        needed = [h for h in ending if self._needed(h, number - 1, number)]
        if not needed:
            return
        gradient, tail = self.terminal.gradient(driver, self.meter), momentum_tail(recording, number)
        if len(gradient) < len(driver.parameters) + len(driver.statistics):
            self.dropped.add("BatchNorm's running statistics (Phi)")
        for h in needed:
            self.costates[h] = terminal_costate(driver, gradient, tail)
        carries = driver.rows or any(t.is_floating_point() for t in driver.memory.values())
        if carries and number < _ends(recording):
            self.dropped.add("what the method carries beyond the end of a window")

    def _needed(self, h: int, number: int, before: int) -> bool:
        """Whether any step below `before` is looked at, of the window of h steps that has step `number`."""
        begins = self.recording.first + (number - self.recording.first) // h * h
        return bisect_left(self.looked, begins) < bisect_left(self.looked, before)

    def pass_hooks(self, number: int) -> None:
        """Pass what the method did between epochs before step `number`."""
        for what, name in reversed(self._events.get(number, [])):
            if self.costates and what == "moved":
                self.dropped.add(f"what the method did to {name} between epochs")
            self.costates = {h: _before_hook(p, what, name) for h, p in self.costates.items()}

    def step(self, visit: Visit) -> CostateStep:
        """What the consumer is given at one step.

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
        acted_on = {h: p.at(visit.batch.indices) for h, p in self.costates.items()}
        return CostateStep(visit, acted_on, norms, tuple(sorted({*self.dropped, *self.kinks.names()})))

    def pass_step(self, step: CostateStep) -> None:
        """Take the costates that steps before this one need from after it to before it."""
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
        pairs = zip(self.costates.items(), before, strict=True)
        self.costates = {h: _before_step(p, part) for (h, p), part in pairs}


def momentum_tail(recording: Recording, number: int) -> float:
    """By how much a unit of the optimiser's buffer before step `number` still moves theta, without gradients.

    Heavy ball: sum of eta_k mu^k over the updates k = 1, 2, ... to the end of training, which is
    eta mu/(1 - mu) far from it; Nesterov: mu times that. 0 at the end of training.

    Args:
        recording: of a roll-out. An outer step after its end counts as one update.
        number: of the step, up to the one before which the roll-out ends.
    """
    o, spec = recording.driver.optimizer, recording.spec
    total, weight = 0.0, o.momentum if o.nesterov else 1.0
    for n in range(number, _ends(recording)):
        rate = spec.learning_rate(*divmod(n, spec.batches_per_epoch))
        for _ in range(recording.steps[n - recording.first].moves if n < recording.last else 1):
            weight *= o.momentum
            total += rate * weight
        if weight < 1e-15:
            break
    return total


def _ends(recording: Recording) -> int:
    """The step before which training ends."""
    spec = recording.spec
    return recording.last if recording.end.stopped else spec.epochs * spec.batches_per_epoch
