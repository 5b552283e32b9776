"""Black-box attacks by transfer: made on an independently trained surrogate, tried on the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.models.frozen.logits import check_model
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.attack import Attack, read_attacks
from controlat.robust_accuracy.robust import DEFAULT_ATTACKS, correct
from controlat.robust_accuracy.source import Source, checked, parts

__all__ = ["Transfer", "same_weights", "transfer"]


@dataclass(frozen=True)
class Transfer:
    """The outcome of transfer attacks.

    Args:
        clean: accuracy of the network without an attack.
        surrogate: accuracy of the surrogate without an attack.
        after: accuracy of the network under each attack alone, by its name (FOSC's table).
        robust: accuracy under all of them.
        spent: evaluations of the surrogate (gradients) and of both (forwards), in samples.
        seconds: wall time.
        survived: (N,) mask of the samples that survived all.
    """

    clean: Accuracy
    surrogate: Accuracy
    after: dict[str, Accuracy]
    robust: Accuracy
    spent: Meter
    seconds: float
    survived: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "points": self.clean.points,
            "clean": self.clean.to_json(),
            "surrogate_clean": self.surrogate.to_json(),
            "after": {name: accuracy.to_json() for name, accuracy in self.after.items()},
            "robust": self.robust.to_json(),
            "gradients": self.spent.gradients,
            "forwards": self.spent.forwards,
            "seconds": self.seconds,
        }


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are one and the same, parameter by parameter."""
    check_model(a)
    check_model(b)
    one, two = list(a.parameters()), list(b.parameters())
    pairs = list(zip(one, two, strict=False)) if len(one) == len(two) else []
    equal = [p.shape == q.shape and torch.equal(p, q.to(p)) for p, q in pairs]
    return a is b or (bool(equal) and all(equal))


def check_surrogate(model: nn.Module, surrogate: nn.Module) -> None:
    """Raise ValueError if the surrogate is the network itself: that would be a white-box attack."""
    if same_weights(model, surrogate):
        raise ValueError("the surrogate has the weights of the network itself; train it with another seed")


def transfer(
    model: nn.Module,
    surrogate: nn.Module,
    source: Source,
    ball: Ball,
    *,
    attacks: Sequence[str | Attack] = DEFAULT_ATTACKS,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    channels_last: bool = True,
) -> Transfer:
    """Accuracy under adversarial examples of another network.

    Args:
        model: the network looked at.
        surrogate: a network trained independently: other initial weights, order of samples and random
            starts; in FOSC's protocol by PGD-10 with alpha = eps/4.
        source: the test points.
        ball: the perturbation set.
        attacks: made on the surrogate; of the restarts of an attack each is tried.
        batch_size: samples at a time.
        seed: of the random starts.
        progress: called with (samples done, name of the attack).
        channels_last: run convolutions of both in NHWC layout; False keeps the layout of the weights.

    Raises:
        ValueError: the surrogate is the network itself, or has no logit for some label.

    Source:
        Wang et al. (2019), section 5.2.
    """
    check_surrogate(model, surrogate)
    batch_size, seed = checked(source, ball, batch_size, seed, progress)
    began, meter = time.perf_counter(), Meter()
    chosen = read_attacks(attacks)
    how: dict[str, Any] = {"channels_last": channels_last, "meter": meter}
    with FrozenModel(model, **how) as view, FrozenModel(surrogate, **how) as other:
        clean, known = correct(view, source, batch_size), correct(other, source, batch_size)
        standing, after = clean.clone(), {}
        for attack in chosen:
            alone = clean.clone()
            for restart in range(attack.restarts):
                for part, x, y in parts(source, clean.nonzero().squeeze(1), batch_size):
                    start = generator(seed, "transfer", attack.name, restart, int(part[0]), device=x.device)
                    found = attack.perturb(other, x, y, ball, start)
                    alone[part] &= (view(found).argmax(1) == y).cpu()
                    if progress is not None:
                        progress(len(part), f"transfer, {attack.name}")
            after[attack.name] = Accuracy(int(alone.sum()), len(alone))
            standing &= alone
    first, second, last = (Accuracy(int(mask.sum()), len(mask)) for mask in (clean, known, standing))
    return Transfer(first, second, after, last, meter, time.perf_counter() - began, standing)
