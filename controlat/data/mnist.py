"""MNIST from its four idx files, raw or gzipped, as they are usually distributed.

Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998. Data sets with
the same four files (Fashion-MNIST, KMNIST) load from their folder in the same way.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from controlat._util.files import read_bytes
from controlat.data import _cache
from controlat.data._download import Remote
from controlat.data._types import Dataset, Split

__all__ = ["REMOTES", "load", "read_idx"]

REMOTES = tuple(
    Remote(
        name,
        (
            f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}",
            f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}",
        ),
        sha256,
        size,
    )
    for name, size, sha256 in (
        (
            "train-images-idx3-ubyte.gz",
            9912422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            28881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            1648877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            4542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
)

IMAGES, LABELS = 0x0803, 0x0801  # magic numbers: uint8 of rank 3, uint8 of rank 1
LARGEST = 2 << 30  # limit in bytes for a file, gzipped or not; MNIST's images have 47 million
LONGEST_HEADER = 4 + 4 * 255
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load(root: Path | None = None) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images (1, 28, 28) of 10 classes; scale 255.

    Args:
        root: folder of the four idx files (or of `MNIST/raw` or `raw` with them, as torchvision lays
            them out); None looks in `mnist` in the cache: $CONTROLAT_DATA, else ~/.cache/controlat.

    Returns:
        The data set "mnist".

    Raises:
        ValueError: a file is missing or damaged; the message names it and what to do.

    Example:
        >>> load(Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: mnist: no file train-images-idx3-ubyte, ...

    Source: LeCun, Cortes and Burges, 1998.
    """
    root = _cache.folder("mnist", root)
    return Dataset("mnist", _split(root, "train"), _split(root, "t10k"), num_classes=10)


def _split(root: Path, part: str) -> Split:
    image_file, label_file = (
        _find(root, f"{part}-images", "idx3-ubyte"),
        _find(root, f"{part}-labels", "idx1-ubyte"),
    )
    images, labels = read_idx(image_file, IMAGES), read_idx(label_file, LABELS)
    if images.size == 0:
        raise ValueError(f"{image_file}: holds no images, its shape is {images.shape}; fetch it again")
    if len(images) != len(labels):
        counts = f"{len(images)} images, but {label_file} has {len(labels)} labels"
        raise ValueError(f"{image_file} has {counts}; take both files from the same data set")
    if (wrong := labels > 9).any():
        position = int(wrong.argmax())
        raise ValueError(
            f"{label_file}: label {labels[position]} at position {position}; labels must be 0..9"
        )
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long(), scale=255.0)


def _find(root: Path, stem: str, kind: str) -> Path:
    folders = [root, root / "MNIST" / "raw", root / "raw"]
    files = [f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")]
    for path in (folder / file for folder in folders for file in files):
        if path.exists() and not path.is_dir():
            return path
    places = ", ".join(map(str, folders))
    raise ValueError(f"mnist: no file {', '.join(files)} in any of {places}; {_cache.cure('mnist')}")


def read_idx(path: str | Path, magic: int | None = None) -> NDArray[Any]:
    """Read an array from an idx file, raw or gzipped (recognised by its content, not its name).

    The file is the magic 0, 0, type code, rank; the sizes as uint32; the values; all big-endian.

    Args:
        path: the file.
        magic: the only magic number to accept, such as 0x0803 for uint8 images; None accepts every
            type (8, 16, 32 bit integers, 32, 64 bit floats) and rank.

    Returns:
        A new array in the byte order of this machine.

    Raises:
        ValueError: wrong magic, file cut short, trailing bytes, damaged gzip, more than 2 GiB, no regular
            file; the message names the file. At most the length that the header gives is unpacked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path).tolist()
        [7, 2, 1]

    Source: LeCun, Cortes and Burges, 1998, "the IDX file format".
    """
    stored = read_bytes(path, LARGEST)
    head, _ = _contents(path, stored, LONGEST_HEADER)
    if len(head) < 4:
        raise ValueError(f"{path}: truncated: expected at least 4 bytes, found {len(head)}; fetch it again")
    dtype, header = _layout(path, int.from_bytes(head[:4], "big"), magic)
    sizes = head[4:header].ljust(header - 4, b"\0")  # a missing size counts as 0: then the header is short
    shape = np.frombuffer(sizes, ">u4").tolist()
    size = header + math.prod(shape) * dtype.itemsize
    if size > LARGEST:
        raise ValueError(f"{path}: sizes {shape[:8]} are {size:,} bytes, at most {LARGEST:,} are read here")
    data, complete = _contents(path, stored, size + 1)  # + 1 to detect trailing bytes
    if not complete or len(data) != size:
        fault = "truncated" if complete else "gzip stream cut short"
        length = f"{len(data)}" if complete or len(data) <= size else f"more than {size}"
        fault = "trailing bytes" if len(data) > size else fault
        raise ValueError(f"{path}: {fault}: expected {size} bytes, found {length}; fetch it again")
    try:
        values = np.frombuffer(data, dtype, offset=header) if size > header else np.empty(0, dtype)
        return values.reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # numpy has limits on rank and size that the format lacks
        raise ValueError(f"{path}: rank {len(shape)}, sizes {shape[:8]}...: {error}") from error


def _layout(path: str | Path, actual: int, magic: int | None) -> tuple[np.dtype[Any], int]:
    """The type of the values and the length of the header, from the magic number."""
    code, rank = actual >> 8, actual & 0xFF
    if code not in DTYPES or magic not in (None, actual):
        codes = " ".join(f"{code:02x}" for code in DTYPES)
        expected = (
            f"0x{magic:08x}" if magic is not None else f"0x0000TTRR with type TT in {codes} and rank RR"
        )
        raise ValueError(
            f"{path}: wrong magic number 0x{actual:08x}, expected {expected}; is it the right file?"
        )
    return np.dtype(DTYPES[code]), 4 + 4 * rank


def _contents(path: str | Path, stored: bytes, limit: int) -> tuple[bytes, bool]:
    """The unpacked bytes, at most `limit` if the file is gzipped, and whether the gzip stream is complete."""
    if not stored.startswith(b"\x1f\x8b"):
        return stored, True
    stream = zlib.decompressobj(wbits=31)  # 31: gzip; unlike the gzip module it returns what it could unpack
    try:
        unpacked = stream.decompress(stored, limit)
    except zlib.error as error:
        raise ValueError(f"{path}: damaged gzip stream ({error}); fetch it again") from error
    return unpacked + stream.unused_data, stream.eof
