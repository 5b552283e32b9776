"""`criterion`: Amata's greedy criterion C for a training loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from controlat._util.checks import brief, choice, instance, number, whole
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import check_batch, check_labels
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Method, build
from controlat.models.frozen.contexts import normal_tensor
from controlat.models.frozen.view import FrozenModel
from controlat.pmp.candidates import Candidates
from controlat.pmp.greedy import probe_batches, score
from controlat.pmp.maximise import MAXIMISERS
from controlat.pmp.pace import Pace
from controlat.pmp.surface import FORMS, Gap
from controlat.pmp.terminal import AdversarialLoss

__all__ = ["criterion"]


def criterion(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    control: Mapping[str, float],
    *,
    eps: float | str,
    gamma: float | str,
    norm: str = "linf",
    method: str | Method = "pgd_at",
    form: str = "norm",
    maximiser: str = "sweep",
    knobs: Sequence[str] | None = None,
    alphas: Sequence[float] | None = None,
    max_steps: int | None = None,
    trials: int = 100,
    batches: int = 8,
    held_out: tuple[Tensor, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    mean_rate: float | str | None = None,
    scale: float | None = None,
    seed: int = 0,
    channels_last: bool = True,
) -> Gap:
    """Amata's greedy criterion C at the model's present parameters, for a training loop of your own.

    C = max_v { s q(v) - gamma n(v) } - { s q(u) - gamma n(u) }, as in `controlat.pmp.greedy`, with
    n(v) = K + 1 for PGD training. The model does not change.

    Args:
        model: the network, from inputs in [0, 1] to logits.
        x: (N, ...) probe inputs, a few hundred training samples.
        y: (N,) labels.
        control: u_t, such as ``{"alpha": 0.01, "steps": 10}`` or ``schedule(epoch)``.
        eps: radius, in pixel units.
        gamma: price of one gradient evaluation, in units of the squared gradient norm.
        norm: ``"linf"`` or ``"l2"``.
        method: a method's name or object.
        form: ``"norm"`` (the paper's) or ``"costate"`` (inner product with the gradient of the terminal cost,
            the adversarial loss on `held_out`). Without `held_out` the costate form takes the adversarial
            loss on the probe: both factors then share their sampling noise, which biases the value, and no
            unbiased or cross-fitted value is given.
        maximiser: ``"sweep"`` scores every candidate, ``"tpe"`` searches with hyperopt.
        knobs: the knobs that are varied, as in `Candidates.read`: ``["alpha", "steps", "beta=1:3:6"]``. All
            others keep their value in `control`. By default alpha and steps, as far as the method has them.
        alphas: candidate step sizes; by default five, spaced logarithmically in [eps/40, 2 eps].
        max_steps: largest candidate K; by default 10, or the K of `control` if that is larger.
        trials: evaluations of TPE, besides that of u_t.
        batches: number M of probe batches; their size N / M should be the batch size of training. The
            cross-fitted value of the norm form needs at least four.
        held_out: (x, y) of the terminal cost.
        optimizer: the optimiser that trains the model. s_t is read from it, and so is the learning rate of
            methods with several updates per step. Without it plain SGD at a constant rate is assumed, and
            theta does not move between the updates of a step. What C does not account for (optimisers other
            than SGD, parameter groups that differ, weight decay in the norm form) is named in ``dropped``.
        mean_rate: mean learning rate over your run, if it changes: s_t contains present rate / mean_rate.
        scale: s_t itself, in place of `optimizer`.
        seed: seed of all random numbers.
        channels_last: run the attack in NHWC layout.

    Returns:
        The `Gap`: value, maximiser, both terms, unbiased and cross-fitted values, interval.

    Raises:
        ValueError: a number is missing or out of range; x is not in [0, 1]; both `scale` and `optimizer`, or
            `mean_rate` without `optimizer`, are given; the optimizer holds no parameter of this model.
        NonFiniteError: a gradient that is needed is not finite, or every trial of TPE failed.

    Warns:
        UserWarning: an alpha is more than 4 eps.

    Source:
        Ye et al. (2021), equation 14.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> u = {"alpha": 0.02, "steps": 3}
    >>> gap = criterion(model, x, y, u, eps=0.1, gamma=0.001, optimizer=optimizer)
    >>> gap.value >= 0, sorted(gap.maximiser), gap.dropped
    (True, ['alpha', 'steps'], ())
    """
    check_batch(x, y)
    x, y = normal_tensor(x), normal_tensor(y)
    trials, batches = whole(trials, "trials", 1), whole(batches, "batches", 1)
    system = build(method) if isinstance(method, str) else method
    driver = Driver(model, system, Ball(number(eps, "eps"), norm), seed=seed, channels_last=channels_last)
    u, ball = driver.method.controls.check(control), driver.ball
    pace = _pace(model, optimizer, mean_rate, scale, form)
    gamma = _checked(gamma, pace, form, maximiser)
    candidates = _candidates(driver, u, knobs, alphas, max_steps)
    if warning := ball.step_size_warning(max(u.get("alpha", 0.0), *candidates.values.get("alpha", ()))):
        warnings.warn(warning, stacklevel=2)
    _check_probe(driver, x, y)
    held_out_data = _held_out(held_out, x, y)
    surface = score(
        driver,
        probe_batches(x.detach(), y, batches),
        u,
        candidates,
        terminal=AdversarialLoss(*held_out_data, ball, seed=driver.seed) if form == "costate" else None,
        scale=pace.scale,
        rate=pace.rate,
        maximiser=maximiser,
        gamma=gamma,
        form=form,
        trials=trials,
    )
    gap = replace(surface, dropped=surface.dropped + pace.dropped).gap(u, gamma, form)
    if form == "costate" and held_out is None:  # grad Phi shares its noise with the probe gradients
        gap = replace(gap, unbiased=None, cross_fitted=None)
    return gap


def _checked(gamma: float | str, pace: Pace, form: str, maximiser: str) -> float:
    """gamma as a number, where it, the scale s_t and the two choices are what they must be."""
    gamma = number(gamma, "gamma")
    for name, value in (("gamma", gamma), ("scale", pace.scale)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value:g}")
    choice(form, "form", FORMS)
    choice(maximiser, "maximiser", MAXIMISERS)
    return gamma


def _candidates(
    driver: Driver,
    u: Control,
    knobs: Sequence[str] | None,
    alphas: Sequence[float] | None,
    max_steps: int | None,
) -> Candidates:
    """The candidates around u."""
    steps = max(10, int(u.get("steps", 1))) if max_steps is None else max_steps
    instance(knobs, (Sequence, type(None)), "knobs", "a list such as ['alpha', 'steps', 'beta=1:3:6']")
    controls, eps = driver.method.controls, driver.ball.eps
    return Candidates.read(knobs, controls, eps=eps, max_steps=steps, alphas=alphas)


def _check_probe(driver: Driver, x: Tensor, y: Tensor) -> None:
    """Raise ValueError if the ball is larger than the pixel box, or a label is none of the network's."""
    driver.ball.check(x.shape[1:])
    with FrozenModel(driver.model, channels_last=driver.channels_last) as view:
        check_labels(int(y.max()), view(x[:1]).shape[1])


def _held_out(held_out: object, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The data of the terminal cost: those given, or else the probe (x, y).

    Raises:
        ValueError: `held_out` is not a pair of inputs and labels.
    """
    if held_out is None:
        return x, y
    if not isinstance(held_out, (tuple, list)) or len(held_out) != 2:
        raise ValueError(f"held_out must be a pair (x, y) of tensors, got {brief(held_out)}")
    try:
        check_batch(*held_out)
    except ValueError as error:
        raise ValueError(f"held_out: {error}") from None
    return held_out[0], held_out[1]


def _pace(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mean_rate: float | str | None,
    scale: float | None,
    form: str,
) -> Pace:
    """The `Pace` of the optimiser, or of the scale that is given."""
    if optimizer is None:
        if mean_rate is not None:
            raise ValueError("mean_rate needs optimizer, whose present rate is compared with it")
        return Pace(1.0 if scale is None else number(scale, "scale"), 0.0, ())
    if scale is not None:
        raise ValueError("give scale or optimizer, not both: s_t is read from the optimizer")
    pace = Pace.of(optimizer, model, mean_rate, form)
    if type(optimizer) is not torch.optim.SGD:
        warnings.warn(f"C leaves out: {'; '.join(pace.dropped)}", stacklevel=3)
    return pace
