"""The library works with the user's own network: nothing of it changes, and the numbers are right."""

import copy
import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from awkward import KINDS, Flattening, awkward, held
from helpers import mlp, same, samples, shorten_autoattack, slow
from systems import PLAIN, batch, driver
from torch import Tensor, nn

from controlat import (
    Ball,
    criterion,
    fgsm,
    pgd,
    robustness,
)
from controlat.app.placement import place
from controlat.attacks.inner_problem import inner_problem
from controlat.control.space import Control
from controlat.dynamics import pullback, verify
from controlat.models.frozen.layout import LayoutWarning
from controlat.models.frozen.view import FrozenModel, runs_channels_last
from controlat.pmp import AdversarialLoss
from controlat.robust_accuracy import Extras, protocol
from controlat.robust_accuracy.source import Pair

EPS, ALPHA, U = 0.1, 0.03, {"alpha": 0.05, "steps": 2}
X, Y = samples(12, (1, 4, 4))
SMALL: dict[str, Any] = {"eps": EPS, "gamma": 0.01, "max_steps": 2, "batches": 4}
every = pytest.mark.parametrize("kind", KINDS)


def costate(net: nn.Module) -> Any:
    d = driver(PLAIN["pgd_at"], net)
    return pullback(d, batch(), Control(**U), 0.1, d.point(batch().indices))


# Everything public that is given a network, and may not change it.
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "pgd": lambda net: pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=2),
    "pgd, train": lambda net: pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=2, mode="train"),
    "fgsm": lambda net: fgsm(net, X, Y, eps=EPS),
    "robustness": lambda net: robustness(net, X, Y, eps=EPS, attacks=["pgd-2"], checks=0),
    "transfer, sweeps": lambda net: protocol(
        net, Pair(X, Y), Ball(EPS), attacks=["fgsm"], extras=Extras(0, 0, True, mlp(16))
    ),
    "transfer from": lambda net: protocol(
        mlp(16), Pair(X, Y), Ball(EPS), attacks=["fgsm"], extras=Extras(0, 0, False, net)
    ),
    "inner problem": lambda net: inner_problem(net, X, Y, Ball(EPS), steps=10),
    "criterion": lambda net: criterion(net, X, Y, U, **SMALL),
    "criterion, costate": lambda net: criterion(net, X, Y, U, form="costate", **SMALL),
    "criterion, free": lambda net: criterion(net, X, Y, U, method="free", **SMALL),
    "costate": costate,
    "verify": lambda net: verify(driver(PLAIN["pgd_at"], net), batch(), Control(**U), 0.1, directions=1),
}


# Each kind with every third call, and each call with every third kind; the others with all tests.
PAIRS = [
    (kind, call) if (i + j) % 3 == 0 else slow(kind, call)
    for i, kind in enumerate(KINDS)
    for j, call in enumerate(CALLS)
]


@pytest.mark.parametrize(("kind", "call"), PAIRS)
def test_a_public_call_leaves_the_very_network(kind: str, call: str) -> None:
    net = awkward(kind)
    if len(kind + call) % 2:
        net.eval()
    graphs = call not in ("costate", "verify")  # which move the parameters and put them back
    before = held(net, graphs)
    CALLS[call](net)
    after = held(net, graphs)
    assert after.keys() == before.keys()
    assert not [name for name in before if not same(before[name], after[name])]


@every
def test_an_error_of_the_network_s_own_leaves_it_too(kind: str) -> None:
    net, calls = awkward(kind), itertools.count()

    def fail(module: nn.Module, arguments: Any, output: Tensor) -> None:
        if next(calls) == 1:
            raise KeyError("mine")

    net.register_forward_hook(fail)
    before = held(net)
    with pytest.raises(KeyError, match="mine"):
        CALLS["pgd"](net)
    assert same(held(net), before)


def by_hand(trained: nn.Module, kind: str, mode: str = "eval", steps: int = 3) -> Tensor:
    """PGD without a start, written down, on a copy."""
    net = awkward(kind)
    net.load_state_dict(trained.state_dict(), strict=False)
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    net.train() if mode == "train" else net.eval()
    x = X.clone()
    for _ in range(steps):
        x.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(x), Y), x)
        x = torch.max(torch.min(x.detach() + ALPHA * g.sign(), X + EPS), X - EPS).clamp(0, 1)
    return x


