"""The settings of `derive`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from controlat._util.checks import number
from controlat._util.files import expanded
from controlat.app.ranges import check_kinds, check_ranges
from controlat.app.settings.problem import RUNTIME
from controlat.app.settings.train import finished_run
from controlat.control.handover import MAPPINGS
from controlat.symbolic import AMATA

__all__ = ["DeriveSettings"]

MEASURES = ("convergence", "curvature")


@dataclass
class DeriveSettings:
    """Derive a schedule from a one-dimensional landscape l(theta, x), and check it.

    Args:
        landscape: Formula in theta, x and named parameters, such as theta^2/2 - (x - theta)^2/(theta^2 + 1),
            which is Amata's and the default. One that begins with a minus sign: --landscape=-theta...
        parameters: Values of the named parameters, such as {a: 2}.
        x0: Data point, where the inner ascent starts.
        theta0: theta at t = 0; with --calibrate it says on which side of the minimum to look.
        tau: Product alpha K of the landscape, held fixed.
        horizon: Length T of training in the landscape's time, theta' = -dL/dtheta.
        gamma: Price of one inner step per unit of that time.
        order: Highest power of t in the Taylor series of K*.
        branch: Which inner maximum at theta0, by value (0 is the largest), where there are several; the
            largest, if the ascent from x0 reaches it, if left out.
        x_range: Where inner maxima are looked for; 10 to either side of x0 if left out.
        theta_range: How far the inner maximum is followed; +-max(3, 2 |theta0|) if left out.
        admissible: product (alpha K = tau, alpha <= alpha*, K real), integer (K whole), free (alpha and K),
            overshoot (alpha up to a multiple of alpha*). Real K is not offered where l is not quadratic in x:
            integer there, else product, if left out.
        overshoot: That multiple, between 1 and 2.
        checks: Check the schedule against the maximum principle and by dynamic programming, and compare
            Theorem 1 with actual runs.
        transcription: Look for a better schedule by direct transcription, too; for product only.
        seconds: Time limit of the whole derivation, after the measuring of --calibrate and before figures:
            formulas get half of it, checks the rest; what was left out for lack of time is named. The numbers
            alone may take 10 seconds in any case.
        epochs: Length of the network's training; 12, or that of the run with --calibrate, if left out.
        k_min: Smallest K of the network's schedule.
        k_max: Largest K of the network's schedule.
        tau_net: alpha K of the network in pixel units; 0.3, or 2 eps of the run, if left out.
        mapping: affine (the range of K* is stretched to k_min..k_max) or clip (K* itself, cut off there);
            clip with --calibrate, which knows K* in steps of the network, else affine.
        resolution: Length of a piece of the network's schedule, in epochs.
        calibrate: Directory of a finished controlat train: theta0, scale of time and tau are fitted to it.
        measure: What is fitted: convergence (inner steps needed) or curvature (of the loss along the ascent).
        since: Fit from this epoch of the run on; from where the measure is lowest if left out.
        data_dir: Folder of the run's data files; where the run had them if left out.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps; for --calibrate.
        threads: CPU threads; those of the run if left out.
        progress: Show a progress bar (on a terminal).
    """

    landscape: str = AMATA
    parameters: dict[str, Any] = field(default_factory=dict)
    x0: str | float = 0
    theta0: str | float = 1
    tau: str | float = 10
    horizon: str | float = 3
    gamma: str | float = "0.01"
    order: int = 2
    branch: int | None = None
    x_range: Sequence[str | float] | None = None
    theta_range: Sequence[str | float] | None = None
    admissible: str | None = None
    overshoot: float = 1.9
    checks: bool = True
    transcription: bool = False
    seconds: float = 60.0
    epochs: int | None = None
    k_min: float = 1
    k_max: float = 10
    tau_net: str | float | None = None
    mapping: str | None = None
    resolution: float = 1.0
    calibrate: str | None = None
    measure: str = "convergence"
    since: float | None = None
    data_dir: str | None = None
    device: str = "auto"
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("x_range", "theta_range"):
            given = getattr(self, name)
            if given is not None:
                if len(given) != 2:
                    raise ValueError(f"{name} must be two numbers, got {given}")
                setattr(self, name, [number(v, name) for v in given])
        check_ranges(self)
        if self.resolution > (self.epochs or math.inf):
            raise ValueError(f"resolution must be at most the {self.epochs} epochs, got {self.resolution:g}")
        if self.data_dir is not None:
            self.data_dir = str(expanded(self.data_dir).absolute())
        if self.calibrate is not None:
            self.calibrate = str(expanded(self.calibrate))
            finished_run(Path(self.calibrate))
            for name in ("tau", "horizon"):
                default = type(self).__dataclass_fields__[name].default
                if number(getattr(self, name), name) != number(default, name):
                    raise ValueError(f"{name} is fitted to the run with calibrate: leave it out")
        if self.mapping is None:
            self.mapping = "affine" if self.calibrate is None else "clip"
        if self.mapping not in MAPPINGS:
            raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}")
        if self.k_min > self.k_max:
            raise ValueError(f"K needs k_min <= k_max, got {self.k_min:g} and {self.k_max:g}")
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        from controlat.bolza.admissible import chosen_set  # here, because sympy is slow to import

        self.admissible = chosen_set(self.task.landscape, self.admissible)
        if self.transcription and self.admissible != "product":
            raise ValueError(
                f"transcription is for product only, got admissible {self.admissible}: leave it out"
            )

    @property
    def task(self) -> Any:  # named in full, the type would be imported, and sympy, when any command starts
        """The problem on the landscape, a `controlat.symbolic.Task`."""
        from controlat.symbolic import Landscape, Task

        x_range, theta_range = (
            None if r is None else (number(r[0], "range"), number(r[1], "range"))
            for r in (self.x_range, self.theta_range)
        )
        return Task(
            landscape=Landscape(self.landscape, self.x0, self.parameters, x_range),
            theta0=self.theta0,
            tau=self.tau,
            horizon=self.horizon,
            gamma=self.gamma,
            order=self.order,
            branch=self.branch,
            theta_range=theta_range,
            seconds=self.seconds / 2 if self.checks else self.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """What decides the results, as plain data; `transcription`, newer than release 0.1, only if on."""
        left_out = RUNTIME if self.transcription else (*RUNTIME, "transcription")
        return {k: v for k, v in asdict(self).items() if k not in left_out}
