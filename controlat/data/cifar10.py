"""CIFAR-10 from its binary version: the files, or the archive as it is distributed."""

from __future__ import annotations

from pathlib import Path

from controlat.data import _cifar
from controlat.data._download import Remote
from controlat.data._types import Dataset

__all__ = ["AUGMENT", "REMOTES", "load"]

AUGMENT = "crop-flip:pad=4"
REMOTES = (
    Remote(
        "cifar-10-binary.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170052171,
    ),
)
LAYOUT = _cifar.Layout(
    name="cifar10",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test="test_batch.bin",
    label_bytes=1,
    num_classes=10,
    pickled=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
)


def load(root: Path | None = None) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images (3, 32, 32) of 10 classes; scale 255.

    Args:
        root: folder of data_batch_1.bin .. data_batch_5.bin and test_batch.bin, of their folder
            `cifar-10-batches-bin`, or of `cifar-10-binary.tar.gz`, which is read without unpacking it to
            disk; None looks in `cifar10` in the cache: $CONTROLAT_DATA, else ~/.cache/controlat.

    Returns:
        The data set "cifar10".

    Raises:
        ValueError: a file is missing or damaged, or there is only the pickled python version, which is
            never read; the message names the file and what to do.

    Example:
        >>> load(Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: cifar10: no file data_batch_1.bin, ...

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    return _cifar.load(LAYOUT, root)
