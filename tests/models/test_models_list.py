"""The list of networks and their exact sizes, each by a formula written down independently."""

from __future__ import annotations

import sys

import pytest
import torch

from controlat.models import describe, names, wideresnet


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def conv(k: int, inputs: int, outputs: int) -> int:
    return dense(k * k * inputs, outputs)


def preact18(final: int) -> int:
    """Pairs of blocks a -> b -> b: three 3 x 3 convolutions b -> b, one a -> b, a 1 x 1 for the shortcut."""
    total = 9 * 3 * 64 + dense(512, 10) + 2 * final
    for a, b in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += 9 * a * b + 3 * 9 * b * b + (a * b if a != b else 0) + 2 * (a + 3 * b)
    return total


def wide(depth: int, w: int) -> int:
    """Sum of 27 * 16, of the stages (16, 16w), (16w, 32w), (32w, 64w), 2 * 64w and 640w + 10, for w > 1.

    A stage (a, b) has 9ab + 9bb + ab + 2a + 2b in its first block, 18bb + 4b in each of n - 1 others.
    """
    n = (depth - 4) // 6
    return (96768 * n - 22784) * w**2 + (448 * n + 3200) * w + 474


SIZES = {
    "cnn_bn": 288 + 64 + 18432 + 128 + 36864 + 128 + 256 * 128 + 128 + 1290,
    "fosc-4": conv(3, 1, 32) + 64 + conv(3, 32, 64) + 128 + dense(49 * 64, 128) + dense(128, 10),
    "fosc-8": sum(
        conv(3, a, b) + 2 * b for a, b in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 196), (196, 196))
    )
    + dense(16 * 196, 256)
    + 2 * 256
    + dense(256, 10),
    "lenet": conv(5, 1, 20) + conv(5, 20, 50) + dense(800, 500) + dense(500, 10),
    "lenet-32-64": conv(3, 1, 32) + conv(3, 32, 64) + dense(9216, 128) + dense(128, 10),
    "madry_mnist": conv(5, 1, 32) + conv(5, 32, 64) + dense(49 * 64, 1024) + dense(1024, 10),
    "mlp": dense(64, 64) + dense(64, 64) + dense(64, 10),
    "preactresnet-18": preact18(final=512),
    "preactresnet-18-locuslab": preact18(final=512),
    "preactresnet-18-yopo": preact18(final=0),
    "small_cnn": conv(3, 1, 32)
    + conv(3, 32, 32)
    + conv(3, 32, 64)
    + conv(3, 64, 64)
    + dense(1024, 200)
    + dense(200, 200)
    + dense(200, 10),
    "torchvision-NAME": None,
    "wideresnet-28-10": wide(28, 10),
    "wideresnet-34-10": wide(34, 10),
}


def test_the_formulas_give_the_published_sizes() -> None:
    published = {
        "fosc-4": 421_834,
        "fosc-8": 1_639_794,
        "lenet": 431_080,
        "lenet-32-64": 1_199_882,
        "madry_mnist": 3_274_634,
        "preactresnet-18": 11_172_170,
        "preactresnet-18-yopo": 11_171_146,
        "small_cnn": 312_202,
        "wideresnet-28-10": 36_479_194,
        "wideresnet-34-10": 46_160_474,
    }
    assert published.items() <= SIZES.items()


def test_every_listed_network_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    before = torch.get_rng_state()
    table = describe()
    assert torch.equal(torch.get_rng_state(), before)
    assert {row["name"]: row["parameters"] for row in table} == SIZES
    assert tuple(row["name"] for row in table) == names() == tuple(SIZES)


def test_the_usual_images() -> None:
    usual = {row["name"]: row["input"] for row in describe()}
    assert usual["fosc-4"] == usual["lenet-32-64"] == (1, 28, 28)
    assert usual["fosc-8"] == usual["wideresnet-34-10"] == (3, 32, 32)
    assert all(row["what"] and "\n" not in row["what"] and len(row["what"]) < 100 for row in describe())


def test_another_number_of_classes() -> None:
    sizes = {row["name"]: row["parameters"] for row in describe(num_classes=257)}
    assert sizes["preactresnet-18"] == SIZES["preactresnet-18"] + 513 * 247


@pytest.mark.parametrize("variant", ["10-2", "16-3", "22-8"])
def test_any_wide_network_has_its_size(variant: str) -> None:
    model = wideresnet.build((3, 32, 32), 10, variant)
    depth, w = map(int, variant.split("-"))
    assert sum(p.numel() for p in model.parameters()) == wide(depth, w)
