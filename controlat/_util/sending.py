"""What is sent to the processes of a `Pool`: pickles, by which functions and classes go by their names."""

from __future__ import annotations

import functools
import io
import pickle
from types import FunctionType
from typing import Any

from controlat._util.registry import importable

__all__ = ["Common", "unsendable"]


class Common:
    """An argument that many tasks have in common: pickled once, and a worker that gets it again has it.

    Args:
        value: the argument.

    >>> common = Common([1, 2])
    >>> first, again = (pickle.loads(pickle.dumps(common)) for _ in range(2))
    >>> first is again, first.value
    (True, [1, 2])
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    @functools.cached_property
    def _pickle(self) -> bytes:
        return pickle.dumps(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _common, (self._pickle,)


@functools.lru_cache(maxsize=1)
def _common(content: bytes) -> Common:
    return Common(pickle.loads(content))


class _Strict(pickle.Pickler):
    """Refuses functions and classes that are pickled by a name under which workers do not find them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, FunctionType)) and not importable(value.__module__):
            raise pickle.PicklingError(
                f"{value.__qualname__} is part of the program itself, which other processes do not import"
            )
        return NotImplemented


def unsendable(value: Any) -> str:
    """Why a value cannot be sent to workers; empty where it can.

    >>> unsendable(print), unsendable(lambda: 0)  # doctest: +ELLIPSIS
    ('', "...<lambda>...")
    """
    try:
        _Strict(_Nowhere()).dump(value)
    except Exception as error:  # classes of the user's may raise anything
        return str(error) or type(error).__name__
    return ""


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return len(content)
