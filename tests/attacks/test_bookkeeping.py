"""What a call costs beside the passes of the network: walks through its modules, operations, waits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp, samples
from torch import Tensor, nn
from waits import started, waited

from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ascend, pgd
from controlat.models.frozen.layout import channels_first, channels_last
from controlat.models.frozen.parts import Parts
from controlat.models.frozen.view import FrozenModel

STEP: dict[str, Any] = {"eps": 0.1, "alpha": 0.03}


def test_a_call_walks_through_the_modules_once_whatever_the_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walks: list[object] = []
    of, named = Parts.of.__func__, nn.Module.named_modules  # type: ignore[attr-defined]

    def counted(cls: type[Parts], model: nn.Module | Parts) -> Parts:
        if isinstance(model, nn.Module):
            walks.append(model)
        return of(cls, model)

    def listed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.append(self)
        return named(self, *args, **kwargs)

    x, y = samples(5, (1, 4, 4))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    pgd(model, x, y, steps=1, **STEP)
    monkeypatch.setattr(Parts, "of", classmethod(counted))
    monkeypatch.setattr(nn.Module, "named_modules", listed)
    pgd(model, x, y, steps=7, **STEP)
    assert walks == [model]


def test_a_call_waits_for_the_device_twice_whatever_the_number_of_steps() -> None:
    x, y = samples(5)
    model = mlp()
    with waited() as waits:
        pgd(model, x, y, steps=7, **STEP)
    assert waits == ["tolist", "tolist"]  # bounds of x and y, and the result


def test_a_step_takes_eight_operations_beside_the_passes_of_the_network() -> None:
    x, y = samples(5)
    model = mlp()

    def operations(call: Callable[[], object]) -> int:
        with started() as names:
            call()
        return len(names)

    def gradient() -> Tensor:
        point = x.clone().requires_grad_()
        loss = F.cross_entropy(view.model(point), y, reduction="none")
        return torch.autograd.grad(loss, point, torch.ones_like(loss))[0]

    def climb(steps: int) -> Tensor:
        return ascend(view, x, y, ball=Ball(0.1), alpha=0.03, steps=steps, start=x)

    with FrozenModel(model) as view:
        passes = operations(gradient)
        one, two = (operations(lambda k=k: climb(k)) for k in (1, 2))
    # the copy that the network is given and that of `gradient` are one each; the rest is the step itself
    assert two - one - passes == 8


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 4), (1, 3, 1, 1), (2, 1, 1, 1), (1, 1, 5, 5)])
@pytest.mark.parametrize("made", [torch.channels_last, torch.contiguous_format])
def test_layouts_have_the_strides_that_torch_gives_a_new_tensor(
    shape: tuple[int, ...], made: torch.memory_format
) -> None:
    t = torch.empty(shape, memory_format=made).normal_()
    for layout, wanted in ((channels_last, torch.channels_last), (channels_first, torch.contiguous_format)):
        result = layout(t)
        assert result.stride() == torch.empty(shape, memory_format=wanted).stride()
        assert torch.equal(result, t)
        assert layout(result) is result


def test_a_step_is_the_formula_to_the_bit_and_keeps_the_layout_of_the_point() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x, g = (torch.rand(3, 2, 5, 5, generator=generator) for _ in range(3))
    g = (g - 0.5).contiguous()
    g[0, 0, 0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    g[0, 0, 1, 0] = torch.inf
    x0, x = channels_last(x0), channels_last(x)
    before = x0.clone(), x.clone(), g.clone()
    result = Ball(0.3).step(x, g, 0.07, x0)
    expected = (x0 + (x + 0.07 * (g.sign() + 0 * g) - x0).clamp(-0.3, 0.3)).clamp(0, 1)
    assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert int(result.isnan().sum()) == 2
    assert result.stride() == x.stride()
    for t, old in zip((x0, x, g), before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


def test_an_objective_may_have_any_shape() -> None:
    x, y = samples(5)
    with FrozenModel(mlp()) as view:
        each = view.gradient(x, lambda logits: cross_entropy(logits, y))
        total = view.gradient(x, lambda logits: cross_entropy(logits, y).sum())
    assert torch.equal(each, total)
