"""Steps by a graph give the bits of steps without one, on a stand-in for CUDA graphs (tests/tape.py)."""

import copy
import functools
import gc
import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import KINDS, awkward, held
from helpers import CLASSES, mlp, same, samples
from systems import CASES, batch, driver, long
from tape import Tape, tape
from torch import Tensor, nn

from controlat import Ball, NonFiniteError, pgd
from controlat._util import rng
from controlat.attacks.losses import cross_entropy, divergence, margin
from controlat.attacks.pgd import ascend, path
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.models.frozen import graphs
from controlat.models.frozen.graph_use import status, using
from controlat.models.frozen.view import FrozenModel

X, Y = samples(12, (1, 4, 4))
STEPS = [(0.1, 0.03, 3), (0.2, 0.03, 1), (0.1, 0.07, 4), (0.05, 0.01, 2)]  # (eps, alpha, K)


def seeded(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def attacks(net: nn.Module, x: Tensor = X, y: Tensor = Y, **options: Any) -> list[Tensor]:
    """Calls of one shape, with radii, step sizes and numbers of steps of their own."""
    return [
        pgd(net, x, y, eps=eps, alpha=alpha, steps=k, generator=seeded(k), **options)
        for eps, alpha, k in STEPS
    ]


def conv(dtype: torch.dtype = torch.float64) -> nn.Module:
    with rng.scoped(0, "conv"):
        layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(64, CLASSES)).to(dtype)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_capture_serves_all_radii_step_sizes_and_numbers_of_steps(
    mode: str, norm: str, dtype: torch.dtype
) -> None:
    net, x = conv(dtype), X.to(dtype)
    plain, before = attacks(net, x, mode=mode, norm=norm), held(net, versions=False)
    with tape() as backend:
        points = attacks(net, x, mode=mode, norm=norm)
    assert same(points, plain)
    assert same(before, held(net, versions=False))
    assert (backend.captures, backend.replays) == (1, sum(k for *_, k in STEPS[1:]))
    assert all(a.stride() == b.stride() for a, b in zip(points, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_any_network_of_users(kind: str, mode: str) -> None:
    net = awkward(kind)
    with rng.scoped(0, "dropout"):
        plain = attacks(net, mode=mode)
    before = held(net, versions=False)
    with tape(), rng.scoped(0, "dropout"):
        assert same(attacks(net, mode=mode), plain)
    assert same(before, held(net, versions=False))


def spectral() -> nn.Module:
    """In training mode every pass moves a buffer that the weight depends on."""
    with rng.scoped(0, "spectral"):
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8))
        return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), nn.Linear(8, CLASSES)).double()


