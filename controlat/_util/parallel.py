"""Several processes on one run: each works on its rows of every batch, and gradients are averaged.

`torchrun` starts them; nothing else changes. The network is not wrapped: attacks run on the bare module
without communication, and the driver reduces one flat gradient per request. After every step all processes
hold the same state z, and what is random is drawn as for the whole batch: they take the steps of one process
on whole batches, up to the order of sums (BatchNorm sees the rows of its process; dropout has other masks).
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

_PATIENCE = timedelta(days=2)  # others wait while the first process validates, attacks or scores


class PeerLost(RuntimeError):
    """Another process of the run ended, or cannot be reached."""


def _exchange(operation: Callable[..., object], *arguments: Any) -> None:
    """Speak to the other processes.

    Raises:
        PeerLost: one of them does not answer; Gloo and NCCL say so at length.
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
    """How many processes torchrun started; 1 without it.

    Raises:
        ValueError: WORLD_SIZE, RANK or LOCAL_RANK is no whole number of the range that torchrun sets.
    """
    size = _set("WORLD_SIZE", 1, 1)
    for name in ("RANK", "LOCAL_RANK"):
        if size > 1 and _set(name, 0, 0) >= size:
            raise ValueError(f"{name} must be below WORLD_SIZE = {size}, got {os.environ[name]}")
    return size


def _set(name: str, usual: int, least: int) -> int:
    """A whole number of the environment, as torchrun sets it."""
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
        """Where they are in the whole batch."""
        return slice(self.rank * self.total // self.size, (self.rank + 1) * self.total // self.size)

    @property
    def alone(self) -> bool:
        """Whether the batch is whole here."""
        return self.size == 1

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over the samples of the whole batch, of tensors that are means over each process's rows."""
        if self.alone:
            return list(tensors)
        weight = (self.rows.stop - self.rows.start) / self.total

        def reduce(flat: Tensor) -> None:
            _exchange(dist.all_reduce, flat.mul_(weight))

        return _fused(tensors, reduce)

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the processes."""
        found = t.clone()
        if not self.alone:
            _exchange(dist.all_reduce, found)
        return found

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the whole batch."""
        if self.alone:
            return rows
        shares = [Share(rank, self.size, self.total).rows for rank in range(self.size)]
        sizes = [s.stop - s.start for s in shares]
        sent = rows.new_zeros(max(sizes), *rows.shape[1:], dtype=_sendable(rows.dtype))
        sent[: len(rows)] = rows
        found = [torch.empty_like(sent) for _ in sizes]
        _exchange(dist.all_gather, found, sent)
        return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)]).to(rows.dtype)

    def sync_buffers(self, model: nn.Module) -> None:
        """Give all processes one set of buffers: the mean of BatchNorm's statistics, else the first's."""
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
    """The tensors after an exchange in place of one flat copy for each dtype."""
    found = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        where = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in where]).to(_sendable(dtype))
        exchange(flat)
        parts = flat.to(dtype).split([tensors[i].numel() for i in where])
        for i, part in zip(where, parts, strict=True):
            found[i] = part.view_as(tensors[i])
    return found


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: 0, ..., size - 1. The first one writes files, validates and scores.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """This process's rows of a batch of `total` samples."""
        return Share(self.rank, self.size, total)

    def broadcast(self, value: Any) -> Any:
        """What the first process gives, plain data, in all processes."""
        if self.size == 1:
            return value
        found: Any = json.loads(self.broadcast_bytes(json.dumps(value).encode()))
        return found

    def once(self, find: Callable[[], Any]) -> Any:
        """What the first process finds, plain data, in all processes, and so a ValueError of its."""
        found, trouble = None, None
        if self.first:
            try:
                found = find()
            except ValueError as error:
                trouble = str(error)
        found, trouble = self.broadcast([found, trouble])
        if trouble is not None:
            raise ValueError(trouble)
        return found

    def broadcast_bytes(self, value: bytes) -> bytes:
        """What the first process gives, in all processes."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        length = torch.tensor([len(value)], device=device)
        _exchange(dist.broadcast, length, 0)
        if not int(length):
            return b""
        sent = torch.empty(int(length), dtype=torch.uint8, device=device)
        if self.first:
            sent.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        _exchange(dist.broadcast, sent, 0)
        return sent.cpu().numpy().tobytes()

    def check(self, fingerprint: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the numbers are the same in all processes."""
        if self.size == 1:
            return
        mine = torch.stack([t.detach().double() for t in fingerprint])
        both = torch.cat([mine, -mine])
        _exchange(dist.all_reduce, both, dist.ReduceOp.MAX)
        if not torch.equal(both[: len(mine)], -both[len(mine) :]):
            raise RuntimeError(
                "the processes no longer hold the same network; do they run on hardware of one kind, and "
                "does the method draw random numbers through its context only?"
            )


def current() -> World:
    """The processes that work together now; alone outside `joined`."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, inside the block; alone without torchrun.

    They speak through NCCL on GPUs, each on its own, and through Gloo on CPUs. A process group that is there
    already is used, and left.

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
        local, there = _set("LOCAL_RANK", 0, 0), torch.cuda.device_count()
        if ":" in device:
            raise ValueError(
                f"with several processes give --device cuda, not {device}: each takes its own GPU"
            )
        if local >= there:
            cure = f"give torchrun --nproc-per-node {there}" if there else "give --device cpu"
            raise ValueError(f"process {local} finds {there} GPUs; {cure}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        yield current()
    finally:
        # A thread of Gloo's needs the interpreter's lock to let go of the last exchange's tensors; where
        # Python ends before it got that, the process aborts (pytorch/pytorch#179291). A pause gives it.
        time.sleep(0.1)
        dist.destroy_process_group()
