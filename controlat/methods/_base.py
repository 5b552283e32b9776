"""The protocol of a method: a generator of parameter updates, run by the driver (`controlat.dynamics`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.control.space import Control, ControlSpace
from controlat.methods._context import Batch, Context, Epoch, Rows

__all__ = ["Batch", "Context", "Epoch", "Hooks", "Method", "Prefixes", "Rows", "Update", "Updates"]


class Update(NamedTuple):
    """A request to the driver: differentiate `loss`, and update theta unless `move` is false.

    The driver sends the gradients in the tensors of `also` to the generator that yielded the request:

        (gradient,) = yield Update(loss, also=lambda: (delta,))

    Args:
        loss: computes a scalar, the mean over the samples of the batch, from ``Context.logits``;
            differentiable in the parameters, with all piecewise constant quantities detached.
        dropped: names of smooth dependences on the state that were detached; results print them.
        also: called after `loss`; returns further tensors in which the loss is differentiated, by the same
            backward pass. With several processes gradients in parameters are those of the whole batch,
            gradients in other tensors those of the loss on this process's rows.
        add: whether the gradient in theta is added to the next update; if not, the request only returns
            gradients, and BatchNorm's running statistics are not changed.
        move: whether to update theta now, by the sum of the gradients added since its last update.
        shift: one tensor per parameter, added to it for the evaluation of `loss` and for the update, and
            subtracted afterwards (weight decay acts on the shifted parameters); None for none.
        rowwise: whether `loss` is a ``functools.partial`` of a function of tensors with one row per sample,
            which uses no other tensors but the network's, and whose course does not depend on their values.
            Where every update of `prefixes` is such, and its random numbers come from `Context.noise`,
            `normal` or `start`, small networks are given several controls and batches at once.
    """

    loss: Callable[[], Tensor]
    dropped: tuple[str, ...] = ()
    also: Callable[[], Sequence[Tensor]] | None = None
    add: bool = True
    move: bool = True
    shift: Sequence[Tensor] | None = None
    rowwise: bool = False


Updates: TypeAlias = Generator[Update, Sequence[Tensor], None]


@runtime_checkable
class Hooks(Protocol):
    """The optional hooks of a method; each may be left out."""

    def check_ball(self, ball: Ball) -> None:
        """Called before training; raises ValueError if the method does not support this perturbation set."""

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        """Called before the first step of an epoch, with the control of that step.

        A closed-loop controller computes that control from the state before this call.
        """

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        """Called after the last step of an epoch, with the control of its first step."""


class Method(Protocol):
    """An adversarial-training system: one file in ``controlat/methods``, or the user's own class."""

    @property
    def controls(self) -> ControlSpace:
        """The admissible set G of u."""

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One outer step S(z, u), as a generator of requests; the driver executes each one at its yield.

        The last request updates theta. No view may be open and no autograd graph be shared across a yield,
        and methods do not call backward. Tensors for the next step are assigned to ``ctx.memory``; tensors in
        it are not written to in place.
        """


@runtime_checkable
class Prefixes(Protocol):
    """A method whose ascent with K_max steps begins with that of every smaller K: scores all K at once."""

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        """Yield (control, its only update) for steps = 1, ..., u["steps"], from one inner trajectory.

        Each is equal to the update of `updates` under that control. theta is not updated in between.
        """
