"""AutoAttack, through pyautoattack where it is installed."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.checks import whole
from controlat._util.errors import NonFiniteError
from controlat._util.precision import full_precision
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.accuracy import Accuracy
from controlat.robust_accuracy.robust import correct_mask
from controlat.robust_accuracy.source import Source, batches, check_arguments, spread

__all__ = ["AutoAttacked", "auto_cost", "autoattack", "require"]

_NORMS = {"linf": "Linf", "l2": "L2"}
_ITERATIONS, _QUERIES = 100, 5000
_CHECKS = 11  # forward passes around each attack: 7 for checks, 2 before it and 2 after it
_SQUARE = 0.002  # by how much Square may lower the accuracy: pyautoattack's own threshold
_SLACK = 1e-5  # by how much rounding may lengthen a perturbation


@dataclass(frozen=True)
class AutoAttacked:
    """The outcome of AutoAttack.

    Args:
        clean: accuracy without an attack.
        after: accuracy after each of its attacks, on the samples that survived those before.
        robust: accuracy after all attacks.
        spent: evaluations, in samples, counted as they happen.
        seconds: wall time.
        warnings: warnings of AutoAttack itself.
        survived: (N,) mask of the robust samples among those attacked.
        positions: (N,) positions of these samples in the test set.
    """

    clean: Accuracy
    after: dict[str, Accuracy]
    robust: Accuracy
    spent: Meter
    seconds: float
    warnings: tuple[str, ...] = ()
    survived: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "points": self.clean.points,
            "clean": self.clean.to_json(),
            "after": {name: accuracy.to_json() for name, accuracy in self.after.items()},
            "robust": self.robust.to_json(),
            "gradients": self.spent.gradients,
            "forwards": self.spent.forwards,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def require() -> Any:
    """The class pyautoattack.AutoAttack.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ValueError(
            "AutoAttack needs pyautoattack: pip install 'controlat[autoattack]', or leave out --autoattack"
        ) from None
    return AutoAttack


def _plan(classes: int) -> dict[str, Meter]:
    """The attacks for a number of classes, each with what it costs one sample at most.

    The standard version attacks 9 target classes with APGD on the targeted DLR loss, which needs 4 classes.
    """
    targets = min(9, classes - 1)
    white = {"apgd-ce": Meter(_ITERATIONS + 1, _CHECKS)}
    if classes >= 4:
        white["apgd-t"] = Meter(targets * (_ITERATIONS + 1), targets + _CHECKS)
    elif classes == 3:
        white["apgd-dlr"] = Meter(_ITERATIONS + 1, _CHECKS)
    white["fab-t"] = Meter(targets * _ITERATIONS, targets * (_ITERATIONS + 3) + _CHECKS)
    return white | {"square": Meter(0, _QUERIES + 2 + _CHECKS)}


def auto_cost(classes: int) -> Meter:
    """Evaluations per sample, at most: those of a sample that no attack breaks."""
    costs = _plan(classes).values()
    return Meter(sum(m.gradients for m in costs), sum(m.forwards for m in costs) + 2)


