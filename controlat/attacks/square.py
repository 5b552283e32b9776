"""Square, a black-box attack: random search that uses logits only, and no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.attacks.losses import margin
from controlat.models.frozen.view import FrozenModel

__all__ = ["square"]

_AREA = 0.8  # share of the image that the first squares cover
_HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    view: FrozenModel, x0: Tensor, y: Tensor, *, ball: Ball, queries: int, generator: torch.Generator
) -> Tensor:
    """Set random squares of each image to x0 +- eps, and keep those changes that lower the margin.

    The start has vertical stripes of x0 +- eps. Each query sets one square to x0 +- eps, with a random sign
    per sample and channel (l_2: adds +- eps, and projects the whole perturbation). Squares cover 0.8 of the
    image at first, and half as much after 10, 50, 200, 500, 1000, ... queries each. Misclassified samples are
    not queried further.

    Args:
        view: the network.
        x0: (N, C, H, W) clean inputs; other inputs (N, ...) are flattened to one row of pixels.
        y: (N,) labels.
        ball: the perturbation set.
        queries: forward passes per sample, at most.
        generator: of the signs and places, on the device of x0.

    Returns:
        For each sample the queried input with the lowest margin z_y - max_{j != y} z_j.

    Source:
        Andriushchenko et al. (2020), algorithms 1 and 2, in its l_inf form for every norm.
    """
    shape = x0.shape
    x0 = x0 if x0.dim() == 4 else x0.reshape(len(x0), 1, 1, -1)
    height, width = x0.shape[2:]

    def signs(n: int, *size: int) -> Tensor:
        coin = torch.randint(2, (n, x0.shape[1], *size), generator=generator, device=x0.device)
        return ball.eps * (2.0 * coin.to(x0.dtype) - 1)

    def label_margin(x: Tensor, labels: Tensor) -> Tensor:
        return -margin(view(x.reshape(len(x), *shape[1:])), labels)

    best = ball.project(x0 + signs(len(x0), 1, width), x0)
    value = label_margin(best, y)
    for query in range(1, queries):
        active = (value > 0).nonzero().squeeze(1)
        if len(active) == 0:
            break
        area = _AREA / 2 ** sum(query > at for at in _HALVED_AT) * height * width
        rows, columns = (min(max(round(area**0.5), 1), side) for side in (height, width))
        top, first = (
            int(torch.randint(side - extent + 1, (1,), generator=generator, device=x0.device))
            for side, extent in ((height, rows), (width, columns))
        )
        window = (..., slice(top, top + rows), slice(first, first + columns))
        candidate, origin = best[active], x0[active]
        base = origin if ball.norm == "linf" else candidate
        candidate[window] = base[window] + signs(len(active), 1, 1)
        candidate = ball.project(candidate, origin)
        margins = label_margin(candidate, y[active])
        better = margins < value[active]
        best[active[better]], value[active[better]] = candidate[better], margins[better]
    return best.reshape(shape)
