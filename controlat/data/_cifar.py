"""The binary version of CIFAR-10 and CIFAR-100: label bytes, then 3072 pixel bytes, image after image.

The pickled "python version" is never read: unpickling a file can run any code.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from controlat._util.files import open_file, read_bytes
from controlat.data import _cache
from controlat.data._types import Dataset, Split

__all__ = ["Layout", "load"]

SHAPE = (3, 32, 32)  # red, green, blue plane, each row by row
PIXELS = 3072
LARGEST = 256 << 20  # limit in bytes for a file, or all files of an archive; both archives have 0.19 GB
MOST = 100  # limit for the number of files and folders in an archive; both have 9


@dataclass(frozen=True)
class Layout:
    """How one of the two data sets is stored.

    Args:
        name: the data set's name.
        folder: the folder inside the archive.
        archive: the archive as it is distributed, a gzipped tar file.
        train: the training files, in order.
        test: the test file.
        label_bytes: label bytes in front of each image; the last one is used.
        num_classes: number of classes.
        pickled: files and folders of the python version, to recognise it.

    Example:
        >>> Layout("toy", "toy-bin", "toy.tar.gz", ("a.bin",), "b.bin", 1, 10, ()).record
        3073
    """

    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    num_classes: int
    pickled: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """All files, the test file last."""
        return (*self.train, self.test)

    @property
    def record(self) -> int:
        """Bytes per image, labels included."""
        return self.label_bytes + PIXELS


def load(layout: Layout, root: Path | None) -> Dataset:
    """Load one of the two data sets from its files, or directly from the archive.

    Args:
        layout: of the data set.
        root: folder of the files, of their folder, or of the archive; None is the folder of the cache.

    Returns:
        The data set, images (3, 32, 32) as uint8 with scale 255.

    Raises:
        ValueError: files are missing or damaged; the message names them.

    Example:
        >>> toy = Layout("toy", "toy-bin", "toy.tar.gz", ("a.bin",), "b.bin", 1, 10, ())
        >>> load(toy, Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: toy: no file a.bin, b.bin in any of nowhere, nowhere/toy-bin, nowhere/toy.tar.gz; ...

    Source: Krizhevsky, 2009, "CIFAR-10 binary version".
    """
    parts = _parts(layout, _cache.folder(layout.name, root))
    images, labels = zip(*(parts[name] for name in layout.train), strict=True)
    train = Split(torch.cat(images), torch.cat(labels), scale=255.0)
    return Dataset(layout.name, train, Split(*parts[layout.test], scale=255.0), layout.num_classes)


def _parts(layout: Layout, root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of each file, from the first place that has them all."""
    folders, archive = (root, root / layout.folder), root / layout.archive
    for place in folders:
        if all(_readable(place / name) for name in layout.files):
            files = ((name, place / name) for name in layout.files)
            return {name: _decode(layout, str(path), read_bytes(path, LARGEST)) for name, path in files}
    if _readable(archive):
        members = _members(layout, archive)
        parts = {name: _decode(layout, f"{archive}, {name}", data) for name, data in members}
        if lost := [name for name in layout.files if name not in parts]:
            raise ValueError(f"{archive}: has no file {', '.join(lost)}; {_cure(layout)}")
        return parts
    if pickled := next((path for name in layout.pickled if (path := root / name).exists()), None):
        version = (
            f"{pickled} is of the pickled python version, which is never read (pickles can run any code)"
        )
        raise ValueError(f"{layout.name}: {version}; take the binary version: {_cache.cure(layout.name)}")
    nearest = max(folders, key=lambda place: sum(_readable(place / name) for name in layout.files))
    missing = ", ".join(name for name in layout.files if not _readable(nearest / name))
    places = ", ".join(map(str, (*folders, archive)))
    raise ValueError(f"{layout.name}: no file {missing} in any of {places}; {_cache.cure(layout.name)}")


def _readable(path: Path) -> bool:
    """Whether a path exists and is no folder; pipes and devices are refused by `open_file`."""
    return path.exists() and not path.is_dir()


@dataclass
class _Bounded:
    """A stream from which at most `left` bytes can be read."""

    stream: gzip.GzipFile
    left: int

    def read(self, size: int) -> bytes:
        content = self.stream.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise tarfile.TarError(f"it unpacks to more than {LARGEST:,} bytes")
        return content


def _members(layout: Layout, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in the archive, in one pass; nothing is written to disk."""
    with open_file(archive, LARGEST) as file:
        try:
            with gzip.GzipFile(fileobj=file) as packed:
                unpacked = _Bounded(packed, LARGEST)
                with tarfile.open(fileobj=unpacked, mode="r|") as tar:  # type: ignore[call-overload]
                    for number, member in enumerate(tar, start=1):
                        if number > MOST:
                            raise tarfile.TarError(f"it holds more than {MOST} files")
                        name = PurePosixPath(member.name).name
                        if name in layout.files and member.isreg() and (content := tar.extractfile(member)):
                            yield name, content.read()
                while unpacked.read(1 << 20):  # read to the end, where gzip verifies the checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive}: damaged or cut short ({error}); {_cure(layout)}") from error


def _decode(layout: Layout, where: str, data: bytes) -> tuple[Tensor, Tensor]:
    if not data or len(data) % layout.record:
        form = f"{layout.label_bytes} for the label and {PIXELS} for the pixels of each image"
        expected = f"expected a positive multiple of {layout.record} bytes ({form})"
        raise ValueError(f"{where}: {expected}, found {len(data)}; {_cure(layout)}")
    records = np.frombuffer(data, np.uint8).reshape(-1, layout.record)
    labels, highest = records[:, layout.label_bytes - 1], layout.num_classes - 1
    if (wrong := labels > highest).any():
        position = int(wrong.argmax())
        fault = f"label {labels[position]} at position {position}; labels must be 0..{highest}"
        raise ValueError(f"{where}: {fault}; {_cure(layout)}")
    images = records[:, layout.label_bytes :].reshape(-1, *SHAPE)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _cure(layout: Layout) -> str:
    return f"move it away and fetch it again: controlat data {layout.name}"
