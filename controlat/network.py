"""The network as an attack sees it: frozen weights, one mode, counted evaluations, no trace left."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from controlat import kernels, rng
from controlat.asking import ask, check_model
from controlat.borrowed import alone, in_mode, owned, replaced
from controlat.control import choice, flag, instance

__all__ = [
    "MODES",
    "LayoutWarning",
    "Meter",
    "NonFiniteError",
    "Tap",
    "View",
    "channels_last",
    "check_model",
    "first_layer",
    "in_layout",
    "is_convolutional",
    "runs_channels_last",
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
    return _laid_out(t, torch.channels_last)


def _channels_first(t: Tensor) -> Tensor:
    """A 4-d tensor laid out as NCHW, strides for one channel too."""
    return _laid_out(t, torch.contiguous_format)


def _laid_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    if t.dim() != 4:
        return t
    like = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=layout)
    return t if t.stride() == like.stride() else like.copy_(t)


class LayoutWarning(UserWarning):
    """A network does not run in NHWC layout, and is run in NCHW."""


# Networks that ran in NHWC, by id and mode, and that do not: users' modules need not be hashable.
_NHWC: weakref.WeakValueDictionary[tuple[int, bool], nn.Module] = weakref.WeakValueDictionary()
_NCHW: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def in_layout(model: nn.Module, x: Tensor, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """run(x, True), x in NHWC layout, or run(x, False), x in NCHW, for a network that does not run in NHWC.

    Such flatten by ``h.view(N, -1)``, which needs NCHW. A first pass that fails in NHWC and not in NCHW
    decides for good, and is told once. Other errors are the network's own.

    Warns:
        LayoutWarning: the network runs in NCHW only.
    """
    if _NCHW.get(id(model)) is model:
        return run(_channels_first(x), False)
    key = id(model), model.training
    if _NHWC.get(key) is model:
        return run(channels_last(x), True)
    before = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        found = run(channels_last(x), True)
        _NHWC[key] = model
        return found
    except (_Reached, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
    with torch.no_grad():
        for b, value in before:  # of a forward pass that got half way
            b.copy_(value)
    found = run(_channels_first(x), False)
    _NCHW[id(model)] = model
    kind = type(model).__name__
    warnings.warn(
        f"{kind} runs in NCHW layout only, which is used from here on (in NHWC: {reason}). With h.flatten(1) "
        "in place of h.view(len(h), -1) it would run in the faster one; channels_last=False asks for NCHW",
        LayoutWarning,
        stacklevel=2,
    )
    return found


def runs_channels_last(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network runs in NHWC layout, tried in both modes on two black images of a shape (C, H, W)."""
    if not is_convolutional(model):
        return True
    first = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(2, *shape, dtype=first.dtype, device=first.device)
    with rng.scoped(0, "layout", device=first.device), torch.no_grad():
        for mode in MODES:
            with View(model, mode) as view:
                view.logits(x)
    return _NCHW.get(id(model)) is not model


_COMPILED = (
    "the output of a single layer is asked for (YOPO), which torch.jit and torch.compile do not give: give "
    "the network as it was before"
)


class _Reached(Exception):
    """The layer that was asked for has been computed."""


