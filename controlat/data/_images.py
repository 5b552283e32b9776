"""Conversion of pictures to images (C, H, W) of one shape, and division of samples into two splits."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from controlat.data._types import stratified

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Shape", "boolean", "halves", "whole"]

# Limit for one picture, 256 MiB in colour: where Pillow begins to warn of decompression bombs.
PIXELS = (1 << 28) // 3


def whole(value: object, name: str) -> int:
    """A whole number >= 1, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def boolean(value: object, name: str) -> bool:
    """True or false, or a ValueError that names it; a text such as "false" is an error."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


@dataclass(frozen=True)
class Shape:
    """The form that all pictures are converted to.

    Args:
        channels: 3 (RGB) or 1 (grey).
        size: side of the square that is cropped from the centre; None for no cropping.
        resize: length of the shorter side before cropping; `size` by default.

    Raises:
        ValueError: a number that is not allowed, resize without size or below it.
    """

    channels: int = 3
    size: int | None = None
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {self.channels!r}")
        if self.size is not None:
            whole(self.size, "size")
        if self.resize is not None and (self.size is None or whole(self.resize, "resize") < self.size):
            raise ValueError(f"resize must be at least size, got resize {self.resize}, size {self.size}")

    def __call__(self, picture: Image.Image) -> Tensor:
        """The image (C, H, W), uint8, rotated and mirrored according to the EXIF orientation of the picture.

        Raises:
            ValueError: more than 89 million pixels, or a grey picture of 32 bits, whose range is not known.
        """
        from PIL import ImageOps

        _check_pixels(*picture.size, "")
        picture.load()  # for TIFF this applies the orientation
        with contextlib.suppress(SyntaxError):  # malformed EXIF data is ignored, as image viewers do
            ImageOps.exif_transpose(picture, in_place=True)
        picture = _eight_bits(picture)
        if "transparency" in picture.info:  # Pillow warns if it is converted to RGB directly
            picture = picture.convert("RGBA")
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        if self.size is not None:
            picture = self._crop(picture, self.size)
        pixels = torch.from_numpy(np.array(picture))
        return pixels.permute(2, 0, 1).contiguous() if self.channels == 3 else pixels.unsqueeze(0)

    def _crop(self, picture: Image.Image, size: int) -> Image.Image:
        """Resize the shorter side to `resize` (bilinear, with antialiasing), then crop the central square."""
        from PIL import Image

        width, height = picture.size
        factor = (self.resize or size) / min(width, height)
        if factor != 1:
            sides = max(round(width * factor), size), max(round(height * factor), size)
            _check_pixels(*sides, f" once its shorter side has {self.resize or size}")
            picture = picture.resize(sides, Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in picture.size)
        return picture.crop((left, top, left + size, top + size))

    def check(self, image: Tensor, expected: tuple[int, int, int], name: str) -> Tensor:
        """The image, if its shape is the expected one.

        Raises:
            ValueError: it has another shape; names the picture.
        """
        if tuple(image.shape) == expected:
            return image
        sizes = [f"{shape[2]} x {shape[1]} (width x height)" for shape in (image.shape, expected)]
        cure = "give a size to resize and crop all of them, such as --data-options.size 64"
        raise ValueError(f"{name} has {sizes[0]}, the first picture {sizes[1]}; {cure}")


def _check_pixels(width: int, height: int, when: str) -> None:
    if width * height > PIXELS:
        raise ValueError(f"{width} x {height} pixels{when}, more than the {PIXELS:,} that are decoded here")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits scaled to 8; Pillow would clip values above 255 instead of scaling."""
    from PIL import Image

    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    grey = np.asarray(picture)
    if picture.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("grey values of 32 bits, which pixel is white is not known; save it with 8 or 16")
    return Image.fromarray(np.rint(grey / 257).astype(np.uint8))


def halves(y: Tensor, test_share: float) -> tuple[Tensor, Tensor]:
    """Positions of training and test samples for data without a split; fixed, with the class proportions.

    Raises:
        ValueError: the share is not in (0, 1) or leaves a part empty.
    """
    share: Any = test_share
    n = round(share * len(y)) if isinstance(share, (int, float)) and 0 < share < 1 else 0
    if not 1 <= n < len(y):
        raise ValueError(f"test_share must be in (0, 1) and leave both parts samples, got {test_share!r}")
    test = torch.zeros(len(y), dtype=torch.bool)
    test[stratified(y, n, seed=0)] = True
    return (~test).nonzero().squeeze(1), test.nonzero().squeeze(1)
