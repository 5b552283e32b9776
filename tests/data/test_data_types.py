"""Splits and data sets: what they hand out, what they refuse, how they are cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from controlat.data import Dataset, Split, _types, load


def images(n: int, dtype: torch.dtype = torch.uint8, shape: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """n images that all differ: the first pixel counts them."""
    x = torch.zeros(n, *shape, dtype=dtype)
    x[:, 0, 0, 0] = torch.arange(n).to(dtype)
    return x


def toy(labels: list[int], num_classes: int = 5, name: str = "toy") -> Dataset:
    y = torch.tensor(labels)
    split = Split(images(len(y)), y, scale=255)
    return Dataset(name, split, split, num_classes)


@pytest.mark.parametrize(
    ("stored", "handed_out"),
    [
        (torch.uint8, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_take_gives_pixels(stored: torch.dtype, handed_out: torch.dtype) -> None:
    split = Split(images(5, stored), torch.arange(5), scale=4)
    x, y = split.take(torch.tensor([4, 1, 1]))
    assert x.dtype == handed_out
    assert x[:, 0, 0, 0].tolist() == [1.0, 0.25, 0.25]
    assert y.tolist() == [4, 1, 1]


def test_take_divides_as_torchvision_does() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    x, _ = Split(grey, torch.zeros(256, dtype=torch.int64), scale=255).take(torch.arange(256))
    assert torch.equal(x, grey.float().div(255))


def test_take_is_a_copy() -> None:
    split = Split(images(1, torch.float32), torch.zeros(1, dtype=torch.int64))
    split.take(torch.tensor([0]))[0].fill_(9)
    assert split.x.max() == 0


def test_subset_to_and_shape() -> None:
    split = Split(images(4, shape=(3, 2, 5)), torch.arange(4), scale=255)
    part = split.subset(torch.tensor([3, 0])).to("cpu")
    assert (part.x.dtype, part.scale, len(part), part.in_shape) == (torch.uint8, 255, 2, (3, 2, 5))
    assert part.y.tolist() == part.x[:, 0, 0, 0].tolist() == [3, 0]
    assert toy([0, 1]).in_shape == (1, 2, 2)


LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(torch.zeros(3, 2, 2), LABELS), r"shape \(N, C, H, W\).*got \(3, 2, 2\)"),
        (lambda: Split(torch.zeros(0, 1, 2, 2), LABELS[:0]), r"none of them 0, got \(0, 1, 2, 2\)"),
        (lambda: Split(torch.zeros(3, 1, 0, 2), LABELS), r"none of them 0, got \(3, 1, 0, 2\)"),
        (lambda: Split(images(3, torch.int64), LABELS), "uint8 or floating point, got torch.int64"),
        (lambda: Split(images(3), LABELS.int(), 255), r"int64 of shape \(N,\), got torch.int32 \(3,\)"),
        (lambda: Split(images(3), LABELS[None], 255), r"got torch.int64 \(1, 3\)"),
        (lambda: Split(images(3), LABELS[:2], 255), "got 3 images and 2 labels"),
        (
            lambda: Split(images(3), LABELS.to("meta"), 255),
            "y must be a dense .* got the device meta",
        ),
        (lambda: Split(images(3), LABELS, 0), "scale must be finite and > 0, got 0"),
        (lambda: Split(images(3), LABELS, math.nan), "scale must be finite and > 0, got nan"),
        (lambda: Split(images(3), LABELS), r"lie in \[0, 1\], got \[0, 2\] with scale 1; give the scale"),
        (lambda: Split(torch.full((3, 1, 1, 1), -0.1), LABELS), r"got \[-0.1, -0.1\]"),
        (lambda: Split(torch.full((3, 1, 1, 1), math.nan), LABELS), "finite, got 3 values that are not"),
        (lambda: Split(torch.full((3, 1, 1, 1), math.inf), LABELS), "finite, got 3 values that are not"),
        (
            lambda: Split(images(3), torch.tensor([0, 1, -2]), 255),
            "labels must be >= 0, got -2 at position 2",
        ),
    ],
)
def test_split_refuses(make: Callable[[], Split], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_split_tolerates_rounding_only() -> None:
    Split(torch.full((3, 1, 1, 1), 1 + 5e-7), LABELS)
    with pytest.raises(ValueError, match="must lie in"):
        Split(torch.full((3, 1, 1, 1), 1 + 5e-6), LABELS)


def test_dataset_refuses() -> None:
    split = Split(images(3), torch.tensor([0, 4, 1]), 255)
    other = Split(images(3, shape=(1, 3, 2)), LABELS, 255)
    fine = Split(images(3), LABELS, 255)
    with pytest.raises(
        ValueError, match=r"'toy', test split: label 4 at position 1, but labels must be 0\.\.3"
    ):
        Dataset("toy", fine, split, num_classes=4)
    with pytest.raises(ValueError, match="'toy', train split: label 4"):
        Dataset("toy", split, fine, num_classes=4)
    with pytest.raises(
        ValueError, match=r"'toy': train split has images \(1, 2, 2\), test split \(1, 3, 2\)"
    ):
        Dataset("toy", fine, other, num_classes=4)
    with pytest.raises(ValueError, match="'toy': num_classes must be >= 2, got 1"):
        Dataset("toy", fine, fine, num_classes=1)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), data=st.data(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_limited_is_a_stratified_subset(labels: list[int], data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, len(labels)))
    whole = toy(labels)
    small = whole.limited(train=n, test=None, seed=seed)
    assert small.test is whole.test
    assert len(small.train) == n
    index = small.train.x[:, 0, 0, 0].long()
    assert (index.diff() > 0).all()  # no sample twice, in the order of the data set
    assert torch.equal(small.train.y, whole.train.y[index])
    share = whole.train.y.bincount(minlength=5).double() * n / len(labels)
    assert ((small.train.y.bincount(minlength=5) - share).abs() < 1).all()
    again = whole.limited(train=n, test=None, seed=seed)
    assert torch.equal(again.train.x, small.train.x)


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), data=st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_hold_out_is_a_partition(labels: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(labels) - 1))
    train, held = toy(labels).hold_out(n)
    assert (len(train), len(held)) == (len(labels) - n, n)
    assert sorted(torch.cat([train.x, held.x])[:, 0, 0, 0].tolist()) == list(range(len(labels)))
    assert torch.equal(toy(labels).hold_out(n)[1].x, held.x)


def test_subsets_leave_the_global_generator_alone_and_ignore_it() -> None:
    data = toy([0, 1, 2] * 20)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = data.limited(10, 10).train.x
    data.hold_out(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(data.limited(10, 10).train.x, first)
    assert not torch.equal(data.limited(10, 10, seed=1).train.x, first)


@pytest.mark.parametrize(("train", "test", "kind"), [(7, None, "train"), (None, 7, "test"), (0, 1, "train")])
def test_limited_refuses(train: int | None, test: int | None, kind: str) -> None:
    message = rf"'toy', {kind} split: asked for [07] samples; give 1\.\.6, or None for all"
    with pytest.raises(ValueError, match=message):
        toy([0, 1] * 3).limited(train, test)


@pytest.mark.parametrize("n", [-1, 0, 6, 7])
def test_hold_out_refuses(n: int) -> None:
    with pytest.raises(ValueError, match=rf"'toy', train split: asked to hold out {n} samples; give 1\.\.5"):
        toy([0, 1] * 3).hold_out(n)


def test_load_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"has no 'digit'; did you mean 'digits'\? choose from: .*mnist"):
        load("digit")


def test_load_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import torch
from controlat.data import Dataset, Split
def plain():
    split = Split(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    return Dataset("plain", split, split, 2)
def rooted(root):
    split = Split(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    return Dataset(f"in {root}", split, split, 2)
def wrong(): return [1]
"""
    (tmp_path / "own_data_factories.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load("own_data_factories:plain").name == "plain"
    assert load("own_data_factories:rooted", "a/b").name == f"in {Path('a/b')}"
    assert load("own_data_factories:rooted").name == "in None"
    with pytest.raises(ValueError, match=r"wrong' gave a list; it must be a controlat\.data\.Dataset"):
        load("own_data_factories:wrong")
    with pytest.raises(ValueError, match="plain' accepts no keyword 'root'"):
        load("own_data_factories:plain", "a/b")


# ----------------------------------------------------------------------------------------------------- device


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_images_that_do_not_fit_stay_on_the_host_and_batches_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x = torch.randint(200, (9, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    split = Split(x, torch.arange(9) % 5, 255)
    monkeypatch.setattr(_types, "free_memory", lambda device: 4 * x.nbytes)
    fits = split.to("cpu")
    monkeypatch.setattr(_types, "free_memory", lambda device: 4 * x.nbytes - 1)
    large = split.to("cpu")
    assert (fits.device, large.device) == (None, "cpu")
    assert large.x is split.x
    index = torch.tensor([1, 5, 7, 2])
    part = large.subset(index)
    assert part.device == "cpu", "it stays so"
    pairs = zip(part.stream(torch.arange(4).split(3)), fits.stream(index.split(3)), strict=True)
    for (x_host, y_host), (x_there, y_there) in pairs:
        assert torch.equal(x_host, x_there)
        assert x_host.dtype == x_there.dtype
        assert torch.equal(y_host, y_there)
    assert large.fingerprint() == split.fingerprint()
    assert list(split.stream([])) == []


def test_batches_go_to_the_device_of_the_split_and_images_do_not() -> None:
    split = Split(torch.ones(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 1, "meta")
    for x, y in split.stream(torch.arange(4).split(2)):
        assert (x.device.type, x.dtype, y.device.type) == ("meta", torch.float32, "meta")
    assert split.x.device.type == "cpu"


# ------------------------------------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
def test_a_fingerprint_tells_every_change_and_nothing_else(dtype: torch.dtype) -> None:
    x = torch.randint(200, (5000, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(5000) % 5
    split = Split(x, y, 255)
    known = split.fingerprint()
    nhwc = x.to(memory_format=torch.channels_last)
    for same in (Split(x.clone(), y.clone(), 255), Split(nhwc, y, 255.0), split.subset(torch.arange(5000))):
        assert same.fingerprint() == known
    pixel, label = x.clone(), y.clone()
    pixel[4999, 2, 1, 1] += 2  # the last of all
    label[0] += 1
    swapped = torch.cat([torch.tensor([1, 0]), torch.arange(2, 5000)])
    other = [
        Split(pixel, y, 255),
        Split(x, label, 255),
        Split(x, y, 256),
        Split(x.float(), y, 255),
        Split(x.transpose(2, 3), y, 255),
        Split(x.reshape(5000, 3, 1, 4), y, 255),  # the same bytes in another shape
        split.subset(swapped),
        split.subset(torch.arange(4999)),
    ]
    assert len({known, *(s.fingerprint() for s in other)}) == 1 + len(other)
