"""Perturbation sets X = {x : ||x - x0||_p <= eps} within the pixel box [0, 1].

A norm is a value: four functions of a batch. Everything else is the same for all norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from controlat.control import number

__all__ = ["NORMS", "Ball", "Norm"]

_TINY = 1e-10  # keeps 0/0 out of normalised gradients, as torchattacks does


def _per_sample(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.dim() - 1))


def _length(x: Tensor) -> Tensor:
    return _per_sample(x.flatten(1).norm(dim=1), x)


@dataclass(frozen=True)
class Norm:
    """One norm: how to draw in its ball, ascend, project on it, and measure a gradient.

    Args:
        draw: (like, eps, generator) -> a random perturbation of norm at most eps.
        direction: gradient -> the unit step of steepest ascent.
        shrink: (perturbation, eps) -> its projection on the ball.
        size: perturbation -> its norm, per sample, shape (N,).
        dual: gradient -> its dual norm, per sample, shape (N,).
    """

    draw: Callable[[Tensor, float, torch.Generator | None], Tensor]
    direction: Callable[[Tensor], Tensor]
    shrink: Callable[[Tensor, float], Tensor]
    size: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def _draw_linf(like: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).uniform_(-eps, eps, generator=generator)


def _sign(g: Tensor) -> Tensor:
    """sign(g), NaN where g is not finite: torch has sign(nan) = 0, which would pass for a flat network."""
    return g.sign() + 0 * g


def _draw_l2(like: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    delta = torch.empty_like(like).normal_(generator=generator)
    length = _length(delta)
    radius = torch.zeros_like(length).uniform_(0, 1, generator=generator)
    return delta * (radius / length * eps)


def _shrink_l2(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _length(delta).clamp_min(_TINY)).clamp_max(1.0)


NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "linf": Norm(
            draw=_draw_linf,
            direction=_sign,
            shrink=lambda delta, eps: delta.clamp(-eps, eps),
            size=lambda delta: delta.flatten(1).abs().amax(1),
            dual=lambda g: g.flatten(1).abs().sum(1),
        ),
        "l2": Norm(
            draw=_draw_l2,
            direction=lambda g: g / (_length(g) + _TINY),
            shrink=_shrink_l2,
            size=lambda delta: delta.flatten(1).norm(dim=1),
            dual=lambda g: g.flatten(1).norm(dim=1),
        ),
    }
)


@dataclass(frozen=True)
class Ball:
    """The set of admissible inputs around x0: ||x - x0|| <= eps and 0 <= x <= 1.

    Projection shrinks the perturbation, then clamps to [0, 1]. As x0 lies in the box, clamping never
    lengthens a perturbation, so the result lies in both sets (for l_inf it is the exact projection).

    Args:
        eps: radius, in pixel units of [0, 1]; a number or a text such as ``"8/255"``.
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: eps is negative or not finite, or the norm is unknown.

    >>> import torch
    >>> ball = Ball("8/255")
    >>> x0 = torch.full((1, 1, 2, 2), 0.5)
    >>> float((ball.project(x0 + 1, x0) - x0).max()) <= 8 / 255 + 1e-7
    True
    """

    eps: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", number(self.eps, "eps"))
        if self.eps < 0:
            raise ValueError(f"eps must be >= 0, got {self.eps:g}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")

    @property
    def _norm(self) -> Norm:
        return NORMS[self.norm]

    def start(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the set: uniform in the l_inf ball; uniform direction and length for l_2.

        The numbers are drawn in one call of the shape of x0, as torchattacks draws them.
        """
        return (x0 + self._norm.draw(x0, self.eps, generator)).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent: sign(g) for l_inf, g over its length for l_2."""
        return self._norm.direction(gradient)

    def shrink(self, delta: Tensor) -> Tensor:
        """The nearest perturbation with ||delta|| <= eps, whatever the pixel box."""
        return self._norm.shrink(delta, self.eps)

    def noise(self, like: Tensor, generator: torch.Generator | None = None, radius: float = 1.0) -> Tensor:
        """A random perturbation of norm at most radius * eps, whatever the pixel box."""
        return self._norm.draw(like, radius * self.eps, generator)

    def step(self, x: Tensor, gradient: Tensor, alpha: float, x0: Tensor) -> Tensor:
        """One step of projected steepest ascent, Pi(x + alpha direction(gradient))."""
        return self.project(x + alpha * self.direction(gradient), x0)

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """The admissible point for x (see the class)."""
        return (x0 + self._norm.shrink(x - x0, self.eps)).clamp_(0, 1)

    def bounds(self, x0: Tensor | None = None) -> tuple[Tensor | float, Tensor | float]:
        """Smallest and largest perturbation of a pixel: +-eps for l_inf, and around x0 what [0, 1] allows."""
        eps = self.eps if self.norm == "linf" else math.inf
        return (-eps, eps) if x0 is None else ((-x0).clamp_min(-eps), (1 - x0).clamp_max(eps))

    def box(self, x: Tensor) -> Tensor:
        """The nearest point of the pixel box [0, 1]."""
        return x.clamp(0, 1)

    def support(self, gradient: Tensor) -> Tensor:
        """max of <d, gradient> over ||d|| <= eps: eps times the dual norm, per sample, shape (N,)."""
        return self.eps * self._norm.dual(gradient)

    def distance(self, x: Tensor, x0: Tensor) -> Tensor:
        """||x - x0|| per sample, shape (N,)."""
        return self._norm.size(x - x0)
