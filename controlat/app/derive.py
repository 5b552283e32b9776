"""The job `derive`: solve a landscape, check the result, and make it a schedule of the trainer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlat._util.checks import number
from controlat._util.files import expanded
from controlat._util.progress import progress_bar
from controlat.app.derive_result import content, write
from controlat.app.runs import claimed
from controlat.app.settings import DeriveSettings, settings_from
from controlat.control.handover import Handover, hand_over
from controlat.control.schedules import Schedule
from controlat.symbolic import AMATA

if TYPE_CHECKING:
    from controlat.bolza import Bound, Verification
    from controlat.symbolic import Derivation, Fit

__all__ = ["Derived", "derive"]

DEMO_TAU, RUN_TAU = 0.3, 2.0  # alpha K of the network: that of the demo; in units of eps of a run
DEMO_EPOCHS = 12
_NUMBERS = 10.0  # seconds that the numbers alone may take, however short the time limit


@dataclass(frozen=True)
class Derived:
    """What `derive` returns: formulas, functions of time, checks, and the schedule for the trainer.

    Args:
        derivation: x*(theta), alpha*(theta), theta(t), K*(t) and the rest, as formulas and as functions.
        handover: the network's schedule, and what became of K* on the way.
        verification: the check against the maximum principle; None if it was left out.
        bound: Theorem 1 beside actual runs; None if it was left out.
        fit: the calibration; None without a run.
        result: all of it as plain data, the content of result.json.
    """

    derivation: Derivation
    handover: Handover
    verification: Verification | None
    bound: Bound | None
    fit: Fit | None
    result: dict[str, Any]

    @property
    def schedule(self) -> Schedule:
        """The schedule for the trainer, or for one's own loop."""
        return self.handover.schedule

    def for_network(
        self, *, epochs: float, k_min: float, k_max: float, tau: float, **options: Any
    ) -> Schedule:
        """The schedule for another network: as `controlat.control.handover.hand_over`."""
        horizon = float(self.derivation.task.horizon)
        options = {"epochs": epochs, "k_min": k_min, "k_max": k_max, "tau": tau} | options
        return hand_over(self.derivation.K, horizon, **options).schedule

    def theta(self, t: Any) -> Any:
        """theta(t) of the robust flow."""
        return self.derivation.theta(t)

    def alpha(self, t: Any) -> Any:
        """alpha*(theta(t))."""
        return self.derivation.alpha(t)

    def K(self, t: Any) -> Any:
        """K*(t), a real number."""
        return self.derivation.K(t)

    def __repr__(self) -> str:
        task = self.derivation.task
        numbers = ", ".join(f"{n} = {getattr(task, n)}" for n in ("theta0", "tau", "horizon", "gamma"))
        return f"Derived({task.landscape.text!r}, {numbers}; {self.schedule.text})"

    def __str__(self) -> str:
        from controlat.report.derivation.terminal import printed

        return printed(self.result)


def derive(landscape: str = AMATA, *, out: str | Path | None = None, **settings: Any) -> Derived:
    """Derive a schedule from a one-dimensional landscape l(theta, x), check it, and make it a network's.

    Args:
        landscape: formula in theta, x and named parameters; Amata's (Ye et al., 2021, equation 11) if left
            out.
        out: directory for result.json, schedule.json, summary.md and figures; nothing is written without it.
        **settings: the other fields of `controlat.app.settings.DeriveSettings`.

    Returns:
        The formulas, functions, checks and the schedule; printed, it reads like summary.md.

    Raises:
        ValueError: bad settings; a formula that is refused; a landscape without an inner maximum, with a flat
            one, or whose flow leaves its domain; a directory that holds something else.

    >>> derived = derive(theta0=1, tau=10, horizon=3, checks=False)
    >>> print(derived.derivation.formula("K"))
    2*tau*exp(2*t)/(theta_0**2 + exp(2*t))
    >>> [derived.schedule(epoch)["steps"] for epoch in range(12)]
    [1, 3, 5, 7, 8, 9, 9, 10, 10, 10, 10, 10]
    """
    chosen = settings_from(DeriveSettings, {"landscape": landscape, **settings}, "derive")
    plain = {"command": "derive"} | chosen.to_json()
    if out is None:
        return _derive(chosen, plain, None)
    out = expanded(out)
    with claimed(out, plain):
        return _derive(chosen, plain, out)


@np.errstate(all="ignore")  # what is not finite is named in the result
def _derive(chosen: DeriveSettings, plain: dict[str, Any], out: Path | None) -> Derived:
    measured = _measured(chosen)
    began = time.perf_counter()
    with progress_bar(4, "", chosen.progress) as bar:
        derivation, fit, verification, bound, late = _solved(chosen, measured, bar)
        handover = _hand_over(chosen, derivation, measured, fit)
        result = content(
            plain,
            derivation,
            verification=verification,
            bound=bound,
            calibration=None if fit is None else {"fit": fit.to_json(), "measured": measured},
            handover=handover,
        )
        result |= {"left_out": late, "seconds": time.perf_counter() - began}
        if out is not None:
            bar.set_description("figures")
            write(result, out)
    return Derived(derivation, handover, verification, bound, fit, result)


