"""Methods on networks as users have them: what is trained, what is left alone, and the derivative."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from awkward import KINDS, Checkpointed, awkward, held
from helpers import same, split
from systems import PLAIN, Case, batch, constant, driver
from torch import Tensor, nn

from controlat import Ball, pgd
from controlat.dynamics import verify
from controlat.dynamics.recording import Recording
from controlat.pmp import AdversarialLoss
from controlat.pmp.costate import backward

every = pytest.mark.parametrize("kind", KINDS)
plain = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
PGD = PLAIN["pgd_at"]


def without_dropout(kind: str) -> nn.Module:
    net = awkward(kind)
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return net


# Options that a network needs: YOPO's first layer must put out a tensor.
NEEDED = {("recurrent", "yopo"): {"layer": "out"}}


def on(kind: str, case: Case) -> Case:
    return case._replace(options=NEEDED.get((kind, case.name), case.options))


def places(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that is trained, under every name."""
    return ((n, p) for n, p in net.named_parameters(remove_duplicate=False) if p.requires_grad)


@every
@plain
def test_scoring_leaves_no_trace_and_steps_keep_the_very_parameters(case: Case, kind: str) -> None:
    case = on(kind, case)
    d = driver(case, awkward(kind))
    d.model.train()
    before = {n: id(p) for n, p in places(d.model)}
    everything = held(d.model, versions=False)
    assert sum(float(g.abs().sum()) for g in d.field(batch(), case.control(), 0.1).gradients) > 0
    assert same(held(d.model, versions=False), everything)
    for i in range(2):
        assert 0 < d.step(batch(number=i), case.control(), 0.05).loss < 30
    assert {n: id(p) for n, p in places(d.model)} == before
    assert {*before.values()} == {id(p) for p in d.parameters}


@every
def test_steps_are_those_of_a_loop_written_by_hand(kind: str) -> None:
    """With scores and attacks in between; checkpointing makes no difference."""
    d, net = driver(PGD, without_dropout(kind)), without_dropout(kind)
    net.train()
    if isinstance(net, Checkpointed):
        net.again = False
    o, first = d.optimizer, {n: t.clone() for n, t in net.state_dict().items()}
    trained = [p for p in net.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.1, momentum=o.momentum, weight_decay=o.weight_decay)
    for i in range(3):
        b = batch(number=i, seed=i)
        d.step(b, PGD.control(steps=0), 0.1)
        pgd(d.model, b.x, b.y, eps=0.1, alpha=0.03, steps=1, mode=("eval", "train")[i % 2])
        d.field(b, PGD.control(), 0.1)
        sgd.zero_grad()
        F.cross_entropy(net(b.x), b.y).backward()
        sgd.step()
    for (name, t), expected in zip(d.model.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-9, atol=1e-12, msg=name)
    still = {n for n, t in first.items() if torch.equal(t, net.state_dict()[n])}
    assert not {n for n, _ in places(net) if "bias" not in n} & still  # the factors of a low rank too
    if kind == "low rank":
        assert still == {"1.weight", "3.weight"}


# Derivatives of these need the output of every layer, which checkpointing does not keep.
REFUSED = {("checkpointed", name) for name in ("free", "awp", "yopo")}


@every
@pytest.mark.parametrize("name", ["pgd_at", "free", "awp", "yopo"])
def test_the_derivative_of_a_step_is_exact(kind: str, name: str) -> None:
    case = on(kind, PLAIN[name])
    d, u = driver(case, awkward(kind)), case.control()
    if (kind, name) in REFUSED:
        with pytest.raises(RuntimeError, match=r"need the output of every layer: turn activation checkpoint"):
            verify(d, batch(), u, 0.1, directions=1)
        return
    found = verify(d, batch(), u, 0.1, directions=4)
    assert len(found.pairs) >= 1
    own = ("the buffer mean, which forward passes write to",)  # which training does not read
    assert found.dropped == (own if kind == "replacing" else ())
    assert found.share < 1e-7


@pytest.mark.parametrize("kind", ["aliased", "tied", "low rank", "checkpointed", "frozen", "recurrent"])
def test_costates_of_a_whole_run_leave_the_network(kind: str) -> None:
    d = driver(PGD, awkward(kind))
    p = constant(PGD.control(), 8, epochs=1)
    phi = AdversarialLoss(*split(8, (1, 4, 4), seed=9).take(torch.arange(8)), Ball(0.1), steps=2)
    recording = Recording.of(d, p)
    before = {n: id(t) for n, t in places(d.model)}
    swept = list(backward(recording, phi))
    assert len(swept) == 2
    assert all(s.norms[2] > 0 for s in swept)
    assert {n: id(t) for n, t in places(d.model)} == before
    merged = "weights that the network merges in eval mode (Phi)" in phi.dropped(d)
    assert merged == (kind == "low rank")


@pytest.mark.parametrize(
    ("kind", "layer", "told"),
    [
        ("recurrent", "cell", "the layer GRU puts out a tuple; name one that gives a tensor"),
        ("frozen", "stem.0", "nothing is trained up to the layer Conv2d; name a later one"),
    ],
)
def test_a_layer_that_yopo_cannot_start_from_is_refused(kind: str, layer: str, told: str) -> None:
    d = driver(PLAIN["yopo"]._replace(options={"layer": layer}), awkward(kind))
    with pytest.raises(ValueError, match=told):
        d.step(batch(), PLAIN["yopo"].control(), 0.1)
