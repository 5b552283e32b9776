"""Data files that are no files, have no end, or unpack to far more than they should."""

from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import guarded

from controlat.data import _cifar, load, svhn
from controlat.data._download import Remote, fetch
from controlat.data.cifar10 import LAYOUT
from controlat.data.mnist import read_idx
from controlat.data.svhn import read_mat

MB = 1 << 20


def pipe(path: Path) -> None:
    os.mkfifo(path)


def door(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # a terabyte that takes no space


def cifar(path: Path) -> None:
    for name in LAYOUT.files:
        if not (path.parent / name).exists():
            (path.parent / name).write_bytes(bytes(LAYOUT.record))
    load("cifar10", path.parent)


def mnist(path: Path) -> None:
    images, labels = struct.pack(">HBB3I", 0, 8, 3, 1, 1, 1) + b"1", struct.pack(">HBBI", 0, 8, 1, 1) + b"1"
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        if not (file := path.with_name(f"train-{name}-ubyte")).exists():
            file.write_bytes(content)
    load("mnist", path.parent)


def both_mat(path: Path) -> None:
    path.with_name("test_32x32.mat").touch()
    load("svhn", path.parent)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "idx": ("a.gz", read_idx),
    "mat": ("a.mat", lambda path: read_mat(path, ["X"])),
    "mnist": ("train-labels-idx1-ubyte", mnist),
    "cifar": ("test_batch.bin", cifar),
    "cifar archive": (LAYOUT.archive, lambda path: load("cifar10", path.parent)),
    "svhn": ("train_32x32.mat", both_mat),
    "download": ("a", lambda path: fetch([Remote("a", ("http://127.0.0.1:9/a",), "0" * 64, 9)], path.parent)),
    "part": (
        "a.part",
        lambda path: fetch([Remote("a", ("http://127.0.0.1:9/a",), "0" * 64, 9)], path.parent),
    ),
}


@pytest.mark.parametrize(
    ("reader", "make"),
    [
        (reader, make)
        for reader in READERS
        for make in (pipe, door, device, huge)
        if (reader, make) != ("part", huge)  # which is begun anew
    ],
)
def test_what_is_no_file_or_has_no_end_is_refused_at_once(
    tmp_path: Path, reader: str, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    name, read = READERS[reader]
    make(Path(name))
    with guarded(), pytest.raises(ValueError, match=rf"(?s){name}\b.*(regular file|bytes)"):
        read(tmp_path / name)


@pytest.mark.parametrize("extra", [1, 64 * MB])
def test_a_gzipped_idx_file_is_unpacked_as_far_as_its_header_says(tmp_path: Path, extra: int) -> None:
    head = struct.pack(">HBB3I", 0, 8, 3, 2, 28, 28)
    (tmp_path / "a").write_bytes(gzip.compress(head + bytes(2 * 28 * 28 + extra)))
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"trailing bytes: expected 1584 bytes, found (more than 1584|1585);"
    ):
        read_idx(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()


def test_an_idx_header_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 1 << 31, 1 << 31, 1 << 31)))
    with pytest.raises(ValueError, match=r"a: sizes .* are 9,903,520,314,283,042,199,192,993,808 bytes, at"):
        read_idx(tmp_path / "a")


@pytest.mark.parametrize("name", ["readme.html", "test_batch.bin"])
def test_an_archive_is_unpacked_up_to_a_limit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cifar, "LARGEST", MB)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 8 * MB
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    # its end is damaged, which is seen only by whoever reads that far
    (tmp_path / LAYOUT.archive).write_bytes(packed.getvalue()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"\(it unpacks to more than 1,048,576 bytes\); move it away"):
        load("cifar10", tmp_path)


def test_an_archive_of_very_many_files_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for i in range(_cifar.MOST + 1):
            tar.addfile(tarfile.TarInfo(str(i)))
    (tmp_path / LAYOUT.archive).write_bytes(packed.getvalue())
    with pytest.raises(ValueError, match=r"\(it holds more than 100 files\); move it away"):
        load("cifar10", tmp_path)


def variable(name: bytes, size: int) -> bytes:
    """A compressed variable of level 5: a row of zeros, uint8."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    head = element(6, struct.pack("<II", 9, 0)) + element(5, struct.pack("<ii", 1, size))
    head += struct.pack("<I", 1 << 16 | 1) + name + bytes(3)
    packed = zlib.compress(element(14, head + element(2, bytes(size))))
    return struct.pack("<II", 15, len(packed)) + packed


def test_a_mat_file_is_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "LARGEST", MB)
    start, path = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM", tmp_path / "a.mat"
    path.write_bytes(start + variable(b"X", MB // 2) + variable(b"y", 8))
    assert {name: a.shape for name, a in read_mat(path, "Xy").items()} == {"X": (1, MB // 2), "y": (1, 8)}
    for content in (variable(b"X", 32 * MB), variable(b"a", MB // 2) + variable(b"b", MB // 2 - 8)):
        path.write_bytes(start + content)
        with pytest.raises(ValueError, match=r"\(it unpacks to more than 1,048,576 bytes\)"):
            read_mat(path, "Xy")
    path.write_bytes(start + 2 * variable(b"X", 8))
    with pytest.raises(ValueError, match=r"\(variable 'X' comes twice\)"):
        read_mat(path, "Xy")