def _solved(
    chosen: DeriveSettings, measured: dict[str, Any] | None, bar: Any
) -> tuple[Derivation, Fit | None, Verification | None, Bound | None, list[str]]:
    """Derivation, fit, the two checks, and what was left out, within the time limit.

    Raises:
        ValueError: the time was over before the numbers were there.
    """
    from controlat._util.limits import within

    began = time.monotonic()
    bar.set_description("deriving")
    derivation, fit = _derived(chosen, measured)
    bar.update()
    late = list(derivation.budget.late)
    if not chosen.checks:
        return derivation, fit, None, None, late
    with within(chosen.seconds - (time.monotonic() - began)):
        bar.set_description("the maximum principle")
        verification = _verified(chosen, derivation)
        late += ["the check against the maximum principle"] if verification is None else verification.left_out
        bar.update()
        bar.set_description("Theorem 1")
        bound, told = _bound(derivation)
        bar.update()
    return derivation, fit, verification, bound, late + told


def _verified(chosen: DeriveSettings, derivation: Derivation) -> Verification | None:
    """The check against the maximum principle; None where the deadline stopped it."""
    from controlat._util.limits import TimeLimit
    from controlat.bolza import verify

    task = derivation.task
    try:
        return verify(
            derivation.branch,
            theta0=float(task.theta0),
            tau=float(task.tau),
            horizon=float(task.horizon),
            gamma=float(task.gamma),
            admissible=chosen.admissible,
            overshoot=chosen.overshoot,
            transcription=chosen.transcription,
        )
    except TimeLimit:
        return None


def _bound(derivation: Derivation) -> tuple[Bound, list[str]]:
    """Theorem 1 beside actual runs, and whether the deadline left rows out."""
    from controlat._util.limits import LATE
    from controlat.bolza import convergence

    bound = convergence(derivation.branch, float(derivation.task.theta0), sigma=(0.0, 0.5))
    late = LATE in (bound.reason, *(row["reason"] for row in bound.rows))
    return bound, ["rows of Theorem 1"] * late


def _derived(chosen: DeriveSettings, measured: dict[str, Any] | None) -> tuple[Derivation, Fit | None]:
    """The derivation of the landscape, calibrated first where a run was measured, within the time limit."""
    from controlat._util.limits import TimeLimit, within
    from controlat.symbolic import Derivation

    task, fit, least = chosen.task, None, max(chosen.seconds, _NUMBERS)
    try:
        with within(least):
            if measured is not None:
                task, fit = _fitted(chosen, measured)
            return Derivation(task), fit
    except TimeLimit:
        raise ValueError(
            f"seconds: the numbers alone take longer than {least:g} seconds; give more, or a shorter horizon"
        ) from None


def _measured(chosen: DeriveSettings) -> dict[str, Any] | None:
    """What was measured on the run: now, or by an earlier call, which left it with the run."""
    if chosen.calibrate is None:
        return None
    from controlat.app.calibration import calibration

    options: dict[str, Any] = {"data_dir": chosen.data_dir, "device": chosen.device}
    return calibration(chosen.calibrate, threads=chosen.threads, progress=chosen.progress, **options)


def _fitted(chosen: DeriveSettings, measured: dict[str, Any]) -> tuple[Any, Fit]:
    """The task that the run asks for: theta_0, the scale of time, and tau so that K* is in its steps.

    The steps needed are K* itself; a curvature of 1/alpha* pixels makes it tau_net/alpha*.
    """
    from controlat.symbolic import fit

    values = measured["measures"][chosen.measure]["values"]
    try:
        fitted = fit(chosen.task, measured["times"], values, chosen.since)
    except ValueError as error:
        raise ValueError(f"calibration to {chosen.measure}: {error}") from None
    scale = 1.0 if chosen.measure == "convergence" else _tau_net(chosen, measured)
    return fitted.task(chosen.task, fitted.amplitude * scale), fitted


def _tau_net(chosen: DeriveSettings, measured: dict[str, Any] | None) -> float:
    if chosen.tau_net is not None:
        return number(chosen.tau_net, "tau_net")
    return DEMO_TAU if measured is None else RUN_TAU * float(measured["eps"])


def _hand_over(
    chosen: DeriveSettings, derivation: Derivation, measured: dict[str, Any] | None, fit: Fit | None
) -> Handover:
    epochs = chosen.epochs or (DEMO_EPOCHS if measured is None else measured["epochs"])
    since = 0.0 if fit is None else fit.times[0] / fit.times[-1]
    return hand_over(
        derivation.K,
        float(derivation.task.horizon),
        epochs=epochs,
        since=since,
        k_min=chosen.k_min,
        k_max=chosen.k_max,
        tau=_tau_net(chosen, measured),
        mapping=chosen.mapping or "affine",
        resolution=chosen.resolution,
        label=("calibrated" if measured is not None else "derived") + f"({chosen.k_min:g}..{chosen.k_max:g})",
    )
