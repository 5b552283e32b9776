"""Data sets: two labelled splits, checked once when they are constructed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from controlat._util.checks import brief, instance, number
from controlat._util.transfer import free_memory, to_device

TOLERANCE = 1e-6  # for pixels outside [0, 1]
_SHARE = 0.25  # of the free memory of a GPU that the images of a split may take; there are three of them


class Samples(Protocol):
    """One labelled split, in memory (`Split`) or decoded as it is needed (an image folder)."""

    @property
    def y(self) -> Tensor:
        """Labels (N,), int64."""

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W) in [0, 1] and labels (B,) at some positions, on the device of the split."""

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`take` of every chunk of positions in turn."""

    def subset(self, index: Tensor) -> Self:
        """The split of the samples at some positions (B,), or where a mask (N,) is true."""

    def to(self, device: torch.device | str) -> Self:
        """The same split on another device."""

    def fingerprint(self) -> str:
        """A checksum of the samples, the same on every device."""


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images in memory; the pixel value in [0, 1] is x / scale.

    Args:
        x: images (N, C, H, W), uint8 or floating point, in [0, scale].
        y: labels (N,), int64, at least 0.
        scale: the stored value that means a pixel of 1 (255 for the usual uint8 images).
        device: device of the batches; that of x if left out.

    Raises:
        ValueError: a shape, dtype, device or length that does not fit, no images, a pixel that is not
            finite or outside [0, 1] by more than 1e-6, a negative label.

    Example:
        >>> split = Split(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8), torch.tensor([0, 1, 1]), 255)
        >>> x, y = split.take(torch.tensor([2]))
        >>> x.unique(), y
        (tensor([0.2000]), tensor([1]))
    """

    x: Tensor
    y: Tensor
    scale: float = 1.0
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        _check_form(self.x, self.y)
        _check_values(self.x, self.y, self.scale)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        _, channels, height, width = self.x.shape
        return channels, height, width

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images, as inputs of a model, and labels at some positions.

        Args:
            index: positions (B,), int64.

        Returns:
            Pixels (B, C, H, W) in [0, 1], float32 (float64 where x is), and labels (B,), on the
            device of the split.
        """
        index = to_device(index, self.x.device)
        dtype = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        device = self.x.device if self.device is None else self.device
        return to_device(self.x[index], device).to(dtype) / self.scale, to_device(self.y[index], device)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`take` of every chunk of positions in turn; positions go to the device in one copy."""
        indices = list(chunks)
        if not indices:
            return iter(())
        every = to_device(torch.cat(indices), self.x.device)
        return map(self.take, every.split([len(index) for index in indices]))

    def subset(self, index: Tensor) -> Split:
        """The split of the samples at some positions (B,), in that order."""
        index = index.to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, device: torch.device | str) -> Split:
        """The same split with its batches on another device.

        Its images go there, too, if they take at most a quarter of the memory that is free; otherwise every
        batch is copied there when it is needed.
        """
        if self.x.nbytes > _SHARE * free_memory(device):
            return replace(self, device=device)
        return replace(self, x=self.x.to(device), y=self.y.to(device), device=None)

    def fingerprint(self) -> str:
        """SHA-256 of shape, dtype, scale, labels and stored pixels, in order.

        Reads every byte, about a second per gigabyte; the same on every device.
        """
        digest = hashlib.sha256(repr((self.x.dtype, tuple(self.x.shape), float(self.scale))).encode())
        for part in (self.y, *self.x.split(4096)):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()


def _check_form(x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        instance(value, Tensor, name, "use torch.as_tensor")
        if value.layout != torch.strided or value.is_meta:
            got = "the device meta" if value.is_meta else f"the layout {value.layout}: use {name}.to_dense()"
            raise ValueError(f"{name} must be a dense tensor that holds numbers, got {got}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, C, H, W), none of them 0, got {tuple(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}; convert it with x.float()")
    if y.ndim != 1 or y.dtype != torch.int64:
        shape = tuple(y.shape)
        raise ValueError(f"y must be int64 of shape (N,), got {y.dtype} {shape}; convert it with y.long()")
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} images and {len(y)} labels")
    if x.device != y.device:
        raise ValueError(f"x and y must be on the same device, got {x.device} and {y.device}")


