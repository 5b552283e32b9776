"""Random numbers as a function of (seed, epoch, batch, purpose), independent of what ran before.

A resumed run then has the same numbers, candidates scored at one step have common random numbers, and torch's
global generator is left unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derive", "generator", "scoped"]


def derive(seed: int, *key: int | str) -> int:
    """A 63-bit seed for one purpose, by hashing (seed, *key).

    >>> derive(0, "order", 3) == derive(0, "order", 3) != derive(0, "order", 4)
    True
    """
    text = repr((int(seed), *(k if isinstance(k, str) else int(k) for k in key))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new torch.Generator for one purpose, on `device`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *key))


@contextmanager
def scoped(seed: int, *key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block only: for dropout and for model factories.

    >>> before = torch.random.get_rng_state()
    >>> with scoped(0, "model"):
    ...     w = torch.rand(1)
    >>> bool((torch.random.get_rng_state() == before).all())
    True
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derive(seed, *key))
        if devices:
            torch.cuda.manual_seed(derive(seed, *key))
        yield
