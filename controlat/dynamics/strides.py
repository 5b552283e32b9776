"""Checkpointing of a roll-out with nested strides, so that the stored states fit into memory.

With a state stored every s steps, and all states of a stretch of s steps held while it is visited, T steps
need T/s + s states; with m nested strides they need about m T^(1/m) (Griewank & Walther 2008, Evaluating
Derivatives, chapter 12).
"""

from __future__ import annotations

from itertools import count

__all__ = ["GIBI", "fitting", "strides"]

GIBI = 2**30


def fitting(size: int, steps: int, limit: float) -> tuple[int, ...]:
    """The fewest nested strides with which the states held at the same time fit into a limit.

    Args:
        size: bytes of one state.
        steps: of the roll-out.
        limit: bytes that states may take.

    Raises:
        ValueError: no nested strides fit.

    >>> fitting(size=100, steps=1000, limit=100 * 100)
    (12, 1)
    """
    nested = strides(steps, int(min(limit / size, steps + 2)))
    if nested:
        return nested
    least = next(n for n in count() if strides(steps, n)) * size
    raise ValueError(
        f"{steps} states of {size / GIBI:.3g} GiB do not fit in {limit / GIBI:.3g} GiB, not even with "
        f"stretches taken again: allow {1.05 * least / GIBI:.2g} GiB"
    )


def strides(steps: int, states: int) -> tuple[int, ...]:
    """The fewest nested strides for which `states` states are enough; each as small as possible, in order.

    Empty if there are none.

    >>> strides(100, 101), strides(100, 22), strides(100, 8)
    ((1,), (8, 1), ())
    """
    for levels in range(1, steps.bit_length() + 1):
        free = states - (1 if levels == 1 else 2)  # the end; the driver's, if steps are taken again
        if _reach(free, levels) >= steps:
            break
    else:
        return ()
    nested = []
    for below in range(levels - 1, 0, -1):
        most = range(min(free, steps), 0, -1)
        held = next(n for n in most if -(-steps // n) <= _reach(free - n + 1, below))
        steps, free = -(-steps // held), free - held + 1  # the first state of a stretch is stored already
        nested.append(steps)
    return *nested, 1


def _reach(states: int, levels: int) -> int:
    """The largest number of steps for so many states: the product of the numbers of states at each level.

    These numbers add up to states + levels - 1, as the first state of a stretch is stored already.
    """
    if states < 1:
        return 0
    each, more = divmod(states - 1, levels)
    steps: int = (each + 1) ** (levels - more) * (each + 2) ** more
    return steps
