"""The plain convolutional networks against functions written down independently, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from controlat.models import build

MNIST = (1, 28, 28)


def made(name: str, in_shape: tuple[int, int, int] = MNIST) -> tuple[nn.Module, Tensor]:
    """A network in float64 and evaluation mode, with no number left at 0 or 1, and three images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, in_shape, 10).double().eval()
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            if tensor.unique().numel() == 1 and tensor.numel() > 1:
                tensor.data += 0.1 * torch.rand_like(tensor)
        return model, torch.rand(3, *in_shape, dtype=torch.float64)


def weights(name: str, in_shape: tuple[int, int, int] = MNIST) -> list[nn.Module]:
    """The layers with weights of a fresh network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = build(name, in_shape, 10).modules()
    return [module for module in modules if isinstance(module, nn.Conv2d | nn.Linear)]


def close(logits: Tensor, reference: Tensor) -> None:
    assert reference.std() > 1e-3, "a constant would agree with anything"
    torch.testing.assert_close(logits, reference, rtol=1e-12, atol=1e-12)


def test_lenet_is_the_network_of_the_example() -> None:
    model, x = made("lenet")
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    mean, std = torch.tensor([0.1307, 0.3081]).double()
    h = F.max_pool2d(F.relu(F.conv2d((x - mean) / std, w1, b1)), 2, 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, w2, b2)), 2, 2)
    logits = F.linear(F.relu(F.linear(h.view(-1, 4 * 4 * 50), w3, b3)), w4, b4)
    close(model(x), logits)


def test_lenet_leaves_colours_as_they_are() -> None:
    model = build("lenet", (3, 32, 32), 10)
    x = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert torch.equal(next(model.children())(x), x)


def test_the_newer_lenet_is_the_network_of_the_example() -> None:
    model, x = made("lenet-32-64")
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    mean, std = torch.tensor([0.1307, 0.3081]).double()
    h = F.relu(F.conv2d((x - mean) / std, w1, b1))
    h = F.max_pool2d(F.relu(F.conv2d(h, w2, b2)), 2)
    close(model(x), F.linear(F.relu(F.linear(h.flatten(1), w3, b3)), w4, b4))


def test_the_newer_lenet_drops_single_units() -> None:
    rates = [m.p for m in build("lenet-32-64", MNIST, 10).modules() if type(m) is nn.Dropout]
    assert rates == [0.25, 0.5]


@pytest.mark.parametrize("in_shape", [MNIST, (2, 7, 9), (1, 1, 2)])
def test_madry_mnist_pads_as_tensorflow(in_shape: tuple[int, int, int]) -> None:
    model, x = made("madry_mnist", in_shape)

    def pool(h: Tensor) -> Tensor:
        rows, columns = h.shape[2] % 2, h.shape[3] % 2
        return F.max_pool2d(F.pad(h, (0, columns, 0, rows), value=-math.inf), 2)

    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    h = pool(F.relu(F.conv2d(x, w1, b1, padding="same")))
    h = pool(F.relu(F.conv2d(h, w2, b2, padding="same")))
    close(model(x), F.linear(F.relu(F.linear(h.flatten(1), w3, b3)), w4, b4))


def test_madry_mnist_starts_with_normals_that_are_cut() -> None:
    cut = 2 * math.exp(-2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * cut / math.erf(math.sqrt(2))  # of a normal cut at two deviations
    for layer in weights("madry_mnist"):
        assert layer.weight.abs().max() <= 0.2
        assert layer.bias.eq(0.1).all()
    largest = weights("madry_mnist")[2].weight
    assert largest.std().item() == pytest.approx(0.1 * math.sqrt(variance), rel=5e-3)


def test_small_cnn_is_the_network_of_trades() -> None:
    model, x = made("small_cnn")
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5, w6, b6, w7, b7 = model.parameters()
    h = F.max_pool2d(F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1)), w2, b2)), 2)
    h = F.max_pool2d(F.relu(F.conv2d(F.relu(F.conv2d(h, w3, b3)), w4, b4)), 2)
    h = F.relu(F.linear(h.flatten(1), w5, b5))
    close(model(x), F.linear(F.relu(F.linear(h, w6, b6)), w7, b7))


def test_small_cnn_drops_half_of_the_first_hidden_layer() -> None:
    kinds = [*build("small_cnn", MNIST, 10).children()]
    assert [type(m).__name__ for m in kinds[-6:]] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert kinds[-4].p == 0.5


def test_small_cnn_starts_without_a_gradient_by_the_pixels() -> None:
    model = build("small_cnn", MNIST, 10).double()
    x = torch.rand(2, *MNIST, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(model(x), torch.tensor([3, 4]))
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(math.log(10))
    assert gradient.eq(0).all()


def test_small_cnn_starts_as_in_trades() -> None:
    *convolutions, last = (layer for i, layer in enumerate(weights("small_cnn")) if i not in (4, 5))
    for layer in convolutions:
        assert layer.bias.eq(0).all()
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
    assert last.weight.eq(0).all()
    assert last.bias.eq(0).all()


def norm(h: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """BatchNorm in evaluation mode, with the eps of Keras."""
    shape = (1, -1, *[1] * (h.ndim - 2))
    w, b, mean, var = (v.view(shape) for v in (w, b, mean, var))
    return w * (h - mean) / (var + 1e-3).sqrt() + b


@pytest.mark.parametrize(
    ("name", "in_shape", "pairs", "convolutions"),
    [("fosc-4", (1, 12, 9), 2, 1), ("fosc-8", (3, 8, 17), 3, 2)],
)
def test_fosc_is_the_network_of_keras(
    name: str, in_shape: tuple[int, int, int], pairs: int, convolutions: int
) -> None:
    model, x = made(name, in_shape)
    values = iter(v for v in model.state_dict().values() if v.is_floating_point())

    def take(number: int) -> list[Tensor]:
        return [next(values) for _ in range(number)]

    h = x
    for _ in range(pairs):
        for _ in range(convolutions):
            h = F.conv2d(h, *take(2), padding=1)
            h = F.relu(norm(h, *take(4)))
        h = F.max_pool2d(h, 2)
    h = F.linear(h.flatten(1), *take(2))
    h = F.relu(norm(h, *take(4)) if name == "fosc-8" else h)
    close(model(x), F.linear(h, *take(2)))
    assert not [*values]


@pytest.mark.parametrize(("name", "norms"), [("fosc-4", 2), ("fosc-8", 7)])
def test_fosc_normalises_and_starts_as_keras(name: str, norms: int) -> None:
    found = [
        m for m in build(name, (3, 16, 16), 10).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert [(m.eps, m.momentum) for m in found] == [(1e-3, 0.01)] * norms
    *convolutions, hidden, last = weights(name, (3, 16, 16))
    for layer in (*convolutions, last):
        bound = math.sqrt(6 / (layer.weight[0].numel() + layer.weight[:, 0].numel()))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 / hidden.in_features), rel=0.02)
    assert all(layer.bias.eq(0).all() for layer in (*convolutions, hidden, last))
