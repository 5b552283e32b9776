"""Projected gradient ascent (PGD), the inner solver with the control (alpha, K)."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections import deque
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn

from controlat._util.checks import choice, flag, instance, number, whole
from controlat.attacks.balls import Ball
from controlat.attacks.losses import Loss, cross_entropy
from controlat.control.space import Knob
from controlat.models.frozen import graph_use
from controlat.models.frozen.contexts import normal_tensor
from controlat.models.frozen.view import FrozenModel

__all__ = ["ALPHA", "NON_FINITE", "STEPS", "ascend", "fgsm", "path", "pgd"]

ALPHA = Knob("real", 0.0, meaning="step size of the inner ascent, in pixel units")
STEPS = Knob("integer", 0, meaning="number K of inner ascent steps")

NON_FINITE = "the gradient of the loss with respect to the input is not finite"
_OUTSIDE = 1e-6  # tolerance for inputs outside [0, 1]: rounding in float32


def path(
    view: FrozenModel,
    x0: Tensor,
    start: Tensor,
    y: Tensor,
    *,
    ball: Ball,
    alpha: float,
    steps: int,
    loss: Loss,
    top: int = -1,
    radius: float = 1.0,
    keep: bool = True,
) -> Iterator[Tensor]:
    """Yield x^1, ..., x^K of x^{k+1} = Pi(x^k + alpha direction(grad loss(x^k))), from x^0 = start.

    Args: as of `ascend`, and

        top: the largest label, which is checked to be one of the model's classes; -1 for no check.
        radius: projects on perturbations of norm radius * eps.
        keep: whether every x^k is kept; if not, all but the last may be overwritten by the next.
    """
    x0, x = view.prepare(x0), view.prepare(start)

    def step(x: Tensor, x0: Tensor, y: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
        def objective(logits: Tensor) -> Tensor:
            check_labels(top, logits.shape[1])
            return loss(logits, y)

        return ball.step(x, view.uncounted_gradient(x, objective), alpha, x0, eps)

    formula = _formula(loss) if type(ball) is Ball else None  # one that watches projections is not captured
    yield from view.iterate(
        step,
        x,
        (x0, y),
        (alpha, radius * ball.eps),
        count=steps,
        key=None if formula is None else (ball.norm, formula),
        check=functools.partial(check_labels, top),
        keep=keep,
    )


def _formula(loss: Loss) -> Hashable:
    """What identifies a loss that computes the same formula at all times; None if it may have a state."""
    if isinstance(loss, functools.partial):
        inner, values = _formula(loss.func), (*loss.args, *loss.keywords.values())
        plain = inner is not None and all(isinstance(value, (int, float, str)) for value in values)
        return (inner, loss.args, *sorted(loss.keywords.items())) if plain else None
    return loss if isinstance(loss, types.FunctionType) and loss.__closure__ is None else None


def ascend(
    view: FrozenModel,
    x0: Tensor,
    y: Tensor,
    *,
    ball: Ball,
    alpha: float,
    steps: int,
    random_start: bool = True,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    top: int = -1,
) -> Tensor:
    """The last point of `path`, or x0 itself for ``steps=0``.

    Args:
        view: the frozen network.
        x0: (N, ...) clean inputs.
        y: what `loss` compares the logits with, one row per sample; labels (N,) for the cross-entropy.
        ball: the perturbation set.
        alpha: step size.
        steps: number of steps K.
        random_start: start at a random point of the ball instead of x0.
        loss: per-sample loss to ascend.
        generator: draws the random start.
        start: (N, ...) start that replaces the random one.
        top: the largest label, which is checked to be one of the model's classes.

    Raises:
        NonFiniteError: the input gradient is not finite; raised when ``view.watch`` looks.
    """
    if steps == 0:
        return x0
    if start is None:
        start = ball.start(x0, generator) if random_start else x0
    last: list[Tensor] = []
    for part in view.chunks(x0):
        arguments = (view, x0[part], start[part], y[part])
        points = path(*arguments, ball=ball, alpha=alpha, steps=steps, loss=loss, top=top, keep=False)
        last += deque(points, maxlen=1)
    result = last[0] if len(last) == 1 else torch.cat(last)
    view.watch.finite(result.amax(), NON_FINITE)  # NaN if one is; the pixel box has no infinite numbers
    return result if result.stride() == x0.stride() else torch.empty_like(x0).copy_(result)


def check_batch(x: Tensor, y: Tensor) -> int:
    """Check that x is a floating-point batch in [0, 1] and y its labels, int64 and >= 0.

    Returns:
        The largest label.

    Raises:
        ValueError: they are not.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}: use torch.as_tensor"
            )
        if value.layout != torch.strided or value.is_meta:
            got = "the device meta" if value.is_meta else f"the layout {value.layout}: use {name}.to_dense()"
            raise ValueError(f"{name} must be a dense tensor that holds numbers, got {got}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point in [0, 1], got {x.dtype}: divide pixels by 255 first")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a batch (N, ...) that is not empty, got shape {tuple(x.shape)}")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(
            f"y must hold one integer label per sample, shape ({len(x)},) and torch.int64 (y.long()), "
            f"got {y.dtype} {tuple(y.shape)}" + ": of one-hot rows take y.argmax(1)" * (y.dim() == 2)
        )
    real = torch.promote_types(x.dtype, torch.float32)
    bounds = [*torch.aminmax(x.detach()), *(t.to(real) for t in torch.aminmax(y))]
    low, high, least, top = torch.stack(bounds).tolist()  # one transfer from a GPU
    if least < 0:  # torch's cross_entropy would silently ignore -100
        raise ValueError(f"labels must be >= 0, got {int(y.min())}")
    if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # also for NaN
        raise ValueError(
            f"x must lie in [0, 1], got values in [{low:g}, {high:g}]: normalisation belongs inside the model"
        )
    return int(top)


