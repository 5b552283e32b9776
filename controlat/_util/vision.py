"""Importing torchvision: optional, and possible beside a build of torch that its wheel was not made for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["torchvision"]

_MISSING = "operator torchvision::nms does not exist"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # operators vanish together with the object that defined them


def torchvision() -> ModuleType:
    """Import torchvision, with `models`, `datasets` and `transforms`.

    The wheel of torchvision on PyPI is made for CUDA: its compiled part does not load beside a CPU build
    of torch, and then the import of its Python part fails too, because it decorates two operators that
    nobody has defined. Only in that case they are declared here, without an implementation, and the
    import is tried again. Networks and data sets do not call them.

    Returns:
        The module.

    Raises:
        ValueError: torchvision is not installed.

    Example:
        >>> from importlib.util import find_spec
        >>> torchvision().models.__name__ if find_spec("torchvision") else "torchvision.models"
        'torchvision.models'
    """
    try:
        return _import()
    except RuntimeError as error:
        if _MISSING not in str(error) or hasattr(torch.ops.torchvision, "nms"):
            raise
    _declare()
    return _import()


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":  # it is there, but something that it needs is not
            raise
        raise ValueError("torchvision is not installed: pip install 'controlat[vision]'") from error


def _declare() -> None:
    """Declare the missing operators and forget the modules of the import that failed."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # leaves room for definitions of others
    for operator in _OPERATORS:
        library.define(operator)
    _kept.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
