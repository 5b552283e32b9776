"""The import of torchvision, which is optional and may be built for another build of torch."""

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
_libraries: list[torch.library.Library] = []  # keeps the operators defined


def torchvision() -> ModuleType:
    """Import torchvision, with `models`, `datasets` and `transforms`.

    The wheel of torchvision on PyPI is built for CUDA: with a CPU build of torch its compiled part does not
    load, and then the import of its Python part fails too, as it registers implementations of two operators
    that are not defined. Only in that case this function declares them, without an implementation, and
    imports again. Networks and data sets do not call them.

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
    """Declare the missing operators, and remove the modules of the failed import."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # FRAGMENT allows other definitions
    for operator in _OPERATORS:
        library.define(operator)
    _libraries.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
