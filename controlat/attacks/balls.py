"""Perturbation sets X = {x : ||x - x0||_p <= eps} within the pixel box [0, 1].

A `Norm` is a value: five functions of a batch. Everything else is the same for all norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from controlat._util.checks import choice, number

__all__ = ["NORMS", "Ball", "Norm", "unit"]

# The diameter of [0, 1]^d; for l_2 that of d = 10^6, an upper bound until `Ball.check` is given the shape.
_DIAMETER = {"linf": 1.0, "l2": 1000.0}
_FAR = 4.0  # in units of eps: longer steps than twice the diameter 2 eps of the ball give a warning


def _per_sample(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.dim() - 1))


def _polar(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v / ||v||, ||v||) per sample, in l_2; the direction of 0 is 0, and non-finite entries give NaN.

    v is first scaled by its largest entry, as squares of entries below 1e-23 underflow in float32. The
    derivative of the direction is that of the quotient, and 0 where v is 0 or so small that 1 / ||v|| would
    nearly overflow.
    """
    v_float = v.to(torch.promote_types(v.dtype, torch.float32))
    largest = v_float.detach().flatten(1).abs().amax(1)
    scale = _per_sample(torch.where(largest == 0, 1.0, largest), v)
    scaled = v_float / scale
    length = _per_sample(torch.linalg.vector_norm(scaled.flatten(1), dim=1), v)
    direction = scaled / torch.where(length == 0, 1.0, length)
    limits = torch.finfo(v_float.dtype)
    smooth = _per_sample(largest >= limits.tiny / limits.eps, v)
    direction = torch.where(smooth, direction, direction.detach())
    return direction.to(v.dtype), (length * scale).flatten().to(v.dtype)


def unit(v: Tensor) -> Tensor:
    """v / ||v||_2 per sample, accurate for tiny v too; 0 for v = 0.

    >>> unit(torch.tensor([[3e-30, -4e-30], [0.0, 0.0]]))
    tensor([[ 0.6000, -0.8000],
            [ 0.0000,  0.0000]])
    """
    return _polar(v)[0]


@dataclass(frozen=True)
class Norm:
    """The functions of one norm that a perturbation set needs.

    Args:
        draw: (like, eps, generator) -> a random perturbation of norm at most eps.
        direction: gradient -> the unit step of steepest ascent, a new tensor.
        shrink: (perturbation, eps) -> its projection on the ball; it may overwrite the perturbation.
        size: perturbation -> its norm, per sample, shape (N,).
        dual: gradient -> its dual norm, per sample, shape (N,).
    """

    draw: Callable[[Tensor, float, torch.Generator | None], Tensor]
    direction: Callable[[Tensor], Tensor]
    shrink: Callable[[Tensor, float | Tensor], Tensor]
    size: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def _draw_linf(like: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).uniform_(-eps, eps, generator=generator)


def _sign(g: Tensor) -> Tensor:
    """sign(g), and NaN where g is not finite: torch has sign(nan) = 0, which looks like a zero gradient."""
    return g.sign().add_(g, alpha=0)


def _draw_l2(like: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    delta = torch.empty_like(like).normal_(generator=generator)
    radius = _per_sample(like.new_empty(len(like)).uniform_(0, 1, generator=generator), like)
    return unit(delta) * (radius * eps)


def _shrink_linf(delta: Tensor, eps: float | Tensor) -> Tensor:
    return delta.clamp_(-eps, eps)  # type: ignore[arg-type]  # two numbers or two tensors


def _shrink_l2(delta: Tensor, eps: float | Tensor) -> Tensor:
    direction, length = _polar(delta)
    inside = _per_sample(length <= eps, delta)  # false for NaN
    return torch.where(inside, delta, eps * direction)


NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "linf": Norm(
            draw=_draw_linf,
            direction=_sign,
            shrink=_shrink_linf,
            size=lambda delta: delta.flatten(1).abs().amax(1),
            dual=lambda g: g.flatten(1).abs().sum(1),
        ),
        "l2": Norm(
            draw=_draw_l2,
            direction=unit,
            shrink=_shrink_l2,
            size=lambda delta: _polar(delta)[1],
            dual=lambda g: _polar(g)[1],
        ),
    }
)


