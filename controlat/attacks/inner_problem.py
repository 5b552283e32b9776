"""Numbers that describe the inner problem of a network at one theta, to fit a landscape to them.

In the landscape (Ye et al. 2021, equation 11) the inner ascent is x <- x + alpha l_x, its exact step alpha*
is 1/|l_xx|, and K* = tau/alpha* of them use up a budget tau = alpha K. The network's counterparts, on fixed
samples and at one theta:

    f_K         mean loss after K steps of size tau/K in the ball, tau = 2 eps, no random start
    share(K)    (f_K - f_0)/(top - f_0), top the largest loss on the path of the finest of these ascents
    convergence the least K with share(K) >= 95 %, interpolated: K* at the budget tau
    curvature   (1 + sqrt(1 - share(1)))/eps: 1/r*, r* the length of the exact step. K = 1 is one step of
                length eps (FGSM). Where the loss along the ascent is s (r - r^2/(2 r*)) with r* <= eps, that
                step has the share 1 - (1 - eps/r*)^2 of the gain; this is solved for r*
    secant      (s(0) - s(eps))/eps, s(r) the slope of the mean loss at x0 + r d along d, the direction of
                steepest ascent at x0; neither ball nor clipping: the plain second difference for -l_xx

Steps have lengths in pixels, as the knob alpha has in training; a landscape multiplies its gradient instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.precision import full_precision
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy
from controlat.control.cost import Meter
from controlat.models.frozen.contexts import normal_tensor
from controlat.models.frozen.view import FrozenModel

__all__ = ["BUDGET", "MEASURES", "SHARE", "InnerProblem", "check_inner_problem", "inner_problem"]

BUDGET = 2.0  # tau in units of eps
SHARE = 0.95  # of the gain, at which an ascent counts as converged
_ROUNDING = 1e-6  # smaller relative increases of the loss are rounding of float32
_LEAST = 10  # the finest ascent needs so many steps to serve as reference

MEASURES = {
    "convergence": f"steps K of size {BUDGET:g} eps/K to {SHARE:.0%} of the gain",
    "curvature": "1 over the length of the exact step, in 1/pixel",
    "secant": "fall of the directional derivative over eps along the first direction, per eps",
    "slope": "mean directional derivative of the loss along the direction of steepest ascent",
    "after_one": "share of the gain after one step of size eps",
}
_ONE, _NEVER, _BEYOND, _FLAT = "one step is enough", "not reached", "beyond the ball", "no gain"


@dataclass(frozen=True)
class InnerProblem:
    """The inner problem at one theta, on fixed samples (the probe).

    A number is None where the loss does not increase by more than rounding.

    Args:
        losses: mean loss after k = 0, ..., steps steps of the finest ascent.
        shares: share of the gain after K steps of size tau/K, by K, up to the first that converged.
        convergence: steps to `SHARE` of the gain.
        curvature: 1/r*, in 1/pixel.
        secant: second difference along the first direction, in loss per pixel squared.
        slope: directional derivative at x0, in loss per pixel.
        after_one: share of the gain after one step of size eps.
        marks: {name in `MEASURES`: why its value is only a bound}.
    """

    losses: tuple[float, ...]
    shares: dict[int, float]
    convergence: float | None
    curvature: float | None
    secant: float
    slope: float
    after_one: float | None
    marks: dict[str, str]


class _Probe:
    """Mean loss of a network over fixed samples, and its gradient, as a function of the inputs alone.

    In mode "train" dropout has the same masks in all evaluations, as noise would look like curvature.
    """

    def __init__(
        self, view: FrozenModel, x: Tensor, y: Tensor, loss: Loss, batch_size: int, seed: int
    ) -> None:
        self.view, self.x, self.y, self.loss, self.seed = view, x, y, loss, seed
        self.parts = list(view.chunks(x))
        if view.mode == "train":  # BatchNorm takes its statistics over a part, as over a training batch
            count = max(1, len(x) // batch_size)
            cuts = [len(x) * i // count for i in range(count + 1)]
            self.parts = [*map(slice, cuts[:-1], cuts[1:])]

    def __call__(self, x: Tensor) -> float:
        """The mean loss, checked to be finite."""
        total = 0.0
        for i, part in enumerate(self.parts):
            with rng.scoped(self.seed, "calibration", i, device=x.device):
                total += float(self.loss(self.view(x[part]), self.y[part]).double().sum())
        return _finite(total / len(x), "mean loss of the probe")

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """The mean loss, checked to be finite, and the input gradient of each sample, from one evaluation."""
        gradient, total = torch.empty_like(x), 0.0
        for i, part in enumerate(self.parts):
            losses: list[Tensor] = []

            def objective(logits: Tensor, part: slice = part, losses: list[Tensor] = losses) -> Tensor:
                losses.append(self.loss(logits, self.y[part]))
                return losses[0]

            with rng.scoped(self.seed, "calibration", i, device=x.device):
                gradient[part] = self.view.gradient(self.view.prepare(x[part]), objective)
            total += float(losses[0].detach().double().sum())
        return _finite(total / len(x), "mean loss of the probe"), gradient

    def path(self, ball: Ball, steps: int) -> Iterator[tuple[float, Tensor | None]]:
        """(mean loss, input gradient) at each point of the ascent with K = steps; no gradient at the last."""
        x = self.x
        for _ in range(steps):
            value, gradient = self.value_and_gradient(x)
            yield value, gradient
            x = ball.step(x, gradient, BUDGET * ball.eps / steps, self.x)
        yield self(x), None


@full_precision()
def inner_problem(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 20,
    loss: Loss = cross_entropy,
    mode: str = "eval",
    batch_size: int = 64,
    channels_last: bool = True,
    seed: int = 0,
    meter: Meter | None = None,
) -> InnerProblem:
    """Compute the numbers of the module for a network, which is left unchanged.

    Args:
        model: from (N, ...) inputs in [0, 1] to logits.
        x: (N, ...) the probe.
        y: (N,) labels.
        ball: the perturbation set; its eps is in pixel units.
        steps: K of the finest ascent of the family, at step size 2 eps/steps.
        loss: per sample.
        mode: of the network: ``"eval"`` or ``"train"``.
        batch_size: samples that go through the network together in mode ``"train"``.
        channels_last: run convolutions in NHWC layout.
        seed: of dropout in mode ``"train"``.
        meter: counts the evaluations.

    Raises:
        ValueError: eps is 0, or fewer than 10 steps.
        NonFiniteError: a loss or slope is not finite.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x, y = torch.full((6, 1, 4, 4), 0.5), torch.arange(6) % 3
    >>> inner = inner_problem(model, x, y, Ball(0.1))
    >>> abs(inner.curvature * 0.1 - 1) < 0.1, inner.marks["convergence"]
    (True, 'one step is enough')
    """
    check_inner_problem(ball, steps)
    with FrozenModel(model, mode, channels_last=channels_last, meter=meter) as view:
        x, y = normal_tensor(x.detach()), normal_tensor(y)
        probe = _Probe(view=view, x=x, y=y, loss=loss, batch_size=batch_size, seed=seed)
        points = probe.path(ball, steps)
        first, gradient = next(points)
        assert gradient is not None
        losses = (first, *(value for value, _ in points))
        slope, secant = _line(probe, ball, gradient)
        gain = max(losses) - first
        if gain <= _ROUNDING * abs(max(losses, key=abs)):
            marks = dict.fromkeys(("convergence", "curvature", "after_one"), _FLAT)
            return InnerProblem(
                losses=losses,
                shares={},
                convergence=None,
                curvature=None,
                secant=secant,
                slope=slope,
                after_one=None,
                marks=marks,
            )
        shares = _shares(probe, ball, gradient, losses)
    return _from_shares(losses, shares, slope, secant, ball)


def _line(probe: _Probe, ball: Ball, gradient: Tensor) -> tuple[float, float]:
    """Slope at x0 and second difference over eps, along the direction d of steepest ascent at x0."""
    direction = ball.direction(gradient)

    def slope(g: Tensor) -> float:
        return _finite(float((g * direction).double().sum()) / len(g), "slope of the loss")

    gradient_at_eps = probe.value_and_gradient(probe.x + ball.eps * direction)[1]
    slope_at_0 = slope(gradient)
    return slope_at_0, (slope_at_0 - slope(gradient_at_eps)) / ball.eps


def _shares(probe: _Probe, ball: Ball, gradient: Tensor, losses: tuple[float, ...]) -> dict[int, float]:
    """Share of the gain by K, up to the first K that converged.

    Args:
        probe: the mean loss.
        ball: the perturbation set.
        gradient: input gradient at x0.
        losses: mean loss along the finest ascent.
    """
    steps, first, gain = len(losses) - 1, losses[0], max(losses) - losses[0]
    shares = {0: 0.0}
    for k in (*_step_numbers(steps), steps):
        if k == steps:
            value = losses[-1]
        elif k == 1:
            value = probe(ball.step(probe.x, gradient, BUDGET * ball.eps, probe.x))
        else:
            *_, (value, _) = probe.path(ball, k)
        shares[k] = (value - first) / gain
        if shares[k] >= SHARE:
            break
    return shares


def _step_numbers(steps: int) -> list[int]:
    """The numbers 2^i and 3 * 2^i below `steps`.

    >>> _step_numbers(20)
    [1, 2, 3, 4, 6, 8, 12, 16]
    """
    return sorted(k for i in range(steps.bit_length()) for k in (2**i, 3 * 2**i) if k < steps)


def _from_shares(
    losses: tuple[float, ...], shares: dict[int, float], slope: float, secant: float, ball: Ball
) -> InnerProblem:
    """The result, with the numbers that follow from the shares of the gain."""
    marks: dict[str, str] = {}
    (*_, before, k), one = shares, shares[1]
    needed = float(k)
    if shares[k] < SHARE:
        marks["convergence"] = _NEVER
    else:
        needed = before + (SHARE - shares[before]) / (shares[k] - shares[before]) * (k - before)
        if k == 1:
            marks["convergence"] = _ONE
    if one >= 1:
        marks["curvature"] = _BEYOND
    curvature = (1 + math.sqrt(max(0.0, 1 - one))) / ball.eps
    return InnerProblem(
        losses=losses,
        shares=shares,
        convergence=needed,
        curvature=curvature,
        secant=secant,
        slope=slope,
        after_one=one,
        marks=marks,
    )


def check_inner_problem(ball: Ball, steps: int) -> None:
    """Raise ValueError if eps is 0, or if the finest ascent has too few steps."""
    if ball.eps == 0:
        raise ValueError("eps is 0: there is no inner problem to measure; give a run with eps > 0")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < _LEAST:
        raise ValueError(f"steps must be a whole number >= {_LEAST}, got {steps!r}")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} is not finite")
    return value
