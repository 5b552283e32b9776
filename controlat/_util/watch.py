"""Whether computed numbers are finite: looked at at once, or those of several steps together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from controlat._util.errors import NonFiniteError

__all__ = ["Watch", "finiteness"]

_Message = str | Callable[[list[float]], str]


class _Noted(NamedTuple):
    numbers: Tensor
    message: _Message
    place: object


class Watch:
    """Collects numbers that must be finite, and looks at them.

    Looking makes the CPU wait until a GPU has computed them, and leaves the GPU without work meanwhile. With
    `every` = n a step only notes its numbers, which stay on the device; one transfer reads those of n steps.
    An error names the step where a number was not finite, although it is raised up to n - 1 steps later.

    Args:
        every: steps between two looks; 0: look at each number at once.

    Attributes:
        place: what is being computed; its text is added to errors.

    >>> watch = Watch(every=2)
    >>> for step in range(2):
    ...     watch.place = f"step {step}"
    ...     watch.finite(torch.tensor(1.0) / step, "the quotient is not finite")
    ...     watch.count()
    Traceback (most recent call last):
    controlat._util.errors.NonFiniteError: the quotient is not finite (step 0)
    """

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self.place: object = ""
        self._noted: list[_Noted] = []
        self._steps = 0

    def finite(self, numbers: Tensor, message: _Message) -> None:
        """Note numbers that must be finite.

        Args:
            numbers: a tensor of at most one dimension.
            message: of the error, or a function of the numbers; `place` is added to it.

        Raises:
            NonFiniteError: with every = 0, a number is not finite.
        """
        self._noted.append(_Noted(numbers.detach().reshape(-1), message, self.place))
        if not self.every:
            self.look()

    def count(self) -> None:
        """Count a step, and look after every n-th.

        Raises:
            NonFiniteError: as `look`.
        """
        self._steps += 1
        if self.every and self._steps % self.every == 0:
            self.look()

    def look(self) -> None:
        """Look at all numbers noted since the last look, in one transfer from the device.

        Raises:
            NonFiniteError: a number is not finite; of several the first that was noted.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return
        together = torch.cat([n.numbers for n in noted]) if len(noted) > 1 else noted[0].numbers
        values: list[float] = together.tolist()
        for numbers, message, place in noted:
            own, values = values[: len(numbers)], values[len(numbers) :]
            if not all(map(math.isfinite, own)):
                text = message if isinstance(message, str) else message(own)
                raise NonFiniteError(f"{text} ({place})" if place else text)


def finiteness(t: Tensor) -> Tensor:
    """0 if all entries of a tensor are finite, else NaN.

    >>> finiteness(torch.tensor([1.0, float("inf")]))
    tensor(nan)
    """
    return (0 * t.detach()).sum()
