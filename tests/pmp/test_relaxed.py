"""Relaxed controls: their derivative is what costates say, and their ends are roll-outs of plain controls."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, flat, same, samples, slow, trace
from rules import Follow
from systems import CASES, FOLLOWED, LONG, PLAIN, Case, constant, driver, each_optimizer, smooth, those
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.attacks.pgd import STEPS
from controlat.control.controller import OpenLoop
from controlat.control.cost import Meter
from controlat.control.space import Control, ControlSpace
from controlat.data import Split
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import (
    Batch,
    Context,
    Epoch,
    Method,
    Rows,
    Update,
)
from controlat.methods.cat import Cat
from controlat.methods.free import Free
from controlat.methods.pgd_at import PgdAT
from controlat.pmp.candidates import Candidates
from controlat.pmp.costate import backward
from controlat.pmp.hamiltonian import Gains, gains
from controlat.pmp.objective import Outcome
from controlat.pmp.relaxed import relaxed
from controlat.pmp.terminal import AdversarialLoss

SIZE, H, GAMMA, PER_EPOCH = (1, 4, 4), 1e-5, 0.01, 3
SETTINGS = {
    "plain": SGDSettings(0.0),
    "momentum": SGDSettings(0.9, weight_decay=1e-3),
    "Nesterov": SGDSettings(0.9, nesterov=True, weight_decay=1e-2),
}
every = pytest.mark.parametrize("case", LONG)
optimizers = each_optimizer(SETTINGS)
PHI = AdversarialLoss(*samples(8, SIZE, seed=9), Ball(0.1), steps=3)
GRID = Candidates.of((0.013,), 2)


def planned(case: Case, epochs: int = 2, rate: float = 0.1) -> RunSpec:
    """Pixels keep away from black and white, and no two step sizes are the same.

    Perturbations that are carried otherwise come to lie exactly where they are clipped: a kink.
    """
    x, y = samples(10, SIZE)
    spec = constant(case.control(), epochs=epochs, held_out=Split(*samples(8, SIZE, seed=5)))
    spec = replace(spec, data=Split(0.2 + 0.6 * x, y), rate=lambda t, T: rate * (1 - 0.6 * t / T))
    return replace(spec, controller=lambda t: case.control(alpha=0.007 + 0.0011 * t))


def recorded(case: Case, o: SGDSettings, epochs: int = 2, eps: float = 0.1, norm: str = "linf") -> Recording:
    d = driver(case, ball=Ball(eps, norm), optimizer=o, channels_last=False)
    return Recording.of(d, planned(case, epochs), stride=4)


class Mixed(NamedTuple):
    """G from costates, -dJ/dlambda from differences, names, and what was found on the way."""

    gap: float
    slope: float
    dropped: tuple[str, ...]
    looked: dict[int, Gains]
    norms: dict[int, float]


def mixing(rec: Recording, phi: AdversarialLoss = PHI, grid: Candidates = GRID, h: float = H) -> Mixed:
    """Every step goes towards the best control that is not its own."""
    price, whole = GAMMA * rec.spec.mean_rate(), rec.last - rec.first
    gap, others, looked, norms, dropped = 0.0, {}, {}, {}, ()
    with rec.put_back():
        for s in backward(rec, phi):
            g = gains(rec.driver, s.visit, s.costates, s.norms, grid)
            value = g.value(whole, price)
            i = 1 + int(value[1:].argmax()) if len(value) > 1 else 0
            gap += float(value[i])
            others[s.visit.number], looked[s.visit.number] = g.controls[i], g
            norms[s.visit.number], dropped = s.norms[whole], s.dropped
    ends = [relaxed(rec, others, part, phi).objective(price) for part in (h, -h)]
    return Mixed(gap, (ends[1] - ends[0]) / (2 * h), dropped, looked, norms)


def check(found: Mixed, dropped: tuple[str, ...] = ()) -> None:
    assert abs(found.gap) > 1e-6
    assert found.slope == pytest.approx(found.gap, rel=1e-6)
    assert found.dropped == dropped


# ------------------------------------------------------------------------------------------ mixing derivative


@each_optimizer(SETTINGS, ["Nesterov"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_derivative_of_the_objective_is_minus_the_sum_of_gains(name: str, o: SGDSettings) -> None:
    check(mixing(recorded(CASES[name], o)))


@pytest.mark.parametrize("name", ["pgd_at", "atta", "free", "nfgsm", "trades", "yopo"])
def test_along_the_controls_that_a_closed_loop_took_the_derivative_is_exact(name: str) -> None:
    """The controller is not differentiated: what is relaxed are the controls that were recorded."""
    case = CASES[name]
    d = driver(case, optimizer=SETTINGS["momentum"], channels_last=False)
    rec = Recording.of(d, replace(planned(case), controller=Follow(case)), stride=4)
    assert len({step.control for step in rec.steps}) == len(rec.steps)
    check(mixing(rec))


class Scripted(Cat):
    """CAT with validation results that are given: no progress after epochs 1 and 3."""

    def _validate(self, ctx: Epoch, k: int) -> int:
        return (5, 4, 6, 3, 9)[ctx.epoch]


@optimizers
def test_a_network_that_the_curriculum_puts_back_is_followed(o: SGDSettings) -> None:
    """Strength grows after an epoch without progress, from the best network so far, which is then saved.

    Epoch 2, at strength 1, is where epoch 4 goes on from: its steps are worth something through what is kept.
    """
    case = CASES["cat curriculum"]
    d = driver(Scripted(**case.options), optimizer=o, channels_last=False)
    rec = Recording.of(d, planned(case, epochs=5), stride=4)
    both = [(6, "reload"), (6, "save"), (12, "reload"), (12, "save")]
    assert [(n, what) for n, what, _ in rec.events] == sorted([(3, "save"), (9, "save"), (15, "save"), *both])
    found = mixing(rec)
    worth = [n for n, g in found.looked.items() if abs(g.value(15, 0.0)).max() > 1e-6]
    assert sorted(worth) == [6, 7, 8, 12, 13, 14]
    check(found)


@optimizers
def test_what_yopo_leaves_out_is_named_and_small(o: SGDSettings) -> None:
    found = mixing(recorded(CASES["yopo hamiltonian"], o))
    assert found.dropped == ("the input of the later layers",)
    assert 1e-6 < abs(found.slope - found.gap) / abs(found.slope) < 0.1


L2 = [*PLAIN, "fast previous", "yopo direct", "atta reset"]


@pytest.mark.parametrize("name", L2)
def test_smooth_steps_are_named(name: str) -> None:
    """Free follows its own l_2 steps; what is dropped elsewhere is small."""
    found = mixing(recorded(CASES[name], SETTINGS["momentum"], eps=0.4, norm="l2"))
    if CASES[name].own.drops_l2:
        assert found.dropped == ("the adversary's (l_2 steps)",)
        assert found.slope == pytest.approx(found.gap, rel=0.2)
    else:
        check(found)


def test_smooth_steps_of_phi_are_named() -> None:
    phi = replace(PHI, ball=Ball(0.4, "l2"))
    found = mixing(recorded(PLAIN["pgd_at"], SETTINGS["momentum"]), phi)
    assert found.dropped == ("the adversary's (l_2 steps of Phi)",)
    assert found.slope == pytest.approx(found.gap, rel=0.2)


@pytest.mark.parametrize("name", ["free", "fast previous", "atta"])
def test_perturbations_that_meet_the_edge_of_the_ball_are_followed(name: str) -> None:
    """Steps of many sizes in a small ball: many pixels are clipped, none where a kink would be."""
    case = CASES[name]
    rec = recorded(case, SETTINGS["momentum"], eps=0.011)
    store = rec.end.memory["delta"] if "delta" in rec.end.memory else rec.end.rows["delta"].values
    clipped = (store.abs() > 0.011 - 1e-9).double().mean()
    assert 0.1 < clipped < 1
    check(mixing(rec, replace(PHI, ball=Ball(0.011)), Candidates.of((0.0043, 0.0137), 1)))


def on_the_edge(name: str, steps: int, eps: float = 0.1) -> Mixed:
    """Steps of size eps: every pixel lies on the edge, or comes exactly to it. lambda goes forward alone."""
    case = CASES[name]._replace(knobs={"steps": steps})
    d = driver(case, ball=Ball(eps), optimizer=SETTINGS["momentum"], channels_last=False)
    spec = replace(planned(case, epochs=3), controller=lambda t: case.control(alpha=eps))
    rec = Recording.of(d, spec, stride=4)
    found, price = mixing(rec), GAMMA * spec.mean_rate()
    others = {n: g.controls[1 + int(g.value(9, price)[1:].argmax())] for n, g in found.looked.items()}
    j = [relaxed(rec, others, part, PHI).objective(price) for part in (0.0, H, 2 * H)]
    return found._replace(slope=(3 * j[0] - 4 * j[1] + j[2]) / (2 * H))


def test_a_perturbation_on_the_edge_can_only_move_inwards() -> None:
    """Two steps of eps from one edge: back to it with what it had, or to the other, which takes it away."""
    check(on_the_edge("atta", 2))


@pytest.mark.parametrize("name", ["free", "atta"])
def test_a_perturbation_that_comes_to_the_edge_from_inside_is_named(name: str) -> None:
    """Moves to either side are possible there: no costate describes both."""
    found = on_the_edge(name, 1)
    (told,) = found.dropped
    share = float(told.rpartition("(")[2].partition("%")[0]) / 100
    assert "carried perturbations lie on a clip" in told
    assert 0.1 < share < 0.9
    assert 1e-6 < abs(found.slope - found.gap) / abs(found.slope) < share


WINDOWS = [slow(0, 4), (1, 5), (2, 9), slow(4, 9)]


def window(case: Case, first: int, last: int, o: SGDSettings = SETTINGS["plain"]) -> Recording:
    """A part of three epochs."""
    d, spec = driver(case, optimizer=o, channels_last=False), planned(case, epochs=3)
    for _ in itertools.islice(rollout(d, spec), first):
        pass
    return Recording.of(d, spec, first=first, last=last, stride=2)


@each_optimizer(SETTINGS, ["Nesterov"])
@pytest.mark.parametrize("name", ["pgd_at", "free", "atta", "atta reset"])
@pytest.mark.parametrize(("first", "last"), WINDOWS)
def test_a_window_of_training_has_the_derivative_of_its_own_objective(
    name: str, first: int, last: int, o: SGDSettings
) -> None:
    """Phi at the end of the window and what the buffer will still do; not what a perturbation carries on."""
    carried = ("what the method carries beyond the end of a window",)
    check(
        mixing(window(CASES[name], first, last, o)), carried if CASES[name].own.carries and last < 9 else ()
    )


@every
@pytest.mark.parametrize(("first", "last"), [(1, 5), slow(4, 9)])
def test_lambda_0_repeats_a_window_to_the_bit(case: Case, first: int, last: int) -> None:
    """Also where samples of later steps carry something from before the window."""
    rec = window(case, first, last, SETTINGS["momentum"])
    assert relaxed(rec, best(rec), 0.0, PHI).phi == PHI.value(rec.driver)


@dataclass(frozen=True)
class Reverting(Free):
    """Free, with networks that are put back between epochs; the perturbation goes on."""

    saves: Mapping[int, str] = field(default_factory=lambda: {0: "a", 1: "b"})
    reloads: Mapping[int, str] = field(default_factory=lambda: {1: "a", 2: "a"})
    stops: int = -1

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        if ctx.epoch in self.saves:
            ctx.save(self.saves[ctx.epoch])
        if ctx.epoch in self.reloads:
            ctx.reload(self.reloads[ctx.epoch])
        if ctx.epoch == self.stops:
            ctx.stop("enough")


def reverting(method: Method, o: SGDSettings, epochs: int) -> Recording:
    d = driver(method, optimizer=o, channels_last=False)
    return Recording.of(d, planned(PLAIN["free"], epochs, rate=0.05), stride=2)


@each_optimizer(SETTINGS, ["Nesterov"])
@pytest.mark.parametrize(
    "reloads",
    [{1: "a", 2: "a"}, {1: "a", 2: "b"}, {2: "b"}, {1: "b", 2: "a"}, {0: "a", 3: "b"}],
    ids=str,
)
def test_costates_pass_through_networks_that_are_put_back(reloads: dict[int, str], o: SGDSettings) -> None:
    """Several times the same one too: the perturbation remembers the way to it."""
    rec = reverting(Reverting(reloads=reloads), o, 4)
    assert sum(what == "reload" for _, what, _ in rec.events) == len(reloads)
    check(mixing(rec))


def test_a_network_of_before_the_roll_out_takes_the_costate_with_it() -> None:
    """Saved in epoch 0, put back after epoch 2: what the steps between do to theta counts for nothing."""
    d = driver(Reverting(saves={0: "a"}, reloads={2: "a"}), optimizer=SETTINGS["plain"], channels_last=False)
    spec = planned(PLAIN["free"], 4)
    for _ in rollout(d, spec, until=1):
        pass
    rec = Recording.of(d, spec, first=3, stride=2)
    assert rec.events == [(9, "reload", "a")]
    check(mixing(rec))


@optimizers
def test_a_run_that_its_method_stops_is_followed_to_the_network_that_is_put_back(o: SGDSettings) -> None:
    rec = reverting(Reverting(saves={0: "a"}, reloads={1: "a"}, stops=1), o, 4)
    assert rec.last == 6
    assert rec.events[-1] == (6, "reload", "a")
    assert relaxed(rec, {}, 0.0, PHI).phi == PHI.value(rec.driver)
    check(mixing(rec))


class Carrying:
    """Samples carry something from epoch to epoch, until it is forgotten; steps = how strong it is."""

    controls = ControlSpace({"steps": STEPS}, cost=lambda u: 1)

    def __init__(self, masked: bool, forgets: int) -> None:
        self.masked, self.forgets = masked, forgets

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        if ctx.epoch == self.forgets:
            ctx.forget("own")

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        kept = torch.zeros_like(batch.x)
        if "own" in ctx.rows:
            values, seen = ctx.rows["own"]
            kept = torch.where(seen.view(-1, 1, 1, 1), values, 0.0) if self.masked else values
        size = dict(ctx.weights())["3.weight"].square().mean()
        if ctx.theta is None:
            size = size.detach()
        all_gather = torch.ones(len(batch.x), dtype=torch.bool)
        ctx.rows["own"] = Rows(0.5 * kept + u["steps"] * size * batch.x, all_gather)
        yield Update(lambda: F.cross_entropy(ctx.logits(batch.x + kept), batch.y))


@pytest.mark.parametrize("forgets", [-1, 1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_what_samples_carry_is_followed_until_it_is_forgotten(masked: bool, forgets: int) -> None:
    """0 where nothing is carried: a method that reads that without the mask has the same costates."""
    method = Carrying(masked, forgets)
    d = driver(method, optimizer=SETTINGS["momentum"], channels_last=False)
    spec = constant(Control(steps=2), epochs=3)
    check(mixing(Recording.of(d, spec, stride=2)))


class Remembering:
    """Carries a number from step to step, which a hook may set anew between epochs; steps = what is added."""

    controls = ControlSpace({"steps": STEPS}, cost=lambda u: 1)

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        if self.hook == "set" and "s" in ctx.memory:
            ctx.memory["s"] = torch.ones(1, dtype=torch.float64)
        if self.hook == "remove":
            ctx.memory.pop("s", None)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        s = ctx.memory.get("s", torch.ones(1, dtype=torch.float64))
        ctx.memory["s"] = 0.9 * s + 0.1 * u["steps"]
        yield Update(lambda: F.cross_entropy(s * ctx.logits(batch.x), batch.y))


@pytest.mark.parametrize("hook", ["none", "set", "remove"])
def test_memory_that_a_hook_sets_anew_has_no_costate_before_that(hook: str) -> None:
    d = driver(Remembering(hook), optimizer=SETTINGS["momentum"], channels_last=False)
    check(mixing(Recording.of(d, constant(Control(steps=1), epochs=3), stride=2)))


# ------------------------------------------------------------------------------------------ the ends: 0 and 1


def best(rec: Recording) -> dict[int, Control]:
    """Another control for every step, if the method has one."""
    found = {}
    for n, step in enumerate(rec.steps, rec.first):
        others = [v for v in GRID.around(rec.driver.method, step.control) if v != step.control]
        if others:
            found[n] = others[n % len(others)]
    return found


@every
def test_lambda_0_repeats_the_run_to_the_bit(case: Case) -> None:
    rec = recorded(case, SETTINGS["Nesterov"], epochs=3)
    d = rec.driver
    end, left, meter, counts, spent = d.snapshot(), trace(d.model), d.meter, d.meter.copy(), rec.spent.copy()
    for others in ({}, best(rec)):
        found = relaxed(rec, others, 0.0, PHI)
        assert found.phi == PHI.value(d)
        assert found.evaluations == sum(s.spent.gradients / s.samples for s in rec.steps)
        assert sum(s.spent.gradients for s in rec.steps) <= found.training_gradients <= counts.gradients
        assert same(d.snapshot(), end)
        assert same(trace(d.model), left)
        assert d.meter is meter
        assert (meter, rec.spent) == (counts, spent)


@those(lambda case: not case.own.counts)
def test_lambda_1_is_the_run_under_the_other_controls(case: Case) -> None:
    """But for whole numbers, as the accuracy that a curriculum looks at: they stay those of u."""
    rec = recorded(case, SETTINGS["momentum"], epochs=3)
    others = best(rec)
    end, left = rec.driver.snapshot(), trace(rec.driver.model)
    found = relaxed(rec, others, 1.0, PHI)
    assert same(rec.driver.snapshot(), end)
    assert same(trace(rec.driver.model), left)
    spec = replace(rec.spec, controller=lambda t: others[round(t * PER_EPOCH)])
    d = driver(case, optimizer=SETTINGS["momentum"], channels_last=False)
    steps = list(rollout(d, spec))
    assert found.phi == PHI.value(d)
    assert found.evaluations == pytest.approx(sum(s.spent.gradients / s.samples for s in steps))
    assert found.phi != PHI.value(rec.driver)


def test_steps_without_another_control_keep_theirs() -> None:
    case = PLAIN["pgd_at"]
    rec, v = recorded(case, SETTINGS["momentum"]), Control(alpha=0.05, steps=3)
    found = relaxed(rec, {2: v}, 1.0, PHI)
    plan = rec.spec.controller
    assert isinstance(plan, OpenLoop)
    spec = replace(rec.spec, controller=lambda t: v if round(t * PER_EPOCH) == 2 else plan(t))
    d = driver(case, optimizer=SETTINGS["momentum"], channels_last=False)
    list(rollout(d, spec))
    assert found.phi == PHI.value(d)
    assert relaxed(rec, {n: s.control for n, s in enumerate(rec.steps)}, 0.7, PHI).phi == PHI.value(
        rec.driver
    )
    assert relaxed(rec, {100: v}, 0.7, PHI).phi == PHI.value(rec.driver)


def noisy() -> nn.Module:
    """BatchNorm and dropout."""
    with rng.scoped(1, "bn"):
        first = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Dropout(0.2)
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(48, CLASSES)).double()


@dataclass
class Looking:
    """A cost that keeps the network that it was asked about."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)
    lower = 0.0

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        self.seen.append({name: t.clone() for name, t in driver.model.state_dict().items()})
        return 0.0

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        return [torch.zeros_like(p) for p in driver.parameters]

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        return ()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x.flatten(1))))))


