"""Pictures of every kind become what they should, the middle is cut out, one set becomes two splits."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from controlat.data._images import Shape, halves


def pixels(seed: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(256, size=(4, 4, channels), dtype=np.uint8)


def write(path: Path, image: NDArray[Any] | Image.Image, **options: Any) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------ kinds of pictures


def single(path: Path, channels: int = 3) -> Tensor:
    """One picture as uint8 (C, H, W)."""
    with Image.open(path) as picture:
        found = Shape(channels)(picture)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    return found


# orientation -> what a viewer does with the stored pixels (EXIF 2.32, tag 274), rows and columns first
UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])  # that store every pixel as it is
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_as_their_orientation_says(tmp_path: Path, ending: str, orientation: int) -> None:
    stored, exif = pixels(3)[:3], Image.Exif()
    exif[274] = orientation
    lossless = {"lossless": True, "exact": True} if ending == "webp" else {}
    path = write(tmp_path / f"x.{ending}", stored, exif=exif, **lossless)
    upright = torch.from_numpy(UPRIGHT[orientation](stored).copy()).permute(2, 0, 1)
    assert same(single(path), upright)
    with Image.open(path) as picture:
        assert same(Shape(3)(picture.convert("RGB")), upright)  # as torchvision hands pictures over


@pytest.mark.parametrize("ending", ["png", "webp"])
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0garbage", b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 274, 3, 1, 9, 0)]
)
def test_an_orientation_that_is_none_leaves_a_picture_as_it_is(
    tmp_path: Path, ending: str, exif: bytes
) -> None:
    path = write(tmp_path / f"x.{ending}", pixels(3), exif=exif, lossless=True)
    assert same(single(path), torch.from_numpy(pixels(3)).permute(2, 0, 1))


def test_pictures_too_large_to_decode_are_refused_before_that(tmp_path: Path) -> None:
    side = 9460  # 89.49 million pixels; Pillow refuses from twice that on, and warns from 89.48 million on
    write(tmp_path / "x.png", Image.new("1", (side, side)))
    with warnings.catch_warnings(action="ignore"), Image.open(tmp_path / "x.png") as picture:
        with pytest.raises(ValueError, match="9460 x 9460 pixels, more than the 89,478,485 that are decoded"):
            Shape(3)(picture)
        assert picture._im is None  # nothing was decoded
    with pytest.raises(ValueError, match="6400000 x 64 pixels once its shorter side has 64, more than"):
        Shape(3, 64)(Image.new("L", (100_000, 1)))


RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(2, 8)


def test_grey(tmp_path: Path) -> None:
    path = write(tmp_path / "x.png", RAMP)
    expected = torch.from_numpy(RAMP)
    assert same(single(path, 1), expected[None])
    assert same(single(path, 3), expected.expand(3, 2, 8))


def test_colour_to_grey(tmp_path: Path) -> None:
    rgb = pixels(0)
    found = single(write(tmp_path / "x.png", rgb), 1)
    luma = torch.from_numpy(rgb).double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert found.shape == (1, 4, 4)
    assert (found[0] - luma).abs().max() < 0.51 + 1e-3


def test_black_and_white(tmp_path: Path) -> None:
    path = write(tmp_path / "x.png", np.array([[True, False]]))
    assert single(path)[:, 0].tolist() == [[255, 0]] * 3


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, ending: str) -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"x.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 6 1 65535\n" + deep.astype(">u2").tobytes())
    else:
        write(path, deep)
    assert single(path, 1)[0].tolist() == [[0, 0, 1, 1, 128, 255]]
    assert single(path, 3)[2].tolist() == [[0, 0, 1, 1, 128, 255]]


def test_palette(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([1, 0])
    assert single(write(tmp_path / "x.png", picture))[:, 0].tolist() == [[40, 10], [50, 20], [60, 30]]
    assert single(write(tmp_path / "x.gif", picture))[:, 0].tolist() == [[40, 10], [50, 20], [60, 30]]


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_palette_with_transparency(tmp_path: Path, transparency: object) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([1, 0])
    path = write(tmp_path / "x.png", picture, transparency=transparency)
    assert single(path)[:, 0].tolist() == [[40, 10], [50, 20], [60, 30]]
    assert single(path, 1).tolist() == [[[48, 18]]]


@pytest.mark.parametrize(("mode", "clear"), [("L", 3), ("RGB", (7, 8, 9)), ("1", 0), ("I;16", 256)])
def test_a_transparent_colour_is_a_colour(tmp_path: Path, mode: str, clear: object) -> None:
    picture = Image.new("L", (2, 2), 200).convert(mode) if mode != "I;16" else Image.new(mode, (2, 2), 51400)
    expected = 255 if mode == "1" else 200
    path = write(tmp_path / "x.png", picture, transparency=clear)
    assert single(path).unique().tolist() == [expected]
    assert single(path, 1).unique().tolist() == [expected]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = pixels(1, channels=4)
    assert same(single(write(tmp_path / "x.png", rgba)), torch.from_numpy(rgba[..., :3].copy()).movedim(2, 0))
    two = pixels(2, channels=2)
    path = write(tmp_path / "y.png", Image.merge("LA", [Image.fromarray(two[..., i]) for i in range(2)]))
    assert same(single(path, 1), torch.from_numpy(two[..., 0].copy())[None])


def test_cmyk(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # all cyan, no black
    found = single(write(tmp_path / "x.tif", picture))
    assert found[:, 0, 0].tolist() == [0, 255, 255]
    assert (found == found[:, :1, :1]).all()
    near = single(write(tmp_path / "x.jpg", picture)).int()
    assert (near - torch.tensor([0, 255, 255])[:, None, None]).abs().max() <= 3


# ------------------------------------------------------------------------------------------- size and cutting


def stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Red counts rows, green counts columns."""
    row, column = np.mgrid[:height, :width]
    return np.stack([10 * row, 10 * column, 0 * row], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size", "resize", "top", "left"),
    [
        (4, 4, 4, None, 0, 0),
        (4, 10, 4, None, 0, 3),
        (4, 9, 4, None, 0, 2),
        (11, 4, 4, None, 3, 0),
        (6, 6, 2, 6, 2, 2),
        (6, 9, 3, 6, 1, 3),
        (9, 7, 6, 7, 1, 0),
    ],
)
def test_the_middle_is_cut_out(
    height: int, width: int, size: int, resize: int | None, top: int, left: int
) -> None:
    whole = stripes(height, width)
    found = Shape(3, size, resize)(Image.fromarray(whole))
    assert same(
        found, torch.from_numpy(whole[top : top + size, left : left + size].copy()).movedim(2, 0).contiguous()
    )


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 12),
    more=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_picture_gets_the_shape(height: int, width: int, size: int, more: int, channels: int) -> None:
    found = Shape(channels, size, size + more)(Image.new("RGB", (width, height), (77, 77, 77)))
    assert found.shape == (channels, size, size)
    assert found.unique().tolist() == [77]


