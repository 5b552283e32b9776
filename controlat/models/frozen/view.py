"""The network as attacks use it: frozen weights, one mode, counted evaluations, unchanged afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from controlat._util import kernels, rng
from controlat._util.checks import choice, flag, instance
from controlat._util.watch import Watch, finiteness
from controlat.control.cost import Meter
from controlat.models.frozen import capture, graphs
from controlat.models.frozen.contexts import MODES, exclusive, in_mode, normal_tensor, swapped
from controlat.models.frozen.hook import LayerHook
from controlat.models.frozen.layout import (
    channels_first,
    channels_last,
    is_convolutional,
    run_in_layout,
    runs_nchw_only,
)
from controlat.models.frozen.logits import check_kind, check_model, check_weights, checked_logits

__all__ = ["CHUNK", "FrozenModel", "check_model", "runs_channels_last"]


# On CPU, malloc keeps freed activations of this many samples; those of 256 samples it returns to the system
# after every step, which costs page faults in the next (benchmarks/README.md).
CHUNK = 64


def runs_channels_last(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network runs in NHWC layout, tried in both modes on two black images of a shape (C, H, W)."""
    if not is_convolutional(model):
        return True
    first = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(2, *shape, dtype=first.dtype, device=first.device)
    with rng.scoped(0, "layout", device=first.device), torch.no_grad():
        for mode in MODES:
            with FrozenModel(model, mode) as view:
                view.logits(x)
    return not runs_nchw_only(model)


def _couples_samples(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, "running_mean", 0) is None


