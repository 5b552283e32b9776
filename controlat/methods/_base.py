"""The form of a method: a generator of parameter updates, run by the driver (`controlat.dynamics`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.control.space import Control, ControlSpace
from controlat.methods._context import Batch, Context, Epoch, Rows

__all__ = ["Batch", "Context", "Epoch", "Hooks", "Method", "Prefixes", "Rows", "Update", "Updates"]


class Update(NamedTuple):
    """A request to the driver: differentiate `loss`, and move theta unless told otherwise.

    The driver sends the gradients of the tensors in `also` back to the generator that yielded the request:

        (gradient,) = yield Update(loss, also=lambda: (delta,))

    Args:
        loss: a scalar, a mean over the samples of the batch, differentiable in the parameters, with
            everything piecewise constant frozen; built from ``Context.logits``.
        dropped: smooth dependences on the state that were detached, by name; results print them.
        also: called after `loss`; further tensors that the loss is differentiated in, by the same backward
            pass. With several processes gradients in parameters are those of the whole batch, gradients in
            other tensors those of the loss on this process's rows.
        add: whether the gradient in theta counts for the next move; if not, the request only looks, and
            BatchNorm's running statistics stay as they were.
        move: whether theta moves now, by the sum of the gradients added since it last moved.
        shift: what is added to each parameter while `loss` is evaluated and, where it moves, while it moves
            (weight decay sees the shifted parameters); None for nothing.
    """

    loss: Callable[[], Tensor]
    dropped: tuple[str, ...] = ()
    also: Callable[[], Sequence[Tensor]] | None = None
    add: bool = True
    move: bool = True
    shift: Sequence[Tensor] | None = None


Updates: TypeAlias = Generator[Update, Sequence[Tensor], None]


@runtime_checkable
class Hooks(Protocol):
    """A method with something to do before training, or at the beginning or end of an epoch.

    Each may be left out.
    """

    def check_ball(self, ball: Ball) -> None:
        """Called before anything is run; raises ValueError where the method is none for this ball."""

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        """Called before the first step of an epoch, with the control of that step.

        A closed loop decides that control at the state before this call.
        """

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        """Called after the last step of an epoch, with the control of its first step."""


class Method(Protocol):
    """An adversarial-training system: one file in ``controlat/methods``, or the user's own class."""

    @property
    def controls(self) -> ControlSpace:
        """The admissible set G of u."""

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One outer step S(z, u): after each yield the driver has done what the `Update` asks for.

        The last request moves theta. No view may be open and no gradient graph be shared across a yield;
        methods never call backward. What is carried to the next step is assigned to ``ctx.memory``, never
        written into its tensors.
        """


@runtime_checkable
class Prefixes(Protocol):
    """A method whose run at K_max passes through the step of every smaller K: offers the exact sweep."""

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        """Yield (control, its only update) for steps = 1, ..., u["steps"], from one trajectory.

        Each equals the update of `updates` under that control. theta does not move in between.
        """