def check_labels(top: int, classes: int) -> None:
    """Raise ValueError unless the largest label is one of the model's classes."""
    if top >= classes:
        raise ValueError(f"labels must be in [0, {classes - 1}], the model's logits; got {top}")


def _required(value: object, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} is missing: give a number such as 8/255")
    return number(value, name)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | None = None,
    alpha: float | str | None = None,
    steps: int | None = None,
    norm: str = "linf",
    random_start: bool = True,
    mode: str = "eval",
    generator: torch.Generator | None = None,
    channels_last: bool = True,
    cuda_graphs: str = "auto",
) -> Tensor:
    """Adversarial examples by projected gradient ascent on the cross-entropy.

    x^{k+1} = Pi(x^k + alpha sign grad_x l(h(x^k), y)), x^0 uniform in the ball (l_2: the gradient over its
    length in place of the sign). The model is left as it was: training mode of every module, BatchNorm
    buffers, ``.grad``, ``requires_grad``; so is x.

    Args:
        model: nn.Module from (N, ...) in [0, 1] to logits (N, C); normalisation is a layer inside.
        x: (N, ...) clean inputs in [0, 1].
        y: (N,) integer labels.
        eps: radius in pixel units; a number or a text such as ``"8/255"``.
        alpha: step size in pixel units.
        steps: number of steps K; 0 returns the clean inputs.
        norm: ``"linf"`` or ``"l2"``.
        random_start: start at a random point of the ball instead of x.
        mode: ``"eval"`` or ``"train"``: how BatchNorm and dropout behave during the attack.
        generator: where the start is drawn from; None: torch's global generator, as torchattacks does. (In
            ``"train"`` mode dropout draws from the global generator.)
        channels_last: run convolutions in NHWC layout, up to twice as fast on CPU. False repeats
            torchattacks pixel by pixel; True gives the same loss to about 1e-3: signs near zero differ.
        cuda_graphs: on a CUDA device ``"auto"`` captures the step as a CUDA graph in the second call with
            inputs of one shape, and replays it from then on, if the model can be captured; ``"off"`` never.

    Returns:
        The detached adversarial batch, of the shape, dtype and device of x.

    Raises:
        ValueError: a number is missing, negative or not finite; eps is larger than the pixel box; x leaves
            [0, 1] by more than 1e-6; the model returns no logits (N, C).
        NonFiniteError: the network's gradient is not finite.

    Warns:
        UserWarning: alpha is more than 4 eps.

    Source:
        Madry et al. (2018), section 2.1.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    >>> x_adv = pgd(model, x, y, eps=0.1, alpha=0.02, steps=10)
    >>> bool(((x_adv - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    top = check_batch(x, y)
    ball = Ball(_required(eps, "eps"), norm)
    size, count = _step_control(alpha, steps)
    flag(random_start, "random_start")
    flag(channels_last, "channels_last")
    instance(generator, (torch.Generator, type(None)), "generator")
    ball.check(x.shape[1:])
    if warning := ball.step_size_warning(size):
        warnings.warn(warning, stacklevel=2)
    x, y = normal_tensor(x.detach()), normal_tensor(y)
    choice(cuda_graphs, "cuda_graphs", graph_use.MODES)
    use = graph_use.using("off") if cuda_graphs == "off" else contextlib.nullcontext()
    with use, FrozenModel(model, mode, channels_last=channels_last) as view:
        result = ascend(
            view,
            x,
            y,
            ball=ball,
            alpha=size,
            steps=count,
            random_start=random_start,
            generator=generator,
            top=top,
        )
    return result.clone() if result is x else result


def _step_control(alpha: float | str | None, steps: int | None) -> tuple[float, int]:
    """alpha and K as numbers within the bounds of the knobs."""
    values = {"alpha": _required(alpha, "alpha"), "steps": _required(steps, "steps")}
    for name, knob in (("alpha", ALPHA), ("steps", STEPS)):
        knob.check(name, values[name])
    return values["alpha"], whole(values["steps"], "steps", 0)


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    mode: str = "eval",
    channels_last: bool = True,
) -> Tensor:
    """Adversarial examples by one step of size eps from the clean input: x + eps sign grad_x l, clamped.

    Arguments, returns and errors are those of `pgd`.

    Source:
        Goodfellow et al. (2015).
    """
    step = {"eps": eps, "alpha": eps, "steps": 1, "random_start": False}
    return pgd(model, x, y, norm=norm, mode=mode, channels_last=channels_last, **step)  # type: ignore[arg-type]
