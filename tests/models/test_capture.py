"""The calls that capture a CUDA graph, in their order, on fakes of torch's."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tape import tape
from torch import Tensor, nn

from controlat.attacks.balls import NORMS, Ball
from controlat.attacks.losses import Loss, cross_entropy, divergence, margin
from controlat.models.frozen.capturable import observed
from controlat.models.frozen.capture import Captured, Cuda, backend_of, follow

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: Any) -> None:
        self.name = "side" if name == CUDA else name

    def wait_stream(self, other: "Stream") -> None:
        LOG.append(f"{self.name} waits for {other.name}")


class Generator:
    state = "before"

    def clone_state(self) -> str:
        return self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class Graph:
    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        LOG.append("replay")


LOG: list[str] = []


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What of torch.cuda a capture uses; as torch, they leave the stream in place where a capture fails."""
    LOG.clear()
    now = {"stream": Stream("main"), "generator": Generator()}

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, now["stream"] = now["stream"], chosen
        yield
        now["stream"] = before

    @contextlib.contextmanager
    def graph(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        LOG.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        before, now["stream"] = now["stream"], stream
        now["generator"].state = "captured"
        yield
        now["stream"], now["generator"].state = before, "before"

    for name, fake in {
        "device": lambda device: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: now["stream"],
        "set_stream": lambda stream: now.update(stream=stream),
        "default_generators": [now["generator"]],
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return now


def test_passes_before_and_a_capture_on_one_side_stream(fakes: dict[str, Any]) -> None:
    backend = Cuda()
    replay = backend.capture(lambda: LOG.append(f"run on {fakes['stream'].name}"), CUDA, None)
    replay()
    expected = ["side waits for main", *["run on side"] * 2, "capture on side into None, thread_local"]
    assert [*expected, "run on side", "main waits for side", "replay"] == LOG
    assert fakes["stream"].name == "main"
    LOG.clear()
    backend.capture(lambda: None, CUDA, replay)
    assert "capture on side into pool, thread_local" in LOG


def test_a_capture_that_fails_leaves_stream_and_generator(fakes: dict[str, Any]) -> None:
    def run() -> None:
        if fakes["generator"].state == "captured":
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        Cuda().capture(run, CUDA, None)
    assert fakes["stream"].name == "main"
    assert fakes["generator"].state == "before"


def test_a_stream_follows_the_last_one(fakes: dict[str, Any]) -> None:
    first = follow(None, CUDA)
    assert follow(first, CUDA) is first
    assert not LOG
    fakes["stream"] = Stream("other")
    assert follow(first, CUDA) is fakes["stream"]
    assert LOG == ["other waits for main"]
    assert follow(None, torch.device("cpu")) is None


def test_only_cuda_devices_have_graphs() -> None:
    assert isinstance(backend_of(CUDA), Cuda)
    assert backend_of(torch.device("cpu")) is None
    assert backend_of(torch.device("mps")) is None


NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
FAR = torch.tensor(2.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [cross_entropy, margin, divergence])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_leaves_nothing_to_the_cpu(norm: str, loss: Loss, training: bool) -> None:
    """On the device meta, as another device than the CPU: every operation and every number is there."""
    net = copy.deepcopy(NET).to("meta").train(training)
    x0, number = torch.empty(2, 3, 8, 8, device="meta"), torch.empty((), device="meta")
    y = torch.empty(2, dtype=torch.int64, device="meta")
    if loss is divergence:
        y = torch.empty(2, 5, device="meta")
    with observed([*net.modules()]) as reasons:
        x = x0.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net(x), y).sum(), x)
        x0.copy_(Ball(0.1, norm).step(x.detach(), gradient, number, x0, number))
    assert reasons == []


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda x: x * FAR, "mul.Tensor"),
        (lambda x: x[torch.tensor([1, 0])], "index.Tensor"),
        (lambda x: x * torch.tensor([1.0, 2.0]).to(x.device), "_to_copy"),
    ],
)
def test_numbers_that_are_elsewhere_are_noticed(run: Callable[[Tensor], Tensor], name: str) -> None:
    with observed([nn.Identity()]) as reasons:
        run(torch.empty(2, 2, device="meta"))
    assert reasons == [f"it takes numbers from one device to another ({name})"]


def test_numbers_are_rounded_as_those_of_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(5, generator=torch.Generator().manual_seed(0))
    alpha = 0.1 + 1e-9  # between two numbers of float32
    with tape():
        graph = Captured(lambda x, a: x + a * x.sign(), x, (), (1.0,), None)
        (point,) = graph.steps(x, (), (alpha,), 1)
    assert torch.equal(point, x + alpha * x.sign())
    assert graph.numbers[0].dtype == torch.float32
