"""The state z of training, and the costates that have its shape.

    z = (theta, v, r, memory, rows; kept, the rest)

The driver takes a copy of z and puts it back bit for bit; a checkpoint holds one. What stands before the
semicolon has a derivative: as far as that goes, a `State` is a point of a vector space. A costate, which has
its shape, and the difference of two states are a `State` with nothing else in it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from controlat.dynamics.names import Names
from controlat.dynamics.rows import gather, put
from controlat.methods import Rows

__all__ = ["Rest", "State", "same_bits"]


@dataclass(frozen=True)
class Rest:
    """What a network and its optimiser hold that has no derivative.

    Args:
        names: of everything else in the network's state dict.
        entries: the other entries of it: frozen parameters, buffers, a module's extra state.
        groups: the optimiser's parameter groups, as its state dict has them.
    """

    names: Names
    entries: dict[str, Any]
    groups: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class State:
    """The state z, or a costate or another vector, which has no `rest`.

    Args:
        parameters: theta, one tensor per parameter that is trained.
        momentum: the optimiser's buffers v, alike; none without momentum and before the first step.
        statistics: running means and variances of normalisation layers, as `Driver.statistics`.
        memory: what the method carries; whole numbers have no derivative.
        rows: what training samples carry, by name, 0 where nothing is carried.
        index: (N,) positions of the samples that `rows` is of; None where it is all of them.
        kept: networks that the method put aside, with their optimiser; they never change, and are not copied.
        rest: of the network and its optimiser.
        stopped: why the method ended training; empty while it goes on.
        controller: plain data that the controller carries.

    >>> z = State(parameters=[torch.tensor([3.0, 4.0])], memory={"calls": torch.tensor(1)})
    >>> z.dot(z), z.norm(), z.plus(z, -1).tensors()
    (25.0, 5.0, [tensor([0., 0.])])
    """

    parameters: list[Tensor]
    momentum: list[Tensor] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    index: Tensor | None = None
    kept: dict[str, State] = field(default_factory=dict)
    rest: Rest | None = None
    stopped: str = ""
    controller: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------ as a vector

    def parts(self) -> tuple[dict[Any, Tensor], ...]:
        """theta, v, r, memory and rows, each by position or name: what has a derivative."""
        lists = self.parameters, self.momentum, self.statistics
        memory = {name: t for name, t in self.memory.items() if t.is_floating_point()}
        rows = {name: store.values for name, store in self.rows.items()}
        return *(dict(enumerate(part)) for part in lists), memory, rows

    def tensors(self) -> list[Tensor]:
        """All that has a derivative, in order; networks that are kept are not among it."""
        return [t for part in self.parts() for t in part.values()]

    def like(self, tensors: Iterable[Tensor]) -> State:
        """The vector with the same structure and other tensors, in the order of `tensors`."""
        left = iter(tensors)
        return State(
            parameters=[next(left) for _ in self.parameters],
            momentum=[next(left) for _ in self.momentum],
            statistics=[next(left) for _ in self.statistics],
            memory={name: next(left) for name, t in self.memory.items() if t.is_floating_point()},
            rows={name: Rows(next(left), store.seen) for name, store in self.rows.items()},
            index=self.index,
        )

    def zeros_like(self) -> State:
        """The vector 0."""
        return self.like(map(torch.zeros_like, self.tensors()))

    def plus(self, other: State, factor: float = 1.0) -> State:
        """self + factor * other; what one of them lacks counts as 0. What has no derivative is self's."""
        self._check_samples(other)
        sums = []
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            both = {i: torch.add(t, theirs[i], alpha=factor) if i in theirs else t for i, t in mine.items()}
            sums.append(both | {i: factor * t for i, t in theirs.items() if i not in mine})
        parameters, momentum, statistics = (list(part.values()) for part in sums[:3])
        masks = {name: store.seen for name, store in (other.rows | self.rows).items()}
        return replace(
            self,
            parameters=parameters,
            momentum=momentum,
            statistics=statistics,
            memory=self.memory | sums[3],
            rows={name: Rows(values, masks[name]) for name, values in sums[4].items()},
            index=other.index if self.index is None else self.index,
        )

    def dot(self, other: State) -> float:
        """The inner product; what one of them lacks counts as 0."""
        self._check_samples(other)
        total = 0.0
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            products = [(t * theirs[i]).sum() for i, t in mine.items() if i in theirs]
            total += float(torch.stack(products).double().sum()) if products else 0.0  # one transfer
        return total

    def norm(self) -> float:
        """||z|| over everything that has a derivative, networks that are kept included."""
        every = [*self.tensors(), *(t for network in self.kept.values() for t in network.tensors())]
        return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in every]).norm())

    def _check_samples(self, other: State) -> None:
        if not (self.rows and other.rows):
            return
        a, b = self.index, other.index
        if a is not b and (a is None or b is None or not torch.equal(a, b)):
            raise ValueError("the rows of two states are of other samples: take both `at` the same ones")

    # ------------------------------------------------------------------------------------ of samples

    def at(self, index: Tensor | None) -> State:
        """The part that concerns some samples, of `rows` theirs alone, gathered; the whole for None."""
        if index is None:
            return self
        return replace(self, rows={name: gather(s, index) for name, s in self.rows.items()}, index=index)

    def with_rows(self, stores: Mapping[str, Rows]) -> dict[str, Rows]:
        """Stores of all samples in which those of this state carry what it says; written in place.

        Names that it does not have are gone. Where it is a state of all samples, its rows are copied.
        """
        if self.index is None:
            return {name: Rows(*map(torch.clone, rows)) for name, rows in self.rows.items()}
        return {name: put(stores.get(name), self.index, rows) for name, rows in self.rows.items()}

    # ------------------------------------------------------------------------------------ as a whole

    def copy(self) -> State:
        """The same with tensors of its own; networks that are kept are shared."""
        rest = self.rest
        if rest is not None:
            entries = {name: _copied(t) for name, t in rest.entries.items()}
            rest = Rest(rest.names, entries, rest.groups)
        return replace(
            self,
            parameters=list(map(_copied, self.parameters)),
            momentum=list(map(_copied, self.momentum)),
            statistics=list(map(_copied, self.statistics)),
            memory={name: _copied(t) for name, t in self.memory.items()},
            rows={name: Rows(*map(_copied, rows)) for name, rows in self.rows.items()},
            index=None if self.index is None else self.index.clone(),
            kept=dict(self.kept),
            rest=rest,
            controller=copy.deepcopy(self.controller),
        )

    def network(self) -> State:
        """The part that is put aside with a network: its own state and that of its optimiser."""
        return State(self.parameters, self.momentum, self.statistics, rest=self.rest)

    def towards(self, other: State, part: float) -> State:
        """(1 - part) self + part other in all floating-point numbers; what else there is is self's."""
        self._check_samples(other)

        def mixed(a: Any, b: Any) -> Any:
            real = isinstance(a, Tensor) and a.is_floating_point()
            return a if not real or torch.equal(a, b) else a.lerp(b, part)  # -inf stays where it is in both

        rest = self.rest
        if rest is not None and other.rest is not None:
            theirs = other.rest.entries
            rest = replace(rest, entries={name: mixed(t, theirs[name]) for name, t in rest.entries.items()})
        pairs = {name: (rows, other.rows[name]) for name, rows in self.rows.items()}
        return replace(
            self,
            parameters=list(map(mixed, self.parameters, other.parameters)),
            momentum=list(map(mixed, self.momentum, other.momentum)),
            statistics=list(map(mixed, self.statistics, other.statistics)),
            memory={name: mixed(t, other.memory[name]) for name, t in self.memory.items()},
            rows={n: Rows(mixed(a.values, b.values), a.seen | b.seen) for n, (a, b) in pairs.items()},
            rest=rest,
        )

    def fingerprint(self) -> list[Tensor]:
        """Numbers that differ where two states do: for processes to compare."""
        device = self.parameters[0].device
        carried = [*self.memory.values(), *(t for rows in self.rows.values() for t in rows)]
        entries = [] if self.rest is None else self.rest.entries.values()
        tensors = [*self.parameters, *self.momentum, *self.statistics, *carried, *entries]
        text = json.dumps([self.stopped, self.controller], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).digest()
        sums = [t.detach().double().sum().to(device) for t in tensors if isinstance(t, Tensor)]
        return [*sums, *torch.tensor(list(digest), device=device)]

    # ------------------------------------------------------------------------------------ as state dicts

    @classmethod
    def of(cls, model: Mapping[str, Any], optimizer: Mapping[str, Any], names: Names, **more: Any) -> State:
        """The state whose network and optimiser have these state dicts; nothing is copied.

        Some networks have other weights in evaluation mode: a state dict of that mode, which lacks one of the
        names, can be put back, but is no vector.

        Args:
            model: of the network.
            optimizer: of torch.optim.SGD, whose parameters are those of `names`, in order.
            names: of what has a derivative.
            **more: fields other than parameters, momentum, statistics and rest.
        """
        if not model.keys() >= {*names.parameters, *names.statistics}:
            names = Names((), (), {})
        ours = {*names.parameters, *names.statistics, *names.tied}
        parameters = [model[name] for name in names.parameters]
        buffers = {i: s.get("momentum_buffer") for i, s in optimizer["state"].items()}
        given = {i: v for i, v in buffers.items() if v is not None}
        count = (len(parameters) or len(given)) if given else 0
        return cls(
            parameters=parameters,
            momentum=[given[i] if i in given else torch.zeros_like(parameters[i]) for i in range(count)],
            statistics=[model[name] for name in names.statistics],
            rest=Rest(
                names=names,
                entries={name: value for name, value in model.items() if name not in ours},
                groups=optimizer["param_groups"],
            ),
            **more,
        )

    @property
    def model(self) -> dict[str, Any]:
        """The state dict of the network, not copied."""
        rest = self._whole()
        named = dict(zip(rest.names.parameters, self.parameters, strict=True))
        named |= dict(zip(rest.names.statistics, self.statistics, strict=True))
        return rest.entries | named | {name: named[first] for name, first in rest.names.tied.items()}

    @property
    def optimizer(self) -> dict[str, Any]:
        """The state dict of the optimiser, not copied."""
        buffers = {i: {"momentum_buffer": v} for i, v in enumerate(self.momentum)}
        return {"state": buffers, "param_groups": self._whole().groups}

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints hold it: state dicts, tensors by name and plain data, nothing copied."""
        stored = {
            "model": self.model,
            "optimizer": self.optimizer,
            "memory": self.memory,
            "rows": {name: rows._asdict() for name, rows in self.rows.items()},
            "kept": {n: {"model": z.model, "optimizer": z.optimizer} for n, z in self.kept.items()},
            "stopped": self.stopped,
        }
        return stored | ({"controller": self.controller} if self.controller else {})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], names: Names) -> State:
        """The state that `to_dict` described; checkpoints of before may lack all but the first three."""
        kept = stored.get("kept", {})
        return cls.of(
            stored["model"],
            stored["optimizer"],
            names,
            memory=stored["memory"],
            rows={name: Rows(rows["values"], rows["seen"]) for name, rows in stored.get("rows", {}).items()},
            kept={name: cls.of(z["model"], z["optimizer"], names) for name, z in kept.items()},
            stopped=stored.get("stopped", ""),
            controller=stored.get("controller", {}),
        )

    def _whole(self) -> Rest:
        assert self.rest is not None, "a vector has no state dicts"
        return self.rest


def _copied(value: Any) -> Any:
    """A copy of a tensor, or of a module's extra state."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def same_bits(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two state dicts of a network hold the same bits."""
    tensors = {name: t for name, t in a.items() if isinstance(t, Tensor)}
    return a.keys() == b.keys() and all(
        isinstance(b[name], Tensor) and torch.equal(t, b[name]) for name, t in tensors.items()
    )
