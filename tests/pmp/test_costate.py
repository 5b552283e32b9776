"""Costates of whole runs: against autograd through training and matrix powers; what a backward pass is."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, Counted, flat, same, samples, split
from systems import CASES, LONG, PLAIN, Case, constant, driver, each_optimizer, passes, smooth, trained_on
from torch import Tensor, nn
from torch.func import functional_call

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control, ControlSpace
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.methods import (
    Batch,
    Context,
    Epoch,
    Rows,
    Update,
)
from controlat.methods.pgd_at import PgdAT
from controlat.pmp.candidates import Candidates
from controlat.pmp.costate import CostateStep, backward, momentum_tail, terminal_costate
from controlat.pmp.hamiltonian import Gains, _by_gradients, _by_steps, gains
from controlat.pmp.terminal import AdversarialLoss

SIZE, RATE = (1, 4, 4), 0.1
SETTINGS = {
    "plain": SGDSettings(0.0),
    "heavy ball": SGDSettings(0.9),
    "Nesterov": SGDSettings(0.9, nesterov=True),
    "plain, decay": SGDSettings(0.0, weight_decay=1e-2),
    "heavy ball, decay": SGDSettings(0.9, weight_decay=1e-2),
    "Nesterov, decay": SGDSettings(0.8, nesterov=True, weight_decay=1e-2),
}
optimizers = pytest.mark.parametrize("o", SETTINGS.values(), ids=SETTINGS)
every = pytest.mark.parametrize("case", LONG)
PHI = AdversarialLoss(*samples(8, SIZE, seed=9), Ball(0.1), steps=3)
GRID = Candidates.of((0.017, 0.05), 3)


def planned(u: Control, n: int = 10, epochs: int = 2, **options: Any) -> RunSpec:
    """Three batches per epoch, the last one shorter; the rate changes with every step."""
    spec = constant(u, n, epochs=epochs, held_out=split(8, SIZE, seed=5), **options)
    return replace(spec, rate=lambda t, T: RATE * (1 - 0.7 * t / T))


def recorded(case: Case, o: SGDSettings = SETTINGS["heavy ball, decay"], **options: Any) -> Recording:
    d = driver(case, optimizer=o, channels_last=False)
    return Recording.of(d, planned(case.control()), **{"stride": 4, **options})


def passed(rec: Recording, *arguments: Any, **options: Any) -> dict[int, CostateStep]:
    """All that a backward pass yields, by the number of the step."""
    found = {}
    for s in backward(rec, *arguments, **options):
        found[s.visit.number] = s._replace(costates={h: p.copy() for h, p in s.costates.items()})
    return found


def vector(p: State) -> Tensor:
    return flat([*p.parameters, *p.momentum])


# --------------------------------------------------------------------- against autograd through the whole run


def last_point(d: Driver) -> Tensor:
    """The adversary that Phi is taken under."""
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if all(p.requires_grad for p in module.parameters()):
            seen.append(arguments[0].detach().clone())

    handle = d.model.register_forward_pre_hook(look)
    PHI.value(d)
    handle.remove()
    (x,) = seen
    return x


def unrolled(
    d: Driver, z: State, points: Sequence[tuple[Tensor, Tensor, float]], x: Tensor
) -> tuple[float, list[Tensor]]:
    """Phi after training by hand from z on given points, and its gradient in theta and v."""
    o, names = d.optimizer, [name for name, _ in d.model.named_parameters()]
    theta = start = [t.clone().requires_grad_() for t in z.parameters]
    v = buffers = [torch.zeros_like(t).requires_grad_() for t in theta]
    if z.momentum:
        v = buffers = [t.clone().requires_grad_() for t in z.momentum]

    def loss(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(d.model, dict(zip(names, theta, strict=True)), (x,)), y)

    for point, y, rate in points:
        g = torch.autograd.grad(loss(theta, point, y), theta, create_graph=True)
        g = tuple(a + o.weight_decay * t for a, t in zip(g, theta, strict=True))
        v = [o.momentum * b + a for a, b in zip(g, v, strict=True)]
        moved = [a + o.momentum * b for a, b in zip(g, v, strict=True)] if o.nesterov else v
        theta = [t - rate * m for t, m in zip(theta, moved, strict=True)]
    phi = loss(theta, x, PHI.y)
    found = torch.autograd.grad(phi, [*start, *buffers], allow_unused=True)
    kept = found if z.momentum else found[: len(start)]
    return phi.item(), [torch.zeros_like(start[0]) if g is None else g for g in kept]


@optimizers
def test_costates_are_minus_the_gradient_of_phi_through_training(o: SGDSettings) -> None:
    """Adversaries held fixed, as they are piecewise constant; theta_t and v_t at every step."""
    case = PLAIN["pgd_at"]
    rec, other = recorded(case, o), smooth()
    d, points = rec.driver, trained_on(other)
    for _ in rollout(driver(case, other, optimizer=o, channels_last=False), rec.spec):
        pass
    x, total = last_point(d), rec.last
    labels = [b.y for e in range(rec.spec.epochs) for b in rec.spec.batches(e)]
    given = list(zip(points, labels, [s.rate for s in rec.steps], strict=True))
    assert len(given) == total == 6
    assert len({rate for *_, rate in given}) == total
    value, seen = PHI.value(d), 0
    for s in backward(rec, PHI):
        visit, p = s.visit, s.costates[total]
        z = d.point(visit.batch.indices)
        before = pullback(d, visit.batch, visit.control, visit.rate, p).costate
        phi, found = unrolled(d, z, given[visit.number :], x)
        assert phi == pytest.approx(value, rel=1e-12)
        assert float((vector(before) + flat(found)).norm() / flat(found).norm()) < 1e-9
        for mine, theirs in zip([*before.parameters, *before.momentum], found, strict=True):
            torch.testing.assert_close(mine, -theirs, rtol=1e-8, atol=1e-11)
        if visit.number == total - 1:
            assert not vector(p)[sum(t.numel() for t in p.parameters) :].any()  # v_T is worth nothing
        seen += 1
    assert seen == total


# -------------------------------------------------------------------------------------- against matrix powers


@dataclass(frozen=True)
class Quadratic:
    """1/2 mean |W x|^2 of a linear network without bias, on the same inputs in every step."""

    x: Tensor
    controls = ControlSpace({}, cost=lambda u: 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        yield Update(lambda: 0.5 * ctx.logits(self.x).square().sum(1).mean())


@dataclass(frozen=True)
class Linear:
    """Phi = <c, W>."""

    c: Tensor
    lower = -float("inf")

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        return float((self.c * driver.parameters[0].detach()).sum())

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        return [self.c.clone()]

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        return ()


def linear() -> nn.Module:
    with rng.scoped(0, "linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES, bias=False)).double()


def quadratic(o: SGDSettings, rate: float = RATE, **options: Any) -> tuple[Recording, Linear, Tensor]:
    """24 steps, the cost, and A of the loss 1/2 W A W'."""
    x = samples(20, SIZE, seed=1)[0]
    d = driver(Quadratic(x), linear(), optimizer=o)
    c = torch.randn(CLASSES, 16, generator=rng.generator(0, "c"), dtype=torch.float64)
    rec = Recording.of(d, constant(Control(), 32, epochs=3, rate=rate), **{"stride": 5, **options})
    return rec, Linear(c), x.flatten(1).T @ x.flatten(1) / len(x)


