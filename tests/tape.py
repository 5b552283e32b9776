"""A stand-in for CUDA graphs on a CPU: the operations of a function, repeated on the memory that it used.

As a CUDA graph it repeats what ran below autograd, on fixed memory, and nothing that Python did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from controlat.models.frozen import capture
from controlat.models.frozen.graph_use import using


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # As they are now: operations such as squeeze_ change what a tensor shows of its memory.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        result = func(*args, **kwargs)
        inputs = {storage(t) for t in tensors((args, kwargs))}
        fresh = [t.detach() for t in tensors(result) if storage(t) not in inputs]
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if fresh or writes:  # the others are views, which stay valid
            self.operations.append((func, args, kwargs, fresh))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Tape:
    """A backend that counts what it captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(
        self, run: Callable[[], None], device: torch.device, beside: capture.Replay | None
    ) -> capture.Replay:
        assert beside is None or callable(beside)
        run()  # the pass before
        recording = _Recording()
        with recording:
            run()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, fresh in recording.operations:
                    again = func(*args, **kwargs)
                    for t, value in zip(fresh, tensors(again) if fresh else (), strict=True):
                        t.copy_(value)

        return replay


@contextmanager
def tape() -> Iterator[Tape]:
    """Graphs on CPU tensors inside the block."""
    backend = Tape()
    with pytest.MonkeyPatch.context() as patch, using("auto"):
        patch.setattr(capture, "backend_of", lambda device: backend)
        yield backend
