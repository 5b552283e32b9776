"""A training system of your own: MART, with the weight of its divergence as a control that can be scheduled.

Run it as it is: python examples/own_method.py (half a minute at most, on the bundled digits). The commands
take it by its name from this folder, as they take any class that can be imported:

    controlat train --out run --method own_method:Mart --schedule pgd:steps=5,alpha=0.04,beta=1..6
"""

import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import controlat
from controlat._util.checks import number
from controlat.attacks.losses import divergence
from controlat.attacks.pgd import ALPHA, STEPS, ascend
from controlat.control.space import Control, ControlSpace, Knob
from controlat.data import load
from controlat.dynamics import verify
from controlat.dynamics.driver import Driver
from controlat.methods import Batch, Context, Update, Updates

BETA = Knob("real", 0.0, default=6.0, meaning="weight of the divergence")


@dataclass
class Mart:
    """min over theta of E BCE(h(x_K), y) + beta E (1 - p_y(x0)) KL(p(x0) || p(x_K)), x_K by K steps of PGD.

    BCE is the cross-entropy less log(1 - the largest probability of a wrong class). Samples that the network
    gets right for sure count little in the divergence; the weight is differentiated too.

    Args:
        start_noise: the ascent starts at x0 + start_noise N(0, 1).

    Source:
        Wang et al. (2020), Improving Adversarial Robustness Requires Revisiting Misclassified Examples; the
        constants are those of the released code.
    """

    start_noise: float = 0.001

    def __post_init__(self) -> None:
        self.start_noise = number(self.start_noise, "start_noise")
        if self.start_noise < 0:
            raise ValueError(f"start_noise must be >= 0, got {self.start_noise:g}")

    @property
    def controls(self) -> ControlSpace:
        """(alpha, K, beta), at K + 2 gradient evaluations."""
        return ControlSpace({"alpha": ALPHA, "steps": STEPS, "beta": BETA}, cost=lambda u: u["steps"] + 2)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        """One update on the clean batch and the one that K steps produced."""
        x, y, k = batch.x, batch.y, int(u["steps"])
        start = x + self.start_noise * ctx.normal(x)
        with ctx.view() as view:
            x_adv = ascend(view, x, y, ball=ctx.ball, alpha=u["alpha"], steps=k, start=start)

        def loss() -> Tensor:
            clean, moved = ctx.logits(x), ctx.logits(x_adv)
            wrong = moved.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
            boosted = F.cross_entropy(moved, y) - (1.0001 - wrong + 1e-12).log().mean()
            weight = 1.0000001 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
            price: Tensor = u["beta"] * (weight * divergence(moved, clean)).mean()
            return boosted + price

        # Signs are piecewise constant in theta; steps of l_2 are smooth, and x_adv is held fixed.
        yield Update(loss, () if ctx.ball.norm == "linf" else ("the adversary's (l_2 steps)",))


if __name__ == "__main__":
    x, y = load("digits").train.take(torch.arange(16))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    driver, batch = Driver(model, Mart(), controlat.Ball(0.15)), Batch(x.double(), y, torch.arange(16), 0, 0)
    u = Mart().controls.check({"alpha": 0.04, "steps": 5})
    found = verify(driver, batch, u, rate=0.1)
    print(f"derivative of one step: {found.share:.0e} from differences in {len(found.pairs)} directions")

    schedule = "pgd:steps=5,alpha=0.04,beta=1..6"
    with tempfile.TemporaryDirectory() as out:
        run = controlat.train(out, method="__main__:Mart", schedule=schedule, epochs=12, threads=1)
    for e in run["epochs"]:
        print(f"epoch {e['epoch']}: beta={e['control']['beta']:.2f}, loss={e['loss']:.3f}", end=", ")
        print(f"clean {e['clean']:.1%}, robust (PGD-10) {e['robust']:.1%}, on held-out samples")
