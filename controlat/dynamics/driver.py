"""The controlled system: one outer step z' = S(z, u).

One driver serves the trainer, the recorded roll-out and the scoring of candidate controls: what is analysed
is what is trained. It alone moves theta, counts evaluations, and copies the state z.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.checks import brief, flag, instance, whole
from controlat._util.parallel import Share, World
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics import fields
from controlat.dynamics.fields import Field
from controlat.dynamics.hooks import between_epochs
from controlat.dynamics.names import Names
from controlat.dynamics.requests import Requests
from controlat.dynamics.rows import gather, put
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.sgd import SGDSettings
from controlat.dynamics.state import State
from controlat.methods import Batch, Context, Method, Rows, check_method
from controlat.models.frozen import batchnorm
from controlat.models.frozen.asking import check_model
from controlat.models.frozen.borrowed import alone, in_mode
from controlat.models.frozen.layout import is_convolutional

__all__ = ["Driver", "Field", "SGDSettings", "Step"]


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
        kept: networks that the method put aside, with their optimiser; part of the state.
        stopped: why the method ended training; empty while it goes on.
        controller_memory: plain data that the controller carries; part of the state.
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
    kept: dict[str, State] = field(default_factory=dict)
    stopped: str = ""
    controller_memory: dict[str, Any] = field(default_factory=dict)
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
            self.names = Names.of(self.model, self.parameters, self.statistics)
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
        self.sgd = self.optimizer.build(self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def statistics(self) -> list[Tensor]:
        """Running mean and variance of every normalisation layer that has them; part of the state."""
        return batchnorm.statistics(self.model)

    @property
    def momentum(self) -> list[Tensor]:
        """The optimiser's buffers v, one per parameter: 0 before the first step; none without momentum."""
        if self.optimizer.momentum == 0:
            return []
        buffers = [self.sgd.state.get(p, {}).get("momentum_buffer") for p in self.parameters]
        return [
            torch.zeros_like(p) if v is None else v for p, v in zip(self.parameters, buffers, strict=True)
        ]

    @property
    def requests(self) -> Requests:
        """What takes the gradients that the method asks for."""
        return Requests(
            model=self.model,
            parameters=self.parameters,
            method=self.method,
            seed=self.seed,
            autocast=self.autocast,
            normalises=self._normalises,
        )

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
        ctx, requests = self.context(batch, rate, self.meter, self.memory), self.requests
        for update, loss, gradients in requests.updates(ctx, batch, u):
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            with requests.shifted(update.shift, moves=True):
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
        return Step(
            epoch=batch.epoch,
            batch=batch.number,
            control=u,
            rate=rate,
            samples=ctx.share.total,
            loss=mean,
            spent=spent,
            dropped=tuple(sorted(dropped)),
            moves=len(losses),
        )

    def _summed(self, spent: Meter, share: Share) -> Meter:
        """What all processes spent."""
        if share.alone:
            return spent
        counts = share.sum(torch.tensor([spent.gradients, spent.forwards, spent.layers], device=self.device))
        return Meter(*map(int, counts))

    def field(self, batch: Batch, v: Control, rate: float = 0.0, meter: Meter | None = None) -> Field:
        """What one outer step under v would do; nothing of the state changes: `fields.field`."""
        return fields.field(self, batch, v, rate, Meter() if meter is None else meter)

    def fields(
        self, batch: Batch, u: Control, rate: float = 0.0, meter: Meter | None = None
    ) -> Iterator[Field]:
        """`field` for every K = 1, ..., u["steps"] at the step size of u, from one trajectory."""
        return fields.prefix_fields(self, batch, u, rate, Meter() if meter is None else meter)

    def state(self) -> State:
        """The state z itself: the driver's own tensors, not copies."""
        return State.of(
            self.model.state_dict(),
            self.sgd.state_dict(),
            self.names,
            memory=self.memory,
            rows=self.rows,
            kept=self.kept,
            stopped=self.stopped,
            controller=self.controller_memory,
        )

    def point(self, index: Tensor) -> State:
        """The part of the state with a derivative that a step on some samples acts on: a vector.

        Tensors are the driver's own, but for rows, which are gathered, and the optimiser's buffers before the
        first step, which are 0.

        Args:
            index: (N,) positions of the samples of a batch.
        """
        return State(
            parameters=[p.detach() for p in self.parameters],
            momentum=self.momentum,
            statistics=[r.detach() for r in self.statistics],
            memory={name: t for name, t in self.memory.items() if t.is_floating_point()},
            rows={name: gather(store, index) for name, store in self.rows.items()},
            index=index,
        )

    def snapshot(self, touched: Tensor | None = None) -> State:
        """A copy of the state z.

        Args:
            touched: positions (N,) of the only samples whose rows are copied, where others will not change;
                all by default.
        """
        z = self.state()
        if touched is None:
            return z.copy()
        part = z.at(touched)  # rows that are gathered are copies already
        return replace(replace(part, rows={}).copy(), rows=part.rows)

    def restore(self, z: State) -> None:
        """Put the state back to what a snapshot, a checkpoint or a sum of states says; z stays usable.

        Rows of samples that z is not of stay as they are.
        """
        self.restore_network(z)
        self.memory = {name: t.clone() for name, t in z.memory.items()}
        self.rows = z.with_rows(self.rows)
        self.kept, self.stopped = dict(z.kept), z.stopped
        self.controller_memory = copy.deepcopy(z.controller)

    def restore_network(self, z: State) -> None:
        """Put back the network and the optimiser alone."""
        self.model.load_state_dict(z.model)
        copies = replace(z, momentum=[v.clone() for v in z.momentum])  # torch keeps the very tensors
        self.sgd.load_state_dict(copies.optimizer)

    def context(self, batch: Batch, rate: float, meter: Meter, memory: dict[str, Tensor]) -> Context:
        """What the method may use in a step on a batch.

        Args:
            batch: of the step.
            rate: its learning rate.
            meter: where evaluations are counted.
            memory: what the method carries, which it may replace.
        """
        return Context(
            model=self.model,
            ball=self.ball,
            meter=meter,
            seed=self.seed,
            epoch=batch.epoch,
            batch=batch.number,
            rate=rate,
            memory=memory,
            rows={name: gather(store, batch.indices) for name, store in self.rows.items()},
            autocast=self.autocast,
            channels_last=self._nhwc,
            share=batch.share or World().share(len(batch.x)),
            margin=self.margin,
        )

    def _scatter(self, batch: Batch, ctx: Context) -> None:
        """Keep what the samples of a batch carry now."""
        for name, rows in ctx.rows.items():
            values, seen = map(ctx.share.all_gather, rows)
            index = ctx.share.all_gather(batch.indices.to(values.device))
            self.rows[name] = put(self.rows.get(name), index, Rows(values, seen))

    def start_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Let the method do what it does before the first step of an epoch."""
        if hasattr(self.method, "start_epoch"):
            random = rng.scoped(self.seed, epoch, -1, "start", device=self.device)
            with random, between_epochs(self, spec, epoch) as ctx:
                self.method.start_epoch(ctx, spec.control_at(epoch, 0, self))

    def end_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Let the method do what it does after the last step of an epoch."""
        if hasattr(self.method, "end_epoch"):
            random = rng.scoped(self.seed, epoch, -1, "end", device=self.device)
            with random, between_epochs(self, spec, epoch) as ctx:
                self.method.end_epoch(ctx, spec.control_at(epoch, 0, self))

    def fingerprint(self) -> list[Tensor]:
        """Numbers that differ where two states z do: for processes to compare."""
        return self.state().fingerprint()

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """Parameters, buffers and training flags are put back after the block, as scoring moves them."""
        return fields.put_back(self.model, self.parameters)
