"""Street View House Numbers (SVHN), cropped digits, from its two MATLAB files."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from controlat._util.files import read_bytes
from controlat.data import _cache
from controlat.data._download import Remote
from controlat.data._types import Dataset, Split

__all__ = ["REMOTES", "load", "read_mat"]

REMOTES = tuple(
    Remote(name, (f"http://ufldl.stanford.edu/housenumbers/{name}",), sha256, size)
    for name, size, sha256 in (
        ("train_32x32.mat", 182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
        ("test_32x32.mat", 64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
    )
)
FLAGS, MATRIX, COMPRESSED = 6, 14, 15  # types of data elements (miUINT32, miMATRIX, miCOMPRESSED)
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
NUMERIC = range(6, 16)  # classes of variables: double, single, eight kinds of whole numbers
LARGEST = 1 << 30  # limit in bytes for a file, and for all its variables unpacked; SVHN's have 0.23 GB
OPAQUE, COMPLEX = 17, 0x0800
AGAIN = "move it away and fetch it again: controlat data svhn"


def load(root: Path | None = None) -> Dataset:
    """SVHN: 73,257 training and 26,032 test images (3, 32, 32) of the digits 0..9; scale 255.

    Args:
        root: folder of train_32x32.mat and test_32x32.mat; None looks in `svhn` in the cache:
            $CONTROLAT_DATA, else ~/.cache/controlat.

    Returns:
        The data set "svhn"; label 10 of the files is the digit 0.

    Raises:
        ValueError: a file is missing or damaged; the message names it and what to do.

    Example:
        >>> load(Path("nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: svhn: no file train_32x32.mat, test_32x32.mat in nowhere; ...

    Source: Netzer, Wang, Coates, Bissacco, Wu and Ng, Reading digits in natural images with unsupervised
    feature learning, 2011, format 2.
    """
    place = _cache.folder("svhn", root)
    paths = [place / remote.name for remote in REMOTES]
    if missing := [path.name for path in paths if not path.exists() or path.is_dir()]:
        raise ValueError(f"svhn: no file {', '.join(missing)} in {place}; {_cache.cure('svhn')}")
    train, test = map(_split, paths)
    return Dataset("svhn", train, test, num_classes=10)


def _split(path: Path) -> Split:
    variables = read_mat(path, ("X", "y"))
    if missing := [name for name in ("X", "y") if name not in variables]:
        raise ValueError(f"{path}: has no variable {', '.join(missing)}; {AGAIN}")
    images, labels = variables["X"], variables["y"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or not images.size:
        got = f"{images.dtype} {images.shape}"
        raise ValueError(f"{path}: X must be uint8 of shape (32, 32, 3, N), N > 0, got {got}; {AGAIN}")
    if labels.shape != (images.shape[3], 1):
        got = f"{images.shape[3]} images, but y has shape {labels.shape}, expected (N, 1)"
        raise ValueError(f"{path}: X has {got}; {AGAIN}")
    digits = labels[:, 0]
    if (wrong := ~np.isin(digits, range(1, 11))).any():
        position = int(wrong.argmax())
        fault = f"label {digits[position]} at position {position}"
        raise ValueError(f"{path}: {fault}; labels must be 1..10 (10 means the digit 0); {AGAIN}")
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return Split(x, torch.from_numpy(digits.astype(np.int64) % 10), scale=255.0)


def read_mat(path: str | Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read real arrays from a MATLAB file of level 5 ("-v6", "-v7").

    Not `scipy.io.loadmat`, which crashes the interpreter on some damaged files (seen with scipy 1.17).

    Args:
        path: the file.
        names: the variables to read.

    Returns:
        The variables that the file has, in their stored type (MATLAB stores doubles that are small whole
        numbers as uint8); everything else in the file is ignored.

    Raises:
        ValueError: another format, a damaged file, more than 1 GiB packed or unpacked, no regular file, a
            variable that is not a dense array of real numbers.

    Example:
        >>> import tempfile
        >>> from scipy.io import savemat
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     savemat(Path(folder) / "a.mat", {"a": np.arange(6).reshape(2, 3), "b": "text"})
        ...     read_mat(Path(folder) / "a.mat", ["a", "c"])
        {'a': array([[0, 1, 2], [3, 4, 5]])}

    Source: The MathWorks, MAT-File Format, chapter 1, "Level 5".
    """
    data = memoryview(read_bytes(path, LARGEST))
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(bytes(data[124:128]))
    if order is None:
        raise ValueError(f"{path}: is no MATLAB file of level 5; {AGAIN}")
    variables: dict[str, NDArray[Any]] = {}
    rest, left = data[128:], LARGEST
    try:
        while rest and len(variables) < len(names):
            kind, body, rest = _element(rest, order)
            if kind == COMPRESSED:
                content = _unpacked(body, order, left)
                left -= len(content)
                kind, body, _ = _element(content, order)
            if kind != MATRIX:
                raise ValueError(f"an element of unknown type {kind}")
            variable = _variable(body, order, names)
            if twice := set(variables) & set(variable):
                raise ValueError(f"variable {twice.pop()!r} comes twice")
            variables |= variable
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); {AGAIN}") from error
    return variables


def _element(data: memoryview, order: str) -> tuple[int, memoryview, memoryview]:
    """Type and content of the first data element, and what follows it."""
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes where an element starts")
    kind, size = struct.unpack(f"{order}II", data[:8])
    start, following = 8, 8 + size + (0 if kind == COMPRESSED else -size % 8)
    if kind >> 16:  # the short form: type, size and up to four bytes in one word
        kind, size, start, following = kind & 0xFFFF, kind >> 16, 4, 8
    body = data[start:following][:size]
    if len(body) < size:
        raise ValueError(f"an element of {size} bytes, of which {len(body)} are there")
    return kind, body, data[following:]


def _unpacked(body: memoryview, order: str, limit: int) -> memoryview:
    head = zlib.decompressobj().decompress(body[:1024], 8)
    size = struct.unpack(f"{order}4xI", head)[0] if len(head) == 8 else 0
    if 8 + size > limit:
        raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
    stream = zlib.decompressobj()
    content = stream.decompress(body, 8 + size + 1)  # + 1 to detect trailing bytes
    if not stream.eof or len(content) != 8 + size:
        raise ValueError(f"{len(content)} unpacked bytes instead of {8 + size}")
    return memoryview(content)


def _variable(body: memoryview, order: str, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """{name: array} of a variable; empty if its name is not in `names`."""
    kind, flags, body = _element(body, order)
    if kind != FLAGS or len(flags) != 8:
        raise ValueError("a variable without flags")
    word = struct.unpack(f"{order}I4x", flags)[0]
    if (group := word & 0xFF) == OPAQUE:  # MATLAB objects have no sizes
        return {}
    _, sizes, body = _element(body, order)
    _, text, body = _element(body, order)
    if (name := bytes(text).decode("latin-1")) not in names:
        return {}
    if group not in NUMERIC or word & COMPLEX:
        raise ValueError(f"variable {name!r} must hold plain numbers, but is of class {group}")
    kind, values, _ = _element(body, order)
    if kind not in STORED:
        raise ValueError(f"variable {name!r} is stored as unknown type {kind}")
    stored = np.dtype(order + STORED[kind])
    shape = np.frombuffer(sizes, f"{order}i4").tolist()
    if len(shape) < 2 or min(shape) < 0 or math.prod(shape) * stored.itemsize != len(values):
        raise ValueError(f"variable {name!r} has sizes {shape}, but {len(values)} bytes of type {kind}")
    array = np.frombuffer(values, stored).reshape(shape, order="F") if values else np.empty(shape, stored)
    return {name: array.astype(stored.newbyteorder("="), copy=False)}
