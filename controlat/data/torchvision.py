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
from controlat.data._types import Dataset, Samples

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
    keep = boolean(in_memory, "in_memory")
    arguments = {key.removesuffix("_"): value for key, value in arguments.items()}
    parts = [_Source(kind, variant, given | arguments, root) for given in _given(kind, arguments)]
    if len(parts) == 1:
        ranges = list(halves(parts[0].y, test_share))
        parts *= 2
    else:
        ranges = [torch.arange(len(part.y)) for part in parts]
    bands, height, width = parts[0].image(shape, None, int(ranges[0][0])).shape
    in_shape = (bands, height, width)

    def split(part: _Source, positions: Tensor) -> Samples:
        def read(i: int) -> Tensor:
            return part.image(shape, in_shape, i)

        found = Streamed(read, part.y[positions], in_shape, positions, threads)
        return found.in_memory() if keep else found

    classes = max(int(part.y.max()) for part in parts) + 1
    train, test = (split(part, positions) for part, positions in zip(parts, ranges, strict=True))
    return Dataset(f"torchvision-{variant}", train, test, classes)


def _kind(variant: str) -> type:
    datasets = torchvision().datasets
    found = getattr(datasets, variant, None) if variant in datasets.__all__ else None
    if not isinstance(found, type):
        raise ValueError(
            f"torchvision has no data set {variant!r}; write torchvision-NAME with a class of "
            "torchvision.datasets, such as torchvision-Flowers102"
        )
    return found


def _given(kind: type, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of the training and the test part; one entry where there are no parts or one is given."""
    known = _parameters(kind)
    if "train" in known:
        return [{}] if "train" in arguments else [{"train": True}, {"train": False}]
    if "split" not in known or "split" in arguments:
        return [{}]
    names = _split_names(kind)
    train, test = (next((n for n in usual if n in names), usual[0]) for usual in (_TRAINS, _TESTS))
    return [{"split": train}, {"split": test}]


def _parameters(kind: type) -> set[str]:
    """Names of the arguments of a class, with those that it hands on to its bases as **kwargs."""
    found: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        found |= set(parameters)
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _split_names(kind: type) -> list[str]:
    """The splits that a class knows: it tells them only when it refuses another name."""
    try:
        kind(root="", split="?")
    except Exception as error:
        return re.findall("'(.*?)'", str(error).partition("Valid values are")[2])
    return []


class _Source:
    """One part of a set as torchvision gives it: pictures by position, and all labels."""

    def __init__(self, kind: type, name: str, arguments: dict[str, Any], root: Path | None) -> None:
        self.name, self.lock = f"torchvision-{name}", threading.Lock()
        given = dict(arguments)
        if "root" in inspect.signature(kind).parameters:
            if root is None:
                raise ValueError(f"{self.name}: give the folder of its files, --data-dir FOLDER")
            given["root"] = str(root)
        try:
            self.set = kind(**given)
        except Exception as error:  # each class has its own ways to say that a file or an argument is wrong
            how = f"torchvision.datasets.{name}(root, download=True) fetches it where that is offered"
            raise ValueError(f"{self.name}: {' '.join(str(error).split())}; {how}") from None
        self.y = self._labels()

    def _labels(self) -> Tensor:
        """All labels, from a list of the set if it has one: else every picture would be decoded for them."""
        lists = [getattr(self.set, attribute, None) for attribute in _LABELS]
        if isinstance(pairs := getattr(self.set, "_samples", None), list):
            lists.append([pair[1] for pair in pairs])
        if getattr(self.set, "target_transform", None) is not None:
            lists = []  # they are not transformed
        for values in lists:
            if values is not None and len(values) == len(self.set):
                found = np.asarray(values)
                if found.ndim == 1 and np.issubdtype(found.dtype, np.integer):
                    return torch.from_numpy(found.astype(np.int64))
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
        """The image at a position, as `Shape` makes it."""
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