def stepper(o: SGDSettings, hessian: Tensor, rate: float) -> Tensor:
    """M of z' = M z with z = (theta, v): of one row of W, (32, 32)."""
    one = torch.eye(16, dtype=torch.float64)
    a = hessian + o.weight_decay * one
    if o.nesterov:  # theta' = theta - rate (g + mu v')
        top = torch.cat([one - rate * (1 + o.momentum) * a, -rate * o.momentum**2 * one], 1)
    else:
        top = torch.cat([one - rate * a, -rate * o.momentum * one], 1)
    return torch.cat([top, torch.cat([a, o.momentum * one], 1)])


def worth_of_the_buffer(o: SGDSettings, rates: Sequence[float]) -> float:
    """By how much a unit buffer moves theta in the updates to come, without gradients: torch's optimiser."""
    theta = torch.zeros(1, dtype=torch.float64)
    sgd = torch.optim.SGD([theta], lr=0.0, momentum=o.momentum, nesterov=o.nesterov)
    sgd.state[theta]["momentum_buffer"] = torch.ones_like(theta)
    for rate in rates:
        theta.grad, sgd.param_groups[0]["lr"] = torch.zeros_like(theta), rate
        sgd.step()
    return float(theta)


@optimizers
@pytest.mark.parametrize("stop", [None, 17])
def test_a_quadratic_has_costates_in_closed_form(o: SGDSettings, stop: int | None) -> None:
    """p_t = (M')^(T - t) p_T; before the end of training p_T has a part for what the buffer will still do."""
    rec, phi, hessian = quadratic(o, last=stop)
    m, end = stepper(o, hessian, RATE), rec.last
    assert end == (stop or 24)
    left = worth_of_the_buffer(o, [RATE] * (24 - end)) if o.momentum else 0.0
    assert (left < 0) == bool(stop and o.momentum)
    last = torch.cat([-phi.c, -left * phi.c], 1)
    found = passed(rec, phi)
    assert sorted(found) == list(range(end))
    for number, s in found.items():
        p = torch.cat([s.costates[end].parameters[0], *s.costates[end].momentum], 1)
        expected = last @ torch.linalg.matrix_power(m, end - number - 1)
        torch.testing.assert_close(p, expected[:, : p.shape[1]], rtol=1e-10, atol=1e-12)
        assert s.norms[end] == pytest.approx(float(p.norm()), rel=1e-12)
        assert s.dropped == ()


