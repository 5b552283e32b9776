"""MNIST files as they should be, and damaged in every way we know."""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from controlat.data import load
from controlat.data.mnist import read_idx

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
CODES = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: NDArray[np.generic]) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, CODES[array.dtype.str[1:]], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def contents(n: int = 12) -> tuple[bytes, bytes]:
    """n images 4 x 3, the first pixel counting, with labels 0..9 in turn."""
    pixels = np.zeros((n, 4, 3), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(n)
    return idx(pixels), idx((np.arange(n) % 10).astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file, data in zip(FILES, contents(12) + contents(5), strict=True):
        (tmp_path / file).write_bytes(data)
    return tmp_path


@given(
    array=hnp.arrays(
        dtype=st.sampled_from(list(CODES)),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    packed=st.booleans(),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_read_idx_round_trip(array: NDArray[np.generic], packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        found = read_idx(path)
    assert found.dtype == array.dtype
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array)


@given(data=st.binary(max_size=40))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_read_idx_of_anything_is_an_array_or_a_value_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for head in (b"", b"\0\0\x08", b"\x1f\x8b\x08\0"):
            path.write_bytes(head + data)
            message = str(path)
            try:
                read_idx(path)
            except ValueError as error:
                message = str(error)
            assert str(path) in message


@pytest.mark.parametrize("cut", range(0, 16 + 12 * 12, 7))
def test_every_truncation_is_named(root: Path, cut: int) -> None:
    path = root / FILES[0]
    path.write_bytes(path.read_bytes()[:cut])
    expected = "at least 4" if cut < 4 else 16 if cut < 16 else 160
    with pytest.raises(ValueError, match=f"{FILES[0]}: truncated: expected {expected} bytes, found {cut};"):
        load("mnist", root)


@pytest.mark.parametrize("missing", [1, 4, 8, 20])
def test_gzip_cut_short(root: Path, missing: int) -> None:
    path = root / FILES[0]
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[:-missing])
    with pytest.raises(
        ValueError, match=rf"{FILES[0]}: gzip stream cut short: expected 160 bytes, found \d+;"
    ):
        load("mnist", root)


def replace(file: int, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / FILES[file]).write_bytes(change((root / FILES[file]).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            replace(0, lambda data: data + b"12"),
            f"{FILES[0]}: trailing bytes: expected 160 bytes, found 162;",
        ),
        (
            replace(0, lambda data: gzip.compress(data) + b"12"),
            f"{FILES[0]}: trailing bytes: expected 160 bytes, found 162;",
        ),
        (
            replace(0, lambda data: gzip.compress(data)[:-8] + bytes(8)),
            rf"{FILES[0]}: damaged gzip stream \(.*incorrect data check\)",
        ),
        (replace(0, lambda data: b"<html>"), "wrong magic number 0x3c68746d, expected 0x00000803;"),
        (replace(0, lambda data: contents()[1]), "wrong magic number 0x00000801, expected 0x00000803;"),
        (
            replace(3, lambda data: contents()[0]),
            f"{FILES[3]}: wrong magic number 0x00000803, expected 0x00000801",
        ),
        (
            replace(3, lambda data: data[:-2] + b"\x0a\x0b"),
            rf"{FILES[3]}: label 10 at position 3; labels must be 0\.\.9",
        ),
        (
            replace(1, lambda data: contents(5)[1]),
            f"{FILES[0]} has 12 images, but .*{FILES[1]} has 5 labels;",
        ),
        (replace(2, lambda data: contents(0)[0]), rf"{FILES[2]}: holds no images, its shape is \(0, 4, 3\)"),
    ],
)
def test_damage_is_named(root: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(root)
    with pytest.raises(ValueError, match=message):
        load("mnist", root)


def test_read_idx_lists_types_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 7, 1]))
    with pytest.raises(ValueError, match="0x00000701, expected 0x0000TTRR with type TT in 08 09 0b 0c 0d 0e"):
        read_idx(path)
    path.write_bytes(struct.pack(">HBB100I", 0, 8, 100, *[1] * 100) + b"1")
    with pytest.raises(ValueError, match=r"file: rank 100, sizes \[1, 1, .*maximum supported dimension"):
        read_idx(path)


@pytest.mark.parametrize("folder", ["", "MNIST/raw", "raw"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_names_and_folders(tmp_path: Path, folder: str, dot: str, packed: bool) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file, data in zip(FILES, contents(12) + contents(5), strict=True):
        name = file.replace("-idx", f"{dot}idx") + (".gz" if packed else "")
        (tmp_path / folder / name).write_bytes(gzip.compress(data) if packed else data)
    data_set = load("mnist", tmp_path)
    assert (data_set.name, len(data_set.train), len(data_set.test)) == ("mnist", 12, 5)
    assert (data_set.in_shape, data_set.num_classes, data_set.train.scale) == ((1, 4, 3), 10, 255)
    assert data_set.train.x[:, 0, 0, 0].tolist() == list(range(12))
    assert data_set.train.y.tolist() == [*range(10), 0, 1]


def test_a_missing_file_lists_what_was_looked_for(root: Path) -> None:
    (root / FILES[3]).unlink()
    with pytest.raises(ValueError, match="mnist: no file t10k-labels-idx1-ubyte, ") as caught:
        load("mnist", root)
    cure = "give --data-dir FOLDER, or download it: controlat data mnist"
    for part in ("t10k-labels.idx1-ubyte.gz", str(root), str(root / "MNIST" / "raw"), cure):
        assert part in str(caught.value)


def test_the_folder_from_the_environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").symlink_to(root)
    monkeypatch.setenv("CONTROLAT_DATA", str(tmp_path))
    assert len(load("mnist").train) == 12
    monkeypatch.delenv("CONTROLAT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"in any of {tmp_path}/controlat/mnist, .*: controlat data mnist"):
        load("mnist")
    (tmp_path / "controlat").mkdir()
    (tmp_path / "controlat" / "mnist").symlink_to(root)
    assert len(load("mnist").train) == 12


@pytest.mark.skipif(not REAL.is_dir(), reason="the MNIST files are not at ../shared/data/mnist")
def test_the_real_files() -> None:
    data = load("mnist", REAL)
    assert (len(data.train), len(data.test), data.in_shape) == (60000, 10000, (1, 28, 28))
    assert data.train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = data.train.x.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.1307, 0.3081)
    train, held = data.hold_out(10000)
    assert (len(train), len(held)) == (50000, 10000)
