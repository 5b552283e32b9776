"""The digits that come with the package never change."""

from __future__ import annotations

import hashlib

import torch

from controlat.data import load


def test_counts_and_sums() -> None:
    data = load("digits")
    assert (len(data.train), len(data.test), data.in_shape, data.num_classes) == (1297, 500, (1, 8, 8), 10)
    assert data.train.scale == data.test.scale == 16
    both = torch.cat([data.train.y, data.test.y]).bincount()
    assert both.tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]  # as scikit-learn describes them
    assert data.test.y.bincount().tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert data.train.x.sum() + data.test.x.sum() == 561718
    assert data.train.x.max() == data.test.x.max() == 16


def test_bytes_are_fixed() -> None:
    data = load("digits")
    parts = (data.train.x, data.train.y, data.test.x, data.test.y)
    digest = hashlib.sha256(b"".join(part.to(torch.uint8).numpy().tobytes() for part in parts))
    assert digest.hexdigest() == "858908fd2f3fd1fea37a5fc67c860daeae0c81eb8dfe8da9de0cf2a7af693682"


def test_first_image() -> None:
    rows = load("digits").train.x[0, 0].tolist()
    assert rows[0] == [0, 0, 5, 13, 9, 1, 0, 0]  # the first digit of the file, a 0
    assert load("digits").train.y[0] == 0
