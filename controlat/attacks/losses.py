"""Per-sample losses of logits, for attacks and evaluations; values have shape (N,)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Loss", "cross_entropy", "divergence", "lead", "margin"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y, per sample."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, kappa: float = 0.0) -> Tensor:
    """-max(z_y - max_{j != y} z_j + kappa, 0), per sample: the loss of the C&W attack.

    It is 0, with gradient 0, once the logit of another class exceeds that of y by `kappa`.

    Args:
        logits: (N, C).
        y: (N,) labels.
        kappa: lead of another class at which the attack on a sample stops, in units of logits.

    Source:
        Carlini and Wagner (2017), objective f6, as used with l_inf PGD since Madry et al. (2018).

    >>> import torch
    >>> margin(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 0]))
    tensor([-2., -0.])
    """
    return -F.relu(kappa - lead(logits, y))


def lead(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, per sample: negative where the label wins.

    >>> import torch
    >>> lead(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 0]))
    tensor([-2.,  2.])
    """
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return other - logits.gather(1, y[:, None]).squeeze(1)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)), per sample.

    Args:
        logits: (N, C).
        target: (N, C) logits of the reference; the loss is differentiable in both.

    Source:
        Zhang et al. (2019), equation 5.

    >>> import torch
    >>> z = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    >>> divergence(z, z)
    tensor([0., 0.])
    """
    return F.kl_div(
        F.log_softmax(logits, 1), F.log_softmax(target, 1), reduction="none", log_target=True
    ).sum(1)


LOSSES: Mapping[str, Loss] = MappingProxyType({"cross_entropy": cross_entropy, "margin": lead})