@optimizers
@pytest.mark.parametrize("first", [0, 3])
def test_windows_end_with_what_the_buffer_will_do_and_begin_anew(o: SGDSettings, first: int) -> None:
    """Windows are counted from the first step; the last one may be shorter, and ends with training."""
    rec, phi, hessian = quadratic(o, first=first)
    m = stepper(o, hessian, RATE)
    horizons = (1, 5, 9)
    for number, s in passed(rec, phi, horizons).items():
        assert sorted(s.costates) == list(horizons)
        for h, q in s.costates.items():
            end = min(first + ((number - first) // h + 1) * h, 24)
            left = worth_of_the_buffer(o, [RATE] * (24 - end)) if o.momentum else 0.0
            last = torch.cat([-phi.c, -left * phi.c], 1)
            p = torch.cat([q.parameters[0], *q.momentum], 1)
            expected = last @ torch.linalg.matrix_power(m, end - number - 1)
            torch.testing.assert_close(p, expected[:, : p.shape[1]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("o", [SETTINGS["heavy ball"], SETTINGS["Nesterov"], SGDSettings(0.3)], ids=str)
@pytest.mark.parametrize("name", ["pgd_at", "free"])
def test_the_buffers_costate_is_that_of_the_free_buffer(o: SGDSettings, name: str) -> None:
    """At every window's end: with the rates to come, and as many updates for a step as the method makes."""
    u = CASES[name].control()
    spec = planned(u, epochs=14)  # 42 steps, the rate changes with every one
    d = driver(CASES[name], optimizer=o, channels_last=False)
    rec = Recording.of(d, spec, last=40)
    moves = {"pgd_at": 1, "free": int(u["steps"])}[name]
    for number in (1, 20, 33, 37, 40):
        updates = [n for n in range(number, 42) for _ in range(moves if n < 40 else 1)]
        rates = [spec.learning_rate(*divmod(n, 3)) for n in updates]
        assert len(set(rates)) > 1
        assert momentum_tail(rec, number) == pytest.approx(-worth_of_the_buffer(o, rates), rel=1e-12)


def test_at_the_end_of_training_the_buffer_is_worth_nothing() -> None:
    for o in (SETTINGS["heavy ball"], SETTINGS["Nesterov"], SETTINGS["plain"]):
        rec = recorded(PLAIN["pgd_at"], o)
        assert momentum_tail(rec, rec.last) == 0
        gradient = PHI.gradient(rec.driver)
        p = terminal_costate(rec.driver, gradient, 0.0)
        assert same(p.parameters, [-g for g in gradient])
        assert len(p.momentum) == (len(gradient) if o.momentum else 0)
        assert not any(t.any() for t in p.momentum)


def test_far_from_the_end_the_buffer_is_worth_the_geometric_series() -> None:
    spec = constant(PLAIN["pgd_at"].control(), 10, epochs=300, rate=0.1)
    for o, factor in ((SETTINGS["heavy ball"], 9.0), (SETTINGS["Nesterov"], 8.1)):
        d = driver(PLAIN["pgd_at"], optimizer=o, channels_last=False)
        rec = Recording.of(d, spec, last=2)
        assert momentum_tail(rec, 2) == pytest.approx(0.1 * factor, rel=1e-12)


@dataclass(frozen=True)
class Halving(PgdAT):
    """PGD training that halves theta in place between epochs, or what it carries."""

    memory: bool = False

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        with torch.no_grad():
            if self.memory:
                ctx.memory.setdefault("mean", torch.ones(3, dtype=torch.float64)).mul_(0.5)
            else:
                for p in ctx.model.parameters():
                    p.mul_(0.5)


@pytest.mark.parametrize(("memory", "name"), [(False, "theta"), (True, "mean")])
def test_what_a_hook_does_in_place_is_named(memory: bool, name: str) -> None:
    d = driver(Halving(memory=memory), linear(), channels_last=False)
    rec = Recording.of(d, planned(Control(alpha=0.05, steps=2), epochs=3))
    last = list(backward(rec, PHI))[-1]
    assert last.dropped == (f"what the method did to {name} between epochs",)


# ------------------------------------------------------------------------------------------ the backward pass


@pytest.mark.parametrize("name", ["pgd_at", "free", "atta"])
@pytest.mark.parametrize("first", [0, 1])
def test_several_horizons_in_one_pass_are_those_of_each_alone(name: str, first: int) -> None:
    d = driver(CASES[name], channels_last=False)
    spec = planned(CASES[name].control(), epochs=3)
    for _ in itertools.islice(rollout(d, spec), first):
        pass
    rec = Recording.of(d, spec, first=first, stride=4)
    whole = rec.last - first
    together = passed(rec, PHI, (4, 1, 2, whole, 2))
    assert sorted(together) == list(range(first, rec.last))
    for h in (1, 2, 4, whole):
        alone = passed(rec, PHI, [h])
        assert sorted(alone) == sorted(together)
        for number, s in alone.items():
            assert list(s.costates) == list(s.norms) == [h]
            assert s.norms[h] == pytest.approx(together[number].norms[h], rel=1e-12)
            mine, theirs = s.costates[h], together[number].costates[h]
            assert set(mine.memory) == set(theirs.memory)
            assert set(mine.rows) == set(theirs.rows)
            torch.testing.assert_close(flat(mine.tensors()), flat(theirs.tensors()), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["pgd_at", "free", "atta"])
@pytest.mark.parametrize("looked", [(1, 4), (5,), (0,), (3, 2)])
def test_looking_at_some_steps_gives_what_looking_at_all_gives(name: str, looked: tuple[int, ...]) -> None:
    rec, horizons = recorded(CASES[name]), (1, 3, 6)
    meters = Meter(), Meter()
    every = passed(rec, PHI, horizons, meter=meters[0])
    some = passed(rec, PHI, horizons, steps=looked, meter=meters[1])
    assert min(some) == min(looked)
    for number in looked:
        assert sorted(some[number].costates) == list(horizons)
    for number, s in some.items():
        for h, p in s.costates.items():
            torch.testing.assert_close(
                flat(p.tensors()), flat(every[number].costates[h].tensors()), rtol=1e-10, atol=1e-14
            )
            assert any(n // h == number // h and n <= number for n in looked)  # else nobody needs it
    assert meters[1].gradients < meters[0].gradients


def test_what_is_looked_at_is_compared_a_few_times_for_each_step_however_long_the_run() -> None:
    """The windows of one and of four steps: none of them goes through all steps that are looked at."""

    def compared(steps: int) -> int:
        d = driver(PLAIN["pgd_at"], optimizer=SETTINGS["plain"], channels_last=False)
        rec = Recording.of(d, planned(Control(alpha=0.1, steps=1), 3, epochs=steps))
        looked = [Counted(n) for n in range(steps)]
        return Counted.during(lambda: list(backward(rec, PHI, (1, 4), steps=looked)))

    short, long = compared(16), compared(64)
    assert short > 0
    assert long < 1.5 * 4 * short  # a factor of 4 in steps, and log 4 more for bisection


def test_looking_at_nothing_costs_nothing() -> None:
    rec, meter = recorded(PLAIN["pgd_at"]), Meter()
    assert passed(rec, PHI, (1, 3), steps=(), meter=meter) == {}
    assert meter == Meter()


@pytest.mark.parametrize("o", [o for name, o in SETTINGS.items() if "decay" in name], ids=str)
@pytest.mark.parametrize("name", ["pgd_at", "awp", "free"])
def test_a_horizon_of_one_step_is_the_gradient_after_it(o: SGDSettings, name: str) -> None:
    rec = recorded(CASES[name], o, stride=1)
    d, spec = rec.driver, rec.spec
    rates = [spec.learning_rate(*divmod(number, 3)) for number in range(6)]
    for number, s in passed(rec, PHI, [1]).items():
        visit = rec.at(number)
        d.step(visit.batch, visit.control, visit.rate)
        p, gradient = s.costates[1], flat(PHI.gradient(d))
        torch.testing.assert_close(flat(p.parameters), -gradient, rtol=1e-10, atol=1e-14)
        assert bool(p.momentum) == (o.momentum > 0)
        assert not p.memory
        assert not p.rows
        if o.momentum:
            m = CASES[name].own.updates(visit.control)
            left = worth_of_the_buffer(o, [r for r in rates[number + 1 :] for _ in range(m)])
            torch.testing.assert_close(flat(p.momentum), -left * gradient, rtol=1e-9, atol=1e-14)


def test_a_costate_that_is_not_finite_is_an_error_with_step_and_horizon() -> None:
    """At W = 0 nothing moves, but every step backward multiplies the costate by 1e60 and more."""
    d = driver(Quadratic(samples(20, SIZE, seed=1)[0]), linear(), optimizer=SETTINGS["plain"])
    with torch.no_grad():
        d.parameters[0].zero_()
    rec = Recording.of(d, constant(Control(), 32, epochs=1, rate=1e60))
    phi = Linear(torch.ones(CLASSES, 16, dtype=torch.float64))
    steps = backward(rec, phi, (2, 8))
    assert [next(steps).visit.number for _ in range(3)] == [7, 6, 5]
    with pytest.raises(NonFiniteError, match=r"costate after step 4 \(horizon 8\) is not finite"):
        next(steps)  # 1e122 is finite, the square of 1e183 is not
    assert len(list(backward(rec, phi, (1, 2)))) == 8
    with pytest.raises(NonFiniteError, match=r"after step 7 \(horizon 1\)"):
        next(backward(rec, Linear(torch.full((CLASSES, 16), torch.nan).double()), (1, 2)))


@pytest.mark.parametrize("h", [0, -3, 2.5, "3"])
def test_horizons_below_one_step_are_refused(h: Any) -> None:
    with pytest.raises(ValueError, match=f"a horizon must be a whole number of at least one step, got {h!r}"):
        next(backward(recorded(PLAIN["pgd_at"]), PHI, (2, h)))


@pytest.mark.parametrize("looked", [(99,), (-1, 2)])
def test_steps_that_the_roll_out_does_not_have_are_refused(looked: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the roll-out has the steps 0\.\.5, not"):
        next(backward(recorded(PLAIN["pgd_at"]), PHI, steps=looked))


def test_a_horizon_beyond_the_roll_out_is_the_roll_out() -> None:
    rec = recorded(PLAIN["pgd_at"])
    mine, theirs = passed(rec, PHI, (100,)), passed(rec, PHI)
    for number, s in mine.items():
        (p,) = s.costates.values()
        assert same(p, theirs[number].costates[6])


@every
def test_a_consumer_may_move_the_driver_which_is_put_back(case: Case) -> None:
    """Between yields steps are taken, networks broken, stores emptied: costates stay."""
    rec = recorded(case)
    d, meter, counts = rec.driver, rec.driver.meter, rec.driver.meter.copy()
    with rec.put_back():
        still = passed(rec, PHI, (2, 6))
    moved = {}
    with rec.put_back():
        for s in backward(rec, PHI, (2, 6)):
            assert d.meter is meter
            moved[s.visit.number] = s._replace(costates={h: p.copy() for h, p in s.costates.items()})
            d.meter = Meter()
            d.step(rec.spec.batches(1).__next__(), s.visit.control, 0.3)
            d.meter = meter
            d.memory.clear()
            d.rows.clear()
            d.kept.clear()
            with torch.no_grad():
                d.parameters[0].zero_()
    assert same(d.snapshot(), rec.end)
    assert d.meter is meter
    assert meter == counts
    for number, s in still.items():
        assert same(moved[number].costates, s.costates)
        assert (moved[number].norms, moved[number].dropped) == (s.norms, s.dropped)


@pytest.mark.parametrize("name", ["pgd_at", "atta", "cat curriculum", "fast early stop", "free", "awp"])
def test_the_driver_is_at_the_state_before_each_step(name: str) -> None:
    rec = recorded(CASES[name])
    for s in backward(rec, PHI, (2, 6)):
        v = s.visit
        assert rec.driver.step(v.batch, v.control, v.rate) == rec.steps[v.number]


# ------------------------------------------------------------------------------ between epochs: what hooks do


class Carrying:
    """Samples carry something that the loss uses; it is forgotten before the second epoch.

    What a sample carries is 0 where nothing is, so that the mask need not be looked at.
    """

    controls = ControlSpace({"steps": CASES["free"].method().controls["steps"]}, cost=lambda u: 1)

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        if ctx.epoch == 1:
            ctx.forget("own")

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        kept = ctx.rows["own"].values if "own" in ctx.rows else torch.zeros_like(batch.x)
        weight = dict(ctx.weights())["3.weight"].square().sum() * u["steps"]
        x = (batch.x + kept).detach() if ctx.theta is None else batch.x + kept
        carried = 0.1 * kept + 0.1 * weight * batch.x
        ctx.rows["own"] = Rows(carried, torch.ones(len(batch.x), dtype=torch.bool))
        yield Update(lambda: F.cross_entropy(ctx.logits(x), batch.y))


def test_what_is_forgotten_has_no_costate_before_that() -> None:
    """Steps of epoch 0 only: what samples carry there is lost, so that theta alone matters."""
    d = driver(Carrying(), optimizer=SETTINGS["plain"], channels_last=False)
    rec = Recording.of(d, planned(Control(steps=1), epochs=3))
    found = passed(rec, PHI)
    rows = {n: [r.values for r in s.costates[9].rows.values()] for n, s in found.items()}
    alive = {n: any(bool(t.any()) for t in values) for n, values in rows.items()}
    assert [n for n, some in alive.items() if some] == [5, 4, 3]  # read again in epoch 2
    assert not any(alive[n] for n in (0, 1, 2))  # forgotten
    assert not any(alive[n] for n in (6, 7, 8))  # nobody reads it


# ------------------------------------------------------------------------------------------------------ gains


GAINS = {name: CASES[name] for name in ("pgd_at", "pgd_at clean")}


def scored(rec: Recording, grid: Candidates = GRID, horizons: Sequence[int] = (2, 6)) -> list[Gains]:
    return [gains(rec.driver, s.visit, s.costates, s.norms, grid) for s in backward(rec, PHI, horizons)]


@each_optimizer(SETTINGS, ["plain", "heavy ball", "Nesterov, decay"])
@pytest.mark.parametrize("case", GAINS.values(), ids=GAINS)
def test_gains_from_gradients_are_those_from_steps(o: SGDSettings, case: Case) -> None:
    rec = recorded(case, o)
    for s in backward(rec, PHI, (1, 3, 6), steps=(2, 5)):
        if s.visit.number not in (2, 5):
            continue
        short = _by_gradients(rec.driver, s.visit, s.costates, GRID, Meter())
        long = _by_steps(rec.driver, s.visit, s.costates, GRID, Meter())
        assert set(short) == set(long)
        assert next(iter(short)) == next(iter(long)) == s.visit.control
        for v, (n, rewards, size) in short.items():
            assert n == long[v][0]
            assert rewards == pytest.approx(long[v][1], rel=1e-8, abs=1e-14)
            assert size == pytest.approx(long[v][2], rel=1e-8, abs=1e-18)


@every
def test_the_control_itself_comes_first_and_is_worth_nothing(case: Case) -> None:
    rec = recorded(case)
    d = rec.driver
    for s in backward(rec, PHI, (2, 6), steps=(1, 5)):
        if s.visit.number not in (1, 5):
            continue
        before, counts = d.snapshot(), d.meter.copy()
        g = gains(d, s.visit, s.costates, s.norms, GRID)
        assert same(d.snapshot(), before)
        assert d.meter == counts
        assert (g.number, g.epoch) == (s.visit.number, s.visit.batch.epoch)
        assert g.controls[0] == s.visit.control
        assert len(set(g.controls)) == len(g.controls)
        assert set(g.controls) == {s.visit.control, *GRID.around(d.method, s.visit.control)}
        assert sorted(g.rewards) == sorted(g.norms) == [2, 6]
        for h in (2, 6):
            assert g.rewards[h][0] == g.value(h, 0.7)[0] == g.cosine(h)[0] == g.sizes[0] == 0
            assert g.value(h, 0.0) == pytest.approx(g.rewards[h])
            price = g.value(h, 0.0) - g.value(h, 0.5)
            assert price == pytest.approx(0.5 * (g.evaluations - g.evaluations[0]))
            assert np.abs(g.cosine(h)).max() <= 1 + 1e-12
        spent = rec.steps[s.visit.number]
        assert g.evaluations[0] == spent.spent.gradients / spent.samples


def test_cosines_are_those_of_vectors() -> None:
    rec = recorded(PLAIN["pgd_at"])
    d = rec.driver
    for s in backward(rec, PHI):
        g = gains(d, s.visit, s.costates, s.norms, GRID)
        before, (p,) = d.snapshot(), s.costates.values()
        ends = []
        for v in (g.controls[0], g.controls[-1]):
            d.step(s.visit.batch, v, s.visit.rate)
            ends.append(vector(d.point(s.visit.batch.indices)))
            d.restore(before)
        moved = ends[1] - ends[0]
        cosine = float(moved @ vector(p) / moved.norm() / vector(p).norm())
        assert g.cosine(6)[-1] == pytest.approx(cosine, rel=1e-6)
        assert g.sizes[-1] == pytest.approx(float(moved @ moved), rel=1e-6)


@every
def test_evaluations_of_candidates_are_those_that_the_network_sees(case: Case) -> None:
    rec = recorded(case)
    s = next(iter(backward(rec, PHI)))
    _, backwards = passes(rec.driver.model)
    meter = Meter()
    g = gains(rec.driver, s.visit, s.costates, s.norms, GRID, meter)
    assert meter.gradients == sum(backwards)
    if not hasattr(case.method(), "prefixes"):  # else K + 1 for each, but one trajectory for all
        assert sum(g.evaluations) * len(s.visit.batch.x) == pytest.approx(meter.gradients)
    for v, n in zip(g.controls, g.evaluations, strict=True):
        backwards.clear()
        before = rec.driver.snapshot()
        rec.driver.step(s.visit.batch, v, s.visit.rate)
        rec.driver.restore(before)
        assert n == sum(backwards) / len(s.visit.batch.x)


def test_gains_are_plain_data_and_come_back() -> None:
    for name in ("pgd_at", "awp", "yopo"):
        for g in scored(recorded(CASES[name])):
            again = Gains.from_json(json.loads(json.dumps(g.to_json())))
            assert (again.number, again.epoch, again.controls) == (g.number, g.epoch, g.controls)
            assert dict(again.norms) == dict(g.norms)
            for mine, theirs in ((again.evaluations, g.evaluations), (again.sizes, g.sizes)):
                assert mine.dtype == theirs.dtype
                assert mine.tolist() == theirs.tolist()
            assert {h: r.tolist() for h, r in again.rewards.items()} == {
                h: r.tolist() for h, r in g.rewards.items()
            }
            assert again.value(2, 0.3).tolist() == g.value(2, 0.3).tolist()
            assert again.to_json() == g.to_json()


# ----------------------------------------------------------------------------------------------------- budget


@every
def test_a_backward_pass_costs_five_evaluations_per_update_beside_the_attack(case: Case) -> None:
    """Taking steps again costs at most the run; the product runs the step once, and 2 for every pass.

    Step sizes change, so that no carried perturbation comes back to a clip: to measure that costs 2 more.
    """
    spec = replace(planned(case.control()), controller=lambda t: case.control(alpha=0.007 + 0.0011 * t))
    d, meter = driver(case, optimizer=SETTINGS["heavy ball, decay"], channels_last=False), Meter()
    rec = Recording.of(d, spec, stride=4)
    run = sum(s.spent.gradients for s in rec.steps)
    points = [
        len(x)
        for b in [rec.at(n) for n in range(1, rec.last)]
        for x in _losses(rec.driver, b.batch, b.control, b.rate)
    ]
    rec.spent = Meter()
    list(backward(rec, PHI, meter=meter))
    phi = (PHI.steps + 1) * len(PHI.x)
    attacks = run - rec.steps[0].spent.gradients - sum(points)  # the first step needs no product
    assert meter.gradients == phi + attacks + 3 * sum(points)
    assert meter.gradients - phi - attacks <= 5 * sum(points)
    assert rec.spent.gradients <= run + 100  # and what hooks between epochs spend
    unit = sum(s.samples for s in rec.steps[1:])
    assert sum(points) >= unit


def _losses(d: Driver, batch: Batch, u: Control, rate: float) -> list[Tensor]:
    """What the network puts out in the passes that a loss of one step is made of."""
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if all(p.requires_grad for p in module.parameters()):
            seen.append(output)

    handle = d.model.register_forward_hook(look)
    meter, d.meter = d.meter, Meter()
    d.step(batch, u, rate)
    handle.remove()
    d.meter = meter
    return seen


def test_stride_one_takes_nothing_again() -> None:
    rec = recorded(PLAIN["pgd_at"], stride=1)
    list(backward(rec, PHI))
    assert rec.spent == Meter()


def test_costates_of_two_horizons_share_the_step() -> None:
    rec = recorded(PLAIN["pgd_at"])
    one, both = Meter(), Meter()
    list(backward(rec, PHI, (6,), meter=one))
    list(backward(rec, PHI, (6, 6, 20), meter=both))
    assert one == both
    both = Meter()
    list(backward(rec, PHI, (3, 6), meter=both))
    gradient = (PHI.steps + 1) * len(PHI.x)
    again = sum(s.samples for n, s in enumerate(rec.steps) if n not in (0, 3))
    assert both.gradients - one.gradients == gradient + 2 * again
