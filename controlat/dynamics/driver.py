"""The controlled system: one outer step z' = S(z, u), and roll-outs of it under a schedule.

One driver serves the trainer, the recorded roll-out and the scoring of candidate controls: what is analysed
is what is trained. z is the whole state: parameters, buffers, optimiser buffers and a method's memory.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.checks import brief, flag, instance, number, whole
from controlat._util.errors import NonFiniteError
from controlat._util.kernels import SecondDerivatives
from controlat._util.parallel import Share, World
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import Snapshot, copied, gather, put
from controlat.methods import (
    Batch,
    Context,
    Epoch,
    Method,
    Prefixes,
    Rows,
    Update,
    check_method,
)
from controlat.models.frozen import batchnorm
from controlat.models.frozen.asking import check_model
from controlat.models.frozen.borrowed import alone, in_mode, owned, replaced
from controlat.models.frozen.layout import is_convolutional

__all__ = ["Driver", "Field", "SGDSettings", "Step"]


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
        for name in ("momentum", "weight_decay"):
            object.__setattr__(self, name, number(getattr(self, name), name))
        flag(self.nesterov, "nesterov")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got momentum 0")


class Step(NamedTuple):
    """What happened in one outer step: where, under which control, its cost, how often theta moved."""

    epoch: int
    batch: int
    control: Control
    rate: float
    samples: int
    loss: float
    spent: Meter
    dropped: tuple[str, ...]
    moves: int

    @property
    def evaluations(self) -> float:
        """n(u): gradient evaluations per sample."""
        return self.spent.gradients / self.samples


class Field(NamedTuple):
    """What one outer step would do under a control.

    Args:
        control: v.
        gradients: -F(theta, v), the sum of the gradients of the step, one tensor per parameter.
        statistics: running statistics after it, as `Driver.statistics`.
    """

    control: Control
    gradients: list[Tensor]
    statistics: list[Tensor]


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
        memory: dense tensors that the method carries; part of the state.
        rows: what training samples carry, by name, a row for each; part of the state.
        kept: copies of network and optimiser that the method put aside; part of the state.
        stopped: why the method ended training; empty while it goes on.
        margin: as in `Context`.
        notice: called with what a method does between epochs: ``"save"`` or ``"reload"`` and a name,
            ``"set"`` and the name of memory that is new, ``"moved"`` and what it wrote to in place.
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
    rows: dict[str, Rows] = field(default_factory=dict)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str = ""
    margin: float = 0.0
    notice: Callable[[str, str], object] | None = None

    def __post_init__(self) -> None:
        check_model(self.model)
        check_method(self.method)
        self.seed = whole(self.seed, "seed")
        flag(self.channels_last, "channels_last")
        for name, kind in (("ball", Ball), ("optimizer", SGDSettings), ("meter", Meter)):
            instance(getattr(self, name), kind, name)
        instance(self.autocast, (torch.dtype, type(None)), "autocast", "such as torch.bfloat16")
        if self.notice is not None and not callable(self.notice):
            raise TypeError(f"notice must be a function of (what, name), got {brief(self.notice)}")
        with alone(self.model), in_mode(self.model, True):  # some networks freeze parts of themselves there
            self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if any(t.is_inference() for t in (*self.model.parameters(), *self.model.buffers())):
            raise ValueError(
                "the model was made under torch.inference_mode(), and its tensors cannot be trained: make it "
                "outside"
            )
        # Looked up once: to go through the modules of a small network takes as long as to run it.
        self._normalises, self._nhwc = (
            bool(self.statistics),
            self.channels_last and is_convolutional(self.model),
        )
        if not self.parameters:
            raise ValueError("the model has no parameters that require gradients: there is nothing to train")
        if hasattr(self.method, "check_ball"):
            self.method.check_ball(self.ball)
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

    @property
    def statistics(self) -> list[Tensor]:
        """Running mean and variance of every normalisation layer that has them; part of the state."""
        return batchnorm.statistics(self.model)

    def step(self, batch: Batch, u: Control, rate: float) -> Step:
        """One outer step z <- S(z, u).

        Where processes share the batch, each takes its rows, and all end in the same state; what was spent is
        the sum over them.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the message names epoch, batch and control.
        """
        before = self.meter.copy()
        losses: list[float] = []
        dropped: set[str] = set()
        for group in self.sgd.param_groups:
            group["lr"] = rate
        ctx = self._context(batch, rate, self.meter, self.memory)
        for update, loss, gradients in self._updates(ctx, batch, u):
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            with self._shifted(update.shift, moves=True):
                self.sgd.step()
            self.sgd.zero_grad(set_to_none=True)
            losses.append(loss)
            dropped.update(update.dropped)
        self.memory.update({name: t.detach() for name, t in self.memory.items()})
        self._scatter(batch, ctx)
        ctx.share.sync_buffers(self.model)
        mean = sum(losses) / len(losses)
        mine = self.meter.since(before)
        spent = self._summed(mine, ctx.share)
        self.meter.add(spent.since(mine))
        names = tuple(sorted(dropped))
        return Step(batch.epoch, batch.number, u, rate, ctx.share.total, mean, spent, names, len(losses))

    def _summed(self, spent: Meter, share: Share) -> Meter:
        """What all processes spent."""
        if share.alone:
            return spent
        counts = share.sum(torch.tensor([spent.gradients, spent.forwards, spent.layers], device=self.device))
        return Meter(*map(int, counts))

    def field(self, batch: Batch, v: Control, rate: float = 0.0, meter: Meter | None = None) -> Field:
        """What one outer step under v would do; nothing of the state changes.

        A method with several updates moves by plain gradient steps of size `rate` in between.
        """
        with self._scoring():
            total = [torch.zeros_like(p) for p in self.parameters]
            spent = Meter() if meter is None else meter
            memory = {name: t.clone() for name, t in self.memory.items()}
            ctx = self._context(batch, rate, spent, memory)
            for _, _, gradients in self._updates(ctx, batch, v):
                torch._foreach_add_(total, gradients)
                if rate:
                    with torch.no_grad():
                        torch._foreach_add_(self.parameters, gradients, alpha=-rate)
            return Field(v, total, [r.clone() for r in self.statistics])

    def fields(
        self, batch: Batch, u: Control, rate: float = 0.0, meter: Meter | None = None
    ) -> Iterator[Field]:
        """`field` for every K = 1, ..., u["steps"] at the step size of u, from one trajectory.

        Raises:
            ValueError: the method cannot do this.
        """
        if not isinstance(self.method, Prefixes):
            raise ValueError(
                f"{type(self.method).__name__} offers no sweep over K: score its controls one by one"
            )
        batch = _owned(batch)
        ctx = self._context(batch, rate, Meter() if meter is None else meter, dict(self.memory))
        candidates = self.method.prefixes(ctx, batch, u)
        while True:
            with self._scoring():
                with self._scope(batch, "inner", 0):
                    found = next(candidates, None)
                if found is None:
                    return
                _, gradients, _ = self._differentiate(ctx, batch, found[0], found[1], 0)
                after = [r.clone() for r in self.statistics]
            yield Field(found[0], gradients, after)

    def snapshot(self, touched: Tensor | None = None) -> Snapshot:
        """A copy of the state z.

        Args:
            touched: positions (N,) of the only samples whose rows are copied, where others will not change;
                all by default.
        """
        model = {
            name: t.detach().clone() if isinstance(t, Tensor) else copy.deepcopy(t)  # a module's extra state
            for name, t in self.model.state_dict().items()
        }
        memory = {name: t.clone() for name, t in self.memory.items()}
        rows = {}
        for name, store in self.rows.items():
            if touched is None:
                rows[name] = {"values": store.values.clone(), "seen": store.seen.clone()}
            else:
                rows[name] = {"index": touched.clone(), **gather(store, touched)._asdict()}
        return Snapshot(model, copied(self.sgd.state_dict()), memory, rows, dict(self.kept), self.stopped)

    def restore(self, snapshot: Snapshot) -> None:
        """Put the state z back to a snapshot, which stays usable.

        Rows that a partial snapshot does not have stay as they are.
        """
        self.model.load_state_dict(snapshot.model)
        self.sgd.load_state_dict(copied(snapshot.optimizer))  # torch keeps the very tensors it is given
        self.memory = {name: t.clone() for name, t in snapshot.memory.items()}
        for name in set(self.rows) - set(snapshot.rows):
            del self.rows[name]
        for name, found in snapshot.rows.items():
            rows = Rows(found["values"], found["seen"])
            if "index" in found:
                self.rows[name] = put(self.rows.get(name), found["index"], rows)
            else:
                self.rows[name] = Rows(rows.values.clone(), rows.seen.clone())
        self.kept, self.stopped = dict(snapshot.kept), snapshot.stopped

    def _updates(
        self, ctx: Context, batch: Batch, u: Control
    ) -> Iterator[tuple[Update, float, list[Tensor]]]:
        """(the update that moves theta, summed loss, summed gradient) for every move of one outer step.

        What other requests drop counts for the move that follows.
        """
        self.model.train()
        batch = _owned(batch)
        total: list[Tensor] | None = None
        losses: list[float] = []
        dropped: set[str] = set()
        moved = False
        reply: Sequence[Tensor] | None = None
        try:
            updates = self.method.updates(ctx, batch, u)
            for i in itertools.count():
                with self._scope(batch, "inner", i):
                    update = self._next(updates, reply)
                if update is None:
                    break
                loss, gradients, reply = self._differentiate(ctx, batch, u, update, i)
                dropped.update(update.dropped)
                if update.add:
                    total = gradients if total is None else [*map(torch.add, total, gradients)]
                    losses.append(loss)
                if update.move:
                    if total is None:
                        raise ValueError(f"{type(self.method).__name__} moves theta without a gradient")
                    yield update._replace(dropped=tuple(sorted(dropped))), sum(losses), total
                    total, losses, moved = None, [], True
        except NonFiniteError as error:
            where = f"epoch {batch.epoch}, batch {batch.number}, {u}"
            raise error if where in str(error) else NonFiniteError(f"{error} ({where})") from None
        if total is not None or not moved:
            what = "without moving theta" if total is None else "with a gradient that moves nothing"
            raise ValueError(f"{type(self.method).__name__} ends a step {what}")

    @staticmethod
    def _next(updates: Any, reply: Sequence[Tensor] | None) -> Update | None:
        """The next request of a method: a generator takes the reply to the last one."""
        if not hasattr(updates, "__next__"):
            raise TypeError(
                f"`updates` of a method must be a generator: yield each Update; got {type(updates).__name__}"
            )
        if reply is None or not hasattr(updates, "send"):
            found = next(updates, None)
        else:
            try:
                found = updates.send(reply)
            except StopIteration:
                return None
        if found is not None and not isinstance(found, Update):
            raise TypeError(f"a method must yield Update(loss), got {type(found).__name__}")
        return found

    def _differentiate(
        self, ctx: Context, batch: Batch, u: Control, update: Update, i: int
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """Loss, its gradient in the parameters, and its gradients in the tensors of `also`.

        Where the step itself is being differentiated (``ctx.theta``), the gradients keep their graph.
        """
        graph, before, statistics = ctx.theta is not None, ctx.theta, list(ctx.statistics)
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.device.type, dtype=self.autocast)
        kept = contextlib.nullcontext() if update.add else self._buffers_kept()
        shift = None if graph else update.shift
        if before is not None:  # new names for theta: what a method made of it is held fixed, with its graph
            moved = before.values() if update.shift is None else map(torch.add, before.values(), update.shift)
            ctx.theta = {name: t.view_as(t) for name, t in zip(before, moved, strict=True)}
        parameters = self.parameters if ctx.theta is None else list(ctx.theta.values())
        with (
            self._scope(batch, "update", i),
            torch.enable_grad(),
            kept,
            self._shifted(shift),
            self._placed(ctx, once=i == 0 and update.shift is None),
        ):
            with cast:
                loss = update.loss()
            if loss.dim():
                raise ValueError(
                    f"the loss of an Update must be one number, got shape {tuple(loss.shape)}: take the mean"
                )
            wanted = [*parameters, *([] if update.also is None else update.also())]
            with batchnorm.still(self.model) if self._normalises else contextlib.nullcontext():
                found = torch.autograd.grad(loss, wanted, allow_unused=True, create_graph=graph)
        ctx.theta = before
        if not update.add:
            ctx.statistics = statistics
        every = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        ours = {id(p) for p in parameters}
        shared = [i for i, t in enumerate(wanted) if i < len(parameters) or id(t) in ours]
        rest = torch.stack([loss.detach(), *torch._foreach_norm([g.detach() for g in every])])
        # One reduction of all: then a number that is not finite is so in every process.
        reduced = ctx.share.mean([*(every[i] for i in shared), rest])
        for i, g in zip(shared, reduced[:-1], strict=True):
            every[i] = g
        value, norm = float(reduced[-1][0]), float(reduced[-1][1:].norm())
        if not (torch.isfinite(torch.tensor((value, norm))).all()):
            where = f"epoch {batch.epoch}, batch {batch.number}, {u}"
            raise NonFiniteError(f"training loss {value:g}, gradient norm {norm:g} ({where})")
        return value, every[: len(parameters)], every[len(parameters) :]

    @contextlib.contextmanager
    def _placed(self, ctx: Context, once: bool) -> Iterator[None]:
        """``ctx.theta`` in place of the parameters, for layers that the backward pass computes again.

        A second derivative computes such layers once more, with the parameters before the step: allowed where
        the step asks for one gradient, there (`once`).
        """
        if ctx.theta is None:
            yield
            return
        hooks: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not once:
            hooks = torch.autograd.graph.disable_saved_tensors_hooks(
                f"costates of {type(self.method).__name__} need the output of every layer: turn activation "
                "checkpointing off (torch.utils.checkpoint)"
            )
        second: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if SecondDerivatives.needed(self.model):
            second = SecondDerivatives()
        theta = dict(zip(map(id, self.parameters), ctx.theta.values(), strict=True))
        with hooks, second, replaced(self.model, theta):
            yield

    @contextlib.contextmanager
    def _shifted(self, shift: Sequence[Tensor] | None, moves: bool = False) -> Iterator[None]:
        """The parameters with something added, inside the block; their own bits after it, unless it moves."""
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
        with replaced(self.model, {id(b): b.detach().clone() for b in self.model.buffers()}):
            yield

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
            {name: gather(store, batch.indices) for name, store in self.rows.items()},
            self.autocast,
            self._nhwc,
            batch.share or World().share(len(batch.x)),
            margin=self.margin,
        )

    def _scatter(self, batch: Batch, ctx: Context) -> None:
        """Keep what the samples of a batch carry now."""
        for name, found in ctx.rows.items():
            values, seen = map(ctx.share.all_gather, found)
            index = ctx.share.all_gather(batch.indices.to(values.device))
            self.rows[name] = put(self.rows.get(name), index, Rows(values, seen))

    def start_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Let the method do what it does before the first step of an epoch."""
        if hasattr(self.method, "start_epoch"):
            with rng.scoped(self.seed, epoch, -1, "start", device=self.device), self._watched():
                self.method.start_epoch(self._epoch(spec, epoch), spec.schedule(epoch))

    def end_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Let the method do what it does after the last step of an epoch."""
        if hasattr(self.method, "end_epoch"):
            with rng.scoped(self.seed, epoch, -1, "end", device=self.device), self._watched():
                self.method.end_epoch(self._epoch(spec, epoch), spec.schedule(epoch))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Notice what memory a hook sets anew or removes, and what it writes to in place."""
        before, network = dict(self.memory), {"theta": self.parameters, "running statistics": self.statistics}
        counts = {name: [t._version for t in tensors] for name, tensors in network.items()}
        versions = {name: t._version for name, t in before.items()}
        self._reloaded = False
        yield
        if self.notice is None:
            return
        for name, tensors in network.items():
            if not self._reloaded and counts[name] != [t._version for t in tensors]:
                self.notice("moved", name)
        for name, t in before.items():
            if t.is_floating_point() and self.memory.get(name) is not t:
                self.notice("set", name)
            elif t.is_floating_point() and t._version != versions[name]:
                self.notice("moved", name)

    def _epoch(self, spec: RunSpec, epoch: int) -> Epoch:
        def save(name: str) -> None:
            found = self.snapshot()
            self.kept[name] = {"model": found.model, "optimizer": found.optimizer}
            if self.notice is not None:
                self.notice("save", name)

        def reload(name: str) -> None:
            self.model.load_state_dict(self.kept[name]["model"])
            self.sgd.load_state_dict(copied(self.kept[name]["optimizer"]))
            self._reloaded = True
            if self.notice is not None:
                self.notice("reload", name)

        def stop(reason: str) -> None:
            self.stopped = reason

        return Epoch(
            self.model,
            self.ball,
            self.meter,
            self.seed,
            epoch,
            self.memory,
            spec.held_out,
            self.channels_last,
            forget=lambda name: void(self.rows.pop(name, None)),
            save=save,
            reload=reload,
            stop=stop,
            first=lambda: next(replace(spec, world=World()).batches(epoch)),
        )

    def _scope(self, batch: Batch, purpose: str, i: int) -> contextlib.AbstractContextManager[None]:
        key: list[int | str] = [batch.epoch, batch.number, purpose, i]
        if batch.share is not None:  # masks of dropout are drawn for the rows of one process
            key.append(batch.share.rank)
        return rng.scoped(self.seed, *key, device=self.device)

    def fingerprint(self) -> list[Tensor]:
        """Numbers that differ where two states z do: for processes to compare."""
        tensors = [*self.model.state_dict().values(), *self.memory.values()]
        sums = [t.detach().double().sum().to(self.device) for t in tensors if isinstance(t, Tensor)]
        return [*sums, torch.tensor(float(len(self.stopped)), device=self.device)]

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Put parameters, buffers and training flags back, as scoring moves them."""
        with alone(self.model), in_mode(self.model, True):
            saved = [(p, p.detach().clone()) for p in self.parameters]
            try:
                with self._buffers_kept():
                    yield
            finally:
                with torch.no_grad():
                    for p, before in saved:
                        if not torch.equal(p, before):  # a graph of the caller's may need the very values
                            p.copy_(before)


def _owned(batch: Batch) -> Batch:
    """A batch that autograd can work with."""
    return batch._replace(x=owned(batch.x), y=owned(batch.y))


def void(_: object) -> None:
    """Nothing, for callbacks that must return nothing."""