@every
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_is_that_on_the_network_itself(kind: str, mode: str) -> None:
    net = awkward(kind)
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    found = pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=3, random_start=False, mode=mode)
    torch.testing.assert_close(found, by_hand(net, kind, mode), rtol=0, atol=1e-12)


@every
def test_a_loop_of_the_user_s_own_trains_as_without_the_library(kind: str) -> None:
    """Their optimiser, made before the first call, must move what the network runs on."""
    with_it, without = awkward(kind), awkward(kind)
    attacks: list[Callable[[nn.Module], Tensor]] = [
        partial(pgd, x=X, y=Y, eps=EPS, alpha=ALPHA, steps=3, random_start=False),
        partial(by_hand, kind=kind),
    ]
    first = copy.deepcopy(with_it.state_dict())
    for net, attack in zip((with_it, without), attacks, strict=True):
        net.train()
        sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for step in range(3):
            x = attack(net)
            torch.manual_seed(step)
            sgd.zero_grad()
            F.cross_entropy(net(x), Y).backward()
            sgd.step()
            if net is with_it:
                robustness(net, X, Y, eps=EPS, attacks=["pgd-2"], checks=0)
                criterion(net, X, Y, U, **SMALL)
    moved = [name for name, t in first.items() if not torch.equal(t, with_it.state_dict()[name])]
    named = with_it.named_parameters(remove_duplicate=False)
    assert {name for name, p in named if p.requires_grad and "bias" not in name} <= set(moved)
    for (name, a), b in zip(with_it.state_dict().items(), without.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_what_merges_in_eval_mode_agrees_with_its_own_labels() -> None:
    net = awkward("low rank")
    with torch.no_grad():
        labels = net(X).argmax(1)
    assert robustness(net, X, labels, eps=EPS, attacks=[], checks=0).clean.value == 1


def test_a_graph_of_the_user_s_own_survives_the_calls_between_its_passes() -> None:
    for training in (True, False):
        net = awkward("twice").train(training)
        loss = F.cross_entropy(net(X), Y)
        expected = torch.autograd.grad(loss, [*net.parameters()], retain_graph=True)
        for name in ("pgd", "pgd, train", "robustness", "criterion", "criterion, costate"):
            CALLS[name](net)
        assert same(torch.autograd.grad(loss, [*net.parameters()]), expected)


@every
def test_views_within_views_are_each_in_their_own_mode(kind: str) -> None:
    net, found = awkward(kind), []
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    before = held(net)
    with FrozenModel(net, "eval") as outer:
        alone = outer(X)
        with FrozenModel(net, "train") as inner:
            attacked = pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=3, random_start=False)
            found.append(inner(X))
        found.append(outer(X))
    with FrozenModel(net, "train") as view:
        expected = view(X)
    if kind != "replacing":  # a running mean that every pass moves, in eval mode too
        assert same(found, [expected, alone])
        torch.testing.assert_close(attacked, by_hand(net, kind), rtol=0, atol=1e-12)
    assert same(held(net), before)


