"""Amata's criterion C in its greedy form: how far the control u_t is from maximising the Hamiltonian.

For a step of length eta, (13) becomes (14): with g_v = grad_theta l(A_v) and n(v) evaluations per sample,
    gap_t = max_v [ s_t q(v) - gamma n(v) ] - [ s_t q(u_t) - gamma n(u_t) ],    C = mean over t,
    q(v) = ||g_v||^2 (form "norm", the paper's) or <grad Phi, g_v> (form "costate"),
    s_t = (eta_t / mean eta) (1 - d)/(1 - mu): one unit of time is mean(eta), and heavy ball with momentum mu
    and dampening d moves (1 - d)/(1 - mu) times as far per unit of gradient, Nesterov's form (d = 0) as well.
    s_t = 1 for plain SGD at a constant rate.

Where the mean rate of the run is not known, the present one stands for it: gap_t is then that of a run at
eta_t throughout. Under a schedule of rates the price weighs more where steps are shorter, which only the
mean tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from controlat._util.checks import (
    brief,
    choice,
    flag,
    instance,
    number,
    whole,
)
from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import check_batch, check_labels
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.data import Augment
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import check_rows
from controlat.methods import Batch, Method, build, check_method
from controlat.models.frozen.contexts import normal_tensor
from controlat.models.frozen.logits import check_model
from controlat.models.frozen.view import FrozenModel
from controlat.pmp.candidates import Candidates
from controlat.pmp.maximise import MAXIMISERS, Scored, score_one, score_sweep, tpe
from controlat.pmp.pace import Pace
from controlat.pmp.surface import FORMS, Array, Gap, Surface
from controlat.pmp.terminal import AdversarialLoss, Terminal

__all__ = ["criterion", "probe_batches", "score"]


def score(
    driver: Driver,
    batches: Sequence[Batch],
    control: Control,
    candidates: Candidates,
    *,
    terminal: Terminal | None = None,
    scale: float = 1.0,
    rate: float = 0.0,
    maximiser: str = "sweep",
    gamma: float = 0.0,
    form: str = "norm",
    trials: int = 100,
    progress: Callable[[], object] | None = None,
) -> Surface:
    """Score the candidates of G, and u_t, at the driver's present state, which does not change.

    Args:
        driver: model, method, ball and seed.
        batches: the probe, in equal batches of the training batch size; all candidates share them and the
            random numbers drawn for them.
        control: u_t, always among the candidates.
        candidates: what is searched.
        terminal: Phi, for the costate form.
        scale: s_t.
        rate: learning rate between the updates of a method that has several.
        maximiser: ``"sweep"``, exact in K for each step size (the candidates are then the same for both forms
            and any gamma); or ``"tpe"``, hyperopt on the value of `form` at `gamma`, as in the paper.
        gamma: price of one evaluation per sample (TPE only).
        form: the form that TPE maximises.
        trials: evaluations of TPE, that of u_t not counted.
        progress: called after every candidate.

    Returns:
        The surface of values.

    Raises:
        ValueError: unknown maximiser, or probe batches of unequal size.
        NonFiniteError: the gradient under u_t or of Phi is not finite, or, in a sweep, that of a candidate;
            or all trials of TPE failed. Where only some did, ``dropped`` of the surface says so.
    """
    if maximiser not in MAXIMISERS:
        raise ValueError(f"maximiser must be one of {', '.join(MAXIMISERS)}, got {maximiser!r}")
    if len({len(b.x) for b in batches}) != 1:
        raise ValueError(f"probe batches must have one size, got {[len(b.x) for b in batches]}")
    first = batches[0].x
    check_rows(
        driver, first, len(first), f"the {len(batches)} probe batches hold 1 sample each", "make fewer"
    )
    meter = Meter()
    phi = None
    if terminal is not None:  # a step of length eta moves theta alone: running statistics have no rate
        phi = _flat(terminal.gradient(driver, meter)[: len(driver.parameters)])
    if phi is not None and not bool(torch.isfinite(phi).all()):
        raise NonFiniteError("the gradient of the terminal cost is not finite")
    rows: dict[Control, tuple[float, Array, Array | None]] = {}
    dropped: tuple[str, ...] = ()

    def keep(scored: Scored) -> None:
        v, n, fields = scored
        rows.setdefault(v, (n, *_products([f.gradients for f in fields], phi)))
        if progress is not None:
            progress()

    def surface() -> Surface:
        n, gram, costate = zip(*rows.values(), strict=True)
        inner = None if phi is None else np.stack([c for c in costate if c is not None])
        return Surface(tuple(rows), np.array(n), np.stack(gram), inner, scale, meter.gradients, dropped)

    keep(score_one(driver, batches, control, rate, meter))
    if maximiser == "sweep":
        for scored in score_sweep(driver, batches, candidates, control, rate, meter):
            keep(scored)
        return surface()

    def objective(v: Control) -> float:
        if v not in rows:
            keep(score_one(driver, batches, v, rate, meter))
        known, i = surface(), list(rows).index(v)
        return float(known.reward(form)[i] - gamma * known.evaluations[i])

    failed = tpe(objective, candidates, trials, driver.seed, [control], driver.method.controls)
    if failed:
        dropped = (f"{len(failed)} of {trials} trials of TPE, which failed (the first: {failed[0]})",)
    return surface()


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _products(gradients: Sequence[Sequence[Tensor]], phi: Tensor | None) -> tuple[Array, Array | None]:
    stacked = torch.stack([_flat(g) for g in gradients])
    gram = (stacked @ stacked.T).double().cpu().numpy()
    if not np.isfinite(gram).all():
        raise NonFiniteError("the squared gradient of a candidate control is not finite")
    return gram, None if phi is None else (stacked @ phi).double().cpu().numpy()


def probe_batches(
    x: Tensor,
    y: Tensor,
    count: int,
    epoch: int = 0,
    indices: Tensor | None = None,
    augment: Augment | None = None,
) -> list[Batch]:
    """Split a probe into `count` equal batches; samples that do not fill one are left out.

    Numbers count down from -1, so that their random numbers are never those of a training step.

    Args:
        x: (N, ...) inputs, as they are: the probe is not augmented.
        y: (N,) labels.
        count: number of batches.
        epoch: of their random numbers.
        indices: (N,) positions in the training set, for methods that keep something per sample.
        augment: of training: what is kept per sample then has a border.
    """
    size = len(x) // count
    if size < 1:
        raise ValueError(f"a probe of {len(x)} samples cannot be split into {count} batches")
    parts = (torch.arange(i * size, (i + 1) * size) for i in range(count))
    where = torch.arange(len(x)) if indices is None else indices
    placement = None if augment is None else augment.centre(size)
    return [Batch(x[p], y[p], where[p], epoch, -1 - i, placement) for i, p in enumerate(parts)]


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
    """Amata's greedy criterion at the model's present parameters, for your own training loop.

    C = max_v { s q(v) - gamma n(v) } - { s q(u) - gamma n(u) }, n(v) = K + 1 for PGD training.
    The model is left as it was.

    Args:
        model: the network, from inputs in [0, 1] to logits.
        x: (N, ...) probe inputs, a few hundred training samples.
        y: (N,) labels.
        control: u_t, such as ``{"alpha": 0.01, "steps": 10}`` or ``schedule(epoch)``.
        eps: radius, in pixel units.
        gamma: price of one gradient evaluation, in units of the squared gradient norm.
        norm: ``"linf"`` or ``"l2"``.
        method: a method's name or object.
        form: ``"norm"`` (the paper's) or ``"costate"`` (inner product with the gradient of the adversarial
            loss, on `held_out`, or on the probe itself without it: then the noise that both share is in the
            value, and no unbiased or cross-fitted one is given).
        maximiser: ``"sweep"`` or ``"tpe"``.
        knobs: what is searched, as `Candidates.read` says: ``["alpha", "steps", "beta=1:3:6"]``; all others
            stay as in `control`. alpha and steps, as far as the method has them, by default.
        alphas: step sizes of G; five spaced logarithmically in [eps/40, 2 eps] by default.
        max_steps: largest K of G; 10 or that of `control` by default.
        trials: evaluations of TPE, that of u_t not counted.
        batches: number M of probe batches, four at least for a cross-fitted value in the norm form; the batch
            size N / M is that of the training step looked at.
        held_out: (x, y) of the terminal cost.
        optimizer: the one that trains the model: s_t and, for methods that make several updates in a step,
            the rate between them are read from it. Without it plain SGD at a constant rate is meant, and no
            motion between the updates of a step. What of it the number does not cover (other optimisers than
            SGD, groups that differ, weight decay in the norm form) is named in ``dropped``.
        mean_rate: mean learning rate of your run, if it changes: s_t has (present rate / mean_rate).
        scale: s_t itself, in place of `optimizer`.
        seed: of everything random.
        channels_last: run the attack in NHWC layout.

    Returns:
        The `Gap`: value, maximiser, both terms, unbiased and cross-fitted values, interval.

    Raises:
        ValueError: a number is missing or out of range; x is not in [0, 1]; both `scale` and `optimizer`, or
            `mean_rate` without `optimizer`; the optimizer is not one of this model.
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
    check_model(model)
    system = build(method) if isinstance(method, str) else check_method(method)
    trials, batches, seed = whole(trials, "trials", 1), whole(batches, "batches", 1), whole(seed, "seed")
    flag(channels_last, "channels_last")
    u, ball = system.controls.check(control), Ball(number(eps, "eps"), norm)
    pace = _pace(model, optimizer, mean_rate, scale, form)
    gamma, scale = number(gamma, "gamma"), pace.scale
    for name, value in (("gamma", gamma), ("scale", scale)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value:g}")
    choice(form, "form", FORMS)
    choice(maximiser, "maximiser", MAXIMISERS)
    steps = max(10, int(u.get("steps", 1))) if max_steps is None else max_steps
    instance(knobs, (Sequence, type(None)), "knobs", "a list such as ['alpha', 'steps', 'beta=1:3:6']")
    candidates = Candidates.read(knobs, system.controls, eps=ball.eps, max_steps=steps, alphas=alphas)
    ball.check(x.shape[1:])
    if told := ball.far(max(u.get("alpha", 0.0), *candidates.values.get("alpha", ()))):
        warnings.warn(told, stacklevel=2)
    driver = Driver(model, system, ball, seed=seed, channels_last=channels_last)
    with FrozenModel(model, channels_last=channels_last) as view:
        check_labels(int(y.max()), view(x[:1]).shape[1])
    phi = (x, y)
    if held_out is not None:
        if not isinstance(held_out, (tuple, list)) or len(held_out) != 2:
            raise ValueError(f"held_out must be a pair (x, y) of tensors, got {brief(held_out)}")
        try:
            check_batch(*held_out)
        except ValueError as error:
            raise ValueError(f"held_out: {error}") from None
        phi = held_out
    surface = score(
        driver,
        probe_batches(x.detach(), y, batches),
        u,
        candidates,
        terminal=AdversarialLoss(*phi, ball, seed=seed) if form == "costate" else None,
        scale=scale,
        rate=pace.rate,
        maximiser=maximiser,
        gamma=gamma,
        form=form,
        trials=trials,
    )
    gap = replace(surface, dropped=surface.dropped + pace.dropped).gap(u, gamma, form)
    if form == "costate" and held_out is None:  # grad Phi has the noise of every probe batch in it
        gap = replace(gap, unbiased=None, cross_fitted=None)
    return gap


def _pace(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mean_rate: float | str | None,
    scale: float | None,
    form: str,
) -> Pace:
    """How far theta moves per unit of time, by the optimiser or by the scale that is given."""
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
