"""The controlled system: one outer step z' = S(z, u), and roll-outs of it under a schedule.

One driver serves the trainer, the recorded roll-out and the scoring of candidate controls: what is analysed
is what is trained. z is the whole state: parameters, buffers, optimiser buffers and a method's memory.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlat import rng
from controlat.augment import Augment
from controlat.balls import Ball
from controlat.control import Control
from controlat.data import Samples
from controlat.methods import Batch, Context, Method, Prefixes, Update
from controlat.network import Meter, NonFiniteError
from controlat.rates import Rate
from controlat.schedules import Schedule

__all__ = ["Driver", "Plan", "SGDSettings", "Snapshot", "Step", "rollout"]


@dataclass(frozen=True)
class SGDSettings:
    """The optimiser, torch.optim.SGD: v' = mu v + g + wd theta, theta' = theta - eta v' (or Nesterov's form).

    Raises:
        ValueError: a number is out of range.
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got momentum 0")


class Step(NamedTuple):
    """What happened in one outer step: where, under which control, and what it cost."""

    epoch: int
    batch: int
    control: Control
    rate: float
    samples: int
    loss: float
    spent: Meter
    dropped: tuple[str, ...]


class Snapshot(NamedTuple):
    """A copy of the state z: model (parameters and buffers), optimiser, memory of the method."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    memory: dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What a roll-out is run on: data in batches, learning rate, schedule, seed.

    Args:
        data: training samples; the order of an epoch is a function of (seed, epoch).
        batch_size: samples per outer step; the last batch of an epoch may be smaller.
        epochs: number of epochs T.
        schedule: t -> u.
        rate: t -> learning rate.
        seed: of everything random.
        augment: random crops and flips, a function of (seed, epoch, batch); None for none.
    """

    data: Samples
    batch_size: int
    epochs: int
    schedule: Schedule
    rate: Rate
    seed: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def batches_per_epoch(self) -> int:
        """Outer steps per epoch."""
        return -(-len(self.data) // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `first` on."""
        order = torch.randperm(len(self.data), generator=rng.generator(self.seed, epoch, "order"))
        chunks = torch.split(order, self.batch_size)[first:]
        for number, (index, (x, y)) in enumerate(zip(chunks, self.data.stream(chunks), strict=True), first):
            if self.augment is None:
                yield Batch(x, y, index, epoch, number)
            else:
                draw = rng.generator(self.seed, epoch, number, "augment")
                placement = self.augment.draw(len(x), draw)
                yield Batch(placement(x), y, index, epoch, number, placement)

    def control(self, batch: Batch) -> Control:
        """u at the start of that batch's step."""
        return self.schedule(batch.epoch + batch.number / self.batches_per_epoch)

    def learning_rate(self, epoch: int, number: int) -> float:
        """eta of one step, taken at its middle."""
        return self.rate(epoch + (number + 0.5) / self.batches_per_epoch, self.epochs)

    def mean_rate(self, epoch: int | None = None) -> float:
        """Mean learning rate of an epoch, or of the whole run: the unit of time and of cost."""
        epochs = range(self.epochs) if epoch is None else (epoch,)
        rates = [self.learning_rate(e, b) for e in epochs for b in range(self.batches_per_epoch)]
        return sum(rates) / len(rates)


@dataclass
class Driver:
    """Runs outer steps of a method on a model. It alone takes gradients, moves theta, counts and snapshots.

    Args:
        model: the network, on its device.
        method: the training system.
        ball: the perturbation set.
        optimizer: SGD's settings.
        seed: of everything random in a step.
        autocast: dtype of mixed precision in training, None for none.
        channels_last: run convolutions in NHWC layout; dropout, which draws in the order of memory, then has
            another mask.
    """

    model: nn.Module
    method: Method
    ball: Ball
    optimizer: SGDSettings = field(default_factory=SGDSettings)
    seed: int = 0
    autocast: torch.dtype | None = None
    channels_last: bool = True
    meter: Meter = field(default_factory=Meter)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no parameters that require gradients: there is nothing to train")
        o = self.optimizer
        self.sgd = torch.optim.SGD(
            self.parameters,
            lr=0.0,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    def step(self, batch: Batch, u: Control, rate: float) -> Step:
        """One outer step z <- S(z, u).

        Raises:
            NonFiniteError: a loss or gradient is not finite; the message names epoch, batch and control.
        """
        before = self.meter.copy()
        losses: list[float] = []
        dropped: set[str] = set()
        for group in self.sgd.param_groups:
            group["lr"] = rate
        for update, loss, gradients in self._updates(batch, u, rate, self.meter, self.memory):
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            with self._shifted(update.shift, moves=True):
                self.sgd.step()
            self.sgd.zero_grad(set_to_none=True)
            losses.append(loss)
            dropped.update(update.dropped)
        mean = sum(losses) / len(losses)
        spent = self.meter.since(before)
        return Step(batch.epoch, batch.number, u, rate, len(batch.x), mean, spent, tuple(sorted(dropped)))

    def field(self, batch: Batch, v: Control, rate: float = 0.0, meter: Meter | None = None) -> list[Tensor]:
        """-F(theta, v): the sum of the gradients of one outer step under v; nothing of the state changes.

        A method with several updates moves by plain gradient steps of size `rate` in between.
        """
        with self._scoring():
            total = [torch.zeros_like(p) for p in self.parameters]
            spent = Meter() if meter is None else meter
            memory = {name: t.clone() for name, t in self.memory.items()}
            for _, _, gradients in self._updates(batch, v, rate, spent, memory):
                torch._foreach_add_(total, gradients)
                with torch.no_grad():
                    torch._foreach_add_(self.parameters, gradients, alpha=-rate)
        return total

    def fields(
        self, batch: Batch, u: Control, rate: float = 0.0, meter: Meter | None = None
    ) -> Iterator[tuple[Control, list[Tensor]]]:
        """`field` for every K = 1, ..., u["steps"] at the step size of u, from one trajectory.

        Raises:
            ValueError: the method cannot do this.
        """
        if not isinstance(self.method, Prefixes):
            raise ValueError(
                f"{type(self.method).__name__} offers no sweep over K: score its controls one by one"
            )
        ctx = self._context(batch, rate, Meter() if meter is None else meter, dict(self.memory))
        candidates = self.method.prefixes(ctx, batch, u)
        while True:
            with self._scoring():
                with self._scope(batch, "inner", 0):
                    found = next(candidates, None)
                if found is None:
                    return
                _, gradients, _ = self._differentiate(batch, found[0], found[1], 0)
            yield found[0], gradients

    def snapshot(self) -> Snapshot:
        """A copy of the state z."""
        model = {
            name: t.detach().clone() if isinstance(t, Tensor) else copy.deepcopy(t)  # a module's extra state
            for name, t in self.model.state_dict().items()
        }
        memory = {name: t.clone() for name, t in self.memory.items()}
        return Snapshot(model, _copied(self.sgd.state_dict()), memory)

    def restore(self, snapshot: Snapshot) -> None:
        """Put the state z back to a snapshot, which stays usable."""
        self.model.load_state_dict(snapshot.model)
        self.sgd.load_state_dict(_copied(snapshot.optimizer))  # torch keeps the very tensors it is given
        self.memory = {name: t.clone() for name, t in snapshot.memory.items()}

    def _updates(
        self, batch: Batch, u: Control, rate: float, meter: Meter, memory: dict[str, Tensor]
    ) -> Iterator[tuple[Update, float, list[Tensor]]]:
        """(the update that moves theta, mean loss, summed gradient) for every move of one outer step."""
        ctx = self._context(batch, rate, meter, memory)
        self.model.train()
        total: list[Tensor] | None = None
        losses: list[float] = []
        reply: Sequence[Tensor] | None = None
        try:
            updates = self.method.updates(ctx, batch, u)
            for i in itertools.count():
                with self._scope(batch, "inner", i):
                    update = self._next(updates, reply)
                if update is None:
                    break
                loss, gradients, reply = self._differentiate(batch, u, update, i)
                if update.add:
                    total = gradients if total is None else torch._foreach_add(total, gradients)
                    losses.append(loss)
                if update.move:
                    if total is None:
                        raise ValueError(f"{type(self.method).__name__} moves theta without a gradient")
                    yield update, sum(losses) / len(losses), total
                    total, losses = None, []
        except NonFiniteError as error:
            where = f"epoch {batch.epoch}, batch {batch.number}, {u}"
            raise error if where in str(error) else NonFiniteError(f"{error} ({where})") from None
        if total is not None:
            raise ValueError(f"{type(self.method).__name__} ends a step with a gradient that moves nothing")

    @staticmethod
    def _next(updates: Any, reply: Sequence[Tensor] | None) -> Update | None:
        """The next request of a method: a generator takes the reply to the last one."""
        if reply is None or not hasattr(updates, "send"):
            return next(updates, None)
        try:
            found: Update = updates.send(reply)
        except StopIteration:
            return None
        return found

    def _differentiate(
        self, batch: Batch, u: Control, update: Update, i: int
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """Loss, its gradient in the parameters, and its gradients in the tensors of `also`."""
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.device.type, dtype=self.autocast)
        kept = contextlib.nullcontext() if update.add else self._buffers_kept()
        with self._scope(batch, "update", i), torch.enable_grad(), kept, self._shifted(update.shift):
            with cast:
                loss = update.loss()
            further = [] if update.also is None else list(update.also())
            found = torch.autograd.grad(loss, [*self.parameters, *further], allow_unused=True)
        wanted = [*self.parameters, *further]
        every = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        gradients, reply = every[: len(self.parameters)], every[len(self.parameters) :]
        value = float(loss.detach())
        norm = float(torch.stack(torch._foreach_norm(every)).norm())
        if not (torch.isfinite(torch.tensor((value, norm))).all()):
            where = f"epoch {batch.epoch}, batch {batch.number}, {u}"
            raise NonFiniteError(f"training loss {value:g}, gradient norm {norm:g} ({where})")
        return value, gradients, reply

    @contextlib.contextmanager
    def _shifted(self, shift: Sequence[Tensor] | None, moves: bool = False) -> Iterator[None]:
        """The parameters with something added, inside the block, and back to their bits unless it moves them."""
        if shift is None:
            yield
            return
        before = None if moves else [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_add_(self.parameters, list(shift))
        try:
            yield
        finally:
            with torch.no_grad():
                if before is None:
                    torch._foreach_sub_(self.parameters, list(shift))
                else:
                    torch._foreach_copy_(self.parameters, before)

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Buffers as they were, after the block."""
        buffers = [
            (module._buffers, name, b, None if b is None else b.detach().clone())
            for module in self.model.modules()
            for name, b in module._buffers.items()
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for home, name, b, value in buffers:  # some modules replace a buffer instead of filling it
                    home[name] = b if b is None or value is None else b.copy_(value)

    def _context(self, batch: Batch, rate: float, meter: Meter, memory: dict[str, Tensor]) -> Context:
        return Context(
            self.model,
            self.ball,
            meter,
            self.seed,
            batch.epoch,
            batch.number,
            rate,
            memory,
            self.autocast,
            self.channels_last,
        )

    def _scope(self, batch: Batch, purpose: str, i: int) -> contextlib.AbstractContextManager[None]:
        return rng.scoped(self.seed, batch.epoch, batch.number, purpose, i, device=self.device)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Put parameters, buffers and training flags back, as scoring moves them."""
        flags = [(m, m.training) for m in self.model.modules()]
        saved = [(p, p.detach().clone()) for p in self.parameters]
        self.model.train()
        try:
            with self._buffers_kept():
                yield
        finally:
            with torch.no_grad():
                for p, before in saved:
                    p.copy_(before)
            for module, training in flags:
                module.training = training


def _copied(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with tensors of its own."""
    state = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in optimizer["state"].items()
    }
    return optimizer | {"state": state}


def rollout(
    driver: Driver,
    plan: Plan,
    *,
    epoch: int = 0,
    batch: int = 0,
    until: int | None = None,
    record: Callable[[int, Snapshot], None] | None = None,
    stride: int = 1,
) -> Iterator[Step]:
    """Run the system under the plan's schedule, one `Step` at a time.

    Args:
        driver: holds the state, which moves as the iterator is consumed.
        plan: data, schedule, rates.
        epoch: where to start.
        batch: where to start in that epoch.
        until: epoch to stop before; the plan's end by default.
        record: called with (step number, snapshot of the state BEFORE that step) at every `stride`-th step.
        stride: see `record`.
    """
    for e in range(epoch, plan.epochs if until is None else until):
        for b in plan.batches(e, batch if e == epoch else 0):
            number = e * plan.batches_per_epoch + b.number
            if record is not None and number % stride == 0:
                record(number, driver.snapshot())
            yield driver.step(b, plan.control(b), plan.learning_rate(e, b.number))
