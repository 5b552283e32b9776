"""What a schedule is derived for: the landscape, where it starts, how long, and at which price."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from controlat._util.limits import SECONDS
from controlat.symbolic.landscape import Landscape
from controlat.symbolic.symbols import GAMMA, HORIZON, TAU, exact, signed

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """What a schedule is derived for.

    Args:
        landscape: l(theta, x) and its data point.
        theta0: the parameter at t = 0.
        tau: the product alpha K, held fixed.
        horizon: T, in units of the landscape's time (theta' = -dL/dtheta).
        gamma: price of one step of inner ascent per unit of time.
        order: highest power of t in the Taylor series of K*.
        branch: which inner maximum at theta_0, by value (0 is the largest); the largest, if the ascent from
            the data point reaches it, where left out.
        theta_range: how far branches are followed; +-max(3, 2 |theta_0|) where left out.
        seconds: time limit of all questions to sympy together; one gets half of what is left.

    Raises:
        ValueError: a number is out of range.
    """

    landscape: Landscape = field(default_factory=Landscape)
    theta0: float | str = 1
    tau: float | str = 10
    horizon: float | str = 3
    gamma: float | str = "0.01"
    order: int = 2
    branch: int | None = None
    theta_range: tuple[float, float] | None = None
    seconds: float = SECONDS / 2

    def __post_init__(self) -> None:
        for name, allowed in (("theta0", ""), ("tau", "> 0"), ("horizon", "> 0"), ("gamma", ">= 0")):
            value = exact(getattr(self, name), name)
            if allowed and (value < 0 or (value == 0 and allowed == "> 0")):
                raise ValueError(f"{name} must be {allowed}, got {value}")
            object.__setattr__(self, name, value)
        if self.order != int(self.order) or not 1 <= self.order <= 12:
            raise ValueError(f"order must be a whole number from 1 to 12, got {self.order}")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be > 0, got {self.seconds}")
        theta, far = float(self.theta0), max(3.0, 2 * abs(float(self.theta0)))
        low, high = self.theta_range or (-far, far)
        if not low < theta < high:
            around = f"an interval around theta0 = {theta:g}"
            raise ValueError(f"theta_range must be {around}, got {low:g} {high:g}")
        object.__setattr__(self, "theta_range", (float(low), float(high)))

    @property
    def reach(self) -> tuple[float, float]:
        """The range of theta."""
        assert self.theta_range is not None
        return self.theta_range

    @property
    def start(self) -> sympy.Symbol:
        """theta_0 as a symbol with its sign."""
        return signed("theta_0", self.theta0)

    @property
    def values(self) -> dict[sympy.Symbol, sympy.Rational]:
        """The number behind every symbol but theta, x and t."""
        own = {self.start: self.theta0, TAU: self.tau, GAMMA: self.gamma, HORIZON: self.horizon}
        return self.landscape.values | own
