"""The state z as one type: a vector, a copy that can be put back, and what a checkpoint holds."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import CLASSES, mlp, same
from systems import CASES, HEAVY, batch, driver, smooth
from torch import Tensor, nn

from controlat.attacks.balls import Ball
from controlat.dynamics.driver import Driver
from controlat.dynamics.finite_differences import verify
from controlat.dynamics.state import State
from controlat.dynamics.state_dict import Names

U, RATE = CASES["atta"].control(), 0.1


def moved(model: nn.Module | None = None, name: str = "atta", steps: int = 1) -> Driver:
    """A driver with momentum, and what its method carries."""
    d = driver(CASES[name], model, channels_last=False)
    for i in range(steps):
        d.step(batch(number=i), CASES[name].control(), RATE)
    return d


def bits(z: State) -> list[Tensor]:
    return [t.clone() for t in z.tensors()]


# ------------------------------------------------------------------------------------------------ as a vector


def test_the_vector_space_is_that_of_all_numbers_in_a_row() -> None:
    """Against one long vector: inner product, sum, length, zero."""
    layers = nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)
    d = moved(nn.Sequential(*layers).double())
    index = torch.arange(6)
    a = d.point(index).copy()
    d.step(batch(number=1), U, RATE)
    b = d.point(index).copy()
    assert len(a.momentum) == len(a.parameters) == 6
    assert len(a.statistics) == 2
    x, y = (torch.cat([t.flatten() for t in p.tensors()]) for p in (a, b))
    assert a.dot(b) == pytest.approx(float(x @ y), rel=1e-14)
    assert a.norm() == pytest.approx(float(x.norm()), rel=1e-14)
    sums = torch.cat([t.flatten() for t in a.plus(b, -0.3).tensors()])
    torch.testing.assert_close(sums, x - 0.3 * y, rtol=1e-12, atol=1e-17)
    assert a.zeros_like().norm() == 0
    assert same(a.like(a.tensors()), a)


def test_whole_numbers_that_a_method_carries_are_no_part_of_the_vector() -> None:
    z = State(parameters=[torch.ones(2)], memory={"count": torch.tensor(3), "scale": torch.tensor(2.0)})
    assert z.dot(z) == 6
    assert z.plus(z).memory == {"count": torch.tensor(3), "scale": torch.tensor(4.0)}
    assert set(z.zeros_like().memory) == {"scale"}


def test_rows_of_other_samples_are_not_added() -> None:
    d = moved()
    a, b = d.point(torch.tensor([0, 1])), d.point(torch.tensor([0, 2]))
    for operation in (a.dot, a.plus, lambda other: a.towards(other, 0.5)):
        with pytest.raises(ValueError, match="rows of two states are of other samples"):
            operation(b)
    assert a.dot(d.point(torch.tensor([0, 1]))) > 0


def test_a_sum_of_states_is_put_back_momentum_before_the_first_step_included() -> None:
    """z + h e, as finite differences need it; a direction has no more than what has a derivative."""
    d = driver(CASES["atta"], channels_last=False)
    index = torch.arange(6)
    e = d.point(index)
    e = e.like(torch.full_like(t, 2.0) for t in e.tensors())
    before = d.snapshot(index)
    assert before.momentum == []
    d.restore(before.plus(e, 0.5))
    assert all(bool((v == 1).all()) for v in d.momentum)
    for p, q in zip(d.parameters, before.parameters, strict=True):
        assert torch.equal(p, q + 1)
    d.restore(before)
    assert not d.sgd.state


# ------------------------------------------------------------------------------------------------ between two


def test_a_part_of_the_way_is_the_mean_of_everything_that_is_a_number() -> None:
    class Masked(nn.Module):
        """Adds a buffer with -inf in it, as masks of attention have it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.mask[0]

    d = moved(Masked().double())
    a = d.snapshot()
    d.step(batch(number=1), U, RATE)
    b = d.snapshot()
    c = a.towards(b, 0.25)
    for x, y, between in zip(a.tensors(), b.tensors(), c.tensors(), strict=True):
        torch.testing.assert_close(between, 0.75 * x + 0.25 * y, rtol=1e-14, atol=1e-16)
    assert same(c.model["mask"], a.model["mask"])
    assert int(c.model["net.1.num_batches_tracked"]) == 1
    assert same(a.towards(b, 0.0).tensors(), a.tensors())


# ---------------------------------------------------------------------------------------- copied and put back


def test_a_partial_copy_has_no_more_rows_than_were_asked_for() -> None:
    d = moved()
    whole, part = d.snapshot(), d.snapshot(torch.tensor([4, 1]))
    assert len(whole.rows["delta"].values) == 6
    assert same(part.rows["delta"].values, whole.rows["delta"].values[[4, 1]])
    assert same(replace(part, rows={}, index=None), replace(whole, rows={}))


