"""Learning rates eta(t): constant, multistep and one-cycle."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from controlat._util.checks import instance, number
from controlat._util.registry import meant
from controlat._util.texts import numbers, only, split

__all__ = ["Rate", "parse_rate"]

_LARGEST = 3.4e38  # about the largest float32; beyond it torch raises an error that names no argument

# kind -> (required, optional) parameters
_KINDS = {
    "constant": (("lr",), ()),
    "multistep": (("lr", "at"), ("factor",)),
    "onecycle": (("lr",), ("peak",)),
}


@dataclass(frozen=True)
class Rate:
    """eta(t) for a run of T epochs.

    ``constant``: eta = lr. ``multistep``: eta = lr factor^m, m the number of epochs in `at` that are <= t, as
    in torch's MultiStepLR. ``onecycle``: linear from 0 at t = 0 to lr at t = peak T, and to 0 at t = T.

    Args:
        lr: the (largest) learning rate.
        kind: one of these three.
        at: increasing epochs at which ``multistep`` multiplies eta by `factor`.
        factor: > 0, of ``multistep``.
        peak: time at which ``onecycle`` is largest, as a fraction of T in (0, 1).

    Raises:
        ValueError: unknown kind, or a number out of range.

    >>> [Rate(0.2, "onecycle")(t, 4) for t in (0, 1, 2, 3)]
    [0.0, 0.1, 0.2, 0.1]
    """

    lr: float
    kind: str = "constant"
    at: tuple[float, ...] = ()
    factor: float = 0.1
    peak: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise ValueError(f"a learning rate is one of {', '.join(_KINDS)}, got {self.kind!r}")
        instance(self.at, (tuple, list), "at", "the epochs of the drops")
        for name in ("lr", "factor"):
            object.__setattr__(self, name, number(getattr(self, name), name))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name):g}")
            if getattr(self, name) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST:g}, got {getattr(self, name):g}")
        object.__setattr__(self, "peak", number(self.peak, "peak"))
        if not 0 < self.peak < 1:
            raise ValueError(f"peak must be in (0, 1), a fraction of the run, got {self.peak:g}")
        object.__setattr__(self, "at", tuple(number(edge, "at") for edge in self.at))
        for a, b in zip((0.0, *self.at), self.at, strict=False):
            if b <= a:
                raise ValueError(f"at must be increasing epochs > 0, got {b:g} after {a:g}")

    def __call__(self, t: float, epochs: float) -> float:
        """eta at time t of a run of T = `epochs`; t in epochs."""
        if self.kind == "multistep":
            return self.lr * self.factor ** bisect_right(self.at, t)
        if self.kind == "onecycle":
            rise, fall = t / (self.peak * epochs), (epochs - t) / ((1 - self.peak) * epochs)
            return self.lr * max(0.0, min(rise, fall))  # 0 for t > T
        return self.lr


def parse_rate(text: str | float) -> Rate:
    """Read a learning rate: ``0.1``, ``multistep:lr=0.1,at=50:75,factor=0.1``, ``onecycle:lr=0.2,peak=0.5``.

    Raises:
        ValueError: the text has none of these forms; the message says what is allowed.

    >>> parse_rate("multistep:lr=0.1,at=50:75")(60, 100)
    0.010000000000000002
    """
    try:
        return Rate(number(text, "lr"))
    except ValueError:
        if not isinstance(text, str) or text.partition(":")[0] not in _KINDS:
            hint = meant(str(text).partition(":")[0], _KINDS)
            raise ValueError(
                f"{hint}a learning rate is a number > 0, multistep:lr=0.1,at=50:75,factor=0.1 or "
                f"onecycle:lr=0.2,peak=0.5; got {text!r}"
            ) from None
    kind, parameters = split(text)
    only(parameters, *_KINDS[kind], f"learning rate {kind!r}")
    values = {name: number(parameters[name], name) for name in ("lr", "factor", "peak") if name in parameters}
    return Rate(kind=kind, at=numbers(parameters["at"], "at") if "at" in parameters else (), **values)
