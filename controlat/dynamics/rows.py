"""Memory per training sample: a store with one row for each, and the rows of some samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from controlat._util.parallel import Share
from controlat._util.transfer import to_device
from controlat.methods import Rows

__all__ = ["gather", "put", "scatter"]


def gather(store: Rows, index: Tensor) -> Rows:
    """The rows of the samples at some positions; positions beyond the store have no row yet."""
    index = to_device(index, store.seen.device)
    inside = index < len(store.seen)
    safe = torch.where(inside, index, 0)
    seen = store.seen[safe] & inside
    mask = seen.view(-1, *[1] * (store.values.dim() - 1))
    return Rows(torch.where(mask, store.values[safe], torch.zeros_like(store.values[:1])), seen)


def put(store: Rows | None, index: Tensor, rows: Rows) -> Rows:
    """Write rows at some positions of a store, in place; a store that is too short is replaced."""
    values = rows.values.detach()
    size = int(index.max()) + 1  # on the host, where a GPU is not waited for
    if store is None or len(store.seen) < size:  # seldom: positions are shuffled
        fresh = Rows(values.new_zeros(size, *values.shape[1:]), rows.seen.new_zeros(size))
        if store is not None:
            fresh.values[: len(store.seen)], fresh.seen[: len(store.seen)] = store
        store = fresh
    index = to_device(index, values.device)
    store.values[index], store.seen[index] = values, rows.seen
    return store


def scatter(stores: dict[str, Rows], index: Tensor, rows: Mapping[str, Rows], share: Share) -> None:
    """Write the rows of a batch, gathered from all processes, into the stores.

    Args:
        stores: by name; changed in place.
        index: (N,) positions of this process's samples.
        rows: this process's rows, by name.
        share: all-gathers the rows of the batch.
    """
    for name, part in rows.items():
        values, seen = map(share.all_gather, part)
        positions = index if share.alone else share.all_gather(to_device(index, values.device))
        stores[name] = put(stores.get(name), positions, Rows(values, seen))
