"""The backward pass of the criterion: costates through a recorded roll-out, and gains on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from controlat._util.checks import instance, number
from controlat.control.cost import Meter
from controlat.dynamics.recording import Recording
from controlat.pmp.candidates import Candidates
from controlat.pmp.costate import backward
from controlat.pmp.full_criterion import Criterion
from controlat.pmp.hamiltonian import Gains, gains
from controlat.pmp.objective import evaluations, outcome_at
from controlat.pmp.terminal import Terminal, check_terminal

__all__ = ["examine", "looked_at"]


def examine(
    recording: Recording,
    terminal: Terminal,
    candidates: Candidates,
    *,
    gamma: float | str,
    horizons: Sequence[int] | None = None,
    looks: int | None = None,
    progress: Callable[[], object] | None = None,
    meter: Meter | None = None,
) -> Criterion:
    """Run costates backward through a recorded roll-out, and score the candidates of G on the way.

    Args:
        recording: of the roll-out under u; its driver is left at its end.
        terminal: Phi.
        candidates: what is searched, around u_t.
        gamma: price of one gradient evaluation per sample.
        horizons: numbers of steps; the whole roll-out is always among them.
        looks: number of steps of each block that are looked at, spread evenly; all of them by default.
        progress: called after every step of the backward pass.
        meter: where evaluations of costates and scoring are counted; a new one by default.

    Returns:
        The criterion over all horizons.

    Raises:
        ValueError: a number is out of range.
        NonFiniteError: Phi or a costate is not finite.

    Source:
        Ye et al. (2021), equation 13.
    """
    gamma = _checked(recording, terminal, candidates, gamma, horizons, looks)
    blocks = recording.spec.blocks(recording.first, recording.last)
    numbers = {recording.first + n for n in looked_at(blocks, looks)}
    meter, replayed = Meter() if meter is None else meter, recording.spent.gradients
    counted = meter.gradients
    with recording.put_back():
        recording.driver.restore(recording.end)
        outcome = outcome_at(recording.driver, terminal, evaluations(recording.steps))
        scores, norms, dropped = _backward_pass(
            recording, terminal, candidates, horizons or [], numbers, meter, progress
        )
    return Criterion(
        looked=tuple(reversed(scores)),
        blocks=blocks,
        first=recording.first,
        rate=recording.spec.mean_rate(),
        gamma=gamma,
        phi=outcome.phi,
        evaluations=outcome.evaluations,
        lower=terminal.lower,
        norms=tuple(reversed(norms)),
        dropped=dropped,
        spent=meter.gradients - counted + outcome.terminal_gradients,
        replayed=recording.spent.gradients - replayed,
    )


def _backward_pass(
    recording: Recording,
    terminal: Terminal,
    candidates: Candidates,
    horizons: Sequence[int],
    numbers: Collection[int],
    meter: Meter,
    progress: Callable[[], object] | None,
) -> tuple[list[Gains], list[tuple[int, float]], tuple[str, ...]]:
    """From the last step to the first: gains at the steps of these numbers, every ||p||, what p neglects."""
    driver, entire = recording.driver, recording.last - recording.first
    scores, norms, dropped = [], [], terminal.dropped(driver)
    every = [*horizons, entire]
    for step in backward(recording, terminal, every, steps=sorted(numbers), meter=meter):
        visit, costates, of, dropped = step
        norms.append((visit.number, of[entire]))
        if visit.number in numbers:
            scores.append(gains(driver, visit, costates, of, candidates, meter))
        if progress is not None:
            progress()
    return scores, norms, dropped


def _checked(
    recording: Recording,
    terminal: Terminal,
    candidates: Candidates,
    gamma: float | str,
    horizons: Sequence[int] | None,
    looks: int | None,
) -> float:
    """gamma as a number, where every argument of `examine` is what it must be."""
    instance(recording, Recording, "recording")
    instance(candidates, Candidates, "candidates")
    check_terminal(terminal, "terminal")
    instance(horizons, (Sequence, type(None)), "horizons", "a list of numbers of steps")
    price = number(gamma, "gamma")
    if price < 0:
        raise ValueError(f"gamma must be >= 0, got {price:g}")
    if looks is not None and (type(looks) is not int or looks < 1):
        raise ValueError(f"looks must be a whole number >= 1, got {looks!r}")
    return price


def looked_at(blocks: Sequence[int], looks: int | None) -> list[int]:
    """Positions of some steps of each block, spread evenly.

    >>> looked_at([0, 0, 0, 0, 1], 2)
    [1, 3, 4]
    """
    members: dict[int, list[int]] = {}
    for i, index in enumerate(blocks):
        members.setdefault(index, []).append(i)
    chosen: list[int] = []
    for steps in members.values():
        n = len(steps)
        k = n if looks is None else min(looks, n)
        chosen += [steps[(2 * i + 1) * n // (2 * k)] for i in range(k)]
    return sorted(chosen)
