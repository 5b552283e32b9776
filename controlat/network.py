"""The network as an attack sees it: frozen weights, one mode, counted evaluations, no trace left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from controlat import kernels
from controlat.asking import ask, check_model
from controlat.control import choice, flag, instance

__all__ = [
    "MODES",
    "Meter",
    "NonFiniteError",
    "Tap",
    "View",
    "channels_last",
    "first_layer",
    "is_convolutional",
]

MODES = ("eval", "train")

# On CPU, buffers of this many samples are small enough for the C library to keep; those of 256 it gives back
# after every step, and faults in again at the next (benchmarks/README.md).
_CPU_CHUNK = 64


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a parameter is not finite."""


@dataclass
class Meter:
    """What was spent, in samples: a batch of 32 taken forward and backward once adds 32.

    Args:
        gradients: forward-backward passes (gradient evaluations).
        forwards: forward passes without a backward one.
        layers: passes through the first layer alone, forward and backward (YOPO).
    """

    gradients: int = 0
    forwards: int = 0
    layers: int = 0

    def since(self, earlier: Meter) -> Meter:
        """What was spent after `earlier` was copied."""
        gone = self.gradients - earlier.gradients, self.forwards - earlier.forwards
        return Meter(*gone, self.layers - earlier.layers)

    def add(self, more: Meter) -> None:
        """Count more, in place."""
        self.gradients += more.gradients
        self.forwards += more.forwards
        self.layers += more.layers

    def copy(self) -> Meter:
        """The present counts."""
        return Meter(self.gradients, self.forwards, self.layers)


