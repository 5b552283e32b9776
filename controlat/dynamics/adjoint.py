"""The outer step as a differentiable map: the vector-Jacobian product of z' = S(z, u).

The state is the parameters, the optimiser's momentum buffers, the running statistics of normalisation layers,
and what the method carries. Whatever the method froze stays frozen: exact for signs, stopping rules and
indices, which are piecewise constant in the state; smooth quantities that it detached are named in
`Update.dropped`. `verify` compares the product with finite differences of the step itself, for any method,
and shows how much was dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlat._util import rng
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Batch, Rows

__all__ = ["Kinks", "Pulled", "State", "Verified", "pullback", "state", "verify"]

_ULPS = 16  # of 1: how far inside carried perturbations are kept, beyond the rounding of pixels


class State(NamedTuple):
    """The state z, or a costate, which has its shape.

    Args:
        parameters: theta, one tensor per parameter that is trained.
        momentum: the optimiser's buffers v, alike; 0 before the first step.
        statistics: running means and variances of normalisation layers, as `Driver.statistics`.
        memory: what the method carries, floating-point tensors only.
        rows: what the samples of the batch carry, (N, ...).
    """

    parameters: list[Tensor]
    momentum: list[Tensor]
    statistics: list[Tensor]
    memory: dict[str, Tensor]
    rows: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        carried = [*self.memory.values(), *self.rows.values()]
        return [*self.parameters, *self.momentum, *self.statistics, *carried]

    def like(self, tensors: list[Tensor]) -> State:
        """The same structure with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        return State(
            [next(left) for _ in self.parameters],
            [next(left) for _ in self.momentum],
            [next(left) for _ in self.statistics],
            {name: next(left) for name in self.memory},
            {name: next(left) for name in self.rows},
        )

    def plus(self, other: State, factor: float = 1.0) -> State:
        """self + factor * other; names that self lacks are left out."""
        return self.like([a + factor * b for a, b in self._pairs(other)])

    def dot(self, other: State) -> float:
        """The inner product; names that self lacks count as 0."""
        return sum(float((a * b).sum()) for a, b in self._pairs(other))

    def _pairs(self, other: State) -> Iterator[tuple[Tensor, Tensor]]:
        memory = {name: other.memory[name] for name in self.memory}
        rows = {name: other.rows[name] for name in self.rows}
        theirs = other._replace(memory=memory, rows=rows)
        return zip(self.tensors(), theirs.tensors(), strict=True)


class Pulled(NamedTuple):
    """What `pullback` returns: the costate before the step, and what it leaves out."""

    costate: State
    dropped: tuple[str, ...]


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


@dataclass
class Kinks:
    """Where a perturbation that depends on the state lies on a clip: slope 1 on one side, 0 on the other.

    Products take 1. Where the perturbation may move to either side, no linear product describes both: what
    the slope 0 would make of the costates of what is carried is measured.

    Args:
        missing: sum of squares of the difference between costates with either slope.
        whole: sum of squares of the costates.
    """

    missing: float = 0.0
    whole: float = 0.0
    found: bool = field(default=False, init=False)
    closed: bool = field(default=False, init=False)

    def names(self) -> tuple[str, ...]:
        """What is dropped, with its share."""
        share = (self.missing / self.whole) ** 0.5 if self.missing else 0.0
        told = f"the other slope where carried perturbations lie on a clip ({share:.1%} of their costate)"
        return (told,) if share > 1e-9 else ()

    @contextlib.contextmanager
    def watched(self, driver: Driver) -> Iterator[None]:
        """Notice clips in the block; `closed` sets the slope of those on which something lies, 1 or 0."""
        plain, kinks, near = driver.ball, self, driver.margin / 4
        kind: Any = type(plain)

        class Watching(kind):  # type: ignore[misc]
            def project(self, x: Tensor, x0: Tensor) -> Tensor:
                return plain.project(kinks._noted(x, x - x0, self.bounds(x0), near), x0)

            def shrink(self, delta: Tensor, *radius: float) -> Tensor:
                return plain.shrink(kinks._noted(delta, delta, self.bounds(), near), *radius)

            def box(self, x: Tensor) -> Tensor:
                return plain.box(kinks._noted(x, x, (0.0, 1.0), near))

        self.found, driver.ball = False, Watching(plain.eps, plain.norm)
        try:
            yield
        finally:
            driver.ball = plain

    def _noted(
        self, t: Tensor, place: Tensor, bounds: tuple[Tensor | float, Tensor | float], near: float
    ) -> Tensor:
        """t, whose gradient is 0 while `closed` where its place lies on a bound."""
        if not t.requires_grad:
            return t
        low, high = bounds
        on = ((place - low).abs() <= near) | ((place - high).abs() <= near)
        if bool(on.any()):
            self.found, t = True, t.view_as(t)
            t.register_hook(lambda g: g.masked_fill(on, 0) if self.closed else g)
        return t

    def measure(self, open_: State, pull: Callable[[], State]) -> None:
        """Compare the costate of a step with that of slope 0."""
        if not self.found:
            return
        self.closed = True
        try:
            shut = pull()
        finally:
            self.closed = False
        for mine, theirs in ((open_.memory, shut.memory), (open_.rows, shut.rows)):
            self.missing += sum(float((q - theirs[name]).square().sum()) for name, q in mine.items())
            self.whole += sum(float(q.square().sum()) for q in mine.values())


