"""CIFAR-100 from its binary version: the files, or the archive as it is distributed."""

from __future__ import annotations

from pathlib import Path

from controlat.data import _cifar
from controlat.data._download import Remote
from controlat.data._types import Dataset

__all__ = ["AUGMENT", "REMOTES", "load"]

AUGMENT = "crop-flip:pad=4"
REMOTES = (
    Remote(
        "cifar-100-binary.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168513733,
    ),
)
LAYOUT = _cifar.Layout(
    name="cifar100",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train=("train.bin",),
    test="test.bin",
    label_bytes=2,  # one of 20 groups, then one of 100 classes
    num_classes=100,
    pickled=("cifar-100-python", "cifar-100-python.tar.gz", "train"),
)


def load(root: Path | None = None) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test images (3, 32, 32) of 100 classes; scale 255.

    Args:
        root: folder of train.bin and test.bin, of their folder `cifar-100-binary`, or of
            `cifar-100-binary.tar.gz`, which is read without unpacking it to disk; None looks in
            `cifar100` in the cache: $CONTROLAT_DATA, else ~/.cache/controlat.

    Returns:
        The data set "cifar100", with the fine labels.

    Raises:
        ValueError: a file is missing or damaged, or there is only the pickled python version, which is
            never read; the message names the file and what to do.

    Example:
        >>> load(Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: cifar100: no file train.bin, test.bin in any of nowhere, ...

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return _cifar.load(LAYOUT, root)
