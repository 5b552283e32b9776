"""CUDA graphs on a card: the bits of plain steps, and nothing broken where a capture fails.

With CONTROLAT_TEST_DEVICE=cpu the same tests run on the CPU, with a stand-in for graphs (tests/tape.py).
"""

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, samples
from systems import CASES, driver
from tape import tape
from torch import Tensor, nn

import controlat
from controlat import Ball, NonFiniteError, pgd
from controlat._util import rng
from controlat.app.placement import deterministic, place
from controlat.app.trainer import load_checkpoint
from controlat.attacks.losses import cross_entropy, divergence, margin
from controlat.attacks.pgd import ascend
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.methods import Batch
from controlat.models import build
from controlat.models.frozen import graphs
from controlat.models.frozen.graph_use import USE, Use, status, using
from controlat.models.frozen.view import FrozenModel
from controlat.robust_accuracy.robust import run_attacks
from controlat.robust_accuracy.source import Pair

DEVICE = os.environ.get("CONTROLAT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
SHAPE = (3, 16, 16)
STEPS = [(0.1, 0.03, 3), (0.2, 0.03, 1), (0.1, 0.07, 4), (0.05, 0.01, 6)]  # (eps, alpha, K)


@contextlib.contextmanager
def graphs_on() -> Iterator[Use]:
    """Graphs inside the block, and what came of it."""
    with tape() if DEVICE == "cpu" else contextlib.nullcontext(), using("auto"), deterministic():
        yield USE.get()


@contextlib.contextmanager
def graphs_off() -> Iterator[None]:
    with using("off"), deterministic():
        yield


def images(n: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = samples(n, SHAPE, seed=seed)
    return x.to(DEVICE, dtype), y.to(DEVICE)


def network(name: str = "residual", nhwc: bool = True, seed: int = 0) -> nn.Module:
    """A network in float32 on the device: convolutions with BatchNorm, with and without dropout, or none."""
    with rng.scoped(seed, "network"):
        if name == "linear":
            net: nn.Module = nn.Sequential(
                nn.Flatten(), nn.Linear(768, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
            )
        elif name == "residual":
            net = nn.Sequential(
                Residual(3), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
            )
        else:
            net = build(name, SHAPE, 3)
    return place(net, DEVICE, nhwc)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norms[0](self.first(x)).relu()
        out: Tensor = self.norms[1](self.second(h)) + h
        return out.relu()


def attacks(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    draw = partial(rng.generator, 0, "start", device=DEVICE)
    return [
        pgd(net, x, y, eps=eps, alpha=alpha, steps=k, generator=draw(k), **options)
        for eps, alpha, k in STEPS * 2
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["linear", "residual", "lenet"])
@pytest.mark.parametrize("layouts", [(True, True), (False, True), (False, False)], ids=str)
def test_points_have_the_bits_of_plain_steps(
    layouts: tuple[bool, bool], name: str, mode: str, norm: str, dtype: torch.dtype
) -> None:
    net, (x, y) = network(name, layouts[0]).to(dtype), images(dtype=dtype)
    how: dict[str, Any] = {"mode": mode, "norm": norm, "channels_last": layouts[1]}
    before = copy.deepcopy(net.state_dict())
    with graphs_off():
        plain = attacks(net, x, y, **how)
    with graphs_on() as use:
        assert same(attacks(net, x, y, **how), plain)
        assert (use.captured, status(DEVICE)) == (1, "on")
    assert same(dict(net.state_dict()), dict(before))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_losses_and_mixed_precision(autocast: torch.dtype | None) -> None:
    net, (x, y) = network().eval(), images()
    target = network(seed=1)(x).detach()
    cases: list[tuple[Any, Tensor]] = [(cross_entropy, y), (divergence, target), (margin, y)]
    cases += [(partial(margin, kappa=0.5), y)]

    def run() -> list[Tensor]:
        with FrozenModel(net, autocast=autocast) as view:
            start = (x + 0.01).clamp(0, 1)
            how: dict[str, Any] = {"ball": Ball(0.1), "alpha": 0.02, "steps": 3, "start": start}
            return [ascend(view, x, z, loss=loss, **how) for loss, z in cases]

    with graphs_off():
        plain = run()
    with graphs_on() as use:
        assert all(same(run(), plain) for _ in range(3))
        assert use.captured == len(cases)


def test_changed_weights_are_seen() -> None:
    net, (x, y) = network(), images()
    twin = copy.deepcopy(net)
    optimiser, meter = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), Meter()
    with graphs_on() as use:
        for k in range(4):
            with FrozenModel(net, meter=meter) as view:
                point = ascend(view, x, y, ball=Ball(0.1), alpha=0.03, steps=k + 1, random_start=False)
            twin.load_state_dict(net.state_dict())
            with using("off"):
                plain = pgd(twin, x, y, eps=0.1, alpha=0.03, steps=k + 1, random_start=False)
            assert same(point, plain)
            optimiser.zero_grad()
            cross_entropy(net(point), y).mean().backward()
            optimiser.step()
        assert (use.captured, meter.gradients) == (1, 16 * (1 + 2 + 3 + 4))
        with torch.no_grad():
            next(net.parameters()).fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            pgd(net, x, y, eps=0.1, alpha=0.03, steps=2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_training_ends_with_the_same_bits(name: str, bf16: bool) -> None:
    case, (x, y) = CASES[name], images()

    def trained() -> tuple[Any, int]:
        made: Driver = driver(case, network().train(), autocast=torch.bfloat16 if bf16 else None)
        made.memory |= {key: t.to(DEVICE) for key, t in case.own.memory.items()}
        for number in range(4):
            batch = Batch(x, y, torch.arange(16, device=DEVICE), 0, number)
            made.step(batch, case.control(), 0.05)
        return made.state().to_dict(), made.meter.gradients

    with graphs_off():
        plain = trained()
    with graphs_on():
        assert same(trained(), plain)


def test_evaluation_attacks_break_the_same_points() -> None:
    net, (x, y) = network(), images(60)

    def run() -> Any:
        result = run_attacks(net, Pair(x, y), Ball(0.1), attacks=["fgsm", "pgd-5-3", "cw-5"], batch_size=16)
        return result.survived, result.spent.gradients

    with graphs_off():
        plain = run()
    with graphs_on() as use:
        assert all(same(run(), plain) for _ in range(2))
        assert use.captured > 0


FEW: dict[str, Any] = {
    "model": "cnn_bn",
    "schedule": "amata:min=1,max=3,tau=0.3",
    "epochs": 2,
    "train_points": 140,
    "held_out": 20,
    "batch_size": 32,
    "progress": False,
    "device": DEVICE,
}


def test_runs_end_with_the_same_bits_and_say_what_was_on(tmp_path: Path) -> None:
    saved = {}
    with tape() if DEVICE == "cpu" else contextlib.nullcontext():
        for mode in ("auto", "off"):
            controlat.train(tmp_path / mode, cuda_graphs=mode, **FEW)
            saved[mode] = load_checkpoint(tmp_path / mode / "last.pt")
    assert same(saved["auto"]["model"], saved["off"]["model"])
    assert same(saved["auto"]["optimizer"], saved["off"]["optimizer"])
    assert [saved[mode]["environment"]["cuda_graphs"] for mode in ("auto", "off")] == ["on", "off"]


class Pass(nn.Module):
    """A linear network behind a pass of the test's own."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.net = run, network("linear")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.run(x))
        return out


def waiting(x: Tensor) -> Tensor:
    """Nothing shows before a capture that this cannot be captured."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return x


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (nn.functional.dropout, "draws random numbers"),
        (lambda x: x if x.sum() > 0 else -x, "reads values"),
        (lambda x: x * x.mean().item(), "reads values"),
        pytest.param(waiting, "capture failed", marks=pytest.mark.skipif(DEVICE != "cuda", reason="no card")),
    ],
    ids=["dropout", "branch", "item", "synchronize"],
)
def test_what_cannot_be_captured_runs_as_without_graphs(run: Callable[[Tensor], Tensor], reason: str) -> None:
    net, (x, y) = Pass(run), images()
    with graphs_off(), rng.scoped(0, "draws", device=DEVICE):
        plain = attacks(net, x, y)
    with graphs_on() as use, rng.scoped(0, "draws", device=DEVICE):
        assert same(attacks(net, x, y), plain)
        assert use.captured == 0
        assert reason in status(DEVICE)
    # A capture that was broken off leaves stream and generators of the device as they were.
    if DEVICE == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device=DEVICE).isfinite().all()
    with graphs_on() as use:
        attacks(network(), x, y)
        assert use.captured == 1


def test_graphs_are_bounded_and_freed_with_their_network() -> None:
    net, (x, y) = network(), images()
    with graphs_on() as use:
        for n in [*range(1, 17)] * 3:
            pgd(net, x[:n], y[:n], eps=0.1, alpha=0.03, steps=2)
        assert use.captured == 16
        gc.collect()
        known = len(graphs._GRAPHS)
        del net
        gc.collect()
        assert len(graphs._GRAPHS) == known - 1
        attacks(network(), x, y)  # a pool of its own again


def test_threads_with_networks_of_their_own() -> None:
    x, y = images()
    with graphs_off():
        plain = [attacks(network(seed=i), x, y) for i in range(3)]

    def run(i: int) -> list[Tensor]:
        with graphs_on():
            return attacks(network(seed=i), x, y)

    if DEVICE == "cpu":
        pytest.skip("the stand-in is put in place for all threads at once")
    with ThreadPoolExecutor(3) as pool:
        assert same(list(pool.map(run, range(3))), plain)


def test_on_a_stream_of_the_user() -> None:
    net, (x, y) = network(), images()
    with graphs_off():
        plain = attacks(net, x, y)
    with graphs_on():
        if DEVICE == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                points = attacks(net, x, y)
            stream.synchronize()
        else:
            points = attacks(net, x, y)
        assert same(points, plain)
        assert same(attacks(net, x, y), plain)