def test_smaller_and_larger_pictures_keep_their_look() -> None:
    half = np.zeros((40, 80, 3), dtype=np.uint8)
    half[:, 40:] = 200  # the right half is bright
    for side in (10, 60):
        found = Shape(3, side)(Image.fromarray(half)).float()
        assert found.shape == (3, side, side)
        assert found[:, :, : side // 3].max() == 0
        assert found[:, :, -side // 3 :].min() == 200
        assert abs(found.mean().item() - 100) < 1
    fine = np.zeros((40, 40), dtype=np.uint8)
    fine[:, ::2] = 200  # without antialiasing this would be all dark or all bright
    assert (Shape(1, 10)(Image.fromarray(fine)).float() - 100).abs().max() < 15


def test_a_ramp_is_resized_as_by_averaging() -> None:
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, axis=0)
    found = Shape(1, 16)(Image.fromarray(ramp))[0].float()
    means = torch.from_numpy(ramp).float().view(16, 4, 16, 4).mean((1, 3))
    assert (found - means)[:, 1:-1].abs().max() <= 1


# ---------------------------------------------------------------------------------------------------- one set


@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=40), share=st.floats(0.01, 0.99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_halves_are_a_partition_in_proportion(labels: list[int], share: float) -> None:
    y = torch.tensor(labels)
    n = round(share * len(y))
    if not 1 <= n < len(y):
        with pytest.raises(ValueError, match="leave both parts samples"):
            halves(y, share)
        return
    train, test = halves(y, share)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(y)))
    assert len(test) == n
    assert (train.diff() > 0).all()
    assert (test.diff() > 0).all()
    assert ((y[test].bincount(minlength=4) - y.bincount(minlength=4) * n / len(y)).abs() < 1).all()
