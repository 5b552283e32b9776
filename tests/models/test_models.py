"""Building networks by name: shapes, randomness, the check on what they return, and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from controlat._util import registry
from controlat.models import build, names

MNIST, DIGITS = (1, 28, 28), (1, 8, 8)


# the widest ones take seconds to draw, and those of torchvision have tests of their own
LISTED = [name for name in names() if not name.startswith(("torchvision", "wideresnet"))]
NAMES = [*LISTED, "wideresnet-10-1", "wideresnet-16-2"]
RESIDUAL = [name for name in NAMES if "resnet" in name]


@pytest.mark.parametrize("name", sorted({*NAMES} - {*RESIDUAL}))
@pytest.mark.parametrize("in_shape", [(1, 28, 28), (3, 16, 23), (3, 33, 18)])
def test_every_model_takes_every_shape(name: str, in_shape: tuple[int, int, int]) -> None:
    takes_in_training(name, in_shape)


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("in_shape", [(1, 1, 1), (3, 9, 14)])
def test_every_residual_network_takes_every_shape(name: str, in_shape: tuple[int, int, int]) -> None:
    takes_in_training(name, in_shape)


def takes_in_training(name: str, in_shape: tuple[int, int, int]) -> None:
    model = build(name, in_shape, 7)
    assert all(module.training for module in model.modules())
    x = torch.zeros(4, *in_shape, dtype=torch.float64)
    assert model.double()(x).shape == (4, 7)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_callers_generator(name: str) -> None:
    module, variant = registry.variant("controlat.models", name)
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = module.build(MNIST, 10, variant)
            states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("name", "least"),
    [("lenet", 16), ("lenet-32-64", 6), ("small_cnn", 16), ("fosc-4", 4), ("fosc-8", 8), ("cnn_bn", 8)],
)
def test_the_smallest_image(name: str, least: int) -> None:
    build(name, (1, least, least), 10)
    for height, width in ((least - 1, least), (least, least - 1)):
        message = f"{name} cannot take images of {height} x {width} pixels: .* >= {least}"
        with pytest.raises(ValueError, match=message):
            build(name, (1, height, width), 10)


def test_cnn_bn_has_what_it_is_for() -> None:
    kinds = [type(module) for module in build("cnn_bn", DIGITS, 10).modules()]
    assert kinds.count(nn.BatchNorm2d) == 3
    assert kinds.count(nn.Dropout) == 2


def test_the_check_leaves_no_trace() -> None:
    model = build("cnn_bn", DIGITS, 10)
    tracked = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert [buffer.item() for buffer in tracked] == [0, 0, 0]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"has no 'lenett'; did you mean 'lenet'\? choose from: .*mlp"):
        build("lenett", MNIST, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp-3", "there is no model 'mlp-3'; choose from: mlp$"),
        ("cnn_bn-big", "there is no model 'cnn_bn-big'; choose from: cnn_bn$"),
        ("lenet-5", "there is no model 'lenet-5'; choose from: lenet, lenet-32-64$"),
        ("madry_mnist-1", "choose from: madry_mnist$"),
        ("small_cnn-1", "choose from: small_cnn$"),
        ("fosc", "there is no model 'fosc'; choose from: fosc-4, fosc-8$"),
        ("preactresnet", "'preactresnet'; choose from: preactresnet-18, preactresnet-18-locuslab, preact"),
        ("preactresnet-34", "there is no model 'preactresnet-34'"),
        *((f"wideresnet{text}", r"D = 6n \+ 4") for text in ("", "-4-1", "-12-1", "-10-0", "-10", "-١٠-1")),
    ],
)
def test_unknown_variant(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("in_shape", "num_classes", "message"),
    [
        ((1, 0, 8), 10, r"in_shape must be \(C, H, W\), each at least 1, got \(1, 0, 8\)"),
        ((8, 8), 10, r"got \(8, 8\)"),
        (DIGITS, 1, "num_classes must be >= 2, got 1"),
    ],
)
def test_build_refuses(in_shape: tuple[int, int, int], num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("mlp", in_shape, num_classes)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    text = """
import torch
from torch import nn
def linear(size): return nn.Sequential(nn.Flatten(), nn.Linear(64, size))
def fixed(): return linear(10)
def sized(num_classes): return linear(num_classes).double()
def shaped(in_shape, num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def partly_frozen(num_classes):
    net = nn.Sequential(nn.BatchNorm2d(1), *linear(num_classes))
    net[0].eval()
    return net
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.size = num_classes
    def forward(self, x): return x.flatten(1)[:, :self.size]
class Pair(Net):
    def forward(self, x): return x, x
class Arg(Net):
    def forward(self, x): return super().forward(x).long()
def flat(): return nn.Linear(64, 10)
def wrong(): return "net"
def broken(): raise RuntimeError("no weights")
"""
    (tmp_path / "own_models.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return "own_models"


@pytest.mark.parametrize("name", ["fixed", "sized", "shaped", "Net"])
def test_the_users_own(own: str, name: str) -> None:
    assert isinstance(build(f"{own}:{name}", DIGITS, 10), nn.Module)


def test_modes_are_put_back(own: str) -> None:
    model = build(f"{own}:partly_frozen", DIGITS, 10)
    assert [module.training for module in model.modules()] == [True, False, True, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixed", r"maps images \(2, 1, 8, 8\) to \(2, 10\); it must return logits of shape \(2, 7\)"),
        ("flat", r"own_models:flat' fails on images of shape \(2, 1, 8, 8\): mat1 and mat2"),
        ("Pair", "must return logits, .* got a tuple; wrap it"),
        ("Arg", "must return logits, .* got torch.int64"),
        ("wrong", "is a str; its factory must return an nn.Module"),
    ],
)
def test_the_users_own_is_checked(own: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"{own}:{name}", DIGITS, 7)


def test_an_error_in_the_factory_gets_a_note(own: str) -> None:
    with pytest.raises(RuntimeError, match="no weights") as caught:
        build(f"{own}:broken", DIGITS, 10)
    assert "own_models:broken" in caught.value.__notes__[0]
