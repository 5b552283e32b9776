"""Where a run stands and what it has spent: a part of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from controlat.control.cost import Meter
from controlat.dynamics.step import Step, read_losses

__all__ = ["Tally"]


@dataclass
class Tally:
    """Where a run stands and what it has spent, hooks of the method included; stored in every checkpoint.

    Args:
        epoch: epoch to go on with, from 0.
        batch: batch of that epoch to go on with.
        gradients: gradient evaluations of training so far, in samples.
        forwards: forward passes of training so far.
        layers: passes through the first layer alone so far (YOPO).
        seconds: wall time of training so far, without validation.
        loss: sum of the losses of the present epoch, by samples.
        samples: samples of the present epoch so far.
        epoch_gradients: evaluations of the present epoch so far.
        epoch_seconds: wall time of the present epoch so far.
        controls: controls that were taken in the present epoch so far, as `run_lengths` writes them.
        best: best robust accuracy on held-out data so far, -1 before the first.
        best_epoch: its epoch.
        dropped: smooth dependences on theta that the method detached.
        evaluations: sum over the steps so far of n, gradient evaluations per sample; None in a run that was
            begun before it was counted.
    """

    epoch: int = 0
    batch: int = 0
    gradients: int = 0
    forwards: int = 0
    layers: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    samples: int = 0
    epoch_gradients: int = 0
    epoch_seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = -1
    dropped: list[str] = field(default_factory=list)
    controls: list[list[Any]] = field(default_factory=list)
    evaluations: float | None = 0.0

    def __post_init__(self) -> None:
        self._unread: list[Step] = []

    def add(self, step: Step) -> None:
        """Count one outer step; its loss, if it is still on a GPU, is added by `read_losses`."""
        self.batch = step.batch + 1
        if not self.controls or self.controls[-1][1] != dict(step.control):
            self.controls.append([step.batch, dict(step.control)])
        self._unread.append(step)
        if isinstance(step.value, float):
            self.read_losses()
        self.samples += step.samples
        if self.evaluations is not None:
            self.evaluations += step.evaluations
        self.dropped = sorted({*self.dropped, *step.dropped})

    def read_losses(self) -> None:
        """Add the losses of the steps that were counted, in one transfer from the device."""
        unread, self._unread = self._unread, []
        for step, loss in zip(unread, read_losses(unread), strict=True):
            self.loss += loss * step.samples

    def spend(self, spent: Meter, seconds: float) -> None:
        """Count evaluations and time, of steps or of hooks."""
        self.gradients += spent.gradients
        self.forwards += spent.forwards
        self.layers += spent.layers
        self.seconds += seconds
        self.epoch_gradients += spent.gradients
        self.epoch_seconds += seconds

    def next_epoch(self, robust: float | None = None) -> bool:
        """Begin a new epoch.

        Args:
            robust: robust accuracy on held-out data at the end of the last one, where it was measured.

        Returns:
            Whether it is the best so far.
        """
        better = robust is not None and robust > self.best
        if better:
            self.best, self.best_epoch = robust, self.epoch  # type: ignore[assignment]
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss, self.samples, self.epoch_gradients, self.epoch_seconds = 0.0, 0, 0, 0.0
        self.controls = []
        return better