def channels_last(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NHWC in memory, others as they are.

    Unlike ``t.contiguous(memory_format=...)`` it sets the strides for one channel too, where both layouts
    hold the same bytes but only these strides select the fast kernels (pooling above all).
    """
    if t.dim() != 4:
        return t
    like = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    return t if t.stride() == like.stride() else like.copy_(t)


class _Reached(Exception):
    """The layer that was asked for has been computed."""


class Tap:
    """A context that catches what a layer puts out while a model runs, and may stop the model there.

    Args:
        layer: a module of the model.
        stop: leave the model's forward pass once the layer has run (see `until`).
        cut: hand the rest of the model a copy without a graph to what came before, so that gradients with
            respect to the output stop there.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> with Tap(model[0]) as tap:
    ...     y = model(torch.ones(1, 2))
    >>> tap.output.shape
    torch.Size([1, 3])
    """

    output: Tensor

    def __init__(self, layer: nn.Module, *, stop: bool = False, cut: bool = False) -> None:
        self.layer, self.stop, self.cut = layer, stop, cut

    def __enter__(self) -> Self:
        self._handle = self.layer.register_forward_hook(self._hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self._handle.remove()
        return kind is _Reached

    def _hook(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        self.output = output.detach().requires_grad_() if self.cut else output
        if self.stop:
            raise _Reached
        return self.output.clone()  # an activation in place would overwrite what was caught


def first_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """A module by its dotted name; by default the first one with parameters, and none in modules within it.

    Raises:
        ValueError: there is none of that name; the message lists the first ones.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            listed = ", ".join(n for n in list(modules)[1:9])
            raise ValueError(f"the model has no layer {name!r}; its first ones are: {listed}")
        found: nn.Module = modules[name]
    else:
        owners = [m for m in modules.values() if next(m.parameters(recurse=False), None) is not None]
        found = next(m for m in owners if sum(1 for part in m.modules() if part in owners) == 1)
    return found


def is_convolutional(model: nn.Module) -> bool:
    """Whether the model has weights of two-dimensional convolutions."""
    return any(p.dim() == 4 for p in model.parameters())


def _couples_samples(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, "running_mean", 0) is None


class View:
    """A context in which a model can be asked for logits and input gradients, and nothing of it changes.

    Inside, the model runs on detached weights and on copies of its buffers; outside, the training flag of
    every module, buffers, ``.grad`` and ``requires_grad`` are as they were, also after an error.

    Args:
        model: any nn.Module from (N, ...) inputs in [0, 1] to logits (N, C).
        mode: ``"eval"`` or ``"train"``: how BatchNorm and dropout behave inside.
        channels_last: run convolutional models in NHWC layout and with a faster kernel for one-channel
            images, about twice as fast on CPU. Values agree to rounding; signs near zero may differ.
        meter: where evaluations are counted.
        autocast: a dtype for mixed precision, None for none.

    Raises:
        TypeError: the model is not an nn.Module.
        ValueError: unknown mode.
        RuntimeError: entered inside ``torch.inference_mode()``.

    >>> import torch
    >>> from controlat.losses import cross_entropy
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    >>> with View(model) as view:
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
    ) -> None:
        check_model(model)
        choice(mode, "mode", MODES)
        flag(channels_last, "channels_last")
        instance(autocast, (torch.dtype, type(None)), "autocast", "such as torch.bfloat16")
        self.model, self.mode = model, mode
        self.channels_last = channels_last and is_convolutional(model)
        self._one_channel = self.channels_last and kernels.applies(model)
        self.meter = Meter() if meter is None else meter
        self.autocast = autocast

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() rules out gradients; use torch.no_grad(), or neither")
        layout = channels_last if self.channels_last else (lambda t: t)
        self._state = {name: layout(p.detach()) for name, p in self.model.named_parameters()}
        self._state |= {name: b.detach().clone() for name, b in self.model.named_buffers()}
        self._flags = [(m, m.training) for m in self.model.modules()]
        self.model.train(self.mode == "train")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, training in self._flags:
            module.training = training
        del self._state, self._flags

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Parts of a batch that can be worked on in turn: faster on CPU where samples do not interact."""
        whole = self.mode == "train" or not self.channels_last or x.device.type != "cpu"
        size = len(x) if whole or any(map(_couples_samples, self.model.modules())) else _CPU_CHUNK
        for i in range(0, len(x), max(size, 1)):
            yield slice(i, i + size)

    def prepare(self, x: Tensor) -> Tensor:
        """x in the memory layout that this view runs in."""
        return channels_last(x) if self.channels_last else x

    def _forward(self, x: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(x.device.type, dtype=self.autocast))
            if self._one_channel:
                stack.enter_context(kernels.OneChannelConvolutions())
            logits = ask(self.model, x, lambda v: functional_call(self.model, self._state, (v,)))
        return logits.float() if self.autocast is not None else logits

    def __call__(self, x: Tensor) -> Tensor:
        """Logits, without a graph; counted as forward passes.

        Raises:
            NonFiniteError: a logit is not finite.
        """
        self.meter.forwards += len(x)
        with torch.no_grad():
            logits = self._forward(self.prepare(x))
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError("the network returns logits that are not finite")
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits, with a graph to x where x asks for one: for attacks of other libraries.

        A forward pass at first; each backward pass through it then counts as one gradient evaluation.
        """
        n, passes = len(x), 0

        def count(_: Tensor) -> None:
            nonlocal passes
            passes += 1
            self.meter.gradients += n
            self.meter.forwards -= n if passes == 1 else 0

        self.meter.forwards += n
        found = self._forward(self.prepare(x))
        if found.requires_grad:
            found.register_hook(count)
        return found

    def layer_gradient(self, x: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
        """Gradient with respect to x of <layer's output, weight>, through the model up to that layer."""
        self.meter.layers += len(x)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            with Tap(layer, stop=True) as tap:
                self._forward(x)
            (gradient,) = torch.autograd.grad((tap.output * weight).sum(), x)
        return gradient

    def gradient(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient with respect to x of the SUM over samples of objective(logits).

        The sum, not the mean: row i is the gradient of sample i alone, whatever the batch size.
        """
        self.meter.gradients += len(x)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(self._forward(x)).sum(), x)
        return gradient