def state(driver: Driver, batch: Batch) -> State:
    """A copy of the driver's present state, as far as a step on that batch sees it."""
    context = driver._context(batch, 0.0, Meter(), driver.memory)
    return State(
        [p.detach().clone() for p in driver.parameters],
        buffers(driver) if driver.optimizer.momentum > 0 else [],
        [r.detach().clone() for r in driver.statistics],
        {name: t.clone() for name, t in driver.memory.items() if t.is_floating_point()},
        {name: rows.values.clone() for name, rows in context.rows.items()},
    )


def buffers(driver: Driver) -> list[Tensor]:
    """Copies of the optimiser's momentum buffers, one for each parameter; 0 before the first step."""
    found = [driver.sgd.state.get(p, {}).get("momentum_buffer") for p in driver.parameters]
    return [
        torch.zeros_like(p) if b is None else b.clone() for p, b in zip(driver.parameters, found, strict=True)
    ]


def pullback(
    driver: Driver, batch: Batch, u: Control, rate: float, costate: State, meter: Meter | None = None
) -> Pulled:
    """p_t = (dS/dz)^T p_{t+1} for one outer step under u at the driver's present state, which stays.

    The step runs again with a graph through torch.optim.SGD's recursion (momentum, Nesterov, weight decay)
    and through all of the method's updates. Buffers of other layers that a forward pass writes to are not
    followed, and named.

    Args:
        driver: at the state before the step.
        batch: of the step.
        u: its control.
        rate: its learning rate.
        costate: after the step. Names of memory or rows that it lacks count as 0.
        meter: where evaluations are counted.

    Returns:
        The costate before the step, and the names of what was dropped.

    Source:
        The discrete costate equation; for SGD with momentum as in Maclaurin et al. (2015), algorithm 2.

    >>> from controlat import Ball
    >>> from controlat.methods import build
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> driver = Driver(model, build("pgd_at"), Ball(0.1))
    >>> batch = Batch(torch.rand(5, 1, 2, 2), torch.arange(5) % 3, torch.arange(5), 0, 0)
    >>> p = state(driver, batch)
    >>> found = pullback(driver, batch, Control(alpha=0.05, steps=2), 0.1, p)
    >>> [t.shape for t in found.costate.parameters]
    [torch.Size([3, 4]), torch.Size([3])]
    """
    kinks = Kinks()
    found, dropped = pullbacks(driver, batch, u, rate, [costate], meter, kinks)
    return Pulled(found[0], tuple(sorted({*dropped, *kinks.names()})))


