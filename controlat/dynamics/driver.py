"""The controlled system: one outer step z' = S(z, u).

One driver serves the trainer, the recorded roll-out and the scoring of candidate controls: what is analysed
is what is trained. It alone moves theta, counts evaluations, and copies the state z.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.checks import brief, flag, instance, whole
from controlat._util.parallel import Share, World
from controlat._util.precision import full_precision
from controlat._util.watch import Watch
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics import fields
from controlat.dynamics.fields import Field
from controlat.dynamics.hooks import call_hook
from controlat.dynamics.put_back import put_back
from controlat.dynamics.requests import Requests
from controlat.dynamics.rows import gather, scatter
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.sgd import SGDSettings
from controlat.dynamics.state import State
from controlat.dynamics.state_dict import Names
from controlat.dynamics.step import Step
from controlat.methods import Batch, Context, Method, Rows, check_method
from controlat.models.frozen import batchnorm
from controlat.models.frozen.contexts import exclusive, in_mode
from controlat.models.frozen.layout import is_convolutional
from controlat.models.frozen.logits import check_model

__all__ = ["Driver", "Field", "SGDSettings", "Step"]


@dataclass
class Driver:
    """Runs outer steps of a method on a model: computes gradients, updates theta, counts, copies the state.

    Args:
        model: the network, on its device.
        method: the training system.
        ball: the perturbation set.
        optimizer: settings of SGD.
        seed: of all random numbers in a step.
        autocast: dtype of mixed precision in training; None for none.
        channels_last: run convolutions in NHWC layout; dropout masks differ between layouts.
        meter: counts the evaluations of all steps.
        memory: dense tensors that the method carries from step to step; part of the state.
        rows: memory per training sample, by name; part of the state.
        kept: copies of the network and its optimiser that the method saved, by name; part of the state.
        stopped: why the method ended training; empty while training goes on.
        controller_memory: plain data that the controller carries; part of the state.
        margin: as in `Context`.
        look_every: steps after which losses and gradients are looked at, to find that they are not finite;
            0: within each step, before theta moves. Looking makes the CPU wait for a GPU. None: 16 on CUDA,
            else 0. `state`, `point` and the hooks look first, so that no checkpoint, costate or decision
            comes from numbers that are not finite; before using the model itself call ``watch.look()``.
        notice: called with what a method does between epochs: ``"save"`` or ``"reload"`` and the name of the
            copy, ``"set"`` and the name of the memory that it assigned, ``"moved"`` and the name of what it
            wrote to in place.
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
    look_every: int | None = None
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
        with exclusive(self.model), in_mode(self.model, True):  # some networks freeze layers in `train`
            self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
            self.names = Names.of(self.model, self.parameters, self.statistics)
        if any(t.is_inference() for t in (*self.model.parameters(), *self.model.buffers())):
            raise ValueError(
                "the model was made under torch.inference_mode(), and its tensors cannot be trained: make it "
                "outside"
            )
        # Found once, as walking through the modules of a small network takes as long as running it.
        self._normalises = bool(self.statistics)
        self._nhwc = self.channels_last and is_convolutional(self.model)
        if not self.parameters:
            raise ValueError("the model has no parameters that require gradients: there is nothing to train")
        if hasattr(self.method, "check_ball"):
            self.method.check_ball(self.ball)
        self.sgd = self.optimizer.build(self.parameters)
        if self.look_every is None:
            self.look_every = 16 if self.device.type == "cuda" else 0
        self.watch = Watch(whole(self.look_every, "look_every", 0))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def statistics(self) -> list[Tensor]:
        """Running means and variances of all normalisation layers; part of the state."""
        return batchnorm.statistics(self.model)

    @property
    def momentum(self) -> list[Tensor]:
        """The optimiser's momentum buffers v, one per parameter; 0 before the first step, none for mu = 0."""
        if self.optimizer.momentum == 0:
            return []
        buffers = [self.sgd.state.get(p, {}).get("momentum_buffer") for p in self.parameters]
        return [
            torch.zeros_like(p) if v is None else v for p, v in zip(self.parameters, buffers, strict=True)
        ]

    @property
    def requests(self) -> Requests:
        """The object that computes the gradients that the method requests."""
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

        With several processes each works on its rows of the batch, and all reach the same state; `Step.spent`
        is the sum over the processes.

        With `look_every` > 0 the CPU waits for the device only where the method's control flow depends on
        values (FAT and Dynamic: which samples go on), where rows of samples or evaluations are gathered from
        several processes, in a closed loop, and in the look at every n-th step.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the message names epoch, batch and control. With
                `look_every` = n it is raised up to n - 1 steps later, or when the state is asked for.
        """
        before = self.meter.copy()
        losses: list[Tensor | float] = []
        dropped: set[str] = set()
        for group in self.sgd.param_groups:
            group["lr"] = rate
        ctx, requests = self.context(batch, rate, self.meter, self.memory), self.requests
        ctx.watch = self.watch
        for update, loss, gradients in requests.updates(ctx, batch, u):
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            with requests.shifted(update.shift, moves=True):
                self.sgd.step()
            self.sgd.zero_grad(set_to_none=True)
            losses.append(loss)
            dropped.update(update.dropped)
        self.memory.update({name: t.detach() for name, t in self.memory.items()})
        scatter(self.rows, batch.indices, ctx.rows, ctx.share)
        ctx.share.sync_buffers(self.model)
        mean = sum(losses) / len(losses)
        local = self.meter.since(before)
        spent = self._summed(local, ctx.share)
        self.meter.add(spent.since(local))
        self.watch.count()
        return Step(
            epoch=batch.epoch,
            batch=batch.number,
            control=u,
            rate=rate,
            samples=ctx.share.total,
            value=mean,
            spent=spent,
            dropped=tuple(sorted(dropped)),
            moves=len(losses),
        )

    def _summed(self, spent: Meter, share: Share) -> Meter:
        """The sum over all processes (all-reduce)."""
        if share.alone:
            return spent
        counts = share.sum(torch.tensor([spent.gradients, spent.forwards, spent.layers], device=self.device))
        return Meter(*map(int, counts))

    def field(self, batch: Batch, v: Control, rate: float = 0.0, meter: Meter | None = None) -> Field:
        """The field of one outer step under v, without taking it: see `fields.field`."""
        return fields.field(self, batch, v, rate, Meter() if meter is None else meter)

    def fields(
        self, batches: Sequence[Batch], u: Control, rate: float = 0.0, meter: Meter | None = None
    ) -> Iterator[list[Field]]:
        """`field` on all batches for every K = 1, ..., u["steps"]: see `fields.prefix_fields`."""
        return fields.prefix_fields(self, batches, u, rate, Meter() if meter is None else meter)

    def state(self) -> State:
        """The state z itself: the driver's own tensors, not copies.

        Raises:
            NonFiniteError: a step since the last look had a loss or gradient that is not finite.
        """
        self.watch.look()
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
        """The differentiable part of the state that a step on some samples acts on: a vector.

        Tensors are the driver's own, except rows, which are gathered, and the momentum buffers before the
        first step, which are 0.

        Args:
            index: (N,) positions of the samples of a batch.
        """
        self.watch.look()
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
            touched: (N,) positions of the samples whose rows are copied, if others will not change; by
                default all.
        """
        z = self.state()
        if touched is None:
            return z.copy()
        part = z.at(touched)  # rows that are gathered are copies already
        return replace(replace(part, rows={}).copy(), rows=part.rows)

    def restore(self, z: State) -> None:
        """Set the state to z: a snapshot, a state from a checkpoint, or a sum of states; z is copied.

        Rows of samples that z does not contain stay as they are.
        """
        self.restore_network(z)
        self.memory = {name: t.clone() for name, t in z.memory.items()}
        self.rows = z.with_rows(self.rows)
        self.kept, self.stopped = dict(z.kept), z.stopped
        self.controller_memory = copy.deepcopy(z.controller)
        self.watch.look()

    def restore_network(self, z: State) -> None:
        """Set the network and the optimiser to those of z, and nothing else."""
        put_back(self.model, self.sgd, self.parameters, self.names, z)

    def context(self, batch: Batch, rate: float, meter: Meter, memory: dict[str, Tensor]) -> Context:
        """The context of a method in the step on a batch.

        Args:
            batch: of the step.
            rate: its learning rate.
            meter: counts the evaluations.
            memory: tensors that the method carries; it may assign new ones.
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

    def start_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Call the method's hook before the first step of an epoch, if it has one."""
        call_hook(self, spec, epoch, "start")

    def end_epoch(self, spec: RunSpec, epoch: int) -> None:
        """Call the method's hook after the last step of an epoch, if it has one.

        Raises:
            NonFiniteError: as `state`.
        """
        self.watch.look()
        call_hook(self, spec, epoch, "end")

    def fingerprint(self) -> list[Tensor]:
        """Sums over the state z: processes compare them to check that they hold the same state."""
        return self.state().fingerprint()

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Float32 inside the block, for analysis: no mixed precision, and no TF32 on a GPU."""
        autocast, self.autocast = self.autocast, None
        try:
            with full_precision():
                yield
        finally:
            self.autocast = autocast

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """Parameters, buffers and training flags are restored after the block: for scoring controls."""
        return fields.restored(self.model, self.parameters)