class _Counted(nn.Module):
    """The network as a module for AutoAttack: float32 in and out, evaluations counted by the view."""

    def __init__(self, view: FrozenModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.view, self.dtype = view, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.view.logits(x.to(self.dtype)).float()


class _Warnings(logging.Handler):
    """Collects the texts of warnings; those that differ in their numbers only are kept once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a warning, unless it is on the number of classes, which `_plan` takes care of."""
        text = record.getMessage().partition(" See flags_doc")[0].strip().rstrip(".")
        if not text.startswith("with only"):
            self.texts.setdefault(re.sub(r"\d+", "#", text), text)


@full_precision()
def autoattack(
    model: nn.Module,
    source: Source,
    ball: Ball,
    *,
    points: int,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, str], object] | None = None,
    channels_last: bool = True,
) -> AutoAttacked:
    """The standard AutoAttack on some points, in eval mode; the model is left as it was.

    APGD on the cross-entropy, targeted APGD on DLR, targeted FAB and Square, each on the samples that
    survived those before; as pyautoattack's run_standard_evaluation in one call, but counted and with
    progress. With fewer than 10 classes all others are targets; with 3, APGD on the plain DLR loss takes the
    place of the targeted one, and with 2 it is left out.

    Args:
        model: from inputs (N, C, H, W) in [0, 1] to logits.
        source: the test points.
        ball: the perturbation set.
        points: how many points, spread evenly over the test set.
        batch_size: samples at a time.
        seed: of everything random.
        progress: called with (samples done, name of the attack); samples that earlier attacks broke count
            as done.
        channels_last: run convolutions in NHWC layout; False keeps the layout of the weights.

    Raises:
        ValueError: pyautoattack is missing, or inputs are not images.

    Source:
        Croce and Hein (2020).
    """
    kind, captured, points = require(), _Warnings(), whole(points, "points", 1)
    batch_size, seed = check_arguments(source, ball, batch_size, seed, progress)
    start_time, meter, notify = time.perf_counter(), Meter(), progress or (lambda n, name: None)
    positions = spread(torch.arange(len(source.y)), points)
    with FrozenModel(model, "eval", channels_last=channels_last, meter=meter) as view:
        survived = correct_mask(view, _Subset(source, positions), batch_size)
        clean = Accuracy.of(survived)
        after: dict[str, Accuracy] = {}
        classes = _classes(view, source, positions)
        for name in _plan(classes):
            notify(int((~survived).sum()), name)
            for index, x, y in batches(source, positions[survived], batch_size):
                targets = min(9, classes - 1)
                broken = _broken(kind, _Counted(view, x.dtype), name, x, y, ball, targets, seed, captured)
                survived[torch.isin(positions, index[broken])] = False
                notify(len(index), name)
            after[name] = Accuracy.of(survived)
    return AutoAttacked(
        clean=clean,
        after=after,
        robust=Accuracy.of(survived),
        spent=meter,
        seconds=time.perf_counter() - start_time,
        warnings=(*captured.texts.values(), *_square_warnings(after)),
        survived=survived,
        positions=positions,
    )


def _classes(view: FrozenModel, source: Source, positions: Tensor) -> int:
    """Number of the model's classes; raises ValueError if inputs are not images."""
    (_, first, _), *_ = batches(source, positions[:1], 1)
    if first.dim() != 4:
        raise ValueError(f"AutoAttack takes images (N, C, H, W), got inputs {tuple(first.shape)}")
    return view(first).shape[1]


def _square_warnings(after: dict[str, Accuracy]) -> list[str]:
    """AutoAttack's own check of its last attack, which it does only if all attacks run in one call."""
    *_, white, square = after.values()
    if square.value >= white.value - _SQUARE:
        return []
    return [
        f"Square broke {white.correct - square.correct} of {white.correct} points that survived its "
        "gradient attacks, which may be unreliable here"
    ]


@dataclass(frozen=True)
class _Subset:
    """The points of a source at some positions."""

    source: Source
    positions: Tensor

    @property
    def y(self) -> Tensor:
        return self.source.y[self.positions.to(self.source.y.device)]

    def stream(self, chunks: Any) -> Any:
        return self.source.stream([self.positions[chunk] for chunk in chunks])


def _broken(
    kind: Any,
    model: nn.Module,
    name: str,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    targets: int,
    seed: int,
    captured: logging.Handler,
) -> Tensor:
    """(N,) mask on the CPU of the samples that one attack breaks; its perturbations are checked."""
    trace = sys.gettrace()
    logger = logging.Logger("controlat.autoattack")
    logger.addHandler(captured)
    try:
        with rng.scoped(seed, "autoattack", device=x.device):
            run = kind(
                model,
                attacks=[name],
                version="custom",
                norm=_NORMS[ball.norm],
                eps=ball.eps,
                device=x.device,
                seed=seed,
            )
            run.logger = run.apgd.logger = run.apgd_targeted.logger = logger
            run.apgd.n_restarts = run.fab.n_restarts = 1
            run.apgd_targeted.n_target_classes = run.fab.n_target_classes = targets
            adversarial, _ = run.run_standard_evaluation(x.float(), y, batch_size=len(x))
    finally:
        sys.settrace(trace)  # pyautoattack sets a trace function of its own, and leaves none
    if not bool(torch.isfinite(adversarial).all()):
        raise NonFiniteError(f"AutoAttack's {name} made inputs that are not finite")
    inside = ball.distance(adversarial, x) <= ball.eps + _SLACK
    with torch.no_grad():
        broken: Tensor = (model(adversarial.clamp(0, 1)).argmax(1) != y) & inside
    return broken.cpu()
