"""The state z of training, and the costates that have its shape.

    z = (theta, v, r, memory, rows; kept, the rest)

The driver copies z and restores it bit for bit; a checkpoint contains it. The components before the semicolon
have a derivative, and form a vector space. A costate, and the difference of two states, are a `State` with
these components alone.
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

from controlat.dynamics.rows import gather, put
from controlat.dynamics.state_dict import Names, Rest, copied
from controlat.methods import Rows

__all__ = ["Rest", "State", "same_bits"]


@dataclass(frozen=True, eq=False)
class State:
    """The state z; or a costate or another vector, whose `rest` is None.

    Args:
        parameters: theta, one tensor per trained parameter.
        momentum: the optimiser's momentum buffers v, one per parameter; empty without momentum, and before
            the first step.
        statistics: running means and variances of normalisation layers, as in `Driver.statistics`.
        memory: tensors that the method carries, by name; those of integers have no derivative.
        rows: memory per training sample, by name; 0 for samples that carry nothing.
        index: (N,) positions of the samples in `rows`; None for all training samples.
        kept: copies of the network and its optimiser that the method saved; they never change, and are
            shared, not copied.
        rest: entries of the network's and the optimiser's state dicts that have no derivative.
        stopped: why the method ended training; empty while training goes on.
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
        """The components with a derivative: theta, v, r, memory and rows, each by position or name."""
        lists = self.parameters, self.momentum, self.statistics
        memory = {name: t for name, t in self.memory.items() if t.is_floating_point()}
        rows = {name: store.values for name, store in self.rows.items()}
        return *(dict(enumerate(part)) for part in lists), memory, rows

    def tensors(self) -> list[Tensor]:
        """All tensors with a derivative, in order, without those of kept networks."""
        return [t for part in self.parts() for t in part.values()]

    def like(self, tensors: Iterable[Tensor]) -> State:
        """The vector with the structure of this one and other tensors, in the order of `self.tensors()`."""
        values = iter(tensors)
        return State(
            parameters=[next(values) for _ in self.parameters],
            momentum=[next(values) for _ in self.momentum],
            statistics=[next(values) for _ in self.statistics],
            memory={name: next(values) for name, t in self.memory.items() if t.is_floating_point()},
            rows={name: Rows(next(values), store.seen) for name, store in self.rows.items()},
            index=self.index,
        )

    def zeros_like(self) -> State:
        """The vector 0."""
        return self.like(map(torch.zeros_like, self.tensors()))

    def plus(self, other: State, factor: float = 1.0) -> State:
        """self + factor * other; a missing component counts as 0. Parts without derivative are self's."""
        self._check_samples(other)
        sums = []
        for a, b in zip(self.parts(), other.parts(), strict=True):
            both = {i: torch.add(t, b[i], alpha=factor) if i in b else t for i, t in a.items()}
            sums.append(both | {i: factor * t for i, t in b.items() if i not in a})
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
        """The inner product; a missing component counts as 0."""
        self._check_samples(other)
        total = 0.0
        for a, b in zip(self.parts(), other.parts(), strict=True):
            products = [(t * b[i]).sum() for i, t in a.items() if i in b]
            total += float(torch.stack(products).double().sum()) if products else 0.0  # one transfer
        return total

    def norm(self) -> float:
        """The l_2 norm of all components with a derivative, those of kept networks included."""
        tensors = [*self.tensors(), *(t for network in self.kept.values() for t in network.tensors())]
        return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())

    def _check_samples(self, other: State) -> None:
        if not (self.rows and other.rows):
            return
        a, b = self.index, other.index
        if a is not b and (a is None or b is None or not torch.equal(a, b)):
            raise ValueError("the rows of two states are of other samples: take both `at` the same ones")

    # ------------------------------------------------------------------------------------ of samples

    def at(self, index: Tensor | None) -> State:
        """The same state with the rows of some samples only, gathered; the state itself for None."""
        if index is None:
            return self
        return replace(self, rows={name: gather(s, index) for name, s in self.rows.items()}, index=index)

    def with_rows(self, stores: Mapping[str, Rows]) -> dict[str, Rows]:
        """Stores of all samples with the rows of this state written into them, in place.

        Stores of names that this state lacks are left out. A state of all samples gives copies of its rows.
        """
        if self.index is None:
            return {name: Rows(*map(torch.clone, rows)) for name, rows in self.rows.items()}
        return {name: put(stores.get(name), self.index, rows) for name, rows in self.rows.items()}

    # ------------------------------------------------------------------------------------ as a whole

    def copy(self) -> State:
        """A copy of all tensors and plain data; kept networks are shared."""
        rest = self.rest
        if rest is not None:
            entries = {name: copied(t) for name, t in rest.entries.items()}
            rest = Rest(rest.names, entries, rest.groups)
        return replace(
            self,
            parameters=list(map(copied, self.parameters)),
            momentum=list(map(copied, self.momentum)),
            statistics=list(map(copied, self.statistics)),
            memory={name: copied(t) for name, t in self.memory.items()},
            rows={name: Rows(*map(copied, rows)) for name, rows in self.rows.items()},
            index=None if self.index is None else self.index.clone(),
            kept=dict(self.kept),
            rest=rest,
            controller=copy.deepcopy(self.controller),
        )

    def network(self) -> State:
        """The state of the network and its optimiser alone: what a method saves."""
        return State(self.parameters, self.momentum, self.statistics, rest=self.rest)

    def towards(self, other: State, part: float) -> State:
        """Linear interpolation (1 - part) self + part other; what is not floating point is self's."""
        self._check_samples(other)

        def mixed(a: Any, b: Any) -> Any:
            real = isinstance(a, Tensor) and a.is_floating_point()
            return a if not real or torch.equal(a, b) else a.lerp(b, part)  # equal tensors may hold -inf

        rest = self.rest
        if rest is not None and other.rest is not None:
            entries = {name: mixed(t, other.rest.entries[name]) for name, t in rest.entries.items()}
            rest = replace(rest, entries=entries)
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
        """Sums over all tensors and a hash of the plain data, for processes to compare."""
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
        """The state of a network and an optimiser with these state dicts; nothing is copied.

        Some networks have other parameters in evaluation mode. A state dict of that mode, which lacks one of
        the names, gives a state that can be restored, but without components that have a derivative.

        Args:
            model: state dict of the network.
            optimizer: state dict of torch.optim.SGD, whose parameters are those of `names`, in order.
            names: names of the entries that have a derivative.
            **more: the other fields of the state, without `rest`.
        """
        if not model.keys() >= {*names.parameters, *names.statistics}:
            names = Names((), (), {})
        differentiable = {*names.parameters, *names.statistics, *names.tied}
        parameters = [model[name] for name in names.parameters]
        buffers = {i: s.get("momentum_buffer") for i, s in optimizer["state"].items()}
        present = {i: v for i, v in buffers.items() if v is not None}
        count = (len(parameters) or len(present)) if present else 0
        return cls(
            parameters=parameters,
            momentum=[present[i] if i in present else torch.zeros_like(parameters[i]) for i in range(count)],
            statistics=[model[name] for name in names.statistics],
            rest=Rest(
                names=names,
                entries={name: value for name, value in model.items() if name not in differentiable},
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
        """The form in which checkpoints store it: state dicts, tensors by name and plain data; not copied."""
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
        """The inverse of `to_dict`; old checkpoints may have nothing but model, optimizer and memory."""
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


def same_bits(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two state dicts of a network hold the same bits."""
    tensors = {name: t for name, t in a.items() if isinstance(t, Tensor)}
    return a.keys() == b.keys() and all(
        isinstance(b[name], Tensor) and torch.equal(t, b[name]) for name, t in tensors.items()
    )
