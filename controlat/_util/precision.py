"""TF32: products of float32 numbers rounded to 10 bits of mantissa, which GPUs since Ampere compute faster.

torch has two sets of flags for it. It refuses to tell the older, ``allow_tf32`` and
``float32_matmul_precision``, once one of the newer, ``fp32_precision`` (torch 2.9), was assigned another; the
newer are used then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

__all__ = ["TF32", "assigned", "full_precision", "tf32", "tf32_state"]


class TF32(NamedTuple):
    """Whether products of float32 numbers are computed in TF32 on a GPU.

    Args:
        convolutions: those of cuDNN; torch's default is True.
        matmul: those of cuBLAS; torch's default is False.
    """

    convolutions: bool
    matmul: bool


class _Value:
    """A value that a block has assigned: compared by identity, as several blocks may assign equal ones."""

    def __init__(self, value: Any) -> None:
        self.value = value


# What blocks have assigned and not put back, the value before all of them first, by object and name. Blocks
# of several threads overlap: the last one to end must not put back what another one had assigned.
_ASSIGNED: dict[tuple[int, str], list[_Value]] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def assigned(*assignments: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of objects with other values inside the block only: (object, name, value).

    Where blocks of several threads overlap, the value of the one that began last holds, and that of before
    all of them is put back after the last one.

    >>> with assigned((torch.backends.cudnn, "deterministic", True)):
    ...     torch.backends.cudnn.deterministic
    True
    """
    with contextlib.ExitStack() as stack:
        for of, name, value in assignments:
            mine = _Value(value)
            with _LOCK:
                values = _ASSIGNED.get((id(of), name)) or [_Value(getattr(of, name))]
                setattr(of, name, value)
                _ASSIGNED[id(of), name] = [*values, mine]
            stack.callback(_put_back, of, name, mine)
        yield


def _put_back(of: Any, name: str, mine: _Value) -> None:
    with _LOCK:
        values = _ASSIGNED[id(of), name]
        values.remove(mine)
        setattr(of, name, values[-1].value)
        if len(values) == 1:
            del _ASSIGNED[id(of), name]


class _Matmul:
    """torch's precision of matrix products as an attribute."""

    precision = property(
        lambda _: torch.get_float32_matmul_precision(),
        lambda _, value: torch.set_float32_matmul_precision(value),
    )


_MATMUL = _Matmul()


def _older() -> tuple[bool, str] | None:
    """``cudnn.allow_tf32`` and the precision of matrix products; None where torch refuses to tell."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _newer() -> tuple[Any, Any, Any]:
    """What has a ``fp32_precision``: convolutions and recurrent layers of cuDNN, matrix products."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


def tf32_state() -> TF32:
    """What is on at present.

    >>> with tf32(True):
    ...     tf32_state()
    TF32(convolutions=True, matmul=True)
    """
    if older := _older():
        return TF32(older[0], older[1] != "highest")
    conv, _, matmul = _newer()
    return TF32(conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32")


@contextlib.contextmanager
def tf32(on: bool | None) -> Iterator[None]:
    """TF32 for convolutions and matrix products on or off inside the block; None leaves both as they are."""
    if on is None:
        yield
        return
    flags: list[tuple[Any, str, Any]] = [(of, "fp32_precision", "tf32" if on else "ieee") for of in _newer()]
    if _older():
        flags = [
            (torch.backends.cudnn, "allow_tf32", on),
            (_MATMUL, "precision", "high" if on else "highest"),
        ]
    with assigned(*flags):
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 inside the block, or in the function that it decorates: for evaluation and analysis."""
    with tf32(False):
        yield
