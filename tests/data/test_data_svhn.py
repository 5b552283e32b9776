"""SVHN files as they should be, and damaged in every way we know."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.io import loadmat, savemat

from controlat.data import load
from controlat.data.svhn import read_mat

# double matrices of one to three dimensions, as MATLAB 6.1 to 7.4 wrote them, on two kinds of machines
BY_MATLAB = [
    path
    for kind in ("matrix", "double", "minus", "3dmatrix", "multi")
    for path in sorted((Path(scipy.io.__file__).parent / "matlab/tests/data").glob(f"test{kind}_[67]*.mat"))
]
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"


def arrays(n: int = 3) -> dict[str, NDArray[Any]]:
    x = np.random.default_rng(n).integers(256, size=(32, 32, 3, n), dtype=np.uint8)
    return {"X": x, "y": (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    savemat(tmp_path / TRAIN, arrays(12), do_compression=True)
    savemat(tmp_path / TEST, arrays(3))
    return tmp_path


def test_pixels_and_labels_end_where_they_should(root: Path) -> None:
    data = load("svhn", root)
    assert (data.name, data.num_classes, data.in_shape) == ("svhn", 10, (3, 32, 32))
    assert (len(data.train), len(data.test)) == (12, 3)
    assert (data.train.x.dtype, data.train.scale, data.test.scale) == (torch.uint8, 255, 255)
    assert data.train.y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    stored = arrays(12)["X"]
    for row, column, channel, n in [
        (0, 0, 0, 0),
        (0, 31, 0, 1),
        (31, 0, 1, 5),
        (4, 9, 2, 11),
        (31, 31, 2, 11),
    ]:
        assert data.train.x[n, channel, row, column] == stored[row, column, channel, n]


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "f8"])
def test_number_types_of_labels(root: Path, dtype: str) -> None:
    savemat(root / TEST, arrays(3) | {"y": np.array([[10], [9], [1]], dtype=dtype)})
    assert load("svhn", root).test.y.tolist() == [0, 9, 1]


def test_one_image(root: Path) -> None:
    savemat(root / TEST, arrays(1))
    assert load("svhn", root).test.x.shape == (1, 3, 32, 32)


def test_missing_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / TEST).unlink()
    cure = "give --data-dir FOLDER, or download it: controlat data svhn"
    with pytest.raises(ValueError, match=f"svhn: no file {TEST} in {root}; {cure}"):
        load("svhn", root)
    monkeypatch.setenv("CONTROLAT_DATA", str(root))
    with pytest.raises(ValueError, match=f"svhn: no file {TRAIN}, {TEST} in {root / 'svhn'}; {cure}"):
        load("svhn")


@pytest.mark.parametrize("file", [TRAIN, TEST])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.1, 0.5, 0.99])
def test_cut_short(root: Path, file: str, share: float) -> None:
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{root / file}: .*; move it away and fetch it again: controlat"):
        load("svhn", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": None}, "has no variable X"),
        ({"y": None}, "has no variable y"),
        ({"X": None, "y": None, "x": 1}, "has no variable X, y"),
        ({"X": np.zeros((32, 32, 3, 3))}, r"X must be uint8 of shape \(32, 32, 3, N\).*, got float64"),
        ({"X": np.zeros((32, 32, 3), np.uint8)}, r"X must be uint8 .*, got uint8 \(32, 32, 3\)"),
        ({"X": np.zeros((3, 32, 32, 3), np.uint8)}, r"X must be uint8 .*, got uint8 \(3, 32, 32, 3\)"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8)}, r"X must be uint8 .*, N > 0, got"),
        ({"X": "text"}, r".*variable 'X' must hold plain numbers, but is of class 4"),
        ({"X": np.array([1, "a"], dtype=object)}, r".*variable 'X' .* class 1"),
        ({"X": {"field": 1}}, r".*variable 'X' .* class 2"),
        ({"X": scipy.sparse.eye_array(3, format="csc")}, r".*variable 'X' .* class 5"),
        ({"y": np.array([[1j], [2], [3]])}, r".*variable 'y' must hold plain numbers"),
        ({"y": np.array([1, 2, 3])}, r"X has 3 images, but y has shape \(1, 3\), expected \(N, 1\)"),
        ({"y": np.array([[1], [2]])}, r"X has 3 images, but y has shape \(2, 1\)"),
        ({"y": np.array([[1], [0], [3]])}, r"label 0 at position 1; labels must be 1\.\.10"),
        ({"y": np.array([[1], [2], [11]])}, "label 11 at position 2;"),
        ({"y": np.array([[1.5], [2], [3]])}, "label 1.5 at position 0;"),
        ({"y": np.array([[1], [np.nan], [3]])}, "label nan at position 1;"),
    ],
)
def test_damage_is_named(root: Path, change: dict[str, Any], message: str) -> None:
    content = {key: value for key, value in (arrays(3) | change).items() if value is not None}
    savemat(root / TEST, content)
    with pytest.raises(ValueError, match=f"{root / TEST}: {message}"):
        load("svhn", root)


def test_other_formats(root: Path) -> None:
    savemat(root / TEST, {"X": np.zeros((32, 32)), "y": np.ones((3, 1))}, format="4")
    with pytest.raises(ValueError, match=f"{root / TEST}: is no MATLAB file of level 5;"):
        load("svhn", root)
    (root / TEST).write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400))
    with pytest.raises(ValueError, match=f"{root / TEST}: is no MATLAB file of level 5;"):
        load("svhn", root)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    array=hnp.arrays(
        dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]),
        shape=hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=4),
    ),
    name=st.sampled_from(["a", "abcd", "abcde", "a" * 31]),
    packed=st.booleans(),
)
def test_read_mat_reads_what_scipy_writes(array: NDArray[Any], name: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.mat"
        others = {"text": "b", "cell": np.array([1, "c"], dtype=object), "empty": np.zeros((0, 0))}
        savemat(path, others | {name: array, "last": 1}, do_compression=packed)
        assert set(read_mat(path, [name, "last", "none"])) == {name, "last"}
        found, reference = read_mat(path, [name])[name], loadmat(path)[name]
    assert found.dtype == array.dtype == reference.dtype
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(found, reference)


@pytest.mark.skipif(not BY_MATLAB, reason="scipy came without its test files")
def test_read_mat_reads_what_matlab_writes() -> None:
    read = 0
    for path in BY_MATLAB:
        for name, value in loadmat(path).items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "uif":
                found = read_mat(path, [name])[name]
                np.testing.assert_array_equal(found, value)
                assert found.dtype == value.dtype.newbyteorder("=")
                read += 1
    assert read >= 12


@pytest.mark.parametrize("order", ["<", ">"])
def test_whole_numbers_stored_in_fewer_bytes(tmp_path: Path, order: str) -> None:
    def element(kind: int, data: bytes) -> bytes:
        return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)

    def double(values: bytes, kind: int) -> bytes:  # what MATLAB makes of [1; 2; 10], of class double
        flags, sizes = struct.pack(f"{order}II", 6, 0), struct.pack(f"{order}ii", 3, 1)
        name = struct.pack(f"{order}I", 1 << 16 | 1) + b"y\0\0\0"
        return element(14, element(6, flags) + element(5, sizes) + name + element(kind, values))

    path = tmp_path / "file.mat"
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100)
    head += b"IM" if order == "<" else b"MI"
    path.write_bytes(head + double(bytes([1, 2, 10]), 2))
    found = read_mat(path, ["y"])["y"]
    np.testing.assert_array_equal(found, loadmat(path)["y"])
    assert (found.dtype, found.tolist()) == (np.uint8, [[1], [2], [10]])
    path.write_bytes(head + double(bytes([1, 2, 10]), 16))
    with pytest.raises(ValueError, match="variable 'y' is stored as unknown type 16"):
        read_mat(path, ["y"])
    path.write_bytes(head + double(bytes([1, 2]), 2))
    with pytest.raises(ValueError, match=r"variable 'y' has sizes \[3, 1\], but 2 bytes of type 2"):
        read_mat(path, ["y"])
    path.write_bytes(head + element(1, bytes(8)))
    with pytest.raises(ValueError, match="an element of unknown type 1"):
        read_mat(path, ["y"])


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    noise=st.binary(min_size=1, max_size=200),
    kind=st.sampled_from(["whole", "plain", "compressed"]),
    at=st.data(),
)
def test_anything_is_a_data_set_or_a_value_error(noise: bytes, kind: str, at: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for file in (TRAIN, TEST):
            savemat(root / file, arrays(2), do_compression=kind == "compressed")
        path = root / TEST
        data = bytearray(path.read_bytes())
        start = at.draw(st.integers(0, 300) | st.integers(0, len(data) - 1))
        data[start : start + len(noise)] = noise
        path.write_bytes(noise if kind == "whole" else data)
        message = str(path)
        try:
            load("svhn", root)
        except ValueError as error:
            message = str(error)
        assert str(path) in message
