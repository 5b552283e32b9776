"""Networks: exact sizes, the check on what they return, and the user's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from controlat import registry
from controlat.models import build
from controlat.models._layers import Normalize

MNIST, DIGITS = (1, 28, 28), (1, 8, 8)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_shape", "parameters"),
    [
        ("lenet", MNIST, 431_080),
        ("mlp", DIGITS, 64 * 64 + 64 + 64 * 64 + 64 + 640 + 10),
        ("cnn_bn", DIGITS, 288 + 64 + 18432 + 128 + 36864 + 128 + 256 * 128 + 128 + 1290),
    ],
)
def test_parameter_counts(name: str, in_shape: tuple[int, int, int], parameters: int) -> None:
    assert count(build(name, in_shape, 10)) == parameters


@pytest.mark.parametrize("name", registry.names("controlat.models"))
@pytest.mark.parametrize("in_shape", [(1, 28, 28), (3, 16, 23), (3, 33, 18)])
def test_every_model_takes_every_shape(name: str, in_shape: tuple[int, int, int]) -> None:
    model = build(name, in_shape, 7)
    assert all(module.training for module in model.modules())
    x = torch.zeros(4, *in_shape, dtype=torch.float64)
    assert model.double()(x).shape == (4, 7)


@pytest.mark.parametrize("name", registry.names("controlat.models"))
def test_weights_come_from_the_callers_generator(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(torch.cat([p.flatten() for p in build(name, MNIST, 10).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(("name", "least"), [("lenet", 16), ("cnn_bn", 8)])
def test_the_smallest_image(name: str, least: int) -> None:
    build(name, (1, least, least), 10)
    for height, width in ((least - 1, least), (least, least - 1)):
        message = f"{name} cannot take images of {height} x {width} pixels: .* >= {least}"
        with pytest.raises(ValueError, match=message):
            build(name, (1, height, width), 10)


def test_lenet_is_the_network_of_the_example() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = build("lenet", MNIST, 10).double(), torch.rand(3, *MNIST, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    mean, std = torch.tensor([0.1307, 0.3081]).double()
    h = F.max_pool2d(F.relu(F.conv2d((x - mean) / std, w1, b1)), 2, 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, w2, b2)), 2, 2)
    logits = F.linear(F.relu(F.linear(h.view(-1, 4 * 4 * 50), w3, b3)), w4, b4)
    torch.testing.assert_close(model(x), logits, rtol=1e-12, atol=1e-12)


def test_lenet_leaves_colours_as_they_are() -> None:
    model = build("lenet", (3, 32, 32), 10)
    x = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert torch.equal(next(model.children())(x), x)


def test_cnn_bn_has_what_it_is_for() -> None:
    kinds = [type(module) for module in build("cnn_bn", DIGITS, 10).modules()]
    assert kinds.count(nn.BatchNorm2d) == 3
    assert kinds.count(nn.Dropout) == 2


def test_the_check_leaves_no_trace() -> None:
    model = build("cnn_bn", DIGITS, 10)
    tracked = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert [buffer.item() for buffer in tracked] == [0, 0, 0]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


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


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"has no 'lenett'; did you mean 'lenet'\? choose from: .*mlp"):
        build("lenett", MNIST, 10)


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
        ("Pair", "returns tuple; it must return logits"),
        ("Arg", "returns torch.int64; it must return logits"),
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