def test_buffers_go_on_within_a_view_and_are_put_back_after_it() -> None:
    net, ball = spectral(), Ball(0.1)

    def run() -> list[Tensor]:
        results = []
        for k in (3, 2):
            with FrozenModel(net, "train") as view:
                for _ in range(3):
                    results += [ascend(view, X, Y, ball=ball, alpha=0.03, steps=k, random_start=False)]
                    results += [view(results[-1])]
        return results

    plain, before = run(), held(net, versions=False)
    with tape() as backend:
        assert same(run(), plain)
        assert backend.replays == 2 * 3 + 3 * 2
    assert same(before, held(net, versions=False))


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], int]] = {  # and how many captures follow
    "nothing": (lambda net: None, 0),
    "optimiser step": (lambda net: [p.add_(0.1) for p in net.parameters()], 0),
    "load_state_dict": (
        lambda net: net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}),
        0,
    ),
    "running statistics": (lambda net: net.get_submodule("1").running_mean.add_(0.5), 0),
    "other storage": (lambda net: setattr(net[4].weight, "data", 2 * net[4].weight), 1),
    "other storage of a copied weight": (lambda net: setattr(net[0].weight, "data", 2 * net[0].weight), 0),
    "other parameter": (lambda net: setattr(net[4], "weight", nn.Parameter(2 * net[4].weight)), 1),
    "other layer": (lambda net: net.__setitem__(2, nn.Softplus()), 1),
    "other number": (lambda net: setattr(net[1], "eps", 0.5), 1),
    "one more layer": (lambda net: net.insert(2, nn.Tanh()), 1),
    "to and fro": (lambda net: net.float().double(), 1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_of_the_network_are_seen(change: str) -> None:
    net, other = conv(), conv()
    do, captures = CHANGES[change]
    with tape() as backend:
        attacks(net)
        do(net)
        points = attacks(net)
    do(other)
    assert same(points, attacks(other))
    assert backend.captures == 1 + captures


def test_a_copy_has_graphs_of_its_own_and_they_are_freed_with_their_network() -> None:
    net = conv()
    with tape() as backend:
        attacks(net)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            twin[0].weight.mul_(2)
        points = attacks(twin)
        assert backend.captures == 2
        before, tensors = len(graphs._GRAPHS), weakref.ref(graphs._GRAPHS[id(twin)][1])
        gc.disable()
        try:
            with using("off"):
                plain = attacks(twin)
            del twin
            assert len(graphs._GRAPHS) == before - 1
            assert tensors() is None
        finally:
            gc.enable()
    assert same(points, plain)


def test_inputs_are_copied_before_the_first_step() -> None:
    net, ball = conv(), Ball(0.1)
    how: dict[str, Any] = {"ball": ball, "alpha": 0.03, "steps": 4, "loss": cross_entropy}
    with FrozenModel(net) as view:
        plain = [*path(view, X, X, Y, **how)]
    with tape() as backend, FrozenModel(net) as view:
        [*path(view, X, X, Y, **how)]
        x0, start, y = X.clone(), X.clone(), Y.clone()
        points = path(view, view.prepare(x0), view.prepare(start), y, **how)
        first = next(points)
        for t in (x0, start):
            t.fill_(torch.nan)
        y.fill_(10**6)
        assert same([first, *points], plain)
        assert backend.replays == 4


def test_a_path_within_a_path_of_the_same_form() -> None:
    net, ball = conv(), Ball(0.1)

    def run() -> list[Tensor]:
        with FrozenModel(net) as view:
            outer = path(view, X, X, Y, ball=ball, alpha=0.03, steps=3, loss=cross_entropy)
            points = []
            for x in outer:
                points += [x, ascend(view, x, Y, ball=ball, alpha=0.02, steps=2, random_start=False)]
            return points

    plain = run()
    with tape():
        for _ in range(3):
            assert same(run(), plain)


def test_losses_are_told_apart() -> None:
    net, ball = mlp(16), Ball(0.1)
    target = mlp(16, seed=1)(X).detach()
    cases = [(cross_entropy, Y), (divergence, target), (functools.partial(margin, kappa=0.5), Y)]
    cases += [(functools.partial(margin, kappa=50.0), Y), (margin, Y)]
    scale = torch.tensor(2.0)
    cases += [(lambda logits, y: scale * margin(logits, y), Y)]  # may change at any time: without a graph

    def run() -> list[Tensor]:
        with FrozenModel(net) as view:
            return [
                ascend(view, X, y, ball=ball, alpha=0.02, steps=2, random_start=False, loss=loss)
                for loss, y in cases
            ]

    plain = run()
    with tape() as backend:
        assert all(same(run(), plain) for _ in range(3))
        assert backend.captures == 5


def test_each_batch_size_has_its_graph_and_the_last_used_ones_are_kept() -> None:
    net, plain = mlp(16), []
    sizes = [12, 5, 12, 5, *range(1, 12), *range(1, 12), 12]
    for n in sizes:
        plain += [pgd(net, X[:n], Y[:n], eps=0.1, alpha=0.03, steps=2, random_start=False)]
    with tape() as backend, pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_MOST", 4)
        for n, expected in zip(sizes, plain, strict=True):
            assert same(pgd(net, X[:n], Y[:n], eps=0.1, alpha=0.03, steps=2, random_start=False), expected)
        (store,) = graphs._GRAPHS[id(net)][1].stores.values()
        assert len(store._graphs) == 4
    assert backend.captures == 2


class Deep(nn.Module):
    """A pass of its own; a network for one reason why a pass cannot be captured."""

    def __init__(self, run: Callable[["Deep", Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.passes, self.draws = run, 0, seeded(0)
        self.table: Tensor | None = None
        self.layers = mlp(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.run(self, x))
        return out


def counting(net: Deep, x: Tensor) -> Tensor:
    net.passes += 1
    return x * (1 + net.passes)


def cached(net: Deep, x: Tensor) -> Tensor:
    if net.table is None:
        net.table = torch.linspace(0.5, 1.5, 4, dtype=x.dtype)
    return x * net.table


# Why no graph is made, or nothing where one is.
PASSES: dict[str, tuple[Callable[[Deep, Tensor], Tensor], str]] = {
    "dropout": (lambda net, x: F.dropout(x), "draws random numbers"),
    "random": (lambda net, x: x * random.random(), "draws random numbers"),
    "own generator": (lambda net, x: x * torch.rand(1, generator=net.draws), "draws random numbers"),
    "branch": (lambda net, x: x if x.sum() > 0 else -x, "reads values of tensors"),
    "mask": (lambda net, x: x.index_put((x < 0.5,), x[x < 0.5] + 0.1), "reads values of tensors"),
    "counter": (counting, "attributes change"),
    "table": (cached, ""),
    "shape": (lambda net, x: x if len(x) > 1 else -x, ""),
    "index": (lambda net, x: x[:, :, torch.tensor([3, 1, 2, 0])], ""),
}


@pytest.mark.parametrize("name", PASSES)
def test_networks_that_cannot_be_captured_run_without_a_graph_and_it_is_said_once(name: str) -> None:
    run, reason = PASSES[name]

    def repeated() -> list[Tensor]:
        random.seed(0)
        net = Deep(run)
        with rng.scoped(0, "draws"):
            return [t for _ in range(3) for t in attacks(net)]

    state, said = random.getstate(), list[str]()
    try:
        plain = repeated()
        with tape() as backend, using("auto", said.append):
            assert same(repeated(), plain)
            told = status("cpu")
    finally:
        random.setstate(state)
    if reason:
        (line,) = said
        assert reason in line
        assert line.startswith("no CUDA graphs for Deep: ")
        assert backend.captures == 0
        assert told.startswith("off (Deep: ")
        assert reason in told
    else:
        assert not said
        assert backend.captures == 1
        assert told == "on"


def test_hooks_and_compiled_networks_run_without_a_graph() -> None:
    net, said = conv(), list[str]()
    with tape() as backend, using("auto", said.append):
        attacks(net)
        handle = net[0].register_forward_hook(lambda module, args, out: 2 * out)
        points = attacks(net)
        assert backend.captures == 1
        assert said == ["no CUDA graphs for Sequential: it has hooks, which run in Python"]
        handle.remove()
        attacks(net)
        assert backend.captures == 2
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            traced = torch.jit.trace(mlp(16), X)  # type: ignore[no-untyped-call]
        attacks(traced)
        assert backend.captures == 2
        assert said[1].endswith("it is compiled")
    net[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert same(points, attacks(net))


def test_half_precision_and_differentiated_steps_run_without_a_graph() -> None:
    net, ball = mlp(16), Ball(0.1)
    with tape() as backend:
        for _ in range(3):
            pgd(mlp(16).bfloat16(), X.bfloat16(), Y, eps=0.1, alpha=0.03, steps=2)
            start = X.clone().requires_grad_()
            with FrozenModel(net) as view:
                out = ascend(view, X, Y, ball=ball, alpha=0.03, steps=2, start=start)
            (gradient,) = torch.autograd.grad(out.sum(), start)
            assert bool(gradient.any())
    assert backend.captures == 0


def test_switches_of_torch_tell_graphs_apart() -> None:
    net = conv()
    with tape() as backend:
        attacks(net)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            attacks(net)
            assert backend.captures == 2
        attacks(net)
        assert backend.captures == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = [pgd(net, X, Y, eps=0.1, alpha=0.03, steps=2, random_start=False) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = pgd(net, X, Y, eps=0.1, alpha=0.03, steps=2, random_start=False)
    assert same(plain, [expected] * 3)


def test_mixed_precision() -> None:
    net, x = mlp(16).float(), X.float()

    def run(dtype: torch.dtype | None) -> Tensor:
        with FrozenModel(net, autocast=dtype) as view:
            return ascend(view, x, Y, ball=Ball(0.1), alpha=0.03, steps=3, random_start=False)

    plain = [run(d) for d in (None, torch.bfloat16)]
    with tape() as backend:
        for _ in range(3):
            assert same([run(d) for d in (None, torch.bfloat16)], plain)
    assert backend.captures == 2


def test_evaluations_are_counted_and_failures_raised_as_without_graphs() -> None:
    net, meter = conv(), Meter()
    with tape() as backend:
        for k in (3, 2, 5, 0):
            with FrozenModel(net, meter=meter) as view:
                ascend(view, X, Y, ball=Ball(0.1), alpha=0.03, steps=k)
        assert meter == Meter(gradients=12 * 10)
        assert backend.captures == 1
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\]"):
            pgd(net, X, Y.clamp_min(5), eps=0.1, alpha=0.03, steps=2)
        pgd(net, X, Y, eps=0.1, alpha=0.03, steps=2)
        assert backend.captures == 1
        assert backend.replays == 2 + 5 + 2
        with torch.no_grad():
            net[0].weight.fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            pgd(net, X, Y, eps=0.1, alpha=0.03, steps=2)
        assert backend.replays == 2 + 5 + 2 + 2


def test_views_within_views_have_tensors_of_their_own() -> None:
    net, ball = conv(), Ball(0.1)

    def run() -> list[Tensor]:
        results = []
        with FrozenModel(net, "train") as view:
            for _ in range(3):
                results += [ascend(view, X, Y, ball=ball, alpha=0.03, steps=2, random_start=False)]
                with FrozenModel(net, "eval") as inner:
                    results += [ascend(inner, X, Y, ball=ball, alpha=0.03, steps=2, random_start=False)]
            return results

    plain = run()
    with tape() as backend:
        assert same(run(), plain)
        assert backend.captures == 1


def test_a_capture_that_fails_leaves_everything_as_it_was() -> None:
    net, said = conv(), list[str]()
    plain, before = attacks(net, mode="train"), held(net, versions=False)

    def refuse(self: Tape, run: Callable[[], None], *rest: Any) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with tape() as backend, pytest.MonkeyPatch.context() as patch, using("auto", said.append):
        patch.setattr(Tape, "capture", refuse)
        assert same(attacks(net, mode="train"), plain)
        assert same(attacks(net, mode="train"), plain)
        assert backend.captures == 0
        assert same(before, held(net, versions=False))
        assert "operation not permitted when stream is capturing)" in status("cpu")
    (line,) = said
    assert line == (
        "no CUDA graphs for Sequential: its capture failed (operation not permitted when stream is capturing)"
    )


def test_off() -> None:
    net = mlp(16)
    with tape() as backend:
        attacks(net, cuda_graphs="off")
        with using("off"):
            attacks(net)
            assert status("cpu") == "off"
        assert backend.captures == 0
        assert status("cpu") == "on"
    assert status("cpu") == "off (no CUDA device)"
    with pytest.raises(ValueError, match="cuda_graphs must be"):
        pgd(net, X, Y, eps=0.1, alpha=0.03, steps=2, cuda_graphs="on")


@pytest.mark.parametrize("case", [pytest.param(CASES[p.id], id=p.id, marks=p.marks) for p in long(CASES)])
def test_training_by_every_method(case: Any) -> None:
    def trained() -> tuple[Any, int]:
        d = driver(case, conv())
        d.memory.update(copy.deepcopy(dict(case.own.memory)))
        for number in range(4):
            d.step(batch(number=number), Control(**case.control()), 0.1)
        return d.state(), d.meter.gradients

    plain = trained()
    with tape() as backend:
        state, gradients = trained()
    assert bool(backend.replays) == (case.name in ("atta", "awp", "cat", "fast", "nfgsm", "pgd_at", "trades"))
    assert gradients == plain[1]
    assert same(state.to_dict(), plain[0].to_dict())
