"""Augmentation on the device, seeded, and invertible sample by sample: random crops of a padded image, flips.

A store of perturbations has padded images, "frames" (N, C, H + 2 pad, W + 2 pad). `Placement.apply` cuts a
window out of each, `Placement.invert` writes a window back to its position (ATTA: Zheng et al., 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from controlat._util.checks import number
from controlat._util.registry import meant
from controlat._util.texts import only, split
from controlat._util.transfer import to_device

__all__ = ["Augment", "Placement", "parse_augment"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The augmentation that was drawn for one batch.

    Args:
        top: (N,) first row of each window in its padded frame, 0 .. 2 pad.
        left: (N,) first column.
        flip: (N,) bool, whether the window is mirrored left to right.
        pad: width of the frame's border.
        fill: pixel value of the border.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    pad: int
    fill: float = 0.0

    def __getitem__(self, rows: slice) -> Placement:
        """The placement of some of the images."""
        return replace(self, top=self.top[rows], left=self.left[rows], flip=self.flip[rows])

    def to(self, device: torch.device | str) -> Placement:
        """The same placement on another device."""
        top, left, flip = (to_device(v, device) for v in (self.top, self.left, self.flip))
        return replace(self, top=top, left=left, flip=flip)

    def frame(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) with the border around them."""
        return F.pad(x, [self.pad] * 4, value=self.fill) if self.pad else x

    def apply(self, frame: Tensor) -> Tensor:
        """The windows (N, C, H, W) of padded frames."""
        return frame[self._index(frame)]

    def invert(self, x: Tensor, frame: Tensor) -> Tensor:
        """The frames with windows x (N, C, H, W) written to the positions from which `apply` takes them.

        >>> placement = Augment(pad=2, flip=True).draw(3, torch.Generator().manual_seed(0))
        >>> frame = torch.rand(3, 1, 12, 12)
        >>> torch.equal(placement.invert(placement.apply(frame), frame), frame)
        True
        """
        result = frame.clone()
        result[self._index(frame)] = x
        return result

    def __call__(self, x: Tensor) -> Tensor:
        """Augmented images: the windows of the padded x."""
        return self.apply(self.frame(x))

    def _index(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index of every pixel of the windows: sample, channel, row, column."""
        n, channels, height, width = frame.shape
        device = frame.device
        here = self.to(device)
        rows = torch.arange(height - 2 * self.pad, device=device)
        columns = torch.arange(width - 2 * self.pad, device=device)
        mirrored = torch.where(here.flip[:, None], columns.flip(0), columns)
        return (
            torch.arange(n, device=device).view(n, 1, 1, 1),
            torch.arange(channels, device=device).view(1, channels, 1, 1),
            (here.top[:, None] + rows).view(n, 1, -1, 1),
            (here.left[:, None] + mirrored).view(n, 1, 1, -1),
        )


@dataclass(frozen=True)
class Augment:
    """Random crops of the image padded by `pad` pixels, and flips of half of the images.

    Args:
        pad: width of the border; 0 for no crop.
        flip: mirror each image with probability 1/2.
        fill: pixel value of the border in [0, 1] (0, or the grey 0.5 of ATTA's store).

    Raises:
        ValueError: a number is out of range.

    >>> Augment(pad=4).draw(2, torch.Generator().manual_seed(0))(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    pad: int = 0
    flip: bool = False
    fill: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.pad <= 1024 or self.pad != int(self.pad):
            raise ValueError(f"augmentation: pad must be a whole number in 0..1024, got {self.pad}")
        if not (math.isfinite(self.fill) and 0 <= self.fill <= 1):
            raise ValueError(f"augmentation: fill must be a pixel value in [0, 1], got {self.fill}")

    def centre(self, n: int) -> Placement:
        """The placement of n images that are not moved, in frames of this width."""
        middle = torch.full((n,), int(self.pad))
        return Placement(
            top=middle,
            left=middle,
            flip=torch.zeros(n, dtype=torch.bool),
            pad=int(self.pad),
            fill=self.fill,
        )

    def draw(self, n: int, generator: torch.Generator) -> Placement:
        """A placement for n images, from a CPU generator: the same on every device."""
        top, left = torch.randint(2 * self.pad + 1, (2, n), generator=generator)
        coin = torch.rand(n, generator=generator) < 0.5
        return Placement(top=top, left=left, flip=coin & self.flip, pad=int(self.pad), fill=self.fill)


def parse_augment(text: str) -> Augment | None:
    """Read ``none``, ``flip``, ``crop:pad=4``, ``crop-flip:pad=4`` or ``crop-flip:pad=4,fill=0.5``.

    Raises:
        ValueError: it is none of these.

    >>> parse_augment("crop-flip:pad=4")
    Augment(pad=4, flip=True, fill=0.0)
    """
    family, parameters = split(text)
    if family in ("none", "flip"):
        only(parameters, (), (), f"augmentation {family}")
        return Augment(flip=True) if family == "flip" else None
    if family not in ("crop", "crop-flip"):
        near = meant(family, ("none", "flip", "crop", "crop-flip"))
        raise ValueError(
            f"unknown augmentation {text!r}; {near}write none, flip, crop:pad=4 or crop-flip:pad=4"
        )
    only(parameters, ("pad",), ("fill",), f"augmentation {family}")
    pad = number(parameters["pad"], "pad")
    if pad != int(pad):
        raise ValueError(f"augmentation {family}: pad must be a whole number, got {pad:g}")
    return Augment(int(pad), family == "crop-flip", number(parameters.get("fill", 0.0), "fill"))
