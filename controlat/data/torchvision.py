"""The classification sets of torchvision, `torchvision-NAME`, from files that are already there.

Nothing is downloaded here. CIFAR-10 and CIFAR-100 are left out, as torchvision unpickles their files: the
sets `cifar10` and `cifar100` read the binary version.
"""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlat._util.vision import torchvision
from controlat.data._images import Shape, boolean, halves, whole
from controlat.data._stream import Streamed, default_workers
from controlat.data._types import Dataset

__all__ = ["load"]

_PICKLED = ("CIFAR10", "CIFAR100")
_TRAINS = ("train", "trainval", "train-standard")
_TESTS = ("test", "val", "valid", "validation")
_LABELS = ("targets", "labels", "_labels", "y")


def load(
    root: Path | None = None,
    *,
    variant: str = "",
    size: int | None = None,
    resize: int | None = None,
    channels: int = 3,
    test_share: float = 0.2,
    in_memory: bool = False,
    workers: int | None = None,
    **arguments: Any,
) -> Dataset:
    """A classification set of torchvision, ``torchvision-Flowers102``, ``torchvision-FashionMNIST``, ...

    Args:
        root: the folder given to torchvision.
        variant: the class in torchvision.datasets.
        size: as in `controlat.data.folder.load`, and so are resize, channels, test_share, in_memory, workers.
        **arguments: further arguments of the class, such as ``split="letters"`` of EMNIST; one that has a
            name from above gets an underscore, such as ``size_="160px"`` of Imagenette.

    Returns:
        The data set; test pictures are those of train=False or of the split test or val, else a fixed share.

    Raises:
        ValueError: torchvision is missing, has no such set, or does not find its files.

    Example:
        >>> load(Path("nowhere"), variant="CIFAR10")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: torchvision-CIFAR10: torchvision unpickles these files; use the data set cifar10 ...
    """
    if variant in _PICKLED:
        other = variant.lower()
        raise ValueError(
            f"torchvision-{variant}: torchvision unpickles these files; use the data set {other} instead"
        )
    kind = _kind(variant)
    shape = Shape(channels, size, resize)
    threads = default_workers() if workers is None else whole(workers, "workers")
    decode_once = boolean(in_memory, "in_memory")
    arguments = {key.removesuffix("_"): value for key, value in arguments.items()}
    sources = [_Source(kind, variant, part | arguments, root) for part in _part_arguments(kind, arguments)]
    if len(sources) == 1:
        positions = list(halves(sources[0].y, test_share))
        sources *= 2
    else:
        positions = [torch.arange(len(source.y)) for source in sources]
    bands, height, width = sources[0].image(shape, None, int(positions[0][0])).shape
    in_shape = (bands, height, width)
    splits = [s.split(shape, in_shape, i, threads) for s, i in zip(sources, positions, strict=True)]
    train, test = (split.in_memory() if decode_once else split for split in splits)
    classes = max(int(source.y.max()) for source in sources) + 1
    return Dataset(f"torchvision-{variant}", train, test, classes)


def _kind(variant: str) -> type:
    datasets = torchvision().datasets
    kind = getattr(datasets, variant, None) if variant in datasets.__all__ else None
    if not isinstance(kind, type):
        raise ValueError(
            f"torchvision has no data set {variant!r}; write torchvision-NAME with a class of "
            "torchvision.datasets, such as torchvision-Flowers102"
        )
    return kind


def _part_arguments(kind: type, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments that select the training and the test part.

    One empty entry if the class has no such parts, or if the user has selected one.
    """
    parameters = _parameters(kind)
    if "train" in parameters:
        return [{}] if "train" in arguments else [{"train": True}, {"train": False}]
    if "split" not in parameters or "split" in arguments:
        return [{}]
    names = _split_names(kind)
    train, test = (next((n for n in usual if n in names), usual[0]) for usual in (_TRAINS, _TESTS))
    return [{"split": train}, {"split": test}]


def _parameters(kind: type) -> set[str]:
    """Names of the arguments of a class, including those of its bases that it passes on as **kwargs."""
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= set(parameters)
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _split_names(kind: type) -> list[str]:
    """The splits of a class, from the error message for an unknown one: there is no other way to get them."""
    try:
        kind(root="", split="?")
    except Exception as error:
        return re.findall("'(.*?)'", str(error).partition("Valid values are")[2])
    return []


class _Source:
    """One part of a data set of torchvision: pictures by position, and all labels."""

    def __init__(self, kind: type, name: str, arguments: dict[str, Any], root: Path | None) -> None:
        self.name, self.lock = f"torchvision-{name}", threading.Lock()
        arguments = dict(arguments)
        if "root" in inspect.signature(kind).parameters:
            if root is None:
                raise ValueError(f"{self.name}: give the folder of its files, --data-dir FOLDER")
            arguments["root"] = str(root)
        try:
            self.set = kind(**arguments)
        except Exception as error:  # each class raises its own kinds for missing files or wrong arguments
            how = f"torchvision.datasets.{name}(root, download=True) fetches it where that is offered"
            raise ValueError(f"{self.name}: {' '.join(str(error).split())}; {how}") from None
        self.y = self._labels()

    def _labels(self) -> Tensor:
        """All labels: from a list, if the set has one; otherwise every picture is decoded."""
        lists = [getattr(self.set, attribute, None) for attribute in _LABELS]
        if isinstance(pairs := getattr(self.set, "_samples", None), list):
            lists.append([pair[1] for pair in pairs])
        if getattr(self.set, "target_transform", None) is not None:
            lists = []  # the lists hold labels before the transform
        for values in lists:
            if values is not None and len(values) == len(self.set):
                labels = np.asarray(values)
                if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
                    return torch.from_numpy(labels.astype(np.int64))
        return torch.tensor([self._label(i) for i in range(len(self.set))])

    def _label(self, position: int) -> int:
        try:
            label = self.set[position][1]
        except Exception as error:
            raise ValueError(f"{self.name}, picture {position}: cannot be read ({error})") from None
        if isinstance(label, Tensor) and label.numel() == 1:
            label = label.item()
        if not isinstance(label, (int, np.integer)):
            raise ValueError(f"{self.name}: the label of picture {position} is {label!r}, not one class")
        return int(label)

    def image(self, shape: Shape, expected: tuple[int, int, int] | None, position: int) -> Tensor:
        """The image at a position, converted by `shape`."""
        from PIL import Image

        where = f"{self.name}, picture {position}"
        try:
            with self.lock:  # some sets keep one file open
                picture = self.set[position][0]
            if not isinstance(picture, Image.Image):
                raise TypeError(f"it is a {type(picture).__name__}")
            image = shape(picture)
        except Exception as error:
            raise ValueError(f"{where}: cannot be read ({error})") from None
        return image if expected is None else shape.check(image, expected, where)

    def split(
        self, shape: Shape, in_shape: tuple[int, int, int], positions: Tensor, threads: int
    ) -> Streamed:
        """The images at some positions, which must have one shape, decoded by threads when needed."""
        return Streamed(
            read=lambda i: self.image(shape, in_shape, i),
            y=self.y[positions],
            in_shape=in_shape,
            positions=positions,
            workers=threads,
        )
