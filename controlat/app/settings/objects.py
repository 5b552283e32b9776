"""The user's own model, data and method as objects of a Python program, in the place of names.

    controlat.search("out", model=net, data=(train, test), eps=8 / 255)

**model** is an `nn.Module`, or a class or function that makes one and may take the keywords `in_shape` and
`num_classes`. Runs of several seeds must not begin where another has ended: of a module the weights that it
has play no part, every run begins at weights that `reset_parameters` draws under its seed: that of the layers
first, then that of what holds them. Parameters without gradient and buffers keep their values. Where
`reset_parameters` leaves a parameter out, a class or function has to be given.

**data** is a `controlat.Dataset`, or (train, test), each a pair (x, y) of tensors or arrays, a data set of
torch's, which is read once into memory, or a `controlat.Split`. Pixels are uint8, or floats in [0, 1]; the
classes are 0 to the largest label.

**method** is an object with the protocol `controlat.methods.Method`, of which every run has a copy, or its
class.

A function or class of a module that can be imported is known by its name, "package.module:attribute", as if
that had been given. Anything else gets a name of its own for files: its class and a digest of what it is, by
which a run that goes on is known to have the same. Of a network that is its structure, the shapes of its
parameters and the values of what is not trained; of data the samples; of a method its class and attributes.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sized
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from controlat import models
from controlat._util import rng
from controlat._util.checks import brief
from controlat._util.registry import NAMED, Named, importable
from controlat.data import Dataset, Samples, Split
from controlat.methods import check_method

__all__ = ["named_data", "named_method", "named_model"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FACTORY = "a class or function that makes it, such as model=lambda: Net()"


def named_model(given: Any, form: Callable[[], tuple[tuple[int, int, int], int]]) -> str:
    """The name of a network; names are returned as they are.

    Args:
        given: a name, an `nn.Module`, or what makes one.
        form: returns shape of the images and number of classes, for a function that has no name elsewhere.

    Raises:
        ValueError: it is something else, or makes no networks that begin at weights of their own.
    """
    if isinstance(given, nn.Module):
        label, make = type(given).__name__, functools.partial(_redrawn, _copied(given))
        return _named(label, make, *_description(_seeded(make)))
    if (name := _name_of(given)) is not None:
        return name
    if not callable(given):
        raise ValueError(
            "model must be a name, an nn.Module, or what makes one from in_shape and num_classes, "
            f"got {brief(given)}"
        )
    label = getattr(given, "__name__", type(given).__name__).strip("<>")
    build = functools.partial(models.build, Named(f"{NAMED}{label}", given), *form())
    first, second = _seeded(build), _seeded(build)
    if {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}:
        raise ValueError(
            f"model {label} makes one and the same network again and again; it must make a new one"
        )
    return _named(label, given, *_description(first))


def named_data(given: Any) -> str:
    """The name of a data set; names are returned as they are.

    Raises:
        ValueError: it is something else, or (train, test) are no data.
    """
    if (name := _name_of(given)) is not None:
        return name
    data = given if isinstance(given, Dataset) else _dataset(given)
    parts = [(len(part), part.in_shape, _fingerprint(part)) for part in (data.train, data.test)]
    return _named("Dataset", functools.partial(_itself, data), data.num_classes, *parts)


def named_method(given: Any) -> str:
    """The name of a method; names are returned as they are.

    Raises:
        ValueError: it is something else.
    """
    if (name := _name_of(given)) is not None:
        return name
    if isinstance(given, (type, FunctionType)):
        return _named(given.__name__.strip("<>"), given, str(inspect.signature(given)))
    method: Any = check_method(given)
    attributes = getattr(method, "__dict__", method)
    return _named(type(method).__name__, functools.partial(copy.deepcopy, method), attributes)


# --------------------------------------------------------------------------------------------------- names


def _name_of(given: Any) -> str | None:
    """What is a name already, or can be imported by one, in every process; None for anything else."""
    if isinstance(given, (str, os.PathLike)):
        return given  # type: ignore[return-value]  # settings take a path for a text
    if not isinstance(given, (type, FunctionType)) or not importable(given.__module__):
        return None
    try:
        there = functools.reduce(getattr, given.__qualname__.split("."), sys.modules[given.__module__])
    except (AttributeError, KeyError):
        return None  # made by a function
    return f"{given.__module__}:{given.__qualname__}" if there is given else None


def _named(label: str, thing: object, *what: object) -> Named:
    """An object under its class and a digest of what it is."""
    digest = hashlib.sha256(_ADDRESS.sub("", repr(what)).encode()).hexdigest()
    return Named(f"{NAMED}{label}-{digest[:8]}", thing)


def _itself(thing: Any) -> Any:
    return thing


# ------------------------------------------------------------------------------------------------ networks


def _copied(model: nn.Module) -> nn.Module:
    """A copy that nothing which happens to the network later changes."""
    try:
        return copy.deepcopy(model).cpu()
    except Exception as error:
        told = f"model {type(model).__name__} cannot be copied ({error})"
        raise ValueError(f"{told}; give {_FACTORY}") from error


def _redrawn(template: nn.Module) -> nn.Module:
    """A copy of a network with weights drawn anew from torch's global generator.

    Raises:
        ValueError: `reset_parameters` does not draw every parameter.
    """
    model = copy.deepcopy(template)
    kept = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not nn.parameter.is_lazy(p):
                p.fill_(torch.nan)  # what is not drawn stays so
        model.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
        for p, value in kept:
            p.copy_(value)
    left = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p) or not p.isfinite().all()]
    if left:
        listed = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        raise ValueError(
            f"model {type(model).__name__} has no reset_parameters for {listed}: runs of several seeds "
            f"cannot begin at weights of their own; give {_FACTORY}"
        )
    return model


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """What a factory makes, without a trace in torch's global generator."""
    with rng.scoped(0, "model"):
        return make()


