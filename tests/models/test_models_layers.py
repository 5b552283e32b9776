"""The first layer of some networks."""

from __future__ import annotations

import math

import pytest
import torch

from controlat.models._layers import Normalize


def test_normalize() -> None:
    layer = Normalize([0.0, 0.5], [1.0, 0.25])
    x = torch.full((3, 2, 1, 1), 0.75)
    assert layer(x)[:, :, 0, 0].tolist() == [[0.75, 1.0]] * 3
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "std"}
    assert repr(layer) == "Normalize(mean=[0.0, 0.5], std=[1.0, 0.25])"
    assert Normalize([0.0, 0.5], 0.5)(x)[0, :, 0, 0].tolist() == [1.5, 0.5]
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, "std must be finite and > 0, got 0.0"),
        (0.0, [1.0, -1.0], r"std must be finite and > 0, got \[1.0, -1.0\]"),
        (0.0, math.inf, "std must be finite and > 0, got inf"),
        (math.nan, 1.0, "mean must be finite, got nan"),
        ([0.0, 0.0, 0.0], [1.0, 1.0], "one number per channel each"),
    ],
)
def test_normalize_refuses(mean: float | list[float], std: float | list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)


def test_normalize_has_a_shape_where_there_are_no_numbers() -> None:
    with torch.device("meta"):
        layer = Normalize([0.0, 0.5], 0.25)
    assert layer.mean.shape == (2, 1, 1)
    assert layer.std.is_meta