class Tied(nn.Module):
    """Encodes and decodes with one weight, and has a frozen parameter and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(16, CLASSES)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x.flatten(1))))))


def test_tied_weights_are_one_tensor_of_the_state_with_two_names() -> None:
    d = moved(Tied().double())
    z = d.snapshot()
    assert d.names == Names(("inner.weight", "head.weight"), (), {"outer.weight": "inner.weight"})
    assert set(z.model) == set(d.model.state_dict())
    assert z.model["outer.weight"] is z.model["inner.weight"]
    assert verify(d, batch(margin=0.2, number=1), U, RATE, directions=3).share < 1e-7  # moves them together


def test_a_network_whose_state_dict_hides_what_is_trained_is_refused() -> None:
    class Wrapped(nn.Module):
        """Hands on the state dict of what it wraps."""

        def __init__(self, inner: nn.Module, copies: bool = False) -> None:
            super().__init__()
            self.inner, self.copies = inner, copies

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def state_dict(self, *arguments: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
            found = self.inner.state_dict()
            return {name: t.clone() for name, t in found.items()} if self.copies else found

        def load_state_dict(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
            return self.inner.load_state_dict(*arguments, **options)  # type: ignore[arg-type]

    d = moved(Wrapped(smooth()), "pgd_at")
    assert d.names.parameters[0] == "0.weight"
    z = d.snapshot()
    d.step(batch(number=1), CASES["pgd_at"].control(), RATE)
    d.restore(z)
    assert same(d.snapshot(), z)
    with pytest.raises(ValueError, match=r"state_dict of the Wrapped lacks one of its own tensors, of shape"):
        moved(Wrapped(smooth(), copies=True), "pgd_at")


def test_networks_that_are_kept_are_states_and_stay_as_they_are() -> None:
    d = moved()
    d.kept["best"] = d.state().network().copy()
    z, kept = d.snapshot(), bits(d.kept["best"])
    d.step(batch(number=1), U, RATE)
    assert z.kept["best"] is d.kept["best"]
    assert same(bits(d.kept["best"]), kept)
    d.restore_network(z.kept["best"])
    assert same(d.snapshot().model, z.model)
    assert same(d.snapshot().optimizer["state"], z.optimizer["state"])


# --------------------------------------------------------------------------------------------- in checkpoints


def test_a_state_comes_back_from_what_checkpoints_hold(tmp_path: object) -> None:
    d = moved(Tied().double())
    d.kept["best"] = d.state().network().copy()
    d.stopped, d.controller_memory = "enough", {"steps": [1, 2], "since": {"epoch": 3}}
    z = d.snapshot()
    torch.save(z.to_dict(), file := f"{tmp_path}/z.pt")
    found = torch.load(file, weights_only=True)
    assert set(found) == {"model", "optimizer", "memory", "rows", "kept", "stopped", "controller"}
    assert same(State.from_dict(found, d.names), z)
    other = driver(CASES["atta"], Tied().double(), channels_last=False)
    other.restore(State.from_dict(found, other.names))
    assert same(other.snapshot(), z)
    u = CASES["atta"].control(alpha=0.02)
    assert other.step(batch(number=1), u, RATE) == d.step(batch(number=1), u, RATE)
    assert same(other.snapshot(), d.snapshot())


def test_checkpoints_of_before_lack_what_came_later() -> None:
    d = moved(smooth(), "pgd_at")
    found = {
        name: part
        for name, part in d.snapshot().to_dict().items()
        if name in ("model", "optimizer", "memory")
    }
    z = State.from_dict(found, d.names)
    assert (z.rows, z.kept, z.stopped, z.controller) == ({}, {}, "", {})
    assert "controller" not in z.to_dict()
    d.restore(z)
    assert same(d.snapshot(), z)


def test_what_a_controller_carries_is_a_part_of_the_state_and_no_others_to_write_to() -> None:
    d = Driver(mlp(), CASES["pgd_at"].method(), driver(CASES["pgd_at"]).ball, HEAVY)
    assert d.controller_memory == {}
    d.controller_memory["seen"] = [0.5]
    z = d.snapshot()
    d.controller_memory["seen"].append(0.25)
    assert z.controller == {"seen": [0.5]}
    d.restore(z)
    d.controller_memory["seen"].append(1.0)
    assert z.controller == {"seen": [0.5]}


def test_processes_that_stop_for_other_reasons_of_one_length_differ() -> None:
    d = moved(smooth(), "pgd_at")
    prints = []
    for d.stopped in ("loss rises", "loss falls", "loss rises"):
        prints.append(torch.stack([t.double() for t in d.fingerprint()]))
    assert same(prints[0], prints[2])
    assert not same(prints[0], prints[1])
    d.momentum[0].add_(1.0)
    assert not same(torch.stack([t.double() for t in d.fingerprint()]), prints[2])


# ------------------------------------------------------------------------------------- put back by copying


def test_a_network_of_nothing_but_parameters_is_put_back_by_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as torch's own loading, and the same tensors."""
    d, other = (Driver(mlp(), CASES["pgd_at"].method(), Ball(0.3), HEAVY) for _ in range(2))
    before = d.snapshot()
    for i in range(2):
        d.step(batch(number=i, shape=(1, 2, 2)), CASES["pgd_at"].control(), RATE)
    after, tensors = d.snapshot(), [p.data_ptr() for p in d.parameters]
    other.model.load_state_dict(after.model)
    other.sgd.load_state_dict(after.copy().optimizer)
    d.restore(before)
    assert same(d.state().to_dict(), before.to_dict())
    assert not d.sgd.state
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: pytest.fail("loaded"))
    d.restore(after)
    assert same(d.model.state_dict(), other.model.state_dict())
    assert same(d.sgd.state_dict(), other.sgd.state_dict())
    assert [p.data_ptr() for p in d.parameters] == tensors
    d.momentum[0].zero_()
    assert after.momentum[0].abs().sum() > 0  # a copy


def test_what_a_user_does_on_loading_is_done() -> None:
    d, loaded = Driver(mlp(), CASES["pgd_at"].method(), Ball(0.3)), []
    z = d.snapshot()
    d.model.register_load_state_dict_post_hook(lambda *_: loaded.append(1))
    d.restore(z)
    assert loaded == [1]
