"""What training samples carry: a store with a row for every one of them, and the rows of some."""

from __future__ import annotations

import torch
from torch import Tensor

from controlat.methods import Rows

__all__ = ["gather", "put"]


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