class Tap:
    """A context that catches what a layer puts out while a model runs, and may stop the model there.

    Args:
        layer: a module of the model.
        stop: leave the model's forward pass once the layer has run (see `until`).
        cut: hand the rest of the model a copy without a graph to what came before, so that gradients with
            respect to the output stop there.

    Raises:
        ValueError: the layer does not run as a module of its own, as in compiled networks; its output is no
            tensor, or depends on nothing that is trained.

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
        if isinstance(self.layer, torch.jit.ScriptModule):
            raise ValueError(_COMPILED)
        self._handle = self.layer.register_forward_hook(self._hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self._handle.remove()
        if kind is None and not hasattr(self, "output"):
            raise ValueError(_COMPILED)
        return kind is _Reached

    def _hook(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        kind = type(module).__name__
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the layer {kind} puts out a {type(output).__name__}; name one that gives a tensor"
            )
        if torch.is_grad_enabled() and not output.requires_grad:
            raise ValueError(f"nothing is trained up to the layer {kind}; name a later one")
        self.output = output.detach().requires_grad_() if self.cut else output
        if self.stop:
            raise _Reached
        return self.output.clone()  # an activation in place would overwrite what was caught


def first_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """A module by its dotted name; by default the first with parameters that are trained, and none within it.

    Raises:
        ValueError: there is none of that name; the message lists the first ones. Or the network is compiled.
    """
    if "_orig_mod" in model._modules:  # of torch.compile
        raise ValueError(_COMPILED)
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            listed = ", ".join(n for n in list(modules)[1:9])
            raise ValueError(f"the model has no layer {name!r}; its first ones are: {listed}")
        found: nn.Module = modules[name]
    else:
        inner = {
            id(part) for m in modules.values() if is_parametrized(m) for part in m.parametrizations.modules()
        }
        layers = [m for m in modules.values() if id(m) not in inner]
        own = [(m, [*m.parameters(recurse=is_parametrized(m))]) for m in layers]
        trained = [m for m, weights in own if any(p.requires_grad for p in weights)]
        owners = trained or [m for m, weights in own if weights]  # within a view none is trained
        found = next(m for m in owners if sum(1 for part in m.modules() if part in owners) == 1)
    return found


def is_convolutional(model: nn.Module) -> bool:
    """Whether the model has weights of two-dimensional convolutions."""
    return any(p.dim() == 4 for p in model.parameters())


def _couples_samples(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, "running_mean", 0) is None


class View:
    """A context in which a model can be asked for logits and input gradients, and nothing of it changes.

    Inside, the model has detached weights and copies of its buffers in place of its own; outside it has the
    very Parameters and buffers that it had, and the training flag of every module, ``.grad`` and
    ``requires_grad`` are as they were, also after an error. Modes are entered and left through `train`, for
    modules that do more there than set a flag. Views of one model in several threads take turns; nothing
    else may use it while a view is open. A view within a view starts from the buffers of the outer one.

    Args:
        model: any nn.Module from (N, ...) inputs in [0, 1] to logits (N, C).
        mode: ``"eval"`` or ``"train"``: how BatchNorm and dropout behave inside.
        channels_last: run convolutional models in NHWC layout and with a faster kernel for one-channel
            images, about twice as fast on CPU. Values agree to rounding; signs near zero may differ.
        meter: where evaluations are counted.
        autocast: a dtype for mixed precision, None for none.

    Raises:
        TypeError: the model is not an nn.Module, or wrapped in DistributedDataParallel.
        ValueError: unknown mode, or lazy layers that have not run yet.
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
        self.meter = Meter() if meter is None else meter
        self.autocast = autocast

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() rules out gradients; use torch.no_grad(), or neither")
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone(self.model))
            stack.enter_context(in_mode(self.model, self.mode == "train"))
            self._weights = stack.enter_context(contextlib.ExitStack())
            self._freeze(self.channels_last and _NCHW.get(id(self.model)) is not self.model)
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
        layout = (channels_last if nhwc else _channels_first) if self.channels_last else (lambda t: t)
        frozen: dict[int, Tensor] = {
            id(p): nn.Parameter(layout(owned(p.detach())), requires_grad=False)
            for p in self.model.parameters()
        }
        if self.channels_last:
            for i in kernels.one_channel_weights(self.model) & frozen.keys():
                frozen[i] = frozen[i].as_subclass(kernels.OneChannelWeight)
        frozen |= {id(b): b.detach().clone() for b in self.model.buffers()}
        self._weights.enter_context(replaced(self.model, frozen))

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Parts of a batch that can be worked on in turn: faster on CPU where samples do not interact."""
        whole = self.mode == "train" or not self.channels_last or x.device.type != "cpu"
        size = len(x) if whole or any(map(_couples_samples, self.model.modules())) else _CPU_CHUNK
        for i in range(0, len(x), max(size, 1)):
            yield slice(i, i + size)

    def prepare(self, x: Tensor) -> Tensor:
        """x in the memory layout that this view runs in."""
        return channels_last(x) if self.channels_last and self._nhwc else x

    def _forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self._run(x)
        with torch.autocast(x.device.type, dtype=self.autocast):
            return self._run(x).float()

    def _run(self, x: Tensor) -> Tensor:
        def run(x: Tensor, nhwc: bool) -> Tensor:
            if nhwc != self._nhwc:
                self._freeze(nhwc)
            return ask(self.model, x, self.model)

        return in_layout(self.model, x, run) if self.channels_last else run(x, self._nhwc)

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
        x = owned(x.detach()).requires_grad_()
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
        x = owned(x.detach()).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(self._forward(x)).sum(), x)
        return gradient
