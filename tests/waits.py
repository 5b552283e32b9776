"""Counts where the CPU would wait for a GPU, and the operations that it would start there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations for whose results the CPU would wait for a GPU.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
}
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: list[str], operations: list[str]) -> None:
        super().__init__()
        self.waits, self.operations = waits, operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.operations.append(name)
        if name in WAITS or masks:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waited() -> Iterator[list[str]]:
    """A list of the waits inside the block."""
    waits: list[str] = []
    with _Called(waits), _Dispatched(waits, []):
        yield waits


@contextmanager
def started() -> Iterator[list[str]]:
    """A list of torch's operations inside the block, views left out."""
    operations: list[str] = []
    with _Dispatched([], operations):
        yield operations
    views = (
        "view",
        "detach",
        "expand",
        "t",
        "transpose",
        "slice",
        "select",
        "alias",
        "unsqueeze",
        "as_strided",
    )
    operations[:] = [o for o in operations if o.removeprefix("aten::") not in views]
