"""The state z of training: snapshots of it, and the rows that training samples carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlat.methods import Rows

__all__ = ["Snapshot", "copied", "gather", "put", "same_bits"]


class Snapshot(NamedTuple):
    """A copy of the state z.

    Args:
        model: parameters and buffers.
        optimizer: its state dict.
        memory: what the method carries.
        rows: what samples carry: by name, values and mask, and the positions if it is not all samples.
        kept: what the method put aside (never changed, hence not copied).
        stopped: why the method ended training.
        controller: what the controller remembers.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    memory: dict[str, Tensor]
    rows: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012
    kept: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    stopped: str = ""
    controller: dict[str, Any] = {}  # noqa: RUF012


def gather(store: Rows, index: Tensor) -> Rows:
    """What some samples carry; samples beyond the store carry nothing."""
    index = index.to(store.seen.device)
    inside = index < len(store.seen)
    safe = torch.where(inside, index, 0)
    seen = store.seen[safe] & inside
    mask = seen.view(-1, *[1] * (store.values.dim() - 1))
    return Rows(torch.where(mask, store.values[safe], torch.zeros_like(store.values[:1])), seen)


def put(store: Rows | None, index: Tensor, rows: Rows) -> Rows:
    """A store, grown where it must, in which some samples carry what `rows` say."""
    values = rows.values.detach()
    size = int(index.max()) + 1
    if store is None or len(store.seen) < size:  # seldom: the largest of many positions comes early
        fresh = Rows(values.new_zeros(size, *values.shape[1:]), rows.seen.new_zeros(size))
        if store is not None:
            fresh.values[: len(store.seen)], fresh.seen[: len(store.seen)] = store
        store = fresh
    index = index.to(values.device)
    store.values[index], store.seen[index] = values, rows.seen
    return store


def same_bits(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two state dicts of a network hold the same bits."""
    tensors = {name: t for name, t in a.items() if isinstance(t, Tensor)}
    return a.keys() == b.keys() and all(
        isinstance(b[name], Tensor) and torch.equal(t, b[name]) for name, t in tensors.items()
    )


def copied(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with tensors of its own."""
    state = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in optimizer["state"].items()
    }
    return optimizer | {"state": state}
