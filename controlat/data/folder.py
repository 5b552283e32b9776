"""Any folder of pictures by class, such as Caltech-256 or ImageNet.

    ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or val, valid, validation), or
    ROOT/CLASS/*.jpg, of which a fixed share of every class becomes the test set.

Classes are numbered in the order of their names. Pictures are decoded by threads when they are needed, and
are not all in memory unless `in_memory` is set. Their EXIF orientation is applied.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from controlat._util.files import open_file
from controlat.data._images import Shape, boolean, halves, whole
from controlat.data._stream import Streamed, default_workers
from controlat.data._types import Dataset, Samples

__all__ = ["AUGMENT", "load"]

AUGMENT = "crop-flip:pad=4"
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow would run Ghostscript on others
LARGEST = 512 << 20  # bytes of one picture file
TESTS = ("test", "val", "valid", "validation")


def load(
    root: Path | None = None,
    *,
    size: int | None = None,
    resize: int | None = None,
    channels: int = 3,
    test_share: float = 0.2,
    in_memory: bool = False,
    workers: int | None = None,
) -> Dataset:
    """A folder of pictures by class, streamed.

    Args:
        root: the folder (see the module).
        size: side of the square that is cropped from the centre of each picture; None for no cropping, and
            then all pictures must have the size of the first.
        resize: length of the shorter side before cropping; `size` by default.
        channels: 3 (RGB) or 1 (grey).
        test_share: share of every class that becomes the test set where the folder has no split.
        in_memory: decode all pictures once and keep them; for small sets.
        workers: decoding threads; the cores of this machine, 16 at most, by default.

    Returns:
        The data set, named after the folder.

    Raises:
        ValueError: no folder, a class without pictures, classes that differ between the splits, a picture
            that cannot be read or has another size; the message names the folder or file. Pictures are
            checked when they are first needed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB", (40, 30)).save(root / name)
        >>> data = load(root, size=16, test_share=0.5)
        >>> len(data.train), len(data.test), data.in_shape, data.num_classes
        (2, 2, (3, 16, 16), 2)
    """
    if root is None:
        raise ValueError("folder: give the folder of the pictures, --data-dir FOLDER (root=FOLDER in Python)")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of pictures")
    shape = Shape(channels, size, resize)
    threads = default_workers() if workers is None else whole(workers, "workers")
    decode_once = boolean(in_memory, "in_memory")
    listing, train, test = _splits(root, test_share)
    channels, height, width = _read(listing.files, shape, None, 0).shape
    in_shape = (channels, height, width)
    read = functools.partial(_read, listing.files, shape, in_shape)
    stamp = functools.partial(_stamp, listing.files, root)
    y = torch.tensor(listing.labels)

    def split(positions: Tensor) -> Samples:
        streamed = Streamed(
            read=read,
            y=y[positions],
            in_shape=in_shape,
            positions=positions,
            workers=threads,
            stamp=stamp,
        )
        return streamed.in_memory() if decode_once else streamed

    return Dataset(root.resolve().name or "folder", split(train), split(test), len(listing.classes))


class Listing(NamedTuple):
    """Every picture of a folder, its label, and the names of the classes."""

    files: list[str]
    labels: list[int]
    classes: list[str]


def _splits(root: Path, test_share: float) -> tuple[Listing, Tensor, Tensor]:
    """All pictures, and the positions of training and test pictures."""
    if not (root / "train").is_dir():
        listing = _list(root)
        return listing, *halves(torch.tensor(listing.labels), test_share)
    folder = next((root / name for name in TESTS if (root / name).is_dir()), None)
    if folder is None:
        raise ValueError(f"{root} has a folder train but none of {', '.join(TESTS)}; add the test pictures")
    train, test = _list(root / "train"), _list(folder)
    if different := sorted({*train.classes} ^ {*test.classes}):
        only = "train" if different[0] in train.classes else folder.name
        raise ValueError(f"{root}: class {different[0]!r} is in {only} only; both splits need the same")
    n = len(train.files)
    both = Listing(train.files + test.files, train.labels + test.labels, train.classes)
    return both, torch.arange(n), torch.arange(n, len(both.files))


def _list(folder: Path) -> Listing:
    """The pictures of every class folder, in the order of their names; hidden files are ignored."""
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold one folder per class, two or more; found {classes or 'none'}")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            pictures = sorted(
                e.path for e in entries if e.name.lower().endswith(ENDINGS) and not e.name.startswith(".")
            )
        if not pictures:
            raise ValueError(f"{folder / name}: no pictures in this class folder ({', '.join(ENDINGS)})")
        files += pictures
        labels += [label] * len(pictures)
    return Listing(files, labels, classes)


def _read(files: list[str], shape: Shape, expected: tuple[int, int, int] | None, position: int) -> Tensor:
    from PIL import Image

    name = files[position]
    try:
        with open_file(name, LARGEST) as file, Image.open(file, formats=FORMATS) as picture:
            image = shape(picture)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = str(error).removeprefix(f"{name}: ")
        raise ValueError(f"{name}: cannot be read as a picture ({reason}); mend or remove it") from None
    return image if expected is None else shape.check(image, expected, name)


def _stamp(files: list[str], root: Path, position: int) -> str:
    """Name in the folder, size and time of change of a picture's file."""
    name = files[position]
    status = os.stat(name)
    return f"{os.path.relpath(name, root)} {status.st_size} {status.st_mtime_ns}"
