"""From K*(t) of a landscape to a schedule of the trainer: epochs, bounds on K, the network's own tau."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlat._util.checks import choice
from controlat.control.schedules import Curve, Schedule

__all__ = ["MAPPINGS", "Handover", "hand_over"]

Array = NDArray[np.float64]
MAPPINGS = {
    "affine": "the range of K* over [0, T] is stretched to [k_min, k_max]",
    "clip": "K* as it is, cut off at k_min and k_max",
}


@dataclass(frozen=True)
class Handover:
    """A schedule for the trainer, and what became of K*.

    Args:
        schedule: u(t) for the trainer or one's own loop.
        real: K* at the start of every piece, in units of the landscape.
        mapped: the same after the mapping, before it is rounded.
        clipped: which pieces were cut off at a bound.
        note: what was done, in words.
    """

    schedule: Schedule
    real: tuple[float, ...]
    mapped: tuple[float, ...]
    clipped: tuple[bool, ...]
    note: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        t = [i * self.schedule.resolution for i in range(len(self.real))]
        rows = {name: list(getattr(self, name)) for name in ("real", "mapped", "clipped")}
        controls = [dict(self.schedule(piece)) for piece in t]
        return {"schedule": self.schedule.to_json(), "t": t, **rows, "controls": controls, "note": self.note}


def hand_over(
    steps: Callable[[Any], Any],
    horizon: float,
    *,
    epochs: float,
    k_min: float,
    k_max: float,
    tau: float,
    mapping: str = "affine",
    resolution: float = 1.0,
    since: float = 0.0,
    label: str = "derived",
) -> Handover:
    """Turn K*(t), 0 <= t <= T, into a schedule over a number of epochs: alpha = tau/K, K rounded half up.

    Epoch e stands for t = e T/epochs, its start, as in every schedule (later where `since` is given). K*
    stays real in the schedule's curve; it is rounded when the schedule is called.

    Args:
        steps: K*(t), for arrays.
        horizon: T, in units of the landscape's time.
        epochs: length of training.
        k_min: smallest number of inner steps.
        k_max: largest number of inner steps.
        tau: alpha K of the network, in pixel units: the landscape's tau is in other units.
        mapping: ``affine`` (the range of K* is stretched to the bounds) or ``clip`` (K* as it is, cut off).
        resolution: length of a piece, in epochs.
        since: share of training before the landscape's time begins; K*(0) holds until then.
        label: the schedule's text, for tables.

    Raises:
        ValueError: a number is out of range.

    >>> schedule = hand_over(lambda t: 1 + t, 4.0, epochs=4, k_min=2, k_max=10, tau=0.3).schedule
    >>> [schedule(epoch)["steps"] for epoch in range(4)], round(schedule(2)["alpha"], 6)
    ([2, 4, 6, 8], 0.05)
    """
    choice(mapping, "mapping", MAPPINGS)
    _check(k_min, k_max, tau=tau, epochs=epochs, resolution=resolution, since=since)
    t = np.arange(max(1, math.ceil(epochs / resolution - 1e-9))) * resolution
    share = np.clip((t / epochs - since) / (1 - since), 0, 1)
    real = np.asarray(steps(share * horizon), dtype=float)
    every = np.asarray(steps(np.linspace(0, horizon, 2001)), dtype=float)
    ends = float(every.min()), float(every.max())
    mapped, clipped, note = _mapped(real, ends, k_min, k_max, stretched=mapping == "affine")
    curves = {
        "steps": Curve("table", tuple(mapped.tolist()), rounding="half_up"),
        "alpha": Curve("ratio", (float(tau),), of="steps"),
    }
    rows = {"real": real, "mapped": mapped, "clipped": clipped}
    plain = {name: tuple(values.tolist()) for name, values in rows.items()}
    return Handover(schedule=Schedule(curves, epochs, resolution, label), note=note, **plain)


def _check(k_min: float, k_max: float, *, tau: float, epochs: float, resolution: float, since: float) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: there is one.
    """
    for good, allowed, got in (
        (0 <= k_min <= k_max < math.inf, "k_min and k_max must be 0 <= k_min <= k_max", (k_min, k_max)),
        (0 < tau < math.inf, "tau of the network must be > 0, in pixel units such as 0.3", (tau,)),
        (0 < resolution <= epochs, "epochs must be > 0 and resolution in (0, epochs]", (epochs, resolution)),
        (0 <= since < 1, "since must be a share of training in [0, 1)", (since,)),
    ):
        if not good:
            raise ValueError(f"{allowed}, got {' and '.join(f'{value:g}' for value in got)}")


def _mapped(
    real: Array, ends: tuple[float, float], k_min: float, k_max: float, *, stretched: bool
) -> tuple[Array, NDArray[np.bool_], str]:
    """K* within the bounds, which pieces were cut off there, and what was done in words.

    `ends` are the smallest and the largest K* of [0, T]; `stretched` asks for them to be moved to the bounds.
    """
    low, high = ends
    note, bounds = f"K* from {low:.4g} to {high:.4g}", f"{k_min:g}..{k_max:g}"
    if stretched and high - low > 1e-9 * abs(high):
        note += f", stretched to {bounds}"
        if low > 0 and (k_min == 0 or k_max / k_min > 3 * high / low):
            note += f" (NOTE: K* itself changes by a factor of {high / low:.3g} only; clip keeps its values)"
        return k_min + (k_max - k_min) * (real - low) / (high - low), np.zeros(len(real), dtype=bool), note
    mapped = np.clip(real, k_min, k_max)
    clipped = mapped != real
    note += ", constant, which cannot be stretched" * stretched + f", within {bounds}"
    note += f"; cut off in {int(clipped.sum())} of {len(real)} pieces" * bool(clipped.any())
    return mapped, clipped, note
