"""CAT, curriculum adversarial training: the attack gets stronger when the network resists the present one."""

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

    Step sizes are (2 eps / j) r with r drawn between 1 and 10/j for each part of each batch; in a batch of
    less than k + 1 samples all are attacked by PGD-k. After each epoch the accuracy on held-out samples under
    PGD-k with step size 2 eps / k is evaluated (with mixing, on inputs rounded to 16 levels). If it has not
    improved for `patience` epochs and the training accuracy is above `ready`, the best network at this
    strength is restored and k grows; at the largest k training continues. Without held-out samples k grows
    when the training accuracy is above `expected`.

    Args:
        mixing: attack the parts of a batch with all strengths up to k; if false, all of it with k.
        curriculum: grow k from 0; if false, k is the control itself (a schedule can then be given).
        patience: epochs without a better validation accuracy.
        ready: training accuracy above which k may grow (from the released code).
        expected: training accuracy above which k grows if there are no held-out samples.
        levels: number of levels that validation inputs are rounded to after the attack; 0 for no rounding.
        attack_mode: mode of BatchNorm and dropout in attacks: ``"train"``, ``"eval"``, or ``"auto"``: train
            with mixing, eval without, as in the released code. A single sample is attacked in mode eval.

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

        Less while the curriculum is below k. If k + 1 does not divide the batch size, mixing costs more, up
        to k + 1, as the last part, with the strongest attack, is the largest.
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
            correct = ctx.sum((logits.detach().argmax(1) == y).sum())
            ctx.memory["right"] = ctx.memory.get("right", torch.zeros_like(correct)) + correct
            ctx.memory["count"] = ctx.memory.get("count", torch.zeros_like(correct)) + ctx.share.total
            return F.cross_entropy(logits, y)

        yield Update(loss, smooth_steps(ctx, Control(steps=k)))

    def _strength(self, memory: dict[str, Tensor], u: Control) -> int:
        return min(int(memory.get("strength", 0)), int(u["steps"])) if self.curriculum else int(u["steps"])

    def _parts(self, share: Share, k: int) -> list[tuple[int, slice]]:
        """(strength, rows of this process) of each part of the whole batch; the last has the remainder."""
        local = share.rows
        if not self.mixing:
            return [(k, slice(0, local.stop - local.start))]
        size = share.total // (k + 1)
        edges = [*(j * size for j in range(k + 1)), share.total]
        local_edges = [min(max(e, local.start), local.stop) - local.start for e in edges]
        return [(j, slice(*ends)) for j, ends in enumerate(pairwise(local_edges))]

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
        """Evaluate the validation accuracy, and increase k if the conditions of the class are met."""
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
            correct, best = self._validate(ctx, k), int(memory.get("best", torch.tensor(-1)))
            waited = int(memory.get("waited", torch.tensor(0))) + 1
            if correct > best:
                waited, best = 0, correct
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
        """Number of held-out samples classified correctly under the attack of strength k."""
        correct = 0
        with FrozenModel(ctx.model, "eval", meter=ctx.meter, channels_last=ctx.channels_last) as view:
            for i, (x, y) in enumerate(ctx.batches()):
                if k > 0:
                    alpha, start = 2 * ctx.ball.eps / k, ctx.generator(f"validation {i}", x.device)
                    x = ascend(view, x, y, ball=ctx.ball, alpha=alpha, steps=k, generator=start)
                if k > 0 and self.levels and self.mixing:
                    x = (x * (self.levels - 1)).round() / (self.levels - 1)
                correct += int((view(x).argmax(1) == y).sum())
        return correct


METHOD = Cat
