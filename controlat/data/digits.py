"""Handwritten digits 8 x 8: the small data set that comes with the package.

The 1797 images of the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, licence CC BY 4.0), as redistributed in scikit-learn
(`sklearn.datasets.load_digits`). `digits.npz` holds them unchanged: images (1797, 8, 8) uint8 in 0..16,
labels (1797,) uint8, and `test`, the positions of the 500 test images. These were drawn once, with
class proportions kept, and are stored because a random stream may change between library versions.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch

from controlat.data._types import Dataset, Split

__all__ = ["load"]


def load(root: Path | None = None) -> Dataset:
    """The 1797 digits as 1297 training and 500 test images (1, 8, 8) of 10 classes; scale 16.

    Args:
        root: not used, the images come with the package.

    Returns:
        The data set "digits"; the two splits never change.

    Example:
        >>> load().test.y.bincount().tolist()
        [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]

    Source: Alpaydin and Kaynak, 1998 (UCI).
    """
    with (resources.files("controlat.data") / "digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images, labels, test = (torch.from_numpy(arrays[key]) for key in ("images", "labels", "test"))
    everything = Split(images.unsqueeze(1), labels.long(), scale=16.0)
    in_test = torch.zeros(len(everything), dtype=torch.bool)
    in_test[test.long()] = True
    return Dataset("digits", everything.subset(~in_test), everything.subset(in_test), num_classes=10)
