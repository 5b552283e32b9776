"""Transfer attacks: adversarial examples of an independently trained surrogate, applied to the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.precision import full_precision
from controlat._util.rng import generator
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.models.frozen.logits import check_model
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.attack import Attack, read_attacks
from controlat.robust_accuracy.robust import DEFAULT_ATTACKS, correct_mask
from controlat.robust_accuracy.source import Source, batches, check_arguments

__all__ = ["Transfer", "same_weights", "transfer"]


@dataclass(frozen=True)
class Transfer:
    """The outcome of transfer attacks.

    Args:
        clean: accuracy of the network without an attack.
        surrogate: accuracy of the surrogate without an attack.
        after: accuracy of the network under each attack alone, by its name (FOSC's table).
        robust: accuracy under all attacks together.
        spent: evaluations of the surrogate (gradients) and of both (forwards), in samples.
        seconds: wall time.
        survived: (N,) mask of the samples that survived all attacks.
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
    """Whether two networks are the same object or have equal parameters."""
    check_model(a)
    check_model(b)
    of_a, of_b = list(a.parameters()), list(b.parameters())
    pairs = list(zip(of_a, of_b, strict=False)) if len(of_a) == len(of_b) else []
    equal = [p.shape == q.shape and torch.equal(p, q.to(p)) for p, q in pairs]
    return a is b or (bool(equal) and all(equal))


def check_surrogate(model: nn.Module, surrogate: nn.Module) -> None:
    """Raise ValueError if the surrogate is the network itself: that would be a white-box attack."""
    if same_weights(model, surrogate):
        raise ValueError("the surrogate has the weights of the network itself; train it with another seed")


@full_precision()
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
        model: the network to be evaluated.
        surrogate: a network trained independently: other initial weights, order of samples and random
            starts; in FOSC's protocol by PGD-10 with alpha = eps/4.
        source: the test points.
        ball: the perturbation set.
        attacks: run on the surrogate; all restarts of an attack are applied to the network.
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
    batch_size, seed = check_arguments(source, ball, batch_size, seed, progress)
    start_time, meter = time.perf_counter(), Meter()
    options: dict[str, Any] = {"channels_last": channels_last, "meter": meter}
    with FrozenModel(model, **options) as view, FrozenModel(surrogate, **options) as other:
        clean, surrogate_clean = (correct_mask(v, source, batch_size) for v in (view, other))
        survived, after = clean.clone(), {}
        for attack in read_attacks(attacks):
            survived_attack = clean.clone()
            for restart in range(attack.restarts):
                for index, x, y in batches(source, clean.nonzero().squeeze(1), batch_size):
                    start = generator(seed, "transfer", attack.name, restart, int(index[0]), device=x.device)
                    adversarial = attack.perturb(other, x, y, ball, start)
                    survived_attack[index] &= (view(adversarial).argmax(1) == y).cpu()
                    if progress is not None:
                        progress(len(index), f"transfer, {attack.name}")
            after[attack.name] = Accuracy.of(survived_attack)
            survived &= survived_attack
    return Transfer(
        clean=Accuracy.of(clean),
        surrogate=Accuracy.of(surrogate_clean),
        after=after,
        robust=Accuracy.of(survived),
        spent=meter,
        seconds=time.perf_counter() - start_time,
        survived=survived,
    )