@dataclass(frozen=True)
class Ball:
    """The set of admissible inputs around x0: ||x - x0|| <= eps and 0 <= x <= 1.

    `project` first shrinks the perturbation to the ball, then clamps to [0, 1]. As x0 lies in the box,
    clamping does not lengthen a perturbation, so that the result lies in both sets; for l_inf it is the exact
    projection.

    Args:
        eps: radius, in pixel units of [0, 1]; a number or a text such as ``"8/255"``. At most the diameter of
            the box: 1 for l_inf, sqrt(d) for l_2 and inputs of d numbers (1000 at most).
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: eps is negative, not finite or beyond the box, or the norm is unknown.

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
        choice(self.norm, "norm", NORMS)
        if self.eps < 0:
            raise ValueError(f"eps must be >= 0, got {self.eps:g}")
        self._check_diameter(_DIAMETER[self.norm])

    def _check_diameter(self, diameter: float) -> None:
        if self.eps > diameter * (1 + 1e-6):
            meant = f": was {self.eps:g}/255 meant?" if self.eps <= 255 else ""
            raise ValueError(
                f"eps must be at most {diameter:.4g}, the diameter of the pixel box [0, 1] in {self.norm}, "
                f"got {self.eps:g}{meant}"
            )

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if eps is larger than the pixel box of one input of this shape."""
        self._check_diameter(1.0 if self.norm == "linf" else math.sqrt(math.prod(shape)))

    def step_size_warning(self, alpha: float) -> str:
        """A warning if a step size is more than 4 eps, twice the diameter of the ball; otherwise empty."""
        if not 0 < _FAR * self.eps < alpha:
            return ""
        meant = f"; was {alpha:g}/255 meant?" if alpha >= 1 else ""
        times = f"{alpha / self.eps:.3g} eps"
        return f"alpha {alpha:g} is {times} (eps {self.eps:g}): every step leaves the ball{meant}"

    @property
    def _norm(self) -> Norm:
        return NORMS[self.norm]

    def start(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the set: uniform in the l_inf ball; uniform direction and length for l_2.

        The numbers are drawn in one call of the shape of x0, as torchattacks draws them.
        """
        self.check(x0.shape[1:])
        return self._norm.draw(x0, self.eps, generator).add_(x0).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent: sign(g) for l_inf, g over its length for l_2."""
        return self._norm.direction(gradient)

    def shrink(self, delta: Tensor, radius: float = 1.0) -> Tensor:
        """The nearest perturbation with ||delta|| <= radius * eps, regardless of the pixel box."""
        return self._norm.shrink(delta.clone(), radius * self.eps)

    def noise(self, like: Tensor, generator: torch.Generator | None = None, radius: float = 1.0) -> Tensor:
        """A random perturbation of norm at most radius * eps, regardless of the pixel box."""
        return self._norm.draw(like, radius * self.eps, generator)

    def step(
        self,
        x: Tensor,
        gradient: Tensor,
        alpha: float | Tensor,
        x0: Tensor,
        eps: float | Tensor | None = None,
    ) -> Tensor:
        """One step of projected steepest ascent, Pi(x + alpha direction(gradient)).

        alpha and `eps` (see `project`) may be 0-d tensors, as in CUDA graphs.
        """
        move = self.direction(gradient).mul_(alpha)
        # In place where that keeps the layout of x: less memory to pass through for small networks.
        return self.project(move.add_(x) if move.stride() == x.stride() else x + move, x0, eps)

    def project(self, x: Tensor, x0: Tensor, eps: float | Tensor | None = None) -> Tensor:
        """The point of the set for x: shrunk to the ball, then clamped to [0, 1]; `eps`: another radius."""
        self.check(x0.shape[1:])
        return self._norm.shrink(x - x0, self.eps if eps is None else eps).add_(x0).clamp_(0, 1)

    def bounds(self, x0: Tensor | None = None) -> tuple[Tensor | float, Tensor | float]:
        """Bounds of the perturbation of each pixel: +-eps for l_inf, and within [0, 1] if x0 is given."""
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