def _description(model: nn.Module) -> tuple[object, ...]:
    """What a network is but for the weights that are trained."""
    trained = [(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    others = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    fixed = [(name, _digest(t)) for name, t in [*others, *model.named_buffers()]]
    return repr(model), trained, fixed


def _digest(t: Tensor) -> str:
    """A checksum of the values of a tensor."""
    content = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(repr((t.dtype, tuple(t.shape))).encode() + content.tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- data


def _dataset(given: Any) -> Dataset:
    """The data set of (train, test)."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(
            "data must be a name, a controlat.Dataset, or (train, test), each a pair (x, y) of tensors or a "
            f"data set of torch's, got {brief(given)}"
        )
    train, test = (_samples(part, name) for part, name in zip(given, ("train", "test"), strict=True))
    classes = 1 + max(int(part.y.max()) for part in (train, test))
    return Dataset("given", train, test, max(classes, 2))


def _samples(given: Any, part: str) -> Samples:
    """One split, in memory."""
    if hasattr(given, "stream"):
        return given  # type: ignore[no-any-return]
    try:
        x, y = _pair(given)
        return Split(x, y if y.is_floating_point() else y.long(), 255 if x.dtype == torch.uint8 else 1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"data, {part}: {error}") from None


def _pair(given: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a pair, or of a data set with a length, read from the first sample to the last."""
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(hasattr(part, "shape") for part in given):
        return torch.as_tensor(given[0]), torch.as_tensor(given[1])
    if not isinstance(given, Sized) or not hasattr(given, "__getitem__") or hasattr(given, "shape"):
        raise ValueError(
            "must be a pair (x, y) of tensors, or a data set with a length and samples (x, y), got "
            f"{brief(given)}"
        )
    samples = [given[i] for i in range(len(given))]
    if not samples or not isinstance(samples[0], (tuple, list)) or not isinstance(samples[0][0], Tensor):
        raise ValueError(
            f"its samples must be (x, y), x a tensor, as by torchvision's ToTensor; got {brief(samples[:1])}"
        )
    x, y = [sample[0] for sample in samples], [int(sample[1]) for sample in samples]
    return torch.stack(x), torch.tensor(y)


def _fingerprint(samples: Samples) -> str:
    """What tells these samples from others: of those that cannot say, the labels."""
    of = getattr(samples, "fingerprint", None)
    return _digest(samples.y) if of is None else str(of())
