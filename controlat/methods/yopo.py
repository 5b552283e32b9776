"""YOPO, you only propagate once: full passes for the costate, first-layer passes for the attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from controlat._util.checks import instance
from controlat.attacks.pgd import ALPHA
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods._base import Batch, Context, Update, Updates
from controlat.methods._inner import smooth_steps
from controlat.methods._options import check_choice
from controlat.models.frozen.hook import LayerHook, first_layer

__all__ = ["METHOD", "Yopo"]

PASSES = Knob("integer", 1, meaning="full propagations m of each batch")
INNER = Knob("integer", 0, default=1, meaning="steps n on the first layer for each of them")


@dataclass(frozen=True)
class Yopo:
    """YOPO-m-n: one update by the gradients of m full passes; between them, n steps of the first layer each.

    With f_0 the first layer, for j = 1..m: the gradient of l(x + eta) in theta is added to the update, and
    its gradient in the output of f_0, the costate p, is kept; then n times eta' = Pi(eta + alpha
    direction(grad_eta <f_0(x + eta), p>)). The gradient in the parameters of f_0 is that of the full pass
    ("direct"), that of <f_0(x + eta'), p> with p constant ("hamiltonian"), or their sum.

    Args:
        first_layer_grad: ``"both"`` (the released code; the paper does not say), ``"direct"`` or
            ``"hamiltonian"``.
        gradients: ``"mean"`` over the m passes, so that the learning rate keeps its meaning when m is
            annealed, or ``"sum"``: then divide the learning rate by m, as in the released configurations.
        layer: dotted name of the module where f_0 ends; the first one with parameters by default. If f_0 is
            linear, n steps of size alpha are one step of size n alpha: the paper's MNIST setting ends f_0 at
            the ReLU after the first convolution.

    Raises:
        ValueError: an option is not allowed.

    Source:
        Zhang et al. (2019), algorithm 1 (You Only Propagate Once).
    """

    first_layer_grad: str = "both"
    gradients: str = "mean"
    layer: str | None = None

    def __post_init__(self) -> None:
        check_choice(self, "first_layer_grad", ("both", "direct", "hamiltonian"))
        check_choice(self, "gradients", ("mean", "sum"))
        if self.layer is not None:
            instance(self.layer, (str, int), "layer", "the dotted name of a module")
            object.__setattr__(self, "layer", str(self.layer))  # names may be numbers, such as 0

    @property
    def controls(self) -> ControlSpace:
        """(alpha, m, n), at m gradient evaluations; the passes of the first layer are counted apart."""
        return ControlSpace({"alpha": ALPHA, "steps": PASSES, "inner": INNER}, cost=lambda u: u["steps"])

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """m full passes, whose gradients are added, and one update."""
        x, y, m = batch.x, batch.y, int(u["steps"])
        layer = first_layer(ctx.model, self.layer)
        weight = 1 / m if self.gradients == "mean" else 1.0
        eta = ctx.noise(x)
        cut = self.first_layer_grad == "hamiltonian"
        for j in range(m):
            last = j == m - 1
            hook = LayerHook(layer, cut=cut)

            def loss(eta: Tensor = eta, hook: LayerHook = hook) -> Tensor:
                with hook:
                    logits = ctx.logits(x + eta)
                return weight * F.cross_entropy(logits, y)

            (p,) = yield Update(
                loss,
                also=lambda hook=hook: (hook.output,),  # type: ignore[misc]
                move=last and self.first_layer_grad == "direct",
                dropped=(*smooth_steps(ctx, u), *(("the input of the later layers",) if cut else ())),
            )
            if last and self.first_layer_grad == "direct":
                return
            per_sample = len(x) / weight * p  # costate of each sample's own loss
            eta = self._inner(ctx, batch, u, eta, per_sample)
            if self.first_layer_grad != "direct":

                def hamiltonian(eta: Tensor = eta, p: Tensor = p) -> Tensor:
                    value = (ctx.layer((x + eta).clamp(0, 1), layer) * p).sum()
                    return value - value.detach()  # its value is 0: it is not part of the reported loss

                yield Update(hamiltonian, smooth_steps(ctx, u), move=last)

    def _inner(self, ctx: Context, batch: Batch, u: Control, eta: Tensor, p: Tensor) -> Tensor:
        """n steps of ascent on <f_0(x + eta), p>, projected on the ball, then on the pixels."""
        layer = first_layer(ctx.model, self.layer)
        with ctx.view("train") as view:
            for _ in range(int(u["inner"])):
                point = batch.x + eta
                inside = (point >= 0) & (point <= 1)  # outside [0, 1] the clamp has derivative 0
                gradient = inside * view.layer_gradient(view.prepare(point.clamp(0, 1)), layer, p)
                eta = ctx.ball.project(point + u["alpha"] * ctx.ball.direction(gradient), batch.x) - batch.x
        return eta


METHOD = Yopo
