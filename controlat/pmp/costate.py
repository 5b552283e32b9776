"""The costate of a recorded roll-out: p_t = (dS_t/dz)^T p_{t+1}, backward from the terminal cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from controlat._util.checks import instance
from controlat._util.errors import NonFiniteError
from controlat.control.cost import Meter
from controlat.dynamics.adjoint import Kinks, State, pullbacks
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording, Visit
from controlat.dynamics.state import gather, put
from controlat.methods import Rows
from controlat.pmp.terminal import Terminal, check_terminal

__all__ = ["Costate", "Swept", "momentum_tail", "sweep"]


# Costates of theta, of the optimiser's buffers and of running statistics: what a method puts back together.
Network = tuple[list[Tensor], list[Tensor], list[Tensor]]


@dataclass
class Costate:
    """p, in the structure of the state z, with a row for every sample that carries something.

    Args:
        parameters: of theta.
        momentum: of the optimiser's buffers; empty without momentum.
        statistics: of the running statistics of normalisation layers.
        memory: of what the method carries.
        rows: of what samples carry.
        held: of networks that the method keeps to put them back.
    """

    parameters: list[Tensor]
    momentum: list[Tensor]
    statistics: list[Tensor] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    held: dict[str, Network] = field(default_factory=dict)

    @classmethod
    def terminal(cls, driver: Driver, gradient: Sequence[Tensor], momentum_tail: float) -> Costate:
        """p at the end of a window: -grad Phi, and what the buffer will still do after it.

        Args:
            driver: at the end of the window.
            gradient: grad Phi there, in theta and in running statistics, as `Terminal.gradient` gives it.
            momentum_tail: by how much a unit of the buffer will still move theta against it, as the function
                `momentum_tail` says.
        """
        n = len(driver.parameters)
        parameters, statistics = [-g for g in gradient[:n]], [-g for g in gradient[n:]]
        momentum = [-momentum_tail * p for p in parameters] if driver.optimizer.momentum > 0 else []
        return cls(parameters, momentum, statistics or [torch.zeros_like(r) for r in driver.statistics])

    def seen(self, driver: Driver, visit: Visit) -> State:
        """The part that a step acts on: rows of the samples of its batch only."""
        rows = {name: gather(store, visit.batch.indices).values for name, store in self.rows.items()}
        return State(self.parameters, self.momentum, self.statistics, self.memory, rows)

    def pulled(self, visit: Visit, before: State) -> Costate:
        """The costate before a step, of which `before` is the part that the step acted on."""
        index, rows = visit.batch.indices, dict(self.rows)
        for name in {*rows, *before.rows}:
            values = before.rows.get(name)
            if values is None:  # nothing was carried before this step
                values = torch.zeros_like(gather(rows[name], index).values)
            mask = torch.ones(len(index), dtype=torch.bool, device=values.device)
            rows[name] = put(rows.get(name), index, Rows(values, mask))
        return Costate(before.parameters, before.momentum, before.statistics, before.memory, rows, self.held)

    def through(self, what: str, name: str) -> None:
        """Pass what a hook did with a network that it keeps: all of it came from where it was saved."""
        mine: Network = (self.parameters, self.momentum, self.statistics)
        if what == "reload":
            theirs = self.held.get(name)
            self.held[name] = mine if theirs is None else _sum(mine, theirs)
            self.parameters, self.momentum, self.statistics = (
                list(map(torch.zeros_like, part)) for part in mine
            )
        elif what == "set":
            self.memory = {n: t for n, t in self.memory.items() if n != name}
        elif what == "save" and name in self.held:
            self.parameters, self.momentum, self.statistics = _sum(mine, self.held.pop(name))

    def norm(self) -> float:
        """||p||, over everything."""
        rows = [store.values for store in self.rows.values()]
        held = [t for pair in self.held.values() for part in pair for t in part]
        network = [*self.parameters, *self.momentum, *self.statistics]
        every = [*network, *self.memory.values(), *rows, *held]
        return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in every]).norm())


def _sum(a: Network, b: Network) -> Network:
    parameters, momentum, statistics = (
        [s + t for s, t in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)
    )
    return parameters, momentum, statistics


class Swept(NamedTuple):
    """One step of a sweep; the driver is at the state before it.

    Args:
        visit: the step.
        costates: p_{t+1} by horizon, as far as the step acts on it.
        norms: ||p_{t+1}|| by horizon.
        dropped: what the costates leave out so far.
    """

    visit: Visit
    costates: dict[int, State]
    norms: dict[int, float]
    dropped: tuple[str, ...]


def sweep(
    recording: Recording,
    terminal: Terminal,
    horizons: Sequence[int] | None = None,
    *,
    looked: Sequence[int] | None = None,
    meter: Meter | None = None,
) -> Iterator[Swept]:
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
        meter: where evaluations of the sweep are counted; taking steps again is counted in
            ``recording.spent``.

    Yields:
        One `Swept` for every step that has a costate. The consumer may move the driver.

    Raises:
        ValueError: a horizon below 1, or a step that the roll-out does not have.
        NonFiniteError: a costate is not finite; the message names the step and the horizon.

    Source:
        Ye et al. (2021), equations 8-9, in discrete time.
    """
    instance(recording, Recording, "recording")
    check_terminal(terminal, "terminal")
    instance(horizons, (Sequence, type(None)), "horizons", "a list of numbers of steps")
    driver, meter = recording.driver, Meter() if meter is None else meter
    whole = recording.last - recording.first
    for h in horizons or []:
        if not isinstance(h, int) or h < 1:
            raise ValueError(f"a horizon must be a whole number of at least one step, got {h!r}")
    wanted = sorted({min(h, whole) for h in (horizons or [whole])})
    every = range(recording.first, recording.last) if looked is None else sorted(looked)
    for n in {*every[:1], *every[-1:]}:
        if not recording.first <= n < recording.last:
            raise ValueError(f"the roll-out has the steps {recording.first}..{recording.last - 1}, not {n}")
    events: dict[int, list[tuple[str, str]]] = {}
    for number, what, name in recording.events:
        events.setdefault(number, []).append((what, name))
    costates: dict[int, Costate] = {}
    dropped: set[str] = set(terminal.dropped(driver))
    kinks = Kinks()
    if driver.autocast is not None:
        dropped.add(f"rounding to {str(driver.autocast).removeprefix('torch.')}")

    def asked(start: int, stop: int) -> bool:
        """Whether any of the steps start, ..., stop - 1 is looked at."""
        return bisect_left(every, start) < bisect_left(every, stop)

    def begin(number: int) -> None:
        """Start the windows that end before step `number`, with the driver at the state there."""
        ending = [h for h in wanted if number == recording.last or (number - recording.first) % h == 0]
        windows = {h: _begins(recording.first, number, h) for h in ending}
        needed = [h for h, start in windows.items() if asked(start, number)]
        for h in ending:
            costates.pop(h, None)
        if not needed:
            return
        gradient, left = terminal.gradient(driver, meter), momentum_tail(recording, number)
        if len(gradient) < len(driver.parameters) + len(driver.statistics):
            dropped.add("BatchNorm's running statistics (Phi)")
        for h in needed:
            costates[h] = Costate.terminal(driver, gradient, left)
        carries = driver.rows or any(t.is_floating_point() for t in driver.memory.values())
        if carries and number < _ends(recording):
            dropped.add("what the method carries beyond the end of a window")

    driver.restore(recording.end)
    begin(recording.last)
    for visit in recording.backward(min(every, default=recording.last)):
        for what, name in reversed(events.get(visit.number + 1, [])):
            if costates and what == "moved":
                dropped.add(f"what the method did to {name} between epochs")
            for p in costates.values():
                p.through(what, name)
        norms = {h: p.norm() for h, p in costates.items()}
        for h, norm in norms.items():
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"the costate after step {visit.number} (horizon {h}) is not finite: it grows backward "
                    "from the terminal cost; look at shorter windows"
                )
        if costates:
            seen = {h: p.seen(driver, visit) for h, p in costates.items()}
            before = driver.snapshot(visit.batch.indices) if driver.rows else driver.snapshot()
            yield Swept(visit, seen, norms, tuple(sorted({*dropped, *kinks.names()})))
            driver.restore(before)
            start = {h: _begins(recording.first, visit.number + 1, h) for h in costates}
            costates = {h: p for h, p in costates.items() if asked(start[h], visit.number)}
        if costates:
            arguments = (driver, visit.batch, visit.control, visit.rate)
            found, names = pullbacks(*arguments, [seen[h] for h in costates], meter, kinks)
            dropped.update(names)
            costates = {h: p.pulled(visit, q) for (h, p), q in zip(costates.items(), found, strict=True)}
        begin(visit.number)


def _begins(first: int, number: int, h: int) -> int:
    """The first step of the window of h steps that contains the step before `number`."""
    return first + (number - first - 1) // h * h


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
