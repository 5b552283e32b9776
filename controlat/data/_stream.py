"""Labelled images that threads decode when they are needed, some batches ahead of training."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from controlat._util.cores import available_cores
from controlat._util.transfer import to_device
from controlat.data._types import Split

__all__ = ["Streamed", "default_workers"]

_AHEAD = 2  # batches that are decoded while one is trained on
_FINGERPRINTED = 64  # number of images that a fingerprint without stamps decodes


def default_workers() -> int:
    """Default number of decoding threads: the cores that this process may use, 16 at most."""
    return min(16, available_cores())


@dataclass(frozen=True, eq=False)
class Streamed:
    """Labelled images that a function reads one by one, with at most a few batches in memory.

    Pillow releases the interpreter's lock while it decodes and resizes, so that threads run in parallel. The
    result does not depend on their number.

    Args:
        read: position in the source -> image (C, H, W), uint8; raises ValueError naming the file.
        y: labels (N,), int64.
        in_shape: (C, H, W), the shape of every image.
        positions: (N,) positions in the source.
        workers: decoding threads.
        device: device of the batches.
        stamp: position in the source -> text that changes with the image, such as the name, size and time of
            change of its file; for `fingerprint`.

    Raises:
        ValueError: no images, a negative label, or fewer than one worker.
    """

    read: Callable[[int], Tensor]
    y: Tensor
    in_shape: tuple[int, int, int]
    positions: Tensor
    workers: int = 1
    device: torch.device | str = "cpu"
    stamp: Callable[[int], str] | None = None

    def __post_init__(self) -> None:
        if len(self.y) == 0:
            raise ValueError("a split has no images")
        if (lowest := int(self.y.min())) < 0:
            raise ValueError(f"labels must be >= 0, got {lowest} at position {int(self.y.argmin())}")
        if self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `Split.take`: pixels (B, C, H, W) in [0, 1], float32, and labels (B,), on the device."""
        (batch,) = self.stream([index])
        return batch

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`take` of every chunk of positions in turn, decoded some chunks ahead."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        pending: collections.deque[tuple[Tensor, list[Future[Tensor]]]] = collections.deque()
        try:
            for chunk in chunks:
                index = chunk.cpu()
                pending.append((index, [pool.submit(self.read, i) for i in self.positions[index].tolist()]))
                if len(pending) > _AHEAD:
                    yield self._batch(*pending.popleft())
            while pending:
                yield self._batch(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, index: Tensor, images: list[Future[Tensor]]) -> tuple[Tensor, Tensor]:
        decoded = [image.result() for image in images]
        pixels = torch.stack(decoded) if decoded else torch.empty(0, *self.in_shape, dtype=torch.uint8)
        return to_device(pixels, self.device).float() / 255, to_device(self.y[index], self.device)

    def subset(self, index: Tensor) -> Streamed:
        """The split of the samples at some positions (B,), or where a mask (N,) is true."""
        index = index.cpu()
        return replace(self, y=self.y[index], positions=self.positions[index])

    def to(self, device: torch.device | str) -> Streamed:
        """The same split, with its batches on another device."""
        return replace(self, device=device)

    def fingerprint(self) -> str:
        """SHA-256 of the shape, and of labels and stamps of all images in order; pixels are not decoded.

        Without `stamp`, it covers the pixels of 64 evenly spaced images in place of the stamps.
        """
        digest = hashlib.sha256(repr((self.in_shape, self.y.tolist())).encode())
        if self.stamp is not None:
            for position in self.positions.tolist():
                digest.update(f"{self.stamp(position)}\n".encode(errors="surrogateescape"))
        else:
            n = min(_FINGERPRINTED, len(self))
            for position in self.positions[torch.arange(n) * len(self) // n].tolist():
                digest.update(self.read(position).numpy().tobytes())
        return digest.hexdigest()

    def in_memory(self) -> Split:
        """All images, decoded once."""
        chunks = torch.arange(len(self)).split(256)
        images = [(x * 255).round().to(torch.uint8) for x, _ in self.to("cpu").stream(chunks)]
        return Split(torch.cat(images), self.y, scale=255.0).to(self.device)
