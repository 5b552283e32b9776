"""The residual networks against functions written down independently."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from controlat.models import build
from controlat.models._layers import GlobalPool, PreActBlock

SMALL = (3, 9, 12)


def shaken(model: nn.Module) -> nn.Module:
    """In float64, with every BatchNorm away from the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data += noise - 0.25
    return model


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def seeded(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(build(name, SMALL, 10)).eval()


def active(x: Tensor, values: Iterator[Tensor]) -> Tensor:
    """relu(BatchNorm(x)) in evaluation mode; takes its four tensors and the counter."""
    w, b, mean, var, _ = (next(values).view(-1, 1, 1) for _ in range(5))
    return (w * (x - mean) / (var + 1e-5).sqrt() + b).clamp(min=0)


def reference(
    model: nn.Module, x: Tensor, widths: list[int], blocks: int, raw: bool = False, final: bool = True
) -> Tensor:
    values = iter(model.state_dict().values())
    x = F.conv2d(x, next(values), padding=1)
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            h = active(x, values)
            y = F.conv2d(h, next(values), stride=stride, padding=1)
            y = F.conv2d(active(y, values), next(values), padding=1)
            if x.shape != y.shape:
                x = F.conv2d(x if raw else h, next(values), stride=stride)
            x = x + y
            assert x.shape[1] == width
    if final:
        x = active(x, values)
    logits = F.linear(x.flatten(2).mean(2), next(values), next(values))
    assert next(values, None) is None
    return logits


@pytest.mark.parametrize(
    ("variant", "raw", "final"), [("18", False, True), ("18-locuslab", True, True), ("18-yopo", False, False)]
)
def test_preactresnet(variant: str, raw: bool, final: bool) -> None:
    model, x = seeded(f"preactresnet-{variant}"), images(2, *SMALL)
    expected = reference(model, x, [64, 128, 256, 512], 2, raw, final)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("variant", "w", "blocks"), [("10-1", 1, 1), ("16-2", 2, 2)])
def test_wideresnet(variant: str, w: int, blocks: int) -> None:
    model, x = seeded(f"wideresnet-{variant}"), images(2, *SMALL)
    expected = reference(model, x, [16 * w, 32 * w, 64 * w], blocks)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("width", "stride"), [(3, 1), (5, 1), (3, 2), (6, 2)])
def test_a_block_in_training(width: int, stride: int, raw: bool) -> None:
    block, x = shaken(PreActBlock(3, width, stride, raw)), images(4, 3, 5, 6)

    def norm(layer: nn.BatchNorm2d, h: Tensor) -> Tensor:
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = layer.weight.view(-1, 1, 1), layer.bias.view(-1, 1, 1)
        return F.relu(scale * (h - mean) / (var + 1e-5).sqrt() + shift)

    h = norm(block.bn1, x)
    y = norm(block.bn2, F.conv2d(h, block.conv1.weight, stride=stride, padding=1))
    y = F.conv2d(y, block.conv2.weight, padding=1)
    same = width == 3 and stride == 1
    assert (block.shortcut is None) == same
    shortcut = x if same else F.conv2d(x if raw else h, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), shortcut + y, rtol=1e-11, atol=1e-11)


def test_the_two_shortcuts_are_different_functions_of_equal_weights() -> None:
    ours, theirs = seeded("preactresnet-18"), seeded("preactresnet-18-locuslab")
    theirs.load_state_dict(ours.state_dict())
    x = images(2, *SMALL)
    assert (ours(x) - theirs(x)).abs().max() > 0.01


def test_a_wide_network_starts_as_in_trades() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("wideresnet-10-4", SMALL, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            out, _, k, _ = module.weight.shape
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * out)), rel=0.05)
        elif isinstance(module, nn.Linear):
            assert module.bias.eq(0).all()
            assert module.weight.ne(0).all()


def test_the_pooling_of_cifar_images() -> None:
    x = images(2, 5, 4, 4)
    torch.testing.assert_close(GlobalPool()(x), F.avg_pool2d(x, 4).flatten(1))
