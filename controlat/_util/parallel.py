"""Data-parallel runs: each process works on its rows of every batch, and gradients are averaged.

`torchrun` starts the processes. The network is not wrapped: attacks run on the plain module without
communication, and the driver all-reduces one flat gradient per request. After every step all processes hold
the same state z. Random numbers are drawn for the whole batch, so that the steps are those of one process
up to the order of sums, but for BatchNorm, which sees the rows of its process, and for dropout masks.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["PeerLost", "Share", "World", "current", "joined", "started"]

_TIMEOUT = timedelta(days=2)  # other processes wait while the first one validates, attacks or scores


class PeerLost(RuntimeError):
    """Another process of the run ended, or cannot be reached."""


def _exchange(operation: Callable[..., object], *arguments: Any) -> None:
    """Run a collective operation of torch.distributed.

    Raises:
        PeerLost: another process does not answer; the message is that of Gloo or NCCL in short.
    """
    try:
        operation(*arguments)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise PeerLost(
            f"another process of this run ended ({reason}); its own messages say why. Start "
            "all of them again: train goes on with --resume, evaluate by itself"
        ) from error


def started() -> int:
    """Number of processes that torchrun has started; 1 without it.

    Raises:
        ValueError: WORLD_SIZE, RANK or LOCAL_RANK is no whole number of the range that torchrun sets.
    """
    size = _environment("WORLD_SIZE", 1, 1)
    for name in ("RANK", "LOCAL_RANK"):
        if size > 1 and _environment(name, 0, 0) >= size:
            raise ValueError(f"{name} must be below WORLD_SIZE = {size}, got {os.environ[name]}")
    return size


def _environment(name: str, usual: int, least: int) -> int:
    """An environment variable of torchrun, a whole number."""
    text = os.environ.get(name, str(usual))
    if not (text.isdecimal() and len(text) < 7 and int(text) >= least):
        raise ValueError(
            f"the environment's {name} must be a whole number >= {least}, as torchrun sets it, got {text!r}; "
            f"start it with torchrun, or unset {name}"
        )
    return int(text)


@dataclass(frozen=True)
class Share:
    """The rows of a batch of `total` samples that belong to one of `size` processes.

    >>> [Share(rank, 3, 8).rows for rank in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int
    size: int
    total: int

    @property
    def rows(self) -> slice:
        """Their positions in the whole batch."""
        return slice(self.rank * self.total // self.size, (self.rank + 1) * self.total // self.size)

    @property
    def alone(self) -> bool:
        """Whether there is only one process, which has the whole batch."""
        return self.size == 1

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All-reduce: means over the whole batch, from means over the rows of each process."""
        if self.alone:
            return list(tensors)
        weight = (self.rows.stop - self.rows.start) / self.total

        def reduce(flat: Tensor) -> None:
            _exchange(dist.all_reduce, flat.mul_(weight))

        return _fused(tensors, reduce)

    def sum(self, t: Tensor) -> Tensor:
        """All-reduce: the sum over the processes."""
        total = t.clone()
        if not self.alone:
            _exchange(dist.all_reduce, total)
        return total

    def all_gather(self, rows: Tensor) -> Tensor:
        """All-gather: the rows of all processes, in the order of the whole batch."""
        if self.alone:
            return rows
        shares = [Share(rank, self.size, self.total).rows for rank in range(self.size)]
        sizes = [s.stop - s.start for s in shares]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:], dtype=_sendable(rows.dtype))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        _exchange(dist.all_gather, gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, sizes, strict=True)]).to(rows.dtype)

    def sync_buffers(self, model: nn.Module) -> None:
        """Make buffers equal in all processes: means of floating-point ones, others by broadcast."""
        if self.alone:
            return
        buffers = list(model.buffers())
        floating = [b for b in buffers if b.is_floating_point()]
        others = [b for b in buffers if not b.is_floating_point()]
        with torch.no_grad():
            for b, value in zip(floating, self.mean(floating), strict=True):
                b.copy_(value)
            for b, value in zip(
                others, _fused(others, lambda t: _exchange(dist.broadcast, t, 0)), strict=True
            ):
                b.copy_(value)


def _sendable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype


def _fused(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> list[Tensor]:
    """The tensors after `exchange`, which is called with one flat copy of all tensors of a dtype."""
    results = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        indices = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices]).to(_sendable(dtype))
        exchange(flat)
        parts = flat.to(dtype).split([tensors[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            results[i] = part.view_as(tensors[i])
    return results


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Args:
        rank: 0, ..., size - 1. The first one writes files, validates and scores.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first process, which writes files."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """This process's rows of a batch of `total` samples."""
        return Share(self.rank, self.size, total)

    def broadcast(self, value: Any) -> Any:
        """Broadcast plain data from the first process."""
        if self.size == 1:
            return value
        received: Any = json.loads(self.broadcast_bytes(json.dumps(value).encode()))
        return received

    def once(self, compute: Callable[[], Any]) -> Any:
        """Call a function in the first process, and broadcast its result, plain data, or its ValueError."""
        result, message = None, None
        if self.first:
            try:
                result = compute()
            except ValueError as error:
                message = str(error)
        result, message = self.broadcast([result, message])
        if message is not None:
            raise ValueError(message)
        return result

    def broadcast_bytes(self, value: bytes) -> bytes:
        """Broadcast bytes from the first process."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        length = torch.tensor([len(value)], device=device)
        _exchange(dist.broadcast, length, 0)
        if not int(length):
            return b""
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
        if self.first:
            content.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        _exchange(dist.broadcast, content, 0)
        return content.cpu().numpy().tobytes()

    def check(self, fingerprint: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the numbers are the same in all processes."""
        if self.size == 1:
            return
        local = torch.stack([t.detach().double() for t in fingerprint])
        extremes = torch.cat([local, -local])  # after the reduction: maxima, and minima times -1
        _exchange(dist.all_reduce, extremes, dist.ReduceOp.MAX)
        if not torch.equal(extremes[: len(local)], -extremes[len(local) :]):
            raise RuntimeError(
                "the processes no longer hold the same network; do they run on hardware of one kind, and "
                "does the method draw random numbers through its context only?"
            )


def current() -> World:
    """The processes of the present process group; one process outside `joined`."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """A process group of the processes that torchrun started, inside the block; one process without torchrun.

    The backend is NCCL on GPUs, one per process, and Gloo on CPUs. A process group that exists already is
    used, and not destroyed.

    Args:
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.

    Raises:
        ValueError: a GPU by its number, or more processes than GPUs.
    """
    if started() == 1 or dist.is_initialized():
        yield current()
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        local, count = _environment("LOCAL_RANK", 0, 0), torch.cuda.device_count()
        if ":" in device:
            raise ValueError(
                f"with several processes give --device cuda, not {device}: each takes its own GPU"
            )
        if local >= count:
            cure = f"give torchrun --nproc-per-node {count}" if count else "give --device cpu"
            raise ValueError(f"process {local} finds {count} GPUs; {cure}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_TIMEOUT)
    try:
        yield current()
    finally:
        # A thread of Gloo needs the interpreter's lock to release the tensors of the last operation; if
        # Python ends before that, the process aborts (pytorch/pytorch#179291). The pause gives it the lock.
        time.sleep(0.1)
        dist.destroy_process_group()
