"""Comparison of the adjoint of the outer step with central differences of the step, for any method."""

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
        pairs: (central difference, product) for each direction that was compared.
        skipped: number of directions in which a sign changed between the two ends.
        dropped: names of the dependences that the adjoint leaves out.
    """

    pairs: tuple[tuple[float, float], ...]
    skipped: int
    dropped: tuple[str, ...]

    @property
    def share(self) -> float:
        """||d - p|| / ||d||, d the differences and p the products of all directions; NaN without directions.

        The relative error if nothing is dropped, otherwise the share of the dropped dependences.
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

    For a random costate w and random unit vectors e in the whole state (parameters, momentum, memory, rows of
    the samples that carry something):

        <w, S(z + h e, u) - S(z - h e, u)> / 2h      compared with      <(dS/dz)^T w, e>

    A direction is skipped if the signs of the input gradients that the method passed to ``ctx.ball`` differ
    between the two ends, since S jumps there; for l_2 steps, which are smooth, only the numbers of samples
    are compared. If a method drops nothing, `Verified.share` is about 1e-9; a large share without a name
    means that a dependence was detached by mistake. Driver and meter are left unchanged. The cost is that of
    2 * directions + 2 steps.

    Other kinks are not detected: with ReLU or max-pooling the two agree only if no unit switches between the
    ends, so use a smooth network (Softplus, Tanh, average pooling) to check a method. Carried perturbations
    on the edge of their set are moved inside by 4 h. A perturbation that reaches a clip exactly, as when
    steps of one size go back and forth, is a kink, and named in `dropped`.

    Args:
        driver: at the state before the step, in float64; with any method.
        batch: of the step, inputs in float64.
        u: its control.
        rate: its learning rate. dS/dz is the identity plus terms with the factor `rate`, to which most
            dropped dependences belong: their share grows with it.
        directions: number of directions.
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

    with inward(driver, 4 * h):  # so that both ends are inside
        with _restored(driver):
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
    groups: dict[str, list[Tensor]] = {
        "parameters": [*driver.model.parameters()],
        "buffers": [b for b in driver.model.buffers() if b.is_floating_point()],
        "optimiser's buffers": z.momentum,
        "memory": [*z.memory.values(), *(rows.values for rows in z.rows.values())],
        "inputs": [batch.x],
    }
    for name, tensors in groups.items():
        for t in tensors:
            if t.dtype != torch.float64:
                raise ValueError(
                    f"finite differences need float64, but the {name} are {t.dtype}: call model.double() "
                    "before the driver's first step, and give inputs in float64 (x.double())"
                )
    if driver.autocast is not None:
        raise ValueError("finite differences need float64: make the driver without autocast")


def _random(z: State, seed: int, *key: str | int) -> State:
    """A vector in the structure of z with standard normal entries."""
    generator = rng.generator(seed, *key)
    return z.like(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in z.tensors())


def _direction(z: State, seed: int, i: int) -> State:
    """A random unit vector; 0 in the rows of samples that carry nothing, which are not part of the state."""
    e = _random(z, seed, "direction", i)
    for values, seen in e.rows.values():
        values[~seen] = 0
    length = e.dot(e) ** 0.5
    return e.like(t / length for t in e.tensors())


def _central(driver: Driver, after: Callable[[], State], weight: State, e: State, h: float) -> float | None:
    """Central difference of <weight, after()> along e; None if the signs at the two ends differ.

    Args:
        driver: its state is set to z + h e and z - h e before `after` is called, and restored.
        after: takes steps, and returns the state or a part of it.
        weight: in the structure of the value of `after`.
        e: direction, with the rows of some samples.
        h: half the distance between the ends.
    """
    ends: list[State] = []
    signs: list[list[Tensor]] = []
    for step in (h, -h):
        with _restored(driver), _signs(driver) as ascended:
            driver.restore(driver.state().at(e.index).plus(e, step))
            ends.append(after())
        signs.append(ascended)
    if len(signs[0]) != len(signs[1]) or not all(map(torch.equal, signs[0], signs[1])):
        return None
    return weight.dot(ends[0].plus(ends[1], -1)) / (2 * h)


@contextlib.contextmanager
def _restored(driver: Driver) -> Iterator[None]:
    """Restore the driver's state, meter and ``.grad``, bit for bit, after the block."""
    saved, meter = driver.snapshot(), driver.meter
    gradients = [p.grad for p in driver.parameters]
    driver.meter = Meter()
    try:
        with driver.scoring():  # training flags, and buffers that are not in the state dict
            yield
    finally:
        driver.restore(saved)
        driver.meter = meter
        for p, g in zip(driver.parameters, gradients, strict=True):
            p.grad = g


@contextlib.contextmanager
def _signs(driver: Driver) -> Iterator[list[Tensor]]:
    """A list of the signs of all input gradients passed to ``ball.direction`` in the block; 0 for l_2."""
    signs: list[Tensor] = []
    plain = driver.ball
    kind: Any = type(plain)

    class Recording(kind):  # type: ignore[misc]
        def direction(self, gradient: Tensor) -> Tensor:
            sign = gradient.detach().sign()
            # l_2 steps are smooth, but the number of samples that move must be the same at both ends
            signs.append(sign if self.norm == "linf" else torch.zeros_like(sign))
            return super().direction(gradient)  # type: ignore[no-any-return]

    driver.ball = Recording(plain.eps, plain.norm)
    try:
        yield signs
    finally:
        driver.ball = plain