def _check_values(x: Tensor, y: Tensor, scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    low, high = (bound.item() / scale for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"x must be finite, got {(~x.isfinite()).sum()} values that are not; remove them")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        cure = "give the scale that maps it there (255 for usual uint8 images)"
        raise ValueError(
            f"x / scale must lie in [0, 1], got [{low:g}, {high:g}] with scale {scale:g}; {cure}"
        )
    if (lowest := y.min().item()) < 0:
        raise ValueError(f"labels must be >= 0, got {lowest} at position {y.argmin().item()}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of one classification problem.

    Args:
        name: the data set's name in results.
        train: the training split.
        test: the test split; its images have the shape of the training images.
        num_classes: number of classes; labels are 0 .. num_classes - 1.

    Raises:
        ValueError: a label that is too large, splits with different shapes, fewer than two classes.

    Example:
        >>> split = Split(torch.zeros(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> data = Dataset("toy", split, split, num_classes=3)
        >>> data.limited(train=3, test=None).train.y.sort().values
        tensor([0, 1, 2])
    """

    name: str
    train: Samples
    test: Samples
    num_classes: int

    def __post_init__(self) -> None:
        num_classes = number(self.num_classes, "num_classes")
        if num_classes < 2 or not num_classes.is_integer():
            raise ValueError(f"data set {self.name!r}: num_classes must be >= 2, got {self.num_classes}")
        for part, split in (("train", self.train), ("test", self.test)):
            if not hasattr(split, "stream"):
                raise TypeError(f"{part} must be samples such as a Split, got {brief(split)}")
            if (highest := split.y.max().item()) >= self.num_classes:
                where = f"label {highest} at position {split.y.argmax().item()}"
                allowed = f"labels must be 0..{self.num_classes - 1}; raise num_classes or mend the label"
                raise ValueError(f"data set {self.name!r}, {part} split: {where}, but {allowed}")
        if self.train.in_shape != self.test.in_shape:
            shapes = f"train split has images {self.train.in_shape}, test split {self.test.in_shape}"
            raise ValueError(f"data set {self.name!r}: {shapes}; they must have one shape (C, H, W)")

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self.train.in_shape

    def limited(self, train: int | None, test: int | None, seed: int = 0) -> Dataset:
        """A smaller data set: fixed random subsets that keep the class proportions.

        Args:
            train: number of training samples to keep; None keeps all.
            test: number of test samples to keep; None keeps all.
            seed: selects the subset; its samples are in the order of the data set.

        Returns:
            The data set of the subsets; each class has its proportional share, rounded up or down.

        Raises:
            ValueError: less than one sample, or more than there are.
        """
        return replace(
            self,
            train=self._part("train", self.train, train, seed),
            test=self._part("test", self.test, test, seed),
        )

    def _part(self, kind: str, split: Samples, n: int | None, seed: int) -> Samples:
        if n is None:
            return split
        if not 1 <= n <= len(split):
            where = f"data set {self.name!r}, {kind} split"
            raise ValueError(f"{where}: asked for {n} samples; give 1..{len(split)}, or None for all")
        return split.subset(stratified(split.y, n, seed))

    def hold_out(self, n: int) -> tuple[Samples, Samples]:
        """Split the training set into (train, held-out); the split is fixed.

        Args:
            n: number of samples to hold out, with the class proportions of the training set.

        Returns:
            The remaining training split and the held-out split; together they are the training set.

        Raises:
            ValueError: no sample would be held out, or none would remain.

        Example:
            >>> split = Split(torch.zeros(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
            >>> train, held = Dataset("toy", split, split, num_classes=2).hold_out(2)
            >>> train.y.bincount(), held.y.bincount()
            (tensor([2, 2]), tensor([1, 1]))
        """
        if not 1 <= n < len(self.train):
            allowed = f"give 1..{len(self.train) - 1}, so that both parts have samples"
            raise ValueError(f"data set {self.name!r}, train split: asked to hold out {n} samples; {allowed}")
        held = torch.zeros(len(self.train), dtype=torch.bool)
        held[stratified(self.train.y, n, seed=0)] = True
        return self.train.subset(~held), self.train.subset(held)


def stratified(y: Tensor, n: int, seed: int) -> Tensor:
    """Sorted positions of n random samples, with class counts by the method of largest remainders."""
    y = y.cpu()
    share = torch.bincount(y) * n
    quota, remainder = share // len(y), share % len(y)
    quota[remainder.argsort(descending=True, stable=True)[: n - int(quota.sum())]] += 1
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = [order[y[order] == label][:count] for label, count in enumerate(quota.tolist())]
    return torch.cat(chosen).sort().values
