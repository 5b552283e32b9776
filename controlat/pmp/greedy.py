"""Amata's criterion C in its greedy form: how far the control u_t is from maximising the Hamiltonian.

For a step of length eta, Amata's (13) becomes (14). With g_v = grad_theta l(A_v), the gradient of the loss
under the control v, and n(v) the gradient evaluations per sample,

    gap_t = max_v [ s_t q(v) - gamma n(v) ] - [ s_t q(u_t) - gamma n(u_t) ],    C = mean of gap_t over t,
    q(v) = ||g_v||^2 (form "norm", the paper's) or <grad Phi, g_v> (form "costate"),
    s_t = (eta_t / mean eta) (1 - d)/(1 - mu).

s_t is the displacement of theta per unit of gradient and of time. The unit of time is the mean learning rate
of the run. In the long run SGD with momentum mu and dampening d displaces theta by (1 - d)/(1 - mu) times as
much as plain SGD, also in Nesterov's form (d = 0). s_t = 1 for plain SGD at a constant rate.

Where the mean learning rate is not known, the present rate is taken for it, as if the whole run were at
eta_t. Under a learning-rate schedule the true s_t is smaller in steps with a smaller rate, so that the price
gamma weighs more there; that needs the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from controlat._util import rng
from controlat._util.checks import choice
from controlat._util.errors import NonFiniteError
from controlat._util.precision import full_precision
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.data import Augment, Samples
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import check_rows
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch
from controlat.pmp.candidates import Candidates
from controlat.pmp.maximise import MAXIMISERS, Scored, score_one, score_sweep, tpe
from controlat.pmp.surface import Array, Surface
from controlat.pmp.terminal import Terminal

__all__ = ["GAMMA", "epoch_scale", "probe_batches", "probe_positions", "score", "training_probe"]

GAMMA = 0.04  # price of one gradient evaluation per sample, in Amata's experiments
_PROBE_BATCHES = 4, 16  # at least and at most, of a probe of training samples


@full_precision()
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
    meter: Meter | None = None,
) -> Surface:
    """Score u_t and the candidates of G at the driver's present state, which does not change.

    Args:
        driver: model, method, ball and seed.
        batches: the probe, in batches of equal size, that of the training batches. All candidates are scored
            on the same batches with the same random numbers.
        control: u_t, which is scored in any case.
        candidates: the controls that are compared with u_t.
        terminal: Phi, for the costate form.
        scale: s_t.
        rate: learning rate between the updates of a method that makes several per step.
        maximiser: ``"sweep"`` scores every candidate, at the cost of one trajectory per step size where the
            method allows it; its scores serve both forms and any gamma. ``"tpe"`` searches with hyperopt for
            the largest value of `form` at `gamma`, as in the paper.
        gamma: price of one gradient evaluation per sample (TPE only).
        form: the form that TPE maximises.
        trials: evaluations of TPE, besides that of u_t.
        progress: called after every candidate.
        meter: where evaluations are counted.

    Returns:
        The scores of all candidates.

    Raises:
        ValueError: unknown maximiser, or probe batches of unequal size.
        NonFiniteError: the gradient of Phi, or the one under u_t or under a candidate of a sweep, is not
            finite; or all trials of TPE failed. If only some failed, ``dropped`` of the surface says so.
    """
    choice(maximiser, "maximiser", MAXIMISERS)
    _check_probe(driver, batches)
    meter = Meter() if meter is None else meter
    before = meter.gradients
    phi = None if terminal is None else _terminal_gradient(terminal, driver, meter)
    scores = _Scores(phi, scale, meter, progress, before)
    scores.add(score_one(driver, batches, control, rate, meter))
    if maximiser == "sweep":
        for scored in score_sweep(driver, batches, candidates, control, rate, meter):
            scores.add(scored)
        return scores.surface()

    def objective(v: Control) -> float:
        if v not in scores.rows:
            scores.add(score_one(driver, batches, v, rate, meter))
        surface, i = scores.surface(), list(scores.rows).index(v)
        return float(surface.reward(form)[i] - gamma * surface.evaluations[i])

    failed = tpe(objective, candidates, trials, driver.seed, [control], driver.method.controls)
    if not failed:
        return scores.surface()
    return scores.surface(
        (f"{len(failed)} of {trials} trials of TPE, which failed (the first: {failed[0]})",)
    )


def _check_probe(driver: Driver, batches: Sequence[Batch]) -> None:
    """Raise ValueError if the batches differ in size, or hold too few samples for the network."""
    if len({len(b.x) for b in batches}) != 1:
        raise ValueError(f"probe batches must have one size, got {[len(b.x) for b in batches]}")
    first = batches[0].x
    check_rows(
        driver, first, len(first), f"the {len(batches)} probe batches hold 1 sample each", "make fewer"
    )


@dataclass
class _Scores:
    """The scores of the candidates so far: their evaluations and the inner products of their gradients.

    Args:
        phi: grad Phi, flattened; None without the costate form.
        scale: s_t.
        meter: where evaluations are counted.
        progress: called after every candidate.
        before: gradient evaluations on the meter before the first one.
        rows: by candidate, n(v), the (M, M) products of its gradients, and the (M,) products with grad Phi.
    """

    phi: Tensor | None
    scale: float
    meter: Meter
    progress: Callable[[], object] | None
    before: int = 0
    rows: dict[Control, tuple[float, Array, Array | None]] = field(default_factory=dict)

    def add(self, scored: Scored) -> None:
        """Add a candidate, unless it was scored before."""
        v, n, fields = scored
        self.rows.setdefault(v, (n, *_products([f.gradients for f in fields], self.phi)))
        if self.progress is not None:
            self.progress()

    def surface(self, dropped: tuple[str, ...] = ()) -> Surface:
        """The `Surface` of the candidates so far."""
        evaluations, gram, costate = zip(*self.rows.values(), strict=True)
        return Surface(
            controls=tuple(self.rows),
            evaluations=np.array(evaluations),
            gram=np.stack(gram),
            costate=None if self.phi is None else np.stack([c for c in costate if c is not None]),
            scale=self.scale,
            spent=self.meter.gradients - self.before,
            dropped=dropped,
        )


def _terminal_gradient(terminal: Terminal, driver: Driver, meter: Meter) -> Tensor:
    """grad Phi in theta, flattened. A step of length eta moves theta; running statistics have no such rate.

    Raises:
        NonFiniteError: it is not finite.
    """
    phi = _flat(terminal.gradient(driver, meter)[: len(driver.parameters)])
    if not bool(torch.isfinite(phi).all()):
        raise NonFiniteError("the gradient of the terminal cost is not finite")
    return phi


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _products(gradients: Sequence[Sequence[Tensor]], phi: Tensor | None) -> tuple[Array, Array | None]:
    """Inner products of the M gradients with each other, (M, M), and with grad Phi, (M,)."""
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
    """Split a probe into `count` batches of equal size; the remaining samples are not used.

    The batches are numbered -1, -2, ..., so that their random numbers differ from those of training steps.

    Args:
        x: (N, ...) inputs; the probe is not augmented.
        y: (N,) labels.
        count: number of batches.
        epoch: epoch that the random numbers are drawn for.
        indices: (N,) positions in the training set, for methods that carry memory per sample.
        augment: the augmentation of training, which decides the size of that memory.

    Raises:
        ValueError: there are fewer samples than batches.
    """
    size = len(x) // count
    if size < 1:
        raise ValueError(f"a probe of {len(x)} samples cannot be split into {count} batches")
    parts = (torch.arange(i * size, (i + 1) * size) for i in range(count))
    positions = torch.arange(len(x)) if indices is None else indices
    placement = None if augment is None else augment.centre(size)
    return [
        Batch(x=x[p], y=y[p], indices=positions[p], epoch=epoch, number=-1 - i, placement=placement)
        for i, p in enumerate(parts)
    ]


def training_probe(
    data: Samples, size: int, *, batch_size: int, epoch: int = 0, augment: Augment | None = None
) -> list[Batch]:
    """A probe of training samples, the same ones at all times, in batches of the training batch size.

    There are four batches at least, which are smaller then, as cross-fitting needs two in each half; and 16
    at most.

    Args:
        data: the training samples.
        size: number of samples of the probe at most.
        batch_size: samples per outer step.
        epoch: epoch that the random numbers are drawn for.
        augment: as in `probe_batches`.

    Raises:
        ValueError: there is but one sample.
    """
    order = probe_positions(data, size)
    least, most = _PROBE_BATCHES
    count = min(max(len(order) // batch_size, 2, min(least, len(order) // 2)), most)
    return probe_batches(*data.take(order), count, epoch, order, augment)


def probe_positions(data: Samples, size: int) -> Tensor:
    """Positions of `size` samples at most, in random order, always the same ones."""
    return torch.randperm(len(data), generator=rng.generator(0, "probe"))[:size]


def epoch_scale(driver: Driver, spec: RunSpec, epoch: int) -> float:
    """s_t in the mean over an epoch (SGD without dampening)."""
    return spec.mean_rate(epoch) / spec.mean_rate() / (1 - driver.optimizer.momentum)
