"""The inner problem of a finished run, epoch by epoch: what a one-dimensional landscape is fitted to.

In the landscape (Ye et al. 2021, equation 11) the inner ascent is x <- x + alpha l_x, its exact step alpha*
is 1/|l_xx|, and K* = tau/alpha* of them use up a budget tau = alpha K. The network's counterparts, on a fixed
probe of training samples, at theta_t at the start of every epoch and at the end:

    f_K         mean loss after K steps of size tau/K in the ball, tau = 2 eps, no random start
    share(K)    (f_K - f_0)/(top - f_0), top the largest loss on the path of the finest of these ascents
    convergence the least K with share(K) >= 95 %, interpolated: K* at the budget tau
    curvature   (1 + sqrt(1 - share(1)))/eps: 1/r*, r* the length of the exact step. K = 1 is one step of
                length eps (FGSM). Where the loss along the ascent is s (r - r^2/(2 r*)) with r* <= eps, that
                step has the share 1 - (1 - eps/r*)^2 of the gain; this is solved for r*
    secant      (s(0) - s(eps))/eps, s(r) the slope of the mean loss at x0 + r d along d, the direction of
                steepest ascent at x0; neither ball nor clipping: the plain second difference for -l_xx

Steps have lengths in pixels, as the knob alpha has in training; a landscape multiplies its gradient instead.
The first two rise and fall with |l_xx| = 1/alpha*, each in its own proportion. The secant does not: cross-
entropy is convex along a direction in which it rises, so that a trained network has no maximum along a line,
and a secant below 0. One long step falls short because the direction turns. Nor does the landscape begin with
the untrained network: K is large there, falls until something has been learnt, and rises from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.files import JSON_LIMIT, open_file, write_json
from controlat._util.parallel import World
from controlat.app.experiment import Experiment, pick_device, progress_bar
from controlat.app.runs import environment
from controlat.app.session import shares_held_out
from controlat.app.settings import EvaluateSettings
from controlat.app.trainer import deterministic, load_checkpoint
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import same_bits
from controlat.models.frozen.borrowed import MODES, owned
from controlat.models.frozen.view import FrozenModel
from controlat.records import Calibrated, read_record

__all__ = ["BUDGET", "SHARE", "Inner", "inner_problem", "measure", "measured"]

BUDGET = 2.0  # tau in units of eps
SHARE = 0.95  # of the gain, at which an ascent counts as converged
_ROUNDING = 1e-6  # of float32: what the loss rises less than this, relatively, is no gain
_LEAST = 10  # steps of the finest ascent: with fewer it is no yardstick
_PROBED, _FINEST = 512, 20  # training samples, and K of the finest ascent, if nothing is said
_KEPT, _VERSION = "calibration.json", 1  # where a measurement stays with its run, and the form of its key
_PROBE = "probe"  # the random order that the criterion takes its probe from

_WHAT = {
    "convergence": f"steps K of size {BUDGET:g} eps/K to {SHARE:.0%} of the gain",
    "curvature": "1 over the length of the exact step, in 1/pixel",
    "secant": "fall of the directional derivative over eps along the first direction, per eps",
    "slope": "mean directional derivative of the loss along the direction of steepest ascent",
    "after_one": "share of the gain after one step of size eps",
}
_ONE, _NEVER, _BEYOND, _FLAT = "one step is enough", "not reached", "beyond the ball", "no gain"


@dataclass(frozen=True)
class Inner:
    """The inner problem at one theta, on the probe; None where the loss does not rise beyond rounding.

    Args:
        losses: mean loss after k = 0, ..., steps steps of the finest ascent.
        shares: share of the gain after K steps of size tau/K, by K, up to the first that converged.
        convergence: steps to `SHARE` of the gain.
        curvature: 1/r*, in 1/pixel.
        secant: second difference along the first direction, in loss per pixel squared.
        slope: directional derivative at x0, in loss per pixel.
        after_one: share of the gain after one step of size eps.
        marks: by measure, why its value is a bound only.
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

    Dropout, in mode "train", has one mask for all evaluations: else noise would pass for curvature.
    """

    def __init__(
        self, view: FrozenModel, x: Tensor, y: Tensor, loss: Loss, batch_size: int, seed: int
    ) -> None:
        self.view, self.x, self.y, self.loss, self.seed = view, x, y, loss, seed
        self.parts = list(view.chunks(x))
        if view.mode == "train":  # a part is a batch of training: BatchNorm looks at all of it
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

    def both(self, x: Tensor) -> tuple[float, Tensor]:
        """The mean loss, checked to be finite, and each sample's gradient, from one evaluation."""
        gradient, total = torch.empty_like(x), 0.0
        for i, part in enumerate(self.parts):
            found: list[Tensor] = []

            def objective(logits: Tensor, part: slice = part, found: list[Tensor] = found) -> Tensor:
                found.append(self.loss(logits, self.y[part]))
                return found[0]

            with rng.scoped(self.seed, "calibration", i, device=x.device):
                gradient[part] = self.view.gradient(self.view.prepare(x[part]), objective)
            total += float(found[0].detach().double().sum())
        return _finite(total / len(x), "mean loss of the probe"), gradient

    def path(self, ball: Ball, steps: int) -> Iterator[tuple[float, Tensor | None]]:
        """(f, x's gradient) at every point of the ascent with K = steps, the last without its gradient."""
        x = self.x
        for _ in range(steps):
            value, gradient = self.both(x)
            yield value, gradient
            x = ball.step(x, gradient, BUDGET * ball.eps / steps, self.x)
        yield self(x), None


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
) -> Inner:
    """Measure the inner problem of a network (see the module), which stays as it is.

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
        meter: where evaluations are counted.

    Raises:
        ValueError: eps is 0, or fewer than 10 steps.
        NonFiniteError: a loss or slope is not finite.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x, y = torch.full((6, 1, 4, 4), 0.5), torch.arange(6) % 3
    >>> found = inner_problem(model, x, y, Ball(0.1))
    >>> abs(found.curvature * 0.1 - 1) < 0.1, found.marks["convergence"]
    (True, 'one step is enough')
    """
    _check(ball, steps)
    with FrozenModel(model, mode, channels_last=channels_last, meter=meter) as view:
        probe = _Probe(view, owned(x.detach()), owned(y), loss, batch_size, seed)
        points = probe.path(ball, steps)
        first, gradient = next(points)
        assert gradient is not None
        losses = (first, *(value for value, _ in points))
        slope, secant = _line(probe, ball, gradient)
        gain = max(losses) - first
        if gain <= _ROUNDING * abs(max(losses, key=abs)):
            marks = dict.fromkeys(("convergence", "curvature", "after_one"), _FLAT)
            return Inner(losses, {}, None, None, secant, slope, None, marks)
        shares = _shares(probe, ball, gradient, losses)
    return _read_off(losses, shares, slope, secant, ball)


