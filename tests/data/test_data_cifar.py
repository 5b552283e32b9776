"""CIFAR-10 and CIFAR-100 as they should be, and damaged in every way we know."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat.data import load
from controlat.data.cifar10 import LAYOUT as TEN
from controlat.data.cifar100 import LAYOUT as HUNDRED

BOTH = pytest.mark.parametrize("layout", [TEN, HUNDRED], ids=lambda layout: layout.name)
Layout = type(TEN)


def record(layout: Layout, label: int, pixels: bytes = bytes(3072)) -> bytes:
    return bytes([7] * (layout.label_bytes - 1) + [label]) + pixels


def contents(layout: Layout) -> dict[str, bytes]:
    """Two images in each file, labels counting, the first red pixel saying which image it is."""
    numbers = iter(range(100))
    return {
        name: b"".join(
            record(layout, i % 10, bytes([i]) + bytes(3071)) for i in (next(numbers), next(numbers))
        )
        for name in layout.files
    }


def unpacked(layout: Layout, place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for name, data in contents(layout).items():
        (place / name).write_bytes(data)
    return place


def packed(files: dict[str, bytes], folder: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.type, member.linkname = len(data), kind, "/etc/hosts"
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def archived(layout: Layout, root: Path) -> Path:
    # the real ones hold other files too, in no order
    files = {"readme.html": b"<html>"} | dict(reversed(contents(layout).items())) | {"batches.meta.txt": b"a"}
    (root / layout.archive).write_bytes(packed(files, layout.folder))
    return root / layout.archive


@BOTH
@pytest.mark.parametrize("place", ["", "folder", "archive"])
def test_all_places_give_the_same(tmp_path: Path, layout: Layout, place: str) -> None:
    if place == "archive":
        archived(layout, tmp_path)
    else:
        unpacked(layout, tmp_path / (layout.folder if place else ""))
    before = sorted(tmp_path.rglob("*"))
    data = load(layout.name, tmp_path)
    n = 2 * len(layout.train)
    assert (data.name, data.num_classes, data.in_shape) == (layout.name, layout.num_classes, (3, 32, 32))
    assert (data.train.x.dtype, data.train.scale, data.test.scale) == (torch.uint8, 255, 255)
    assert data.train.x[:, 0, 0, 0].tolist() == list(range(n))
    assert data.train.y.tolist() == [i % 10 for i in range(n)]
    assert data.test.x[:, 0, 0, 0].tolist() == [n, n + 1]
    assert data.test.y.tolist() == [n % 10, (n + 1) % 10]
    assert sorted(tmp_path.rglob("*")) == before


@BOTH
def test_planes_rows_and_columns(tmp_path: Path, layout: Layout) -> None:
    unpacked(layout, tmp_path)
    pixels = np.random.default_rng(0).integers(256, size=3072, dtype=np.uint8)
    (tmp_path / layout.test).write_bytes(record(layout, 3, pixels.tobytes()) + record(layout, 4))
    x = load(layout.name, tmp_path).test.x[0]
    for channel, row, column in [(0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 5, 9), (2, 31, 30), (2, 31, 31)]:
        assert x[channel, row, column] == pixels[1024 * channel + 32 * row + column]


def test_the_fine_label_is_used(tmp_path: Path) -> None:
    unpacked(HUNDRED, tmp_path)
    (tmp_path / "test.bin").write_bytes(bytes([19, 99]) + bytes(3072))
    assert load("cifar100", tmp_path).test.y.tolist() == [99]


@BOTH
def test_the_cache_is_looked_at(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLAT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"in any of {tmp_path / layout.name}, "):
        load(layout.name)
    unpacked(layout, tmp_path / layout.name)
    assert load(layout.name).name == layout.name


@BOTH
def test_missing_files_are_named(tmp_path: Path, layout: Layout) -> None:
    cure = f"give --data-dir FOLDER, or download it: controlat data {layout.name}"
    with pytest.raises(ValueError, match=f"{layout.name}: no file {layout.train[0]}, ") as caught:
        load(layout.name, tmp_path)
    for part in (tmp_path, tmp_path / layout.folder, tmp_path / layout.archive, cure):
        assert str(part) in str(caught.value)
    (unpacked(layout, tmp_path / layout.folder) / layout.test).unlink()
    with pytest.raises(ValueError, match=f"{layout.name}: no file {layout.test} in any of "):
        load(layout.name, tmp_path)
    archived(layout, tmp_path)
    assert len(load(layout.name, tmp_path).test) == 2


@BOTH
@pytest.mark.parametrize("which", [0, 1, 2])
def test_pickles_are_never_read(tmp_path: Path, layout: Layout, which: int) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "trapped",)

    path = tmp_path / layout.pickled[which]
    if which == 0:
        path.mkdir()
        path = path / "data_batch_1"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="python version, which is never read") as caught:
        load(layout.name, tmp_path)
    for part in (str(tmp_path / layout.pickled[which]), f"binary version: .*controlat data {layout.name}"):
        assert caught.match(part)
    assert not (tmp_path / "trapped").exists()
    unpacked(layout, tmp_path)
    assert len(load(layout.name, tmp_path).test) == 2


@BOTH
@pytest.mark.parametrize("change", [-1, 1])
def test_sizes(tmp_path: Path, layout: Layout, change: int) -> None:
    path = unpacked(layout, tmp_path) / layout.train[-1]
    size = 2 * layout.record + change
    path.write_bytes((path.read_bytes() + bytes(1))[:size])
    expected = f"{path}: expected a positive multiple of {layout.record} bytes .*, found {size}; move it away"
    with pytest.raises(ValueError, match=expected):
        load(layout.name, tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"found 0; .* fetch it again: controlat data"):
        load(layout.name, tmp_path)


@BOTH
def test_labels(tmp_path: Path, layout: Layout) -> None:
    highest = layout.num_classes - 1
    path = unpacked(layout, tmp_path) / layout.test
    path.write_bytes(record(layout, highest) + record(layout, highest + 1))
    message = rf"{path}: label {highest + 1} at position 1; labels must be 0\.\.{highest}"
    with pytest.raises(ValueError, match=message):
        load(layout.name, tmp_path)


@BOTH
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "damaged or cut short"),
        (lambda data: data[:-4], "damaged or cut short"),
        (lambda data: data[: len(data) // 2], "damaged or cut short"),
        (lambda data: data[:-8] + bytes(8), r"damaged or cut short \(CRC check failed"),
        (lambda data: b"<html>not found</html>", r"damaged or cut short \(Not a gzipped file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:700]), "damaged or cut short"),
        (lambda data: gzip.compress(b"no tar file" * 100), "damaged or cut short"),
    ],
)
def test_damaged_archives(
    tmp_path: Path, layout: Layout, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = archived(layout, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path}: {message}.*; move it away and fetch it again: controlat"):
        load(layout.name, tmp_path)


@BOTH
def test_archives_with_other_content(tmp_path: Path, layout: Layout) -> None:
    files, path = contents(layout), tmp_path / layout.archive
    test = files.pop(layout.test)
    path.write_bytes(packed(files, layout.folder))
    with pytest.raises(ValueError, match=f"{path}: has no file {layout.test};"):
        load(layout.name, tmp_path)
    path.write_bytes(packed(files | {layout.test: test[:-1]}, layout.folder))
    with pytest.raises(ValueError, match=f"{path}, {layout.test}: expected a positive multiple"):
        load(layout.name, tmp_path)
    path.write_bytes(packed(dict.fromkeys(layout.files, b""), layout.folder, tarfile.SYMTYPE))
    with pytest.raises(ValueError, match=f"{path}: has no file {layout.train[0]}"):
        load(layout.name, tmp_path)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    noise=st.binary(max_size=600),
    kind=st.sampled_from(["file", "archive", "tar", "spot", "gzip"]),
    at=st.data(),
)
def test_anything_is_a_data_set_or_a_value_error(noise: bytes, kind: str, at: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, path = Path(name), Path(name) / TEN.archive
        if kind == "file":
            path = unpacked(TEN, root) / TEN.test
            path.write_bytes(noise)
        elif kind in ("archive", "tar"):
            path.write_bytes(noise if kind == "archive" else gzip.compress(noise.ljust(512, b"\0")))
        else:  # some bytes of a good archive, packed or not, are overwritten
            data = bytearray(archived(TEN, root).read_bytes())
            data = bytearray(gzip.decompress(data)) if kind == "spot" else data
            start = at.draw(st.integers(0, len(data) - 1))
            data[start : start + len(noise)] = noise
            path.write_bytes(gzip.compress(data, 1) if kind == "spot" else data)
        message = str(path)
        try:
            load("cifar10", root)
        except ValueError as error:
            message = str(error)
        assert str(path) in message
