"""CUDA graphs: one step of an inner solver captured once, and replayed for every step of that form.

Of a step of attacks on small batches most time goes into launching its kernels one by one; a graph launches
all of them at once. It repeats kernels on fixed memory. Inputs are therefore copied to buffers of its own,
step sizes and radii are 0-d tensors in them, and the frozen network keeps its tensors from one view to the
next. Parameters that the view does not lay out anew are the network's own memory, so that a graph sees what
an optimiser or ``load_state_dict`` writes there; copies are written again when a view opens.

The first use of a form runs without a graph and is observed (`capturable`), the second is captured. Whatever
cannot be captured runs without a graph, with one note of the reason. Results are the same bits if the kernels
are: the captured function is the plain one.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from controlat._util.precision import tf32_state
from controlat.models.frozen import capture
from controlat.models.frozen.capturable import ATTRIBUTES, Contents, observed, unsuited
from controlat.models.frozen.graph_use import USE
from controlat.models.frozen.parts import Parts

__all__ = ["Graphs", "Store", "graphs_of", "iterate"]

_MOST = 16  # graphs of one network in one mode and layout
_UNSTABLE = 3  # observed passes that changed attributes, after which none is observed any more


class Store:
    """What views of one network in one mode and layout keep: frozen tensors, and graphs that run on them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.classes = 0  # of the logits in the last pass
        self._shared: list[bool] = []  # which of them are the network's own memory
        self._contents = Contents()
        self._reason, self._unstable = "", 0
        # None: observed, to be captured when it is used again
        self._graphs: OrderedDict[Hashable, capture.Captured | None] = OrderedDict()

    def frozen(self, parts: Parts, freeze: Callable[[], dict[int, Tensor]]) -> dict[int, Tensor]:
        """Frozen tensors for a network's own, by their ids: those of the last view if they fit.

        Of these, copies are written again.

        Args:
            parts: of the network, with its own parameters and buffers.
            freeze: makes new frozen tensors for them.
        """
        own = {id(t): t for t in (*parts.parameters, *parts.buffers)}
        if self._fits(own):
            pairs = zip(self.tensors, own.values(), self._shared, strict=True)
            copies = [(f, t.detach()) for f, t, shared in pairs if not shared]
            if copies:
                with torch.no_grad():
                    torch._foreach_copy_([f for f, _ in copies], [t for _, t in copies])
        else:
            fresh = freeze()
            self.tensors = [fresh[i] for i in own]
            self._shared = [
                f.data_ptr() == t.data_ptr() for f, t in zip(self.tensors, own.values(), strict=True)
            ]
            self._graphs.clear()
        return dict(zip(own, self.tensors, strict=True))

    def _fits(self, own: dict[int, Tensor]) -> bool:
        return len(own) == len(self.tensors) and all(
            f.shape == t.shape
            and f.dtype == t.dtype
            and f.device == t.device
            and (not shared or (f.data_ptr() == t.data_ptr() and f.stride() == t.stride()))
            for f, t, shared in zip(self.tensors, own.values(), self._shared, strict=True)
        )

    def check(self, parts: Parts) -> str:
        """Why the network cannot be captured; its graphs are dropped if it has changed since."""
        if not self._contents.same(parts.modules):
            self._contents = Contents(parts.modules)
            self._graphs.clear()
            self._reason = (
                ATTRIBUTES if self._unstable >= _UNSTABLE else unsuited(parts.modules, self.tensors)
            )
        return self._reason

    def observed(self, parts: Parts, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """run(), a pass without a graph which decides whether the next one like it is captured."""
        with observed(parts.modules) as reasons:
            result = run()
        if not reasons:
            self._add(key, None)
        elif reasons == [ATTRIBUTES] and self._unstable < _UNSTABLE:  # it may have been the first pass of all
            self._unstable += 1
            self._contents = Contents(parts.modules)
        else:
            self._reason = reasons[0]
            USE.get().note(parts, self._reason)
        return result

    def captured(
        self,
        parts: Parts,
        key: Hashable,
        step: capture.Step,
        x: Tensor,
        inputs: Sequence[Tensor],
        numbers: Sequence[float],
    ) -> capture.Captured | None:
        """The graph of an observed form, captured now if it is not yet; None if that fails."""
        graph = self._graphs[key]
        if graph is None:
            beside = next((g.replay for g in self._graphs.values() if g is not None), None)
            try:
                with self._preserved():
                    graph = capture.Captured(step, x, inputs, numbers, beside)
            except Exception as error:  # by the user's own network: it runs without a graph, as it did before
                first = error.__context__ or error  # the end of a capture that was broken off fails too
                self._reason = f"its capture failed ({str(first).partition(chr(10))[0]})"
                USE.get().note(parts, self._reason)
                return None
            USE.get().captured += 1
        self._add(key, graph)
        return graph

    @contextmanager
    def _preserved(self) -> Iterator[None]:
        """Running statistics and copies of weights as before after the block."""
        copies = [f for f, shared in zip(self.tensors, self._shared, strict=True) if not shared]
        values = [f.clone() for f in copies]
        try:
            yield
        finally:
            with torch.no_grad():
                for f, value in zip(copies, values, strict=True):
                    f.copy_(value)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def _add(self, key: Hashable, graph: capture.Captured | None) -> None:
        """The most recently used ones are kept."""
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)


