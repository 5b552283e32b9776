"""What a model may return, take and do to its inputs: the same sentence from every public call."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import spec, split
from systems import sample
from torch import Tensor, nn

import controlat
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.recording import Recording
from controlat.methods import build
from controlat.models.frozen.logits import check_logits
from controlat.models.frozen.view import FrozenModel
from controlat.pmp import AdversarialLoss, backward, relaxed
from controlat.robust_accuracy import protocol
from controlat.robust_accuracy.source import Pair

X = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 2


def _driver(model: nn.Module, method: str = "pgd_at") -> Driver:
    return Driver(model, build(method), Ball(0.1))


def _record(model: nn.Module) -> Recording:
    return Recording.of(_driver(model), spec(split(8, classes=2), schedule="pgd:steps=1,alpha=0.1"))


# Every way in which a model is asked: (model, x) -> anything.
CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "pgd": lambda m, x: controlat.pgd(m, x, Y, eps=0.1, alpha=0.1, steps=1),
    "pgd in train mode": lambda m, x: controlat.pgd(m, x, Y, eps=0.1, alpha=0.1, steps=1, mode="train"),
    "fgsm": lambda m, x: controlat.fgsm(m, x, Y, eps=0.1),
    "robustness": lambda m, x: controlat.robustness(m, x, Y, eps=0.1, attacks=["pgd-2"], checks=2),
    "protocol": lambda m, x: protocol(m, Pair(x, Y), Ball(0.1), attacks=["pgd-2"]),
    "criterion": lambda m, x: controlat.criterion(
        m, x, Y, {"alpha": 0.1, "steps": 0}, eps=0.1, gamma=0, max_steps=1, batches=4, form="costate"
    ),
    "terminal": lambda m, x: AdversarialLoss(x, Y, Ball(0.1), steps=0).gradient(_driver(m)),
    "view": lambda m, x: _viewed(m, x),
}


def _viewed(model: nn.Module, x: Tensor) -> Tensor:
    with FrozenModel(model) as view:
        return view(x)


class Returns(nn.Module):
    """A network whose logits are changed into something else."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


class Output(NamedTuple):
    logits: Tensor


WRONG = {
    r"got shape \(\d, 1\) for \d samples; one number z .* logits \(0, z\)": lambda z: z[:, :1],
    r"got shape \(\d,\) for \d samples; one number z": lambda z: z[:, 0],
    r"got shape \(\d, 2, 3, 3\) .*maps of pixels": lambda z: z[..., None, None].expand(-1, -1, 3, 3),
    r"got shape \(\d+, 2\) for \d samples; return one row": lambda z: z.repeat(2, 1),
    r"got shape \(\) for": lambda z: z.sum(),
    "got a tuple; wrap it": lambda z: (z, z),
    "got a dict; .* its logits alone": lambda z: {"logits": z},
    "got a dict; .* returns them alone": lambda z: {"out": z},
    "got a Output; .* its logits alone": Output,
    "got a NoneType": lambda z: None,
    "got torch.int64 .*return scores": lambda z: z.argmax(1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_logits_is_refused_by_every_call(call: str, message: str) -> None:
    with pytest.raises(ValueError, match="the model must return logits, .*" + message):
        CALLS[call](Returns(WRONG[message]), X)


def test_one_logit_per_sample_is_refused_by_training_and_recording() -> None:
    model = Returns(lambda z: z[:, :1]).double()
    batch = next(spec(split(4)).batches(0))
    with pytest.raises(ValueError, match="must return logits"):
        _driver(model).step(batch, Control(alpha=0.1, steps=0), 0.1)
    with pytest.raises(ValueError, match="must return logits"):
        _record(model)


def test_two_logits_per_sample_are_logits() -> None:
    z = torch.zeros(3, 2)
    assert check_logits(z, 3) is z


# ------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("call", CALLS)
def test_inputs_that_do_not_fit_the_weights(call: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"x has 4 numbers per sample, .* \(Linear\) takes 5"):
        CALLS[call](net, X)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"x has 1 channels, .* \(Conv2d\) takes 3"):
        CALLS[call](net, X)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"x is torch.float32, .* torch.float64: use x.to\(torch.float64\)"):
        CALLS[call](net, X)


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.net, self.error = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, KeyError])
def test_an_error_of_the_model_passes_through_unchanged(call: str, kind: type[Exception]) -> None:
    error = kind("my own: size 3")
    with pytest.raises(kind) as caught:
        CALLS[call](Fails(error), X)
    assert caught.value is error


# ------------------------------------------------------------------------------------- work done in place


class InPlace(nn.Module):
    """Normalises its input in place, as x.sub_(mean).div_(deviation) does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5).mul_(2.0)


class OutOfPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 2.0


def _network(inplace: bool, convolutional: bool) -> nn.Sequential:
    first = [InPlace() if inplace else OutOfPlace(), nn.ReLU(inplace=inplace)]
    body = [nn.Conv2d(1, 2, 1)] if convolutional else []
    torch.manual_seed(0)
    return nn.Sequential(*first, *body, nn.Flatten(), nn.Linear(8 if convolutional else 4, 2))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("convolutional", [False, True])
def test_a_model_may_work_in_place_on_its_input(call: str, convolutional: bool) -> None:
    x = X.clone()
    torch.manual_seed(1)
    found = CALLS[call](_network(True, convolutional), x)
    assert torch.equal(x, X)
    torch.manual_seed(1)
    expected = CALLS[call](_network(False, convolutional), X.clone())
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    elif call == "criterion":
        assert found.value == expected.value


@pytest.mark.parametrize("method", ["pgd_at", "free", "yopo", "trades", "fat"])
def test_training_a_model_that_works_in_place(method: str) -> None:
    data = split(8, classes=2)
    kept = copy.deepcopy(data)
    ends = []
    for inplace in (True, False):
        model = _network(inplace, False).double()
        d = _driver(model, method)
        u = sample(d.method, alpha=0.1, steps=1)
        for batch in spec(data).batches(0):
            d.step(batch, u, 0.1)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    assert torch.equal(data.x, kept.x)


def test_costates_of_a_model_that_works_in_place() -> None:
    found = []
    for inplace in (True, False):
        recording = _record(_network(inplace, False).double())
        terminal = AdversarialLoss(*split(6, classes=2).take(torch.arange(6)), Ball(0.1), steps=1)
        swept = list(backward(recording, terminal, meter=Meter()))
        found.append([step.norms for step in swept])
        found[-1].append(relaxed(recording, {0: Control(alpha=0.05, steps=2)}, 0.5, terminal).phi)
    assert found[0] == found[1]
