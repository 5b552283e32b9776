"""The input gradient of one-channel convolutions against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from controlat._util.kernels import OneChannelWeight, one_channel_weights
from controlat.attacks.losses import cross_entropy
from controlat.models import lenet
from controlat.models.frozen.view import FrozenModel


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    nhwc=st.booleans(),
)
def test_gradients_and_values_are_those_of_torch(
    kernel: tuple[int, int], stride: int, padding: int, dilation: int, bias: bool, nhwc: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 1, 11, 10, generator=g, dtype=torch.float64)
    w = torch.randn(4, 1, *kernel, generator=g, dtype=torch.float64)
    b = torch.randn(4, generator=g, dtype=torch.float64) if bias else None
    if nhwc:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    x.requires_grad_()

    def run(w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, w, b, stride, padding, dilation)
        return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]

    expected, found = run(w), run(w.as_subclass(OneChannelWeight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_layers_with_several_channels_groups_or_named_padding_are_left_to_torch(padding: str | int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=padding), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, padding="same")
    ).double()
    model.requires_grad_(False)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    for i in (0, 2):
        model[i]._parameters["weight"] = model[i].weight.detach().as_subclass(OneChannelWeight)
    (found,) = torch.autograd.grad(model(x).sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weights_that_are_trained_keep_their_gradient() -> None:
    layer = nn.Conv2d(1, 2, 3)
    x = torch.rand(2, 1, 5, 5, requires_grad=True)
    weight = layer.weight.as_subclass(OneChannelWeight)
    F.conv2d(x, weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    x = torch.rand(2, 1, 5, 5, requires_grad=True)
    w = torch.rand(2, 1, 3, 3).as_subclass(OneChannelWeight)
    (first,) = torch.autograd.grad(F.conv2d(x, w).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_view_of_lenet_has_the_gradient_of_the_plain_layout() -> None:
    torch.manual_seed(0)
    model = lenet.build((1, 28, 28), 10).double()
    x, y = torch.rand(70, 1, 28, 28, dtype=torch.float64), torch.arange(70) % 10
    found = []
    for fast in (True, False):
        with FrozenModel(model, channels_last=fast) as view:
            found.append(view.gradient(view.prepare(x), lambda logits: cross_entropy(logits, y)))
    assert one_channel_weights(model.modules()) == {id(model[1].weight)}
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert float(found[0].abs().sum()) > 0