class Graphs:
    """The stores of one network, by mode and layout, and whether a view has its tensors in place."""

    def __init__(self) -> None:
        self.taken = False
        self.stores: dict[Hashable, Store] = {}
        self._stream: torch.cuda.Stream | None = None  # of the last view, whose kernels may still run

    def store(self, *key: Hashable) -> Store:
        """The store of one mode and layout."""
        return self.stores.setdefault(key, Store())

    @contextmanager
    def taken_by_one(self, device: torch.device) -> Iterator[Graphs | None]:
        """The graphs, for one view at a time; None for a view within it."""
        if self.taken:
            yield None
            return
        self.taken = True
        self._stream = capture.follow(self._stream, device)
        try:
            yield self
        finally:
            self._stream = capture.follow(self._stream, device)
            self.taken = False


# By the id of the network: users' modules need not be hashable. Graphs go with their network.
_GRAPHS: dict[int, tuple[weakref.ref[nn.Module], Graphs]] = {}


def graphs_of(parts: Parts) -> Graphs | None:
    """The graphs of a network; None where there are none: switched off, on a CPU, own classes of tensors."""
    tensors = [*parts.parameters, *parts.buffers]
    if not tensors or USE.get().mode == "off" or capture.backend_of(tensors[0].device) is None:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        USE.get().note(parts, "its weights are tensors of a class of their own")
        return None
    model, key = parts.model, id(parts.model)
    reference, graphs = _GRAPHS.get(key, (None, None))
    if graphs is None or reference is None or reference() is not model:
        graphs = Graphs()
        _GRAPHS[key] = weakref.ref(model, lambda _: _GRAPHS.pop(key, None)), graphs
    return graphs


def iterate(
    store: Store | None,
    parts: Parts,
    step: capture.Step,
    x: Tensor,
    inputs: Sequence[Tensor],
    numbers: Sequence[float],
    *,
    count: int,
    key: Hashable,
    check: Callable[[int], object],
    keep: bool,
) -> Iterator[Tensor]:
    """Yield x^1, ..., x^count of x' = step(x, *inputs, *numbers), by a graph where there is one.

    Args:
        store: of the view that has the network in place; None for no graphs.
        parts: of the network that `step` evaluates.
        step: computes the next point; with a graph the numbers are 0-d tensors.
        x: x^0.
        inputs: tensors that stay the same in all steps.
        numbers: numbers that stay the same in all steps.
        count: how many steps.
        key: what else decides the kernels of `step`, beside its arguments; None if that cannot be told.
        check: called with the number of classes before steps by a graph.
        keep: whether every x^k is kept; otherwise all but the last are overwritten by the next.
    """
    full = None
    if store is not None and count and key is not None and not _differentiated(x, inputs):
        if reason := store.check(parts) or _unsuited(x, inputs):
            USE.get().note(parts, reason)
        else:
            full = (key, *map(_form, (x, *inputs)), len(numbers), _kernels())
    if store is not None and full in store:
        check(store.classes)
        graph = store.captured(parts, full, step, x, inputs, numbers)
        if graph is not None and not graph.running:
            for k, point in enumerate(graph.steps(x, inputs, numbers, count), start=1):
                yield point.clone() if keep or k == count else point
            return
        full = None
    for _ in range(count):
        if store is None or full is None:
            x = step(x, *inputs, *numbers)
        else:
            x = store.observed(parts, full, functools.partial(step, x, *inputs, *numbers))
            full = None  # the first pass tells
        yield x


def _form(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.device


def _differentiated(x: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a graph of autograd is wanted of the steps."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *inputs))


def _unsuited(x: Tensor, inputs: Sequence[Tensor]) -> str:
    """Why steps on these inputs cannot be captured; an empty text if they can.

    In half precision a product with a number is rounded once, one with a 0-d tensor twice. The layout of a
    step's result may depend on those of its inputs, if they differ.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return f"its inputs are {x.dtype}"
    if inputs[0].stride() != x.stride():
        return "its inputs have several memory layouts"
    if _has_any_global_hook():
        return "there are hooks of all modules, which run in Python"
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "it is compiled or captured already"
    return ""


def _kernels() -> Hashable:
    """torch's switches that decide which kernels run."""
    cudnn: Any = torch.backends.cudnn
    return (
        cudnn.enabled,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        tf32_state(),
    )