# ---------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("kind", ["twice", "low rank", "checkpointed"])
def test_threads_that_share_a_network_get_the_numbers_of_one_after_another(kind: str) -> None:
    net = awkward(kind)
    around = nn.Sequential(nn.Identity(), net)  # shares the modules
    before = held(net)

    def job(i: int) -> Any:
        if i % 4 == 3:
            return criterion(net, X, Y, U, **SMALL).value
        start = torch.Generator().manual_seed(i)
        mode = ("eval", "train")[i % 2]
        which = around if i % 4 == 2 else net
        return pgd(which, X, Y, eps=EPS, alpha=ALPHA, steps=4, mode=mode, generator=start)

    expected = [job(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert same(list(pool.map(job, range(8))), expected)
    assert same(held(net), before)


def test_a_thread_that_would_wait_for_ever_is_told() -> None:
    one, two = mlp(16), mlp(16)
    with FrozenModel(one), ThreadPoolExecutor(1) as pool:

        def other() -> None:
            with FrozenModel(two), FrozenModel(one):
                pass

        with pytest.raises(RuntimeError, match=r"another thread works with this Sequential.*of its own"):
            pool.submit(other).result()
        with FrozenModel(two), FrozenModel(one):  # in one thread they may nest
            pass


# ----------------------------------------------------------------------------------------------------- layout


def flattening(channels: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Flattening().double()
    net.conv = nn.Conv2d(channels, 4, 3, padding=1).double()
    return net


def images(channels: int) -> Tensor:
    return samples(12, (channels, 4, 4))[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_needs_nchw_gets_it_and_is_told_of_once(channels: int) -> None:
    x = images(channels)
    calls: dict[str, Callable[..., Any]] = {
        "pgd": lambda net, **o: pgd(net, x, Y, eps=EPS, alpha=ALPHA, steps=2, random_start=False, **o),
        "train": lambda net, **o: pgd(
            net, x, Y, eps=EPS, alpha=ALPHA, steps=2, random_start=False, mode="train", **o
        ),
        "robustness": lambda net, **o: robustness(net, x, Y, eps=EPS, checks=5, **o).survived,
        "criterion": lambda net, **o: criterion(net, x, Y, U, form="costate", **SMALL, **o).value,
        "inner problem": lambda net, **o: inner_problem(net, x, Y, Ball(EPS), steps=10, **o).losses,
    }
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = call(flattening(channels), channels_last=False)
        net = flattening(channels)
        before = held(net)
        with pytest.warns(LayoutWarning, match=r"Flattening runs in NCHW layout only.*view size.*h.flatten"):
            found = call(net)
        assert same(found, expected), name
        assert same(call(net), expected), name  # and no second warning, which would be an error here
        assert same(held(net), before)


def test_training_falls_back_within_the_step() -> None:
    found = []
    for nhwc in (True, False):
        d = driver(PLAIN["pgd_at"], flattening(), channels_last=nhwc)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for i in range(2):
                d.step(batch(number=i), Control(alpha=0.0, steps=0), 0.1)
        found.append(d.model.state_dict())
        assert [w.category for w in told] == [LayoutWarning] * nhwc
    assert same(*found)  # running statistics too: they have seen each batch once


def test_an_error_in_both_layouts_is_the_network_s_own() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(5, 3)).double()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=1)


def test_a_network_is_placed_in_the_layout_that_it_runs_in() -> None:
    with pytest.warns(LayoutWarning):
        needs = place(flattening(3), "cpu", True, (3, 4, 4))
    assert needs.conv.weight.is_contiguous()
    assert not runs_channels_last(needs, (3, 4, 4))
    takes = place(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "cpu", True, (3, 4, 4))
    assert takes[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not takes[0].weight.is_contiguous()


def seen_layouts(net: nn.Module) -> set[bool]:
    """Whether the inputs of the convolution were in NHWC, as they come."""
    seen: set[bool] = set()
    net.conv.register_forward_pre_hook(lambda m, arguments: seen.add(arguments[0].is_contiguous()))  # type: ignore[union-attr,operator]
    return seen


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_part_of_an_evaluation_keeps_to_the_layout(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_autoattack(monkeypatch)

    def net(seed: int) -> nn.Module:
        found = flattening(3, seed)
        found.out = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
        found.forward = lambda x: found.out(found.norm(found.conv(x)).tanh())  # type: ignore[method-assign]
        return found

    one, two = net(0), net(1)
    seen = [seen_layouts(one), seen_layouts(two)]
    extras = Extras(5, 6, True, two)
    source, how = Pair(images(3), Y), {"attacks": ["fgsm", "cw-2"], "channels_last": channels_last}
    protocol(one, source, Ball(EPS), extras=extras, **how)  # type: ignore[arg-type]
    fgsm(one, images(3), Y, eps=EPS, channels_last=channels_last)
    phi = AdversarialLoss(images(3), Y, Ball(EPS), steps=2)
    if not channels_last:  # (its own pass is in the layout of the samples)
        phi.gradient(driver(PLAIN["pgd_at"], one, channels_last=False))
    assert seen == [{not channels_last}] * 2


# ----------------------------------------------------------------------------------- inference, jit, wrappers


def test_batches_of_inference_mode_are_as_good_as_others() -> None:
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
    assert x.is_inference()
    net = mlp(16)

    def calls(x: Tensor, y: Tensor) -> list[Any]:
        start, d = torch.Generator().manual_seed(0), driver(PLAIN["pgd_at"], mlp(16))
        b = batch()._replace(x=x, y=y, indices=torch.arange(12))
        return [
            pgd(net, x, y, eps=EPS, alpha=ALPHA, steps=2, generator=start),
            fgsm(net, x, y, eps=EPS, norm="l2"),
            robustness(net, x, y, eps=EPS, attacks=["cw-2"], checks=12).survived,
            criterion(net, x, y, U, form="costate", held_out=(x, y), **SMALL).value,
            inner_problem(net, x, y, Ball(EPS), steps=10).losses,
            verify(d, b, Control(**U), 0.1, directions=1).pairs,
            [f.gradients for (f,) in d.fields([b], Control(**U))],
            d.step(b, Control(**U), 0.1).loss,
        ]

    assert same(calls(x, y), calls(X, Y))


def test_a_network_of_inference_mode_is_attacked_and_not_trained() -> None:
    with torch.inference_mode():
        net = mlp(16)
    expected = pgd(mlp(16), X, Y, eps=EPS, alpha=ALPHA, steps=2, random_start=False)
    assert same(pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=2, random_start=False), expected)
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        criterion(net, X, Y, U, **SMALL)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double().eval()


WRAPPED: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(convolutional()),
    "traced": lambda: torch.jit.trace(convolutional(), X),  # type: ignore[no-untyped-call]
    "compiled": lambda: torch.compile(convolutional(), backend="eager"),
    "parallel": lambda: nn.DataParallel(convolutional()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_networks_give_the_numbers_of_the_network(kind: str) -> None:
    net, plain = WRAPPED[kind](), convolutional()
    before = held(net, versions=False)
    buffers = "1.running_mean", "1.running_var"
    hidden = tuple(f"the buffer {name}, which forward passes write to" for name in buffers)

    def calls(net: nn.Module) -> list[Any]:
        attack = partial(pgd, net, X, Y, eps=EPS, alpha=ALPHA, steps=3, random_start=False)
        found: list[Any] = [attack(), attack(), robustness(net, X, Y, eps=EPS, checks=0).survived]
        if kind != "traced":  # as traced, in eval mode
            found += [attack(mode="train"), criterion(net, X, Y, U, form="costate", **SMALL).value]
            checked = verify(driver(PLAIN["pgd_at"], net), batch(), Control(**U), 0.1, directions=1)
            if kind == "scripted":  # its BatchNorm runs unseen
                assert checked.dropped == hidden * (net is not plain)
            else:
                found.append(checked.pairs)
        return found

    assert same(calls(net), calls(plain))
    assert same(held(net, versions=False), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["scripted", "traced", "compiled"])
def test_single_layers_of_compiled_networks_cannot_be_asked_for(kind: str) -> None:
    net = WRAPPED[kind]()
    pgd(net, X, Y, eps=EPS, alpha=ALPHA, steps=1)
    with pytest.raises(ValueError, match=r"single layer is asked for.*give the network as it was before"):
        criterion(net, X, Y, {"alpha": 0.05, "steps": 2, "inner": 1}, method="yopo", **SMALL)


def test_distributed_data_parallel_is_sent_away(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(mlp(16))
        for call in ("pgd", "robustness", "criterion"):
            with pytest.raises(TypeError, match=r"DistributedDataParallel.*give \.module"):
                CALLS[call](net)
        CALLS["pgd"](net.module)
    finally:
        dist.destroy_process_group()


def test_lazy_layers_are_to_be_called_first() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double()
    for call in ("pgd", "robustness", "criterion"):
        with pytest.raises(ValueError, match=r"lazy layers.*call it on one batch first"):
            CALLS[call](net)
    net(X)
    CALLS["pgd"](net)


def test_checkpointed_layers_are_computed_with_the_frozen_weights() -> None:
    """Once by themselves, once by the backward pass; BatchNorm's statistics move in neither."""
    net, passes = awkward("checkpointed"), []
    net.blocks[0].register_forward_pre_hook(  # type: ignore[union-attr,operator]
        lambda m, arguments: passes.append(any(p.requires_grad for p in m.parameters()))
    )
    CALLS["pgd, train"](net)
    assert passes == [False] * 4
