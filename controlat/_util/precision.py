"""TF32: products of float32 numbers rounded to 10 bits of mantissa, which GPUs since Ampere compute faster.

torch has two sets of flags for it. It refuses to tell the older, ``allow_tf32`` and
``float32_matmul_precision``, once one of the newer, ``fp32_precision`` (torch 2.9), was assigned another; the
newer are used then.
"""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def assigned(*assignments: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of objects with other values inside the block only: (object, name, value).

    >>> with assigned((torch.backends.cudnn, "deterministic", True)):
    ...     torch.backends.cudnn.deterministic
    True
    """
    with contextlib.ExitStack() as stack:
        for of, name, value in assignments:
            before = getattr(of, name)
            setattr(of, name, value)
            stack.callback(setattr, of, name, before)
        yield


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
    cudnn, older = torch.backends.cudnn, _older()
    if on is None:
        yield
    elif older:
        with assigned((cudnn, "allow_tf32", on)):
            torch.set_float32_matmul_precision("high" if on else "highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(older[1])
    else:
        with assigned(*((of, "fp32_precision", "tf32" if on else "ieee") for of in _newer())):
            yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 inside the block, or in the function that it decorates: for evaluation and analysis."""
    with tf32(False):
        yield
