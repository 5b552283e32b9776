"""Networks as users have them, in float64 for images (1, 4, 4)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from helpers import CLASSES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlat._util import rng


class Aliased(nn.Module):
    """One module under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.head = self.body[-1]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body[:-1](x))
        return out


class Twice(nn.Module):
    """A layer and a BatchNorm that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        layer, norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.layers = nn.Sequential(nn.Flatten(), layer, norm, nn.Tanh(), layer, norm)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layers(x))
        return out


class Tied(nn.Module):
    """Two modules with one Parameter, and two with one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.down.weight = self.up.weight
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        self.norms[1].running_mean = self.norms[0].running_mean
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.up(x.flatten(1))).tanh()
        out: Tensor = self.out(self.norms[1](self.down(h)))
        return out


class LowRank(nn.Linear):
    """W + B A, added up in eval mode and taken apart again in training mode, as LoRA layers do."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.randn(outputs, rank))
        self.merged = False

    def train(self, mode: bool = True) -> "LowRank":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.a.T @ self.b.T


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass, unless told otherwise."""

    again = True

    def __init__(self) -> None:
        super().__init__()
        block = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
        self.blocks = nn.ModuleList([nn.Sequential(*block), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        out: Tensor = self.out(x)
        return out


class Frozen(nn.Module):
    """A first part that stays in eval mode and is not trained, whatever mode the network is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.out = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.stem.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.stem(x))
        return out


class Rebuilt(nn.Module):
    """Eval mode runs on another Parameter and without the branch that training has, as RepVGG deploys."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.out = nn.Linear(8, CLASSES)
        self.deployed = False

    def train(self, mode: bool = True) -> "Rebuilt":
        super().train(mode)
        if not mode and not self.deployed:
            self.kept = [self.one.weight, self.two]
            self.one.weight = nn.Parameter((self.one.weight + self.two.weight).detach())
            del self.two
            self.deployed = True
        elif mode and self.deployed:
            self.one.weight, self.two = self.kept
            self.deployed = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = self.one(x) if self.deployed else self.one(x) + self.two(x)
        out: Tensor = self.out(h.tanh())
        return out


class Replacing(nn.Module):
    """A buffer that is another tensor after every pass, one that comes with the first, and a hook."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("last", None)
        self.net = nn.Sequential(nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, CLASSES))
        self.net[0].register_forward_hook(lambda m, arguments, output: 1.5 * output)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = x.detach().mean(0)
        out: Tensor = self.net(x - self.mean)
        return out


class Rows(nn.Module):
    """A recurrent network over the rows of an image: its weights are in a list of its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cell(x.squeeze(1))[0][:, -1])
        return out


class Flattening(nn.Module):
    """Takes for granted that images lie in memory as (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).tanh()
        out: Tensor = self.out(h.view(len(h), -1))
        return out


def low_rank() -> nn.Module:
    return nn.Sequential(nn.Flatten(), LowRank(16, 8), nn.Softplus(), LowRank(8, CLASSES))


def mixed() -> nn.Module:
    """A network in training mode with a BatchNorm in eval mode, and the other way round."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, CLASSES),
    )
    net[1].eval()
    net[3].training = False
    net[4].weight.requires_grad_(False)
    return net


def parametrized() -> nn.Module:
    """A weight that is computed from others, and one with a mask."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    last = nn.Linear(8, CLASSES)
    nn.utils.prune.random_unstructured(last, "weight", amount=3)  # type: ignore[no-untyped-call]
    return nn.Sequential(nn.Flatten(), first, nn.Softplus(), last)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "aliased": Aliased,
    "twice": Twice,
    "tied": Tied,
    "low rank": low_rank,
    "checkpointed": Checkpointed,
    "frozen": Frozen,
    "rebuilt": Rebuilt,
    "mixed": mixed,
    "replacing": Replacing,
    "parametrized": parametrized,
    "recurrent": Rows,
    "data parallel": lambda: nn.DataParallel(Twice()),
}


def awkward(kind: str, seed: int = 0) -> nn.Module:
    """A network of one kind, with buffers and gradients that are not those of the beginning."""
    with rng.scoped(seed, "awkward", kind):
        net = KINDS[kind]().double()
        for b in net.buffers():
            if b.is_floating_point() and not bool(((b == 0) | (b == 1)).all() and b.dim() == 2):
                b.copy_(0.5 + 0.1 * torch.rand_like(b))
        for p in net.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
    return net


def held(net: nn.Module, versions: bool = True) -> dict[str, Any]:
    """Everything that a network holds, by every name: the very objects, their bits and their flags.

    With `versions`, also how often they were written to: where that changes, a graph made before is no good.
    """
    found: dict[str, Any] = {}
    for name, m in net.named_modules(remove_duplicate=False):
        found[name] = [id(m), m.training, [*m._modules.keys()], getattr(m, "merged", None)]
        for key, t in [*m._parameters.items(), *m._buffers.items()]:
            what = None
            if t is not None:
                what = [id(t), t.detach().clone(), t.requires_grad, t.stride(), t._version * versions]
            grad = None if t is None or t.grad is None else [id(t.grad), t.grad.clone()]
            found[f"{name}.{key}"] = [what, grad]
    return found