def pullbacks(
    driver: Driver,
    batch: Batch,
    u: Control,
    rate: float,
    costates: Sequence[State],
    meter: Meter | None = None,
    kinks: Kinks | None = None,
) -> tuple[list[State], tuple[str, ...]]:
    """`pullback` of several costates at once: the step runs once, and each takes one pass backward.

    Beside the step itself, each costate is counted as two gradient evaluations for every sample that the loss
    was taken of: it differentiates a forward and a backward pass. Where kinks are found, one more is.
    """
    meter, kinks = Meter() if meter is None else meter, Kinks() if kinks is None else kinks
    before = state(driver, batch)
    leaves = before.like([t.requires_grad_() for t in before.tensors()])
    dropped: set[str] = set()
    with driver._scoring(), torch.enable_grad(), _inward(driver), kinks.watched(driver):
        memory = {name: t.clone() for name, t in driver.memory.items()} | leaves.memory
        ctx = driver._context(batch, rate, meter, memory)
        start = ctx.rows
        ctx.rows = {name: Rows(leaves.rows[name], rows.seen) for name, rows in ctx.rows.items()}
        theta, momentum = leaves.parameters, leaves.momentum
        trained = {id(p) for p in driver.parameters}
        names = [name for name, p in driver.model.named_parameters() if id(p) in trained]
        ctx.theta, ctx.statistics = dict(zip(names, theta, strict=True)), list(leaves.statistics)
        others = _other_buffers(driver)
        for update, _, gradients in driver._updates(ctx, batch, u):
            shift = [torch.zeros_like(t) for t in theta] if update.shift is None else list(update.shift)
            theta, momentum = _sgd(driver, theta, momentum, gradients, shift, rate)
            ctx.theta = dict(zip(names, theta, strict=True))
            dropped.update(update.dropped)
            with torch.no_grad():  # views of the network run at the present parameters
                torch._foreach_copy_(driver.parameters, [t.detach() for t in theta])
        written = [name for name, b in _other_buffers(driver).items() if not torch.equal(b, others[name])]
        dropped.update(f"the buffer {name}, which forward passes write to" for name in written)
        pairs = zip(driver.statistics, ctx.statistics, strict=True)
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs):
            dropped.add("BatchNorm's running statistics, which move unseen in a compiled network")
        after = State(
            theta,
            momentum,
            ctx.statistics,
            {name: t for name, t in ctx.memory.items() if t.is_floating_point()},
            {name: rows.values for name, rows in ctx.rows.items()},
        )
        ctx.theta = dict(zip(names, leaves.parameters, strict=True))
        with driver._placed(ctx, once=True):  # for layers that are computed again
            found = [
                leaves.like(_pull(after, costate, leaves, keep=kinks.found or i + 1 < len(costates)))
                for i, costate in enumerate(costates)
            ]
            kinks.measure(found[0], lambda: leaves.like(_pull(after, costates[0], leaves)))
    for q in found:  # samples that carried nothing have no state there
        for name, (_, seen) in start.items():
            q.rows[name][~seen] = 0
    meter.gradients += 2 * (len(costates) + kinks.found) * ctx.passes
    return found, tuple(sorted(dropped))


@contextlib.contextmanager
def _inward(driver: Driver, margin: float | None = None) -> Iterator[None]:
    """Carried perturbations off the edge of their set, by a hair where no margin is given."""
    before = driver.margin
    driver.margin = before or margin or _ULPS * torch.finfo(driver.parameters[0].dtype).eps
    try:
        yield
    finally:
        driver.margin = before


def _other_buffers(driver: Driver) -> dict[str, Tensor]:
    """Copies of the floating-point buffers that are no running statistics."""
    known = {id(r) for r in driver.statistics}
    named = driver.model.named_buffers()
    return {name: b.clone() for name, b in named if b.is_floating_point() and id(b) not in known}


