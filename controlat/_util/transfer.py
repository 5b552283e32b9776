"""Tensors from the host to a device: without waiting for it, and whether there is room."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["free_memory", "to_device"]


def to_device(t: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; a copy to a GPU is queued there, from pinned memory, and the host goes on.

    >>> to_device(torch.arange(3), "cpu")
    tensor([0, 1, 2])
    """
    if t.device.type == "cpu" and torch.device(device).type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def free_memory(device: torch.device | str) -> float:
    """Bytes that are free on a GPU; infinite for another device, which shares the memory of the host."""
    device = torch.device(device)
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf
