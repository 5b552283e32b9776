"""What several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Normalise each channel: (x - mean) / std.

    Normalisation lives in the model, not in the data, so that everything outside the model is in pixel
    units: eps, the ball and the range [0, 1] keep their meaning, and an attack sees the whole function.

    Args:
        mean: one number, or one per channel, in pixel units [0, 1].
        std: likewise, > 0.

    Raises:
        ValueError: values that are not finite, std not > 0, or numbers of channels that differ.

    Example:
        >>> Normalize(0.5, 0.25)(torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)).flatten()
        tensor([0., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(
                name, torch.as_tensor(values, dtype=torch.get_default_dtype()).reshape(-1, 1, 1)
            )
        if not self.mean.isfinite().all():
            raise ValueError(f"mean must be finite, got {mean}")
        if not (self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(f"std must be finite and > 0, got {std}")
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one number per channel each, got {mean} and {std}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images of the same shape (N, C, H, W)."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The values, for `print(model)`."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def check_side(network: str, in_shape: tuple[int, int, int], least: int) -> None:
    """Refuse images whose height or width is below `least` pixels (ValueError)."""
    _, height, width = in_shape
    if min(height, width) < least:
        allowed = f"height and width must be >= {least}; choose another network, such as mlp"
        raise ValueError(f"{network} cannot take images of {height} x {width} pixels: {allowed}")
