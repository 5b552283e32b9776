"""The adjoint of the outer step against central differences of the step itself, for any method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlat._util import rng
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver
from controlat.dynamics.kinks import inward
from controlat.dynamics.state import State
from controlat.methods import Batch

__all__ = ["Verified", "verify"]


class Verified(NamedTuple):
    """What `verify` returns.

    Args:
        pairs: (central difference, product) for every direction that was compared.
        skipped: number of directions in which a sign changed between the two ends.
        dropped: the names of what the product leaves out, as the method gives them.
    """

    pairs: tuple[tuple[float, float], ...]
    skipped: int
    dropped: tuple[str, ...]

    @property
    def share(self) -> float:
        """|d - p| / |d|, with d the differences and p the products of all directions; NaN without any.

        The relative error where nothing is dropped, otherwise the share of what is.
        """
        d, p = torch.tensor(self.pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return float((d - p).norm() / d.norm())


def verify(
    driver: Driver,
    batch: Batch,
    u: Control,
    rate: float,
    *,
    directions: int = 8,
    h: float = 1e-5,
    seed: int = 0,
) -> Verified:
    """Compare `pullback` with central differences of one outer step, at the driver's present state z.

    For a random costate w and random directions e of length 1 in the whole state (parameters, momentum,
    memory, rows of the samples that carry something):

        <w, S(z + h e, u) - S(z - h e, u)> / 2h      beside      <(dS/dz)^T w, e>

    A direction is skipped where the sign pattern of the gradients that the method ascended differs between
    the two ends, as S jumps there. They are those that it gave to ``ctx.ball``; of l_2 steps, which are
    smooth, the number of samples is compared. Where a method drops nothing, `Verified.share` is about 1e-9; a
    large one without a name is a dependence that was detached unawares. The driver is left as it was, its
    meter too. The cost is that of 2 * directions + 2 steps.

    Other kinks are not seen: a network with ReLU or max-pooling agrees to all digits only if no unit
    switches between the ends, so take a smooth one (Softplus, Tanh, average pooling) to judge a method.
    Carried perturbations that lie where they are clipped are moved inside by 4 h. One that comes to lie
    exactly on a clip, as happens when steps of one size go back and forth, is a kink, and named.

    Args:
        driver: at the state before the step, in float64. Its method may be anybody's.
        batch: of the step, inputs in float64.
        u: its control.
        rate: its learning rate. The derivative of S has the identity in it, what a method drops mostly comes
            with the factor `rate`: the share grows with it.
        directions: how many.
        h: half the distance between the two ends.
        seed: of w and of the directions.

    Raises:
        ValueError: something is not in float64, or a number is out of range.

    Source:
        Griewank & Walther (2008), Evaluating Derivatives, chapter 3: <w, J e> = <J^T w, e>.

    >>> from controlat import Ball
    >>> from controlat.methods import build
    >>> with rng.scoped(0, "example"):
    ...     layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ...     model = torch.nn.Sequential(torch.nn.Flatten(), *layers).double()
    ...     x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    >>> batch, u = Batch(x, torch.arange(5) % 3, torch.arange(5), 0, 0), Control(alpha=0.05, steps=2)
    >>> compared = verify(Driver(model, build("pgd_at"), Ball(0.1)), batch, u, 0.1)
    >>> len(compared.pairs), compared.dropped, compared.share < 1e-7
    (8, (), True)
    >>> compared = verify(Driver(model, build("pgd_at"), Ball(0.1, "l2")), batch, u, 0.1)
    >>> compared.dropped, 1e-4 < compared.share < 1
    (("the adversary's (l_2 steps)",), True)
    """
    if directions < 1 or not h > 0:
        raise ValueError(f"directions must be >= 1 and h > 0, got {directions} and {h:g}")
    _check_float64(driver, batch)

    def after() -> State:
        driver.step(batch, u, rate)
        return driver.point(batch.indices).copy()

    with inward(driver, 4 * h):  # far enough from the edge for both ends of a difference
        with _put_back(driver):
            weight = _random(after(), seed, "weight")
        costate, dropped = pullback(driver, batch, u, rate, weight)
        pairs = []
        for i in range(directions):
            e = _direction(driver.point(batch.indices), seed, i)
            difference = _central(driver, after, weight, e, h)
            if difference is not None:
                pairs.append((difference, costate.dot(e)))
    return Verified(tuple(pairs), directions - len(pairs), dropped)


def _check_float64(driver: Driver, batch: Batch) -> None:
    z = driver.point(batch.indices)
    given: dict[str, list[Tensor]] = {
        "parameters": [*driver.model.parameters()],
        "buffers": [b for b in driver.model.buffers() if b.is_floating_point()],
        "optimiser's buffers": z.momentum,
        "memory": [*z.memory.values(), *(rows.values for rows in z.rows.values())],
        "inputs": [batch.x],
    }
    for name, tensors in given.items():
        for t in tensors:
            if t.dtype != torch.float64:
                raise ValueError(
                    f"finite differences need float64, but the {name} are {t.dtype}: call model.double() "
                    "before the driver's first step, and give inputs in float64 (x.double())"
                )
    if driver.autocast is not None:
        raise ValueError("finite differences need float64: make the driver without autocast")


def _random(z: State, seed: int, *key: str | int) -> State:
    """Standard normal numbers in the structure of z."""
    generator = rng.generator(seed, *key)
    return z.like(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in z.tensors())


def _direction(z: State, seed: int, i: int) -> State:
    """A random direction of length 1; rows of samples that carry nothing yet are no part of the state."""
    e = _random(z, seed, "direction", i)
    for values, seen in e.rows.values():
        values[~seen] = 0
    length = e.dot(e) ** 0.5
    return e.like(t / length for t in e.tensors())


def _central(driver: Driver, after: Callable[[], State], weight: State, e: State, h: float) -> float | None:
    """Central difference of <weight, after()> along e; None where the signs of the ends differ.

    Args:
        driver: whose state is moved before `after` is called, and put back.
        after: takes steps, and returns the state, or a part of it.
        weight: in the structure of what `after` returns.
        e: direction, its rows those of some samples.
        h: half the distance.
    """
    ends: list[State] = []
    signs: list[list[Tensor]] = []
    for step in (h, -h):
        with _put_back(driver), _signs(driver) as ascended:
            driver.restore(driver.state().at(e.index).plus(e, step))
            ends.append(after())
        signs.append(ascended)
    if len(signs[0]) != len(signs[1]) or not all(map(torch.equal, signs[0], signs[1])):
        return None
    return weight.dot(ends[0].plus(ends[1], -1)) / (2 * h)


@contextlib.contextmanager
def _put_back(driver: Driver) -> Iterator[None]:
    """Put the driver back, to the bit, after the block."""
    saved, meter = driver.snapshot(), driver.meter
    gradients = [p.grad for p in driver.parameters]
    driver.meter = Meter()
    try:
        with driver.scoring():  # flags, and buffers that a state dict leaves out
            yield
    finally:
        driver.restore(saved)
        driver.meter = meter
        for p, g in zip(driver.parameters, gradients, strict=True):
            p.grad = g


@contextlib.contextmanager
def _signs(driver: Driver) -> Iterator[list[Tensor]]:
    """Signs of the gradients that perturbations ascend in the block, in the order of time; 0 for l_2."""
    signs: list[Tensor] = []
    plain = driver.ball
    kind: Any = type(plain)

    class Noting(kind):  # type: ignore[misc]
        def direction(self, gradient: Tensor) -> Tensor:
            sign = gradient.detach().sign()
            # l_2 steps are smooth, but as many samples must move at both ends
            signs.append(sign if self.norm == "linf" else torch.zeros_like(sign))
            return super().direction(gradient)  # type: ignore[no-any-return]

    driver.ball = Noting(plain.eps, plain.norm)
    try:
        yield signs
    finally:
        driver.ball = plain