def _line(probe: _Probe, ball: Ball, gradient: Tensor) -> tuple[float, float]:
    """Slope at x0 and second difference over eps along the direction d there."""
    direction = ball.direction(gradient)

    def slope(g: Tensor) -> float:
        return _finite(float((g * direction).double().sum()) / len(g), "slope of the loss")

    there = probe.both(probe.x + ball.eps * direction)[1]
    here = slope(gradient)
    return here, (here - slope(there)) / ball.eps


def _shares(probe: _Probe, ball: Ball, gradient: Tensor, losses: tuple[float, ...]) -> dict[int, float]:
    """Share of the gain by K, up to the first K that converged; the gradient at x0 is there already."""
    steps, first, gain = len(losses) - 1, losses[0], max(losses) - losses[0]
    found = {0: 0.0}
    for k in (*_rungs(steps), steps):
        if k == steps:
            value = losses[-1]
        elif k == 1:
            value = probe(ball.step(probe.x, gradient, BUDGET * ball.eps, probe.x))
        else:
            *_, (value, _) = probe.path(ball, k)
        found[k] = (value - first) / gain
        if found[k] >= SHARE:
            break
    return found


def _rungs(steps: int) -> list[int]:
    """Powers of 2, and 3 times such, below `steps`.

    >>> _rungs(20)
    [1, 2, 3, 4, 6, 8, 12, 16]
    """
    return sorted(k for i in range(steps.bit_length()) for k in (2**i, 3 * 2**i) if k < steps)


def _read_off(
    losses: tuple[float, ...], shares: dict[int, float], slope: float, secant: float, ball: Ball
) -> Inner:
    """The measures that are read off the shares of the gain."""
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
    return Inner(losses, shares, needed, curvature, secant, slope, one, marks)


def _check(ball: Ball, steps: int) -> None:
    if ball.eps == 0:
        raise ValueError("eps is 0: there is no inner problem to measure; give a run with eps > 0")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < _LEAST:
        raise ValueError(f"steps must be a whole number >= {_LEAST}, got {steps!r}")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} is not finite")
    return value