def test_weights_that_are_tied_go_a_part_of_the_way_once() -> None:
    with rng.scoped(0):
        model = Tied().double()
    d = driver(PLAIN["pgd_at"], model, optimizer=SETTINGS["momentum"], channels_last=False)
    check(mixing(Recording.of(d, planned(PLAIN["pgd_at"]))))


@optimizers
@pytest.mark.parametrize("part", [0.3, 0.8, -0.1])
def test_one_step_goes_a_part_of_the_way(o: SGDSettings, part: float) -> None:
    """For one update this is the step with the mixed gradient; running statistics are mixed too."""
    case, v = PLAIN["pgd_at"], Control(alpha=0.05, steps=3)
    ends, gradients = [], []
    spec = planned(case)
    first = next(spec.batches(0))
    for control in (spec.control(first), v):
        d = driver(case, noisy(), optimizer=o, channels_last=False)
        start = [p.detach().clone() for p in d.parameters]
        gradients.append(d.field(first, control).gradients)
        d.step(first, control, spec.learning_rate(0, 0))
        ends.append({name: t.clone() for name, t in d.model.state_dict().items()})
    rec = Recording.of(driver(case, noisy(), optimizer=o, channels_last=False), spec, last=1)
    phi = Looking()
    relaxed(rec, {0: v}, part, phi)
    (found,) = phi.seen
    assert not torch.equal(ends[0]["1.running_mean"], ends[1]["1.running_mean"])
    for name, t in found.items():
        if t.is_floating_point():
            torch.testing.assert_close(t, (1 - part) * ends[0][name] + part * ends[1][name])
        else:
            assert same(t, ends[0][name])
    mixed = [
        (1 - part) * g + part * k + o.weight_decay * t for g, k, t in zip(*gradients, start, strict=True)
    ]
    rate = spec.learning_rate(0, 0) * (1 + o.momentum * o.nesterov)
    names = [name for name, _ in noisy().named_parameters()]
    expected = flat(t - rate * g for t, g in zip(start, mixed, strict=True))
    torch.testing.assert_close(flat(found[name] for name in names), expected, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------- costs, errors


@pytest.mark.parametrize("name", ["pgd_at", "trades", "yopo", "free", "atta"])
def test_costs_mix_linearly(name: str) -> None:
    rec = recorded(CASES[name], SETTINGS["momentum"])
    others = best(rec)
    d, sizes = rec.driver, [s.samples for s in rec.steps]
    cost = d.method.controls.cost
    n = [sum(cost(s.control) for s in rec.steps), sum(cost(v) for v in others.values())]
    for part in (0.0, 0.25, 0.5, 1.0):
        found = relaxed(rec, others, part, PHI)
        assert found.evaluations == pytest.approx((1 - part) * n[0] + part * n[1])
        assert found.objective(0.3) == pytest.approx(found.phi + 0.3 * found.evaluations)
        both = [cost(s.control) + (part > 0) * cost(others[i]) for i, s in enumerate(rec.steps)]
        assert found.training_gradients == sum(b * size for b, size in zip(both, sizes, strict=True))


def test_an_outcome_has_its_objective() -> None:
    assert Outcome(phi=0.5, evaluations=12.0).objective(0.01) == pytest.approx(0.62)
    assert Outcome(phi=0.5, evaluations=12.0).objective(0.0) == 0.5


def test_the_driver_is_left_at_its_end_after_an_error_too() -> None:
    class Failing(PgdAT):
        def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
            if u["steps"] == 3 and ctx.epoch == 1:
                raise RuntimeError("mine")
            yield from super().updates(ctx, batch, u)

    d = driver(Failing(), smooth(), optimizer=SETTINGS["momentum"])
    rec = Recording.of(d, planned(PLAIN["pgd_at"]), stride=2)
    meter, counts, left = d.meter, d.meter.copy(), trace(d.model)
    with pytest.raises(RuntimeError, match="mine"):
        relaxed(rec, dict.fromkeys(range(6), Control(alpha=0.05, steps=3)), 0.5, PHI)
    assert same(d.snapshot(), rec.end)
    assert same(trace(d.model), left)
    assert d.meter is meter
    assert meter == counts