def _sgd(
    driver: Driver,
    theta: list[Tensor],
    momentum: list[Tensor],
    gradients: list[Tensor],
    shift: list[Tensor],
    rate: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """torch.optim.SGD's step at theta + shift, with a graph."""
    o = driver.optimizer
    moved = [g + o.weight_decay * (t + d) for g, t, d in zip(gradients, theta, shift, strict=True)]
    if o.momentum > 0:
        momentum = [o.momentum * v + g for v, g in zip(momentum, moved, strict=True)]
        ahead = [g + o.momentum * v for g, v in zip(moved, momentum, strict=True)]
        moved = ahead if o.nesterov else momentum
    return [t - rate * g for t, g in zip(theta, moved, strict=True)], momentum


def _pull(after: State, costate: State, leaves: State, keep: bool = False) -> list[Tensor]:
    """Gradients of <costate, after> in the leaves; the graph is kept for another costate where asked."""
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for mine, theirs in ((after.memory, costate.memory), (after.rows, costate.rows)):
        for name, value in mine.items():
            if name in theirs and value.requires_grad:
                outputs.append(value)
                weights.append(theirs[name])
    outputs += [*after.parameters, *after.momentum, *after.statistics]
    weights += [*costate.parameters, *costate.momentum, *costate.statistics]
    inputs = leaves.tensors()
    found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


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
    >>> found = verify(Driver(model, build("pgd_at"), Ball(0.1)), batch, u, 0.1)
    >>> len(found.pairs), found.dropped, found.share < 1e-7
    (8, (), True)
    >>> found = verify(Driver(model, build("pgd_at"), Ball(0.1, "l2")), batch, u, 0.1)
    >>> found.dropped, 1e-4 < found.share < 1
    (("the adversary's (l_2 steps)",), True)
    """
    if directions < 1 or not h > 0:
        raise ValueError(f"directions must be >= 1 and h > 0, got {directions} and {h:g}")
    before = state(driver, batch)
    _check_float64(driver, batch, before)
    with _inward(driver, 4 * h):
        return _compare(driver, batch, u, rate, before, directions, h, seed)


def _compare(
    driver: Driver, batch: Batch, u: Control, rate: float, before: State, directions: int, h: float, seed: int
) -> Verified:
    """`verify`, with carried perturbations far enough from the edge for both ends of a difference."""

    def after() -> State:
        driver.step(batch, u, rate)
        return state(driver, batch)

    with _put_back(driver):
        weight = _random(after(), seed, "weight")
    found = pullback(driver, batch, u, rate, weight)
    pairs = []
    for i in range(directions):
        e = _direction(driver, batch, before, seed, i)
        difference = _central(driver, batch, after, weight, e, h)
        if difference is not None:
            pairs.append((difference, found.costate.dot(e)))
    return Verified(tuple(pairs), directions - len(pairs), found.dropped)


def _check_float64(driver: Driver, batch: Batch, z: State) -> None:
    given: dict[str, list[Tensor]] = {
        "parameters": [*driver.model.parameters()],
        "buffers": [b for b in driver.model.buffers() if b.is_floating_point()],
        "optimiser's buffers": z.momentum,
        "memory": [*z.memory.values(), *z.rows.values()],
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
    return z.like([torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in z.tensors()])


def _direction(driver: Driver, batch: Batch, z: State, seed: int, i: int) -> State:
    """A random direction of length 1; rows of samples that carry nothing yet are no part of the state."""
    e = _random(z, seed, "direction", i)
    for name, rows in driver._context(batch, 0.0, Meter(), {}).rows.items():
        e.rows[name][~rows.seen] = 0
    return e.like([t / e.dot(e) ** 0.5 for t in e.tensors()])


def _central(
    driver: Driver, batch: Batch, after: Callable[[], State], weight: State, e: State, h: float
) -> float | None:
    """Central difference of <weight, after()> along e; None where the signs of the ends differ.

    Args:
        driver: whose state is moved before `after` is called, and put back.
        batch: what the state is of.
        after: takes steps, and returns the state, or a part of it.
        weight: in the structure of what `after` returns.
        e: direction.
        h: half the distance.
    """
    before, ends = state(driver, batch), []
    signs: list[list[Tensor]] = []
    for step in (h, -h):
        with _put_back(driver), _signs(driver) as seen:
            _put(driver, batch, before.plus(e, step))
            ends.append(after())
        signs.append(seen)
    if len(signs[0]) != len(signs[1]) or not all(map(torch.equal, signs[0], signs[1])):
        return None
    return weight.dot(ends[0].plus(ends[1], -1)) / (2 * h)


def _put(driver: Driver, batch: Batch, z: State) -> None:
    """Make z the driver's state."""
    with torch.no_grad():
        torch._foreach_copy_(driver.parameters, z.parameters)
        for r, value in zip(driver.statistics, z.statistics, strict=True):
            r.copy_(value)
    for p, v in zip(driver.parameters, z.momentum, strict=bool(z.momentum)):
        driver.sgd.state[p]["momentum_buffer"] = v.clone()
    driver.memory.update({name: t.clone() for name, t in z.memory.items()})
    for name, rows in driver._context(batch, 0.0, Meter(), {}).rows.items():
        values, seen = driver.rows[name]
        here = batch.indices.to(values.device)[rows.seen]
        driver.rows[name] = Rows(values.index_copy(0, here, z.rows[name][rows.seen]), seen)


@contextlib.contextmanager
def _put_back(driver: Driver) -> Iterator[None]:
    """Put the driver back, to the bit, after the block."""
    saved, meter = driver.snapshot(), driver.meter
    gradients = [p.grad for p in driver.parameters]
    driver.meter = Meter()
    try:
        with driver._scoring():  # flags, and buffers that a state dict leaves out
            yield
    finally:
        driver.restore(saved)
        driver.meter = meter
        for p, g in zip(driver.parameters, gradients, strict=True):
            p.grad = g


@contextlib.contextmanager
def _signs(driver: Driver) -> Iterator[list[Tensor]]:
    """Signs of the gradients that perturbations ascend in the block, in the order of time; 0 for l_2."""
    found: list[Tensor] = []
    plain = driver.ball
    kind: Any = type(plain)

    class Noting(kind):  # type: ignore[misc]
        def direction(self, gradient: Tensor) -> Tensor:
            seen = (
                gradient.detach().sign()
            )  # l_2 steps are smooth, but as many samples must move at both ends
            found.append(seen if self.norm == "linf" else torch.zeros_like(seen))
            return super().direction(gradient)  # type: ignore[no-any-return]

    driver.ball = Noting(plain.eps, plain.norm)
    try:
        yield found
    finally:
        driver.ball = plain
