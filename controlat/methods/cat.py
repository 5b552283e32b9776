"""CAT, curriculum adversarial training: attacks grow stronger when the network has learnt to resist them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from controlat._util.parallel import Share
from controlat.attacks.pgd import ascend
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import (
    Batch,
    Context,
    Epoch,
    Update,
    Updates,
)
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice, check_flag, check_number, check_whole
from controlat.models.frozen.view import FrozenModel

__all__ = ["METHOD", "Cat"]

STRENGTH = Knob("integer", 0, meaning="strength k that the curriculum may reach, in steps of the attack")


@dataclass(frozen=True)
class Cat:
    """The batch in k + 1 parts, part j attacked by PGD-j; k grows by one when validation stops improving.

    Step sizes are (2 eps / j) r with r drawn between 1 and 10/j for every part of every batch; a batch of
    less than k + 1 samples goes to PGD-k. After each epoch the accuracy on held-out samples under PGD-k of
    step size 2 eps / k is looked at (with mixing, inputs rounded to 16 levels); if it has not improved for
    `patience` epochs and training accuracy is above `ready`, the best network at this strength is put back
    and k grows. At the largest k training goes on. Without held-out samples, k grows when training accuracy
    is above `expected`.

    Args:
        mixing: attack parts of the batch with all strengths up to k, or all of it with k.
        curriculum: grow k from 0; if false, k is the control itself (a schedule can then be given).
        patience: epochs without a better validation accuracy.
        ready: training accuracy that is needed to move on (in the released code).
        expected: training accuracy that is enough without held-out samples.
        levels: to how many levels validation inputs are rounded after the attack; 0 for no rounding.
        attack_mode: ``"auto"``: train with mixing, eval without, as released; or one of the two. A single
            sample is always attacked in mode eval.

    Raises:
        ValueError: an option is not allowed.

    Source:
        Cai et al. (2018), with batch mixing and quantization.
    """

    mixing: bool = True
    curriculum: bool = True
    patience: int = 10
    ready: float = 0.9
    expected: float = 0.95
    levels: int = 16
    attack_mode: str = "auto"

    def __post_init__(self) -> None:
        check_flag(self, "mixing")
        check_flag(self, "curriculum")
        check_whole(self, "patience", 1)
        check_number(self, "ready", 0.0, 1.0)
        check_number(self, "expected", 0.0, 1.0)
        check_whole(self, "levels", 0)
        if self.levels == 1:
            raise ValueError("levels must be at least 2, or 0 for no rounding, got 1")
        check_choice(self, "attack_mode", ("auto", "train", "eval"))

    @property
    def controls(self) -> ControlSpace:
        """k, at k/2 + 1 gradient evaluations with mixing, k + 1 without.

        While the curriculum is below k it costs less; where k + 1 does not divide the batch, mixing costs
        more, as the last and strongest part is the largest: up to k + 1.
        """
        return ControlSpace(
            {"steps": STRENGTH}, cost=lambda u: 1 + (u["steps"] / 2 if self.mixing else u["steps"])
        )

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the batch, attacked in parts."""
        x, y, k = batch.x, batch.y, self._strength(ctx.memory, u)
        draw = ctx.generator("size")
        mode = ("train" if self.mixing else "eval") if self.attack_mode == "auto" else self.attack_mode
        start = ctx.start(x)
        parts = self._parts(ctx.share, k)
        x_adv = torch.cat([self._attack(ctx, mode, x[p], start[p], y[p], j, draw) for j, p in parts])

        def loss() -> Tensor:
            logits = ctx.logits(x_adv)
            right = ctx.sum((logits.detach().argmax(1) == y).sum())
            ctx.memory["right"] = ctx.memory.get("right", torch.zeros_like(right)) + right
            ctx.memory["count"] = ctx.memory.get("count", torch.zeros_like(right)) + ctx.share.total
            return F.cross_entropy(logits, y)

        yield Update(loss, smooth_steps(ctx, Control(steps=k)))

    def _strength(self, memory: dict[str, Tensor], u: Control) -> int:
        return min(int(memory.get("strength", 0)), int(u["steps"])) if self.curriculum else int(u["steps"])

    def _parts(self, share: Share, k: int) -> list[tuple[int, slice]]:
        """(strength, which rows here) of each part of the whole batch; the last one takes the remainder."""
        here = share.rows
        if not self.mixing:
            return [(k, slice(0, here.stop - here.start))]
        size = share.total // (k + 1)
        edges = [*(j * size for j in range(k + 1)), share.total]
        inside = [min(max(e, here.start), here.stop) - here.start for e in edges]
        return [(j, slice(*ends)) for j, ends in enumerate(pairwise(inside))]

    def _attack(
        self, ctx: Context, mode: str, x: Tensor, start: Tensor, y: Tensor, k: int, draw: torch.Generator
    ) -> Tensor:
        r = float(torch.rand(1, generator=draw))
        if k == 0 or len(x) == 0:
            return x
        alpha = 2 * ctx.ball.eps / k * (1 + r * (10 / k - 1))
        with ctx.view(mode if len(x) > 1 else "eval") as view:
            return ascend(view, x, y, ball=ctx.ball, alpha=alpha, steps=k, start=start)

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        """Look at validation accuracy, and grow k where the network is ready."""
        memory = ctx.memory
        accuracy = float(memory["right"] / memory["count"])
        memory["right"], memory["count"] = (
            torch.zeros_like(memory["right"]),
            torch.zeros_like(memory["count"]),
        )
        if not self.curriculum:
            return
        k = self._strength(memory, u)
        if ctx.held_out is None:
            grow = accuracy > self.expected
        else:
            right, best = self._validate(ctx, k), int(memory.get("best", torch.tensor(-1)))
            waited = int(memory.get("waited", torch.tensor(0))) + 1
            if right > best:
                waited, best = 0, right
                ctx.save("best")
            grow = waited >= self.patience and accuracy > self.ready
            if grow and k < int(u["steps"]):
                ctx.reload("best")
                best, waited = self._validate(ctx, k + 1), 0
                ctx.save("best")
            memory["best"], memory["waited"] = torch.tensor(best), torch.tensor(waited)
        if grow and k < int(u["steps"]):
            memory["strength"] = torch.tensor(k + 1)

    def _validate(self, ctx: Epoch, k: int) -> int:
        """How many held-out samples are right at strength k, inputs rounded."""
        right = 0
        with FrozenModel(ctx.model, "eval", meter=ctx.meter, channels_last=ctx.channels_last) as view:
            for i, (x, y) in enumerate(ctx.batches()):
                if k > 0:
                    alpha, start = 2 * ctx.ball.eps / k, ctx.generator(f"validation {i}", x.device)
                    x = ascend(view, x, y, ball=ctx.ball, alpha=alpha, steps=k, generator=start)
                if k > 0 and self.levels and self.mixing:
                    x = (x * (self.levels - 1)).round() / (self.levels - 1)
                right += int((view(x).argmax(1) == y).sum())
        return right


METHOD = Cat