# ---- of a run


def measure(
    run: str | Path,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    probe: int = _PROBED,
    steps: int = _FINEST,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a finished run again, in memory, and measure its inner problem before every epoch and at the end.

    The probe is that of the criterion: the same training samples, not augmented, in float32; BatchNorm and
    dropout as in the ascent of the run's method (its attack_mode, "eval" where it has none). The loss is the
    cross-entropy, whatever the method's. Training is not touched by it, to the last bit.

    Args:
        run: directory of a finished `controlat train`.
        data_dir: folder of the data files; that of the run if left out.
        device: auto, cpu, cuda, ...
        threads: CPU threads; those of the run if left out, where there are as many cores.
        probe: training samples.
        steps: K of the finest ascent.
        progress: show a progress bar (on a terminal).

    Returns:
        Plain data: ``run``, ``schedule``, ``seed``, ``times`` [0, ..., E] in epochs, ``epochs`` E (fewer than
        planned where the method ended training), ``measures`` by name, each ``{"what", "values": one per time
        (None where the loss does not rise), "marks": one text per time, empty where the value is no mere
        bound}``, ``losses`` (E + 1, steps + 1), ``probe`` (its samples), ``mode``, ``eps``, ``alpha`` and
        ``steps`` of the finest ascent, ``budget`` tau in pixels, ``gradients`` and ``forwards`` of measuring,
        in samples, ``training_gradients``, ``seconds`` of measuring, ``training_seconds``, ``same`` (whether
        training ended with the run's bits), ``warning`` (why not; None if it did), ``environment``.

    Raises:
        ValueError: not a run of `controlat train`, unfinished, data that is missing, a number out of range.
        NonFiniteError: a loss is not finite; says at which epoch.
    """
    settings, theirs = _read(Path(run), data_dir, device, threads, probe, progress)
    _check(settings.ball, steps)
    began = time.perf_counter()
    with deterministic(settings.threads):
        shared, seed = shares_held_out(run), settings.seeds[0]
        experiment = Experiment.of(settings, shared)
        spec = replace(experiment.spec(settings.schedule_of(settings.schedules[0]), seed), world=World())
        driver, meter = experiment.driver(seed), Meter()
        order = torch.randperm(len(experiment.training), generator=rng.generator(0, _PROBE))[:probe]
        look = _Look(*experiment.training.take(order), _mode(driver), spec.batch_size, steps, meter)
        with progress_bar(spec.epochs * spec.batches_per_epoch, " steps", progress, "calibrate") as bar:
            found = [look(driver, epoch) for epoch in _epochs(driver, spec, bar.update)]
        trained = load_checkpoint(Path(run) / "last.pt", driver.device)["model"]
        ours, same = environment(driver.device), same_bits(driver.model.state_dict(), trained)
    seconds = sum(taken for _, taken in found)
    return {
        "run": str(run),
        "schedule": spec.schedule.text,
        "seed": seed,
        **_series([inner for inner, _ in found]),
        "probe": len(order),
        "mode": look.mode,
        "eps": settings.ball.eps,
        "alpha": BUDGET * settings.ball.eps / steps,
        "steps": steps,
        "budget": BUDGET * settings.ball.eps,
        "gradients": meter.gradients,
        "forwards": meter.forwards,
        "training_gradients": driver.meter.gradients,
        "seconds": seconds,
        "training_seconds": time.perf_counter() - began - seconds,
        "same": same,
        "warning": None if same else _warning(theirs, ours),
        "environment": ours,
    }


def measured(
    run: str | Path,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    probe: int = _PROBED,
    steps: int = _FINEST,
    progress: bool = True,
) -> dict[str, Any]:
    """`measure`, or what an earlier call left in the run's directory, if all that decides it is the same.

    Args: as of `measure`.

    Returns:
        As `measure`, and under ``key`` what decided it: digests of the run's checkpoint, settings, schedule
        and training data, probe, steps, budget, share, device, threads, versions.

    Raises: as of `measure`.
    """
    run = Path(run)
    settings, _ = _read(run, data_dir, device, threads, probe, progress)
    _check(settings.ball, steps)
    key = _key(run, settings, steps)
    if (run / _KEPT).exists():
        open_file(run / _KEPT, JSON_LIMIT).close()  # what is no file of ours is refused, not replaced
    with contextlib.suppress(ValueError):  # missing, damaged, or of an earlier form
        kept = dict(read_record(run / _KEPT, Calibrated))
        if kept["key"] == key:
            return kept
    options: dict[str, Any] = {"data_dir": data_dir, "device": device, "threads": threads}
    found = measure(run, probe=probe, steps=steps, progress=progress, **options) | {"key": key}
    with contextlib.suppress(OSError):  # a run that may not be written to is measured anew each time
        write_json(run / _KEPT, found)
    return found


def _key(run: Path, settings: EvaluateSettings, steps: int) -> dict[str, Any]:
    """All that decides a measurement, as plain data."""
    files = ("last.pt", "settings.json", "schedule.json")
    with deterministic(settings.threads):
        there = environment(pick_device(settings.device))
    return {
        "version": _VERSION,
        "files": {name: _digest(run / name) for name in files},
        "data": Experiment.of(settings).training.fingerprint(),
        "probe": settings.probe,
        "steps": steps,
        "budget": BUDGET,
        "share": SHARE,
        **{name: there[name] for name in ("controlat", "torch", "device", "hardware", "threads")},
    }


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Look:
    """What is looked at in every epoch alike: samples, mode, batch size in mode "train", steps."""

    x: Tensor
    y: Tensor
    mode: str
    batch_size: int
    steps: int
    meter: Meter

    def __call__(self, driver: Driver, epoch: int) -> tuple[Inner, float]:
        """The inner problem at the driver's present state, and the seconds that it took."""
        began = time.perf_counter()
        try:
            found = inner_problem(
                driver.model,
                self.x,
                self.y,
                driver.ball,
                steps=self.steps,
                mode=self.mode,
                batch_size=self.batch_size,
                channels_last=driver.channels_last,
                seed=driver.seed,
                meter=self.meter,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (inner problem at t = {epoch})") from None
        return found, time.perf_counter() - began


def _epochs(driver: Driver, spec: RunSpec, told: Callable[[], object]) -> Iterator[int]:
    """0, ..., E, with the driver at the start of that epoch; it trains in between, `told` of every step."""
    for epoch in range(spec.epochs):
        yield epoch
        for _ in rollout(driver, spec, epoch=epoch, until=epoch + 1):
            told()
        if driver.stopped:
            break
    yield epoch + 1


def _read(
    run: Path, data_dir: str | None, device: str, threads: int | None, probe: int, progress: bool
) -> tuple[EvaluateSettings, dict[str, Any]]:
    """Problem, schedule and seed of a finished run, as `evaluate --run` reads them, and its environment.

    Raises:
        ValueError: it is no such run.
    """
    given: dict[str, Any] = {"data_dir": data_dir, "device": device, "progress": progress}
    settings = EvaluateSettings(run=str(run), probe=probe, threads=threads, **given)
    stored = load_checkpoint(run / "last.pt")
    done = stored["tally"]["epoch"]
    if done < settings.epochs and not stored["stopped"]:
        raise ValueError(
            f"{run} has a checkpoint of {done} of {settings.epochs} epochs; finish it with --resume"
        )
    theirs: dict[str, Any] = stored["environment"]
    if data_dir is None:
        settings.data_dir = stored["settings"].get("data_dir")
    if threads is None and theirs["threads"] <= (os.cpu_count() or 1):
        settings.threads = theirs["threads"]
    return settings, theirs


def _mode(driver: Driver) -> str:
    """BatchNorm and dropout as the criterion has them on its probe: as the method attacks."""
    mode = getattr(driver.method, "attack_mode", "eval")
    return mode if mode in MODES else "eval"


def _series(found: list[Inner]) -> dict[str, Any]:
    """The measures by name, each over time."""
    measures = {
        name: {
            "what": what,
            "values": [getattr(inner, name) for inner in found],
            "marks": [inner.marks.get(name, "") for inner in found],
        }
        for name, what in _WHAT.items()
    }
    epochs = len(found) - 1
    losses = [list(inner.losses) for inner in found]
    return {"times": list(range(epochs + 1)), "epochs": epochs, "measures": measures, "losses": losses}


def _warning(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Why training did not end with the bits of the run, as far as the two environments tell."""
    names = ("controlat", "torch", "system", "device", "hardware", "threads", "processes")
    told = [f"{n} {theirs.get(n)} there, {ours.get(n)} here" for n in names if theirs.get(n) != ours.get(n)]
    why = "; ".join(told) if told else "the environments agree: was the data or the user's own code changed?"
    return (
        f"training did not end with the bits of the run ({why}); what is measured belongs to a sibling of it"
    )