class FrozenModel:
    """A context manager that evaluates logits and input gradients of a model and leaves it unchanged.

    Inside the block the model has detached weights and copies of its buffers. After it, also after an error,
    the model has the same Parameter and buffer objects, training flags, ``.grad`` and ``requires_grad`` as
    before. The mode is set by `model.train` and `model.eval`, which modules may override. Views of one model
    in several threads wait for each other; nothing else may use the model while a view is open. A view within
    a view starts from the buffers of the outer one.

    Args:
        model: any nn.Module from (N, ...) inputs in [0, 1] to logits (N, C).
        mode: ``"eval"`` or ``"train"``: how BatchNorm and dropout behave inside.
        channels_last: run convolutional models in NHWC layout and with a faster kernel for one-channel
            images, about twice as fast on CPU. Values agree to rounding; signs near zero may differ.
        meter: where evaluations are counted.
        autocast: a dtype for mixed precision, None for none.
        watch: looks whether results are finite; by default at once.

    Raises:
        TypeError: the model is not an nn.Module, or wrapped in DistributedDataParallel.
        ValueError: unknown mode; when entered: lazy layers that have not run yet, weights on the device meta.
        RuntimeError: entered inside ``torch.inference_mode()``.

    >>> import torch
    >>> from controlat.attacks.losses import cross_entropy
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    >>> with FrozenModel(model) as view:
    ...     gradient = view.gradient(x, lambda logits: cross_entropy(logits, y))
    >>> gradient.shape, view.meter.gradients
    (torch.Size([2, 1, 2, 2]), 2)
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "eval",
        *,
        channels_last: bool = True,
        meter: Meter | None = None,
        autocast: torch.dtype | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.model = check_kind(model)
        choice(mode, "mode", MODES)
        flag(channels_last, "channels_last")
        instance(autocast, (torch.dtype, type(None)), "autocast", "such as torch.bfloat16")
        self.mode, self.channels_last = mode, channels_last
        self.meter = Meter() if meter is None else meter
        self.autocast = autocast
        self.watch = Watch() if watch is None else watch

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() rules out gradients; use torch.no_grad(), or neither")
        with contextlib.ExitStack() as stack:
            parts = stack.enter_context(exclusive(self.model))
            check_weights(parts)
            self._parts = stack.enter_context(in_mode(parts, self.mode == "train"))
            self._lays_out = self.channels_last and is_convolutional(self._parts)
            self._graphs = graphs.graphs_of(self._parts)
            if self._graphs is not None:  # a view within a view has tensors of its own, and no graphs
                device = (*self._parts.parameters, *self._parts.buffers)[0].device
                self._graphs = stack.enter_context(self._graphs.taken_by_one(device))
            self._weights = stack.enter_context(contextlib.ExitStack())
            self._freeze(self._lays_out and not runs_nchw_only(self.model))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _freeze(self, nhwc: bool) -> None:
        """Put detached weights and copies of buffers in place, in one layout."""
        self._weights.close()
        self._nhwc = nhwc
        layout = (channels_last if nhwc else channels_first) if self._lays_out else (lambda t: t)

        def freeze() -> dict[int, Tensor]:
            frozen: dict[int, Tensor] = {
                id(p): nn.Parameter(layout(normal_tensor(p.detach())), requires_grad=False)
                for p in self._parts.parameters
            }
            if self._lays_out:
                for i in kernels.one_channel_weights(self._parts.modules) & frozen.keys():
                    frozen[i] = frozen[i].as_subclass(kernels.OneChannelWeight)
            return frozen | {id(b): b.detach().clone() for b in self._parts.buffers}

        self._store = None
        if self._graphs is not None:
            self._store = self._graphs.store(self.mode, self._lays_out, nhwc)
        frozen = freeze() if self._store is None else self._store.frozen(self._parts, freeze)
        self._weights.enter_context(swapped(self._parts, frozen))

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Parts of a batch to be evaluated one after the other: faster on CPU, if samples do not interact."""
        whole = self.mode == "train" or not self._lays_out or x.device.type != "cpu"
        size = len(x) if whole or any(map(_couples_samples, self._parts.modules)) else CHUNK
        for i in range(0, len(x), max(size, 1)):
            yield slice(i, i + size)

    def prepare(self, x: Tensor) -> Tensor:
        """x in the memory layout that this view runs in."""
        return channels_last(x) if self._lays_out and self._nhwc else x

    def _forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self._run(x)
        with torch.autocast(x.device.type, dtype=self.autocast, cache_enabled=False):  # for graphs
            return self._run(x).float()

    def _run(self, x: Tensor) -> Tensor:
        if self._lays_out:
            logits = run_in_layout(self.model, x, self._run_in)
        else:
            logits = checked_logits(self.model, x)
        if self._store is not None:
            self._store.classes = logits.shape[1]
        return logits

    def _run_in(self, x: Tensor, nhwc: bool) -> Tensor:
        if nhwc != self._nhwc:
            self._freeze(nhwc)
        return checked_logits(self.model, x)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits, without a graph; counted as forward passes.

        Raises:
            NonFiniteError: a logit is not finite; raised when `watch` looks.
        """
        self.meter.forwards += len(x)
        with torch.no_grad():
            logits = self._forward(self.prepare(x))
        self.watch.finite(finiteness(logits), "the network returns logits that are not finite")
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits, with a graph if x requires gradients: for attacks of other libraries.

        Counted as a forward pass, and as one gradient evaluation in its place for each backward pass.
        """
        n, passes = len(x), 0

        def count(_: Tensor) -> None:
            nonlocal passes
            passes += 1
            self.meter.gradients += n
            self.meter.forwards -= n if passes == 1 else 0

        self.meter.forwards += n
        logits = self._forward(self.prepare(x))
        if logits.requires_grad:
            logits.register_hook(count)
        return logits

    def layer_gradient(self, x: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
        """Gradient with respect to x of <layer's output, weight>, through the model up to that layer."""
        self.meter.layers += len(x)
        x = normal_tensor(x.detach()).requires_grad_()
        with torch.enable_grad():
            with LayerHook(layer, stop=True) as hook:
                self._forward(x)
            (gradient,) = torch.autograd.grad((hook.output * weight).sum(), x)
        return gradient

    def gradient(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient with respect to x of the SUM over samples of objective(logits).

        The sum, not the mean: row i is the gradient of sample i alone, whatever the batch size.
        """
        self.meter.gradients += len(x)
        return self.uncounted_gradient(x, objective)

    def uncounted_gradient(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """`gradient` for a step of `iterate`, which counts for it."""
        x = normal_tensor(x.detach()).requires_grad_()
        with (
            contextlib.nullcontext() if torch.is_grad_enabled() else torch.enable_grad()
        ):  # it costs 1 % of a step
            losses = objective(self._forward(x))
        (gradient,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
        return gradient

    def iterate(
        self,
        step: capture.Step,
        x: Tensor,
        inputs: Sequence[Tensor],
        numbers: Sequence[float],
        *,
        count: int,
        key: Hashable,
        check: Callable[[int], object],
        keep: bool = True,
    ) -> Iterator[Tensor]:
        """Yield x^1, ..., x^count of x' = step(x, *inputs, *numbers), each counted as a gradient evaluation.

        On a CUDA device the step is captured as a CUDA graph and replayed, where that is possible.

        Args:
            step: a function of its arguments, this network, and what `key` tells; it evaluates
                `uncounted_gradient` once. It must work with 0-d tensors in place of `numbers`.
            x: x^0, in the layout of `prepare`.
            inputs: tensors that stay the same in all steps, the centre of the perturbation set first.
            numbers: numbers that stay the same in all steps.
            count: how many steps.
            key: what else the step depends on; None if that cannot be told.
            check: called with the number of classes before the steps of a graph, which check no labels.
            keep: whether every x^k is kept; if not, all but the last may be overwritten by the next.
        """
        points = graphs.iterate(
            self._store,
            self._parts,
            step,
            x,
            inputs,
            numbers,
            count=count,
            key=None if key is None else (key, self.autocast),
            check=check,
            keep=keep,
        )
        for point in points:
            self.meter.gradients += len(x)
            yield point
