"""Several processes on one run: each works on its rows of every batch, and gradients are averaged.

Start them with torchrun; nothing else changes. The network is not wrapped: attacks run on the bare module without
communication, and the driver reduces one flat gradient per request. With the same seed two processes on half
batches take the steps of one process on whole batches (up to the order of sums; BatchNorm sees half batches).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World", "joined", "world"]


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the run.

    Args:
        rank: 0, ..., size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def part(self, n: int, batch_size: int) -> slice:
        """The rows of a batch of n samples that belong to this process: always the same places.

        Raises:
            ValueError: a process would have no sample.
        """
        if self.size == 1:
            return slice(0, n)
        share = -(-batch_size // self.size)
        if n <= share * (self.size - 1):
            raise ValueError(
                f"a batch of {n} samples leaves one of {self.size} processes without any; choose a batch_size or "
                "train_points such that the last batch is not that small"
            )
        return slice(self.rank * share, min((self.rank + 1) * share, n))

    def mean(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        """Sums over the processes of weight * tensor: means, where the weights add up to 1."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors]) * weight
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over the processes."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            found = found.cuda()
        dist.all_reduce(found)
        return [float(v) for v in found]

    def everyones(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if self.size == 1:
            return rows
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded.contiguous())
        return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)])

    def agree(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first: BatchNorm's statistics differ between them."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """Where this process stands; alone unless a process group is there."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextlib.contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[World]:
    """Join the processes that torchrun started, inside the block; alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield world()
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    try:
        yield world()
    finally:
        dist.destroy_process_group()
