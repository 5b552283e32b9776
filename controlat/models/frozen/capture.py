"""Capturing a step of an inner solver as a CUDA graph, on memory of its own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["Backend", "Captured", "Cuda", "Replay", "Step", "backend_of", "follow"]

_WARM = 2  # passes before a capture, in which libraries choose kernels and reserve memory

# (x, inputs that stay the same in all steps, numbers such as step size and radius) -> the next x.
Step: TypeAlias = Callable[..., Tensor]
Replay: TypeAlias = Callable[[], object]


class Backend(Protocol):
    """What turns a function of no arguments into one that repeats its kernels."""

    def capture(self, run: Callable[[], None], device: torch.device, beside: Replay | None) -> Replay:
        """A function that repeats what `run` does on a device; `beside`: another one, to share memory with.

        It may call `run` before.
        """


class Cuda:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._one = threading.Lock()  # threads with networks of their own capture one after the other

    def capture(self, run: Callable[[], None], device: torch.device, beside: Replay | None) -> Replay:
        """Capture on a side stream, after passes there that do all that is done once."""
        with self._one, torch.cuda.device(device):
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # shared memory needs one
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            # The pool of a living graph: one whose graphs are all gone cannot be captured into again.
            pool = getattr(beside, "__self__", graph).pool() if beside is not None else None
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            state = generator.clone_state()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM):
                        run()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:  # of torch up to 2.10: its generator counts as captured for good
                generator.graphsafe_set_state(state)
                raise
            finally:
                torch.cuda.set_stream(current)  # torch does not where a capture fails
                current.wait_stream(stream)
        return graph.replay


_CUDA = Cuda()


def backend_of(device: torch.device) -> Backend | None:
    """What captures on a device; None if nothing does."""
    return _CUDA if device.type == "cuda" else None


def follow(last: torch.cuda.Stream | None, device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of a CUDA device, which from now on waits for all that `last` was given so far.

    Kernels on different streams run at the same time: memory that they share needs an order.
    """
    if device.type != "cuda":
        return None
    current = torch.cuda.current_stream(device)
    if last is not None and last != current:
        current.wait_stream(last)
    return current


class Captured:
    """One step x' = step(x, *inputs, *numbers) as a graph on buffers of its own."""

    def __init__(
        self,
        step: Step,
        x: Tensor,
        inputs: Sequence[Tensor],
        numbers: Sequence[float],
        beside: Replay | None,
    ) -> None:
        self.x, self.inputs = x.clone(), [t.clone() for t in inputs]
        self.numbers = [x.new_full((), value) for value in numbers]
        self.running = False
        # Nothing of self in it: a graph is freed with the last reference to it, not by the garbage collector.
        run = functools.partial(_run, step, self.x, self.inputs, self.numbers)
        backend = backend_of(x.device)
        assert backend is not None
        self.replay = backend.capture(run, x.device, beside)

    def steps(
        self, x: Tensor, inputs: Sequence[Tensor], numbers: Sequence[float], count: int
    ) -> Iterator[Tensor]:
        """Yield x^1, ..., x^count from x^0 = x, all in the same memory."""
        self.running = True
        try:
            for buffer, value in zip((self.x, *self.inputs), (x, *inputs), strict=True):
                buffer.copy_(value)
            for number, size in zip(self.numbers, numbers, strict=True):
                number.fill_(size)
            for _ in range(count):
                self.replay()
                yield self.x
        finally:
            self.running = False


def _run(step: Step, x: Tensor, inputs: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
    with torch.no_grad():
        x.copy_(step(x, *inputs, *numbers))
