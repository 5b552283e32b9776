"""Closed loops by name: what they decide, against closed forms and the criterion; one run, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same, split
from systems import CASES, PLAIN, Case, constant, driver
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment, as_schedule
from controlat.control.cost import Meter
from controlat.control.schedule_text import FAMILIES
from controlat.control.space import Control, ControlSpace, Knob
from controlat.data import Split
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.methods import Epoch
from controlat.methods import build as method_of
from controlat.methods.pgd_at import PgdAT
from controlat.pmp import WEIGHT, Candidates, controllers, epoch_scale, examine, score, training_probe
from controlat.pmp.controllers.greedy import Greedy
from controlat.pmp.controllers.horizon import Horizon
from controlat.pmp.controllers.ratio import Ratio
from controlat.pmp.terminal import AdversarialLoss, build_terminal

PER_EPOCH, EPOCHS = 3, 3
BALL = Ball(0.1)
TEXTS = (
    "greedy:gamma=0.01,probe=8,alpha=0.03:0.1,steps=0..3",
    "horizon:h=2,points=8,alpha=0.03:0.1,steps=0..3",
    "ratio:threshold=1.0001,most=3,probe=8,alpha=0.05",
)
NAMES = ("pgd_at", "atta reset", "cat curriculum", "free", "yopo")


def looped(case: Case, text: str) -> tuple[Driver, RunSpec]:
    if "alpha" not in case.method().controls:
        text = text.replace("alpha=0.03:0.1,", "")
    if case.method().controls["steps"].low > 0:
        text = text.replace("steps=0..3", "steps=1..3")
    loop = controllers.build(text, method=case.method(), ball=BALL)
    spec = constant(case.control(), epochs=EPOCHS, held_out=split(8, (1, 4, 4), seed=5))
    return driver(case, channels_last=False), replace(spec, controller=loop)


def state(d: Driver) -> dict[str, Any]:
    """z without what the controller remembers, and without rows."""
    return replace(d.snapshot(), controller={}, rows={}).to_dict()


# ------------------------------------------------------------------------------------------- what is decided


@pytest.mark.parametrize("name", [*NAMES, "trades", "fast"])
def test_greedy_takes_the_largest_value_of_the_criterion_at_the_same_state(name: str) -> None:
    case = CASES[name]
    space = case.method().controls
    values: dict[str, Any] = {"alpha": (0.01, 0.05, 0.2), "steps": range(4), "beta": (1.0, 6.0)}
    candidates = Candidates({knob: v for knob, v in values.items() if knob in space})
    gamma, rate, mean = 0.002, lambda t, T: 0.1 + 0.05 * t, 0.1 + 0.05 * (PER_EPOCH * EPOCHS / 2) / PER_EPOCH
    spec = constant(case.control(), epochs=EPOCHS, rate=0.1, held_out=split(8, (1, 4, 4), seed=5))
    loop = Greedy(method=case.method(), candidates=candidates, gamma=gamma, probe=8)
    spec = replace(spec, rate=rate, controller=loop)  # type: ignore[arg-type]
    d, states = driver(case, channels_last=False), dict[int, State]()
    before, spent = d.meter.copy(), 0
    decided = {}
    for e in range(EPOCHS):
        states[e] = d.snapshot()
        steps = list(rollout(d, spec, epoch=e, until=e + 1))
        assert len({step.control for step in steps}) == 1, "it is held for the epoch"
        decided[e], spent = steps[0].control, spent + sum(step.spent.gradients for step in steps)
    u, scored = loop.first, 0
    for e in range(EPOCHS):
        other = driver(case, channels_last=False)
        other.restore(states[e])
        probe = training_probe(spec.data, 8, batch_size=spec.batch_size, epoch=e)
        eta = 0.1 + 0.05 * (e + 0.5)
        scale = eta / mean / (1 - 0.9)
        assert epoch_scale(other, spec, e) == pytest.approx(scale)
        surface = score(
            other, probe, u, candidates, scale=epoch_scale(other, spec, e), rate=spec.mean_rate(e)
        )
        values_ = surface.reward("norm") - gamma * surface.evaluations
        assert values_[surface.controls.index(decided[e])] == values_.max()
        u, scored = decided[e], scored + surface.spent
    hooks = d.meter.gradients - before.gradients - spent - scored
    assert hooks == 0 or hasattr(case.method(), "end_epoch"), "what it measures is counted, once"
    assert scored <= spec.decision_cost


class Linear(nn.Module):
    """Softmax regression in float64."""

    def __init__(self) -> None:
        super().__init__()
        with rng.scoped(0, "linear"):
            self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_the_gain_over_one_step_is_its_closed_form() -> None:
    """For plain SGD eta <grad Phi(theta'), g_v - g_u> - price (n(v) - n(u)), theta' = theta - eta g_u."""
    method = method_of("pgd_at", {"random_start": False})
    candidates = Candidates.of((0.03, 0.08), 2)
    data, held = split(4), split(6, seed=1)
    u, eta = Control(alpha=0.08, steps=1), 0.3
    loop = Horizon(method=method, candidates=candidates, h=1, gamma=0.01, terminal="clean", points=6)
    spec = RunSpec(data=data, batch_size=4, epochs=2, controller=loop, rate=lambda t, T: eta, held_out=held)
    d = Driver(Linear(), method, BALL, SGDSettings(momentum=0.0))
    bound: Any = spec.controller
    controls, found = bound.gains(Moment(0, 0, 1), d, u)

    def loss(theta: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(1) @ theta[0].T + theta[1], y)

    def gradient(theta: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(theta, x, y), list(theta)))

    def attacked(theta: Sequence[Tensor], x0: Tensor, y: Tensor, v: Control) -> Tensor:
        x = x0
        for _ in range(v["steps"]):
            point = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(loss(theta, point, y), point)
            x = (x + v["alpha"] * g.sign()).clamp(x0 - BALL.eps, x0 + BALL.eps).clamp(0, 1)
        return x

    theta = [p.detach().clone().requires_grad_() for p in d.parameters]
    x, y = data.take(spec.order(0)[0])
    fields = {v: gradient(theta, attacked(theta, x, y, v), y) for v in (u, *controls)}
    after = [(p - eta * g).detach().requires_grad_() for p, g in zip(theta, fields[u], strict=True)]
    phi = gradient(after, *held.take(torch.arange(6)))
    for v, gain in zip(controls, found, strict=True):
        moved = sum(float((p * (a - b)).sum()) for p, a, b in zip(phi, fields[v], fields[u], strict=True))
        assert gain == pytest.approx(eta * moved - 0.01 * eta * (v["steps"] - u["steps"]), abs=1e-12)
    assert len(controls) == 5
    assert controls[0] == u
    best = bound.decide(Moment(0, 0, 1), d, u)
    assert best == controls[int(np.argmax(found))]


@pytest.mark.parametrize("name", NAMES)
def test_gains_ahead_are_those_of_the_full_criterion_and_the_state_is_as_it_was(name: str) -> None:
    case = CASES[name]
    d, spec = looped(case, "horizon:looks=9,points=8,alpha=0.03:0.1,steps=0..3")
    list(rollout(d, spec, until=1))
    u, now = Control(**d.controller_memory["control"]), Moment(1, 0, PER_EPOCH)
    before, meter = d.snapshot(), d.meter.copy()
    loop: Any = spec.controller
    controls, mean = loop.gains(now, d, u)
    assert same(d.snapshot(), before)
    assert d.notice is None

    other = driver(case, channels_last=False)
    other.restore(before)
    spent = Meter()
    held = replace(spec, controller=lambda t: u)
    rec = Recording.of(other, held, first=PER_EPOCH, last=2 * PER_EPOCH, stride=2)
    assert spec.held_out is not None
    order = torch.randperm(8, generator=rng.generator(0, "horizon"))
    phi = build_terminal("adversarial", *spec.held_out.take(order), BALL, spec.seed)
    steps = EPOCHS * PER_EPOCH
    price = WEIGHT / (steps * case.method().controls.cost(loop.most_expensive))
    gamma = price / held.mean_rate()
    full = examine(rec, phi, loop.candidates, gamma=gamma)
    for v, gain in full.surface(0):
        assert mean[controls.index(v)] * PER_EPOCH == pytest.approx(gain, abs=1e-12)
    spent.gradients = sum(step.spent.gradients for step in rec.steps) + full.spent + full.replayed
    # The criterion takes the value of Phi, too.
    spent.gradients -= phi.evaluations.value  # type: ignore[union-attr]
    counted = d.meter.gradients - meter.gradients
    assert counted == spent.gradients or hasattr(case.method(), "start_epoch")
    assert counted <= loop.decision_evaluations(spec)


def test_a_run_under_the_most_expensive_candidate_weighs_as_much_as_is_stated() -> None:
    _, spec = looped(PLAIN["pgd_at"], TEXTS[1])
    loop: Any = spec.controller
    n = [spec.plan()[0]["steps"] + 1] * EPOCHS * PER_EPOCH
    assert loop.price(spec) * sum(n) == pytest.approx(WEIGHT)
    assert replace(loop, gamma=0.5).price(spec) == spec.price(0.5)


@dataclass(frozen=True, kw_only=True)
class HandMade(Ratio):
    """Losses by K, one row for each decision."""

    rows: tuple[tuple[float, ...], ...]

    def loss(self, z: Any, k: int) -> float:
        z.asked.append(k)
        return self.rows[len(z.asked) // 2 - (len(z.asked) % 2 == 0)][k]


def test_k_grows_by_one_where_the_ratio_is_beyond_the_threshold_and_not_beyond_the_most() -> None:
    rows = (
        (1.0, 1.0, 1.2),  # K = 0: 1.2 = 1.2 * 1.0, not beyond
        (1.0, 1.0, 1.21),  # beyond
        (0.1, 1.0, 1.1),  # K = 1 is good enough, whatever no attack misses
        (1.0, 1.0, 9.0),  # one step only, however large the ratio
    )
    method = method_of("pgd_at")
    loop = HandMade(method=method, threshold=1.2, most=2, tau=0.3, rows=rows, run=None)
    z = SimpleNamespace(asked=[], controller_memory={})
    taken = [loop.control(Moment(e, b, 2), z) for e in range(6) for b in range(2)]  # type: ignore[arg-type]
    assert [u["steps"] for u in taken[::2]] == [0, 1, 1, 2, 2, 2]
    assert taken[1::2] == taken[::2]
    assert [round(u["alpha"], 12) for u in taken[::2]] == [0.0, 0.3, 0.3, 0.15, 0.15, 0.15]
    assert z.asked == [2, 0, 2, 0, 2, 1, 2, 1], "with the most steps there is nothing to measure"
    assert loop.most_expensive == Control(alpha=0.15, steps=2)


def test_the_losses_of_the_ratio_are_those_of_an_attack_on_the_probe() -> None:
    d, spec = looped(PLAIN["pgd_at"], TEXTS[2])
    loop: Any = spec.controller
    x, y = spec.data.take(torch.randperm(10, generator=rng.generator(0, "probe"))[:8])
    d.model.eval()
    with torch.no_grad():
        clean = float(F.cross_entropy(d.model(x), y))
    before = d.meter.copy()
    assert loop.loss(d, 0) == pytest.approx(clean)
    assert d.meter.since(before) == Meter(forwards=8)
    assert loop.loss(d, 3) == AdversarialLoss(x, y, BALL, steps=3, alpha=0.05, seed=spec.seed).value(d)
    assert d.meter.since(before).gradients == 3 * 8
    assert loop.loss(d, 3) > clean


def test_between_decisions_the_control_is_held() -> None:
    d, spec = looped(PLAIN["pgd_at"], "ratio:threshold=1.0001,most=3,probe=8,alpha=0.05,every=2")
    steps = [step.control["steps"] for step in rollout(d, spec)]
    assert steps == [1] * 2 * PER_EPOCH + [2] * PER_EPOCH
    assert spec.decision_cost == 2 * 5 * 8


# ------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize("text", TEXTS, ids=controllers.names())
@pytest.mark.parametrize("name", NAMES)
def test_rollout_recording_schedule_and_resumed_rollout_are_one_run(name: str, text: str) -> None:
    case = CASES[name]
    d, spec = looped(case, text)
    kept, before = {}, []
    steps = []
    for n, step in enumerate(rollout(d, spec, before=lambda _: before.append(state(d)))):
        steps.append(step)
        kept[n + 1] = d.snapshot()
    assert all(a.control == b.control for a, b in pairwise(steps) if a.epoch == b.epoch)

    other, again = looped(case, text)
    rec = Recording.of(other, again, stride=4)
    assert same(rec.steps, steps)
    assert same(other.snapshot(), d.snapshot())
    assert other.meter == d.meter
    with rec.put_back():
        for visit in rec.backward():
            assert same(state(other), before[visit.number])

    schedule = as_schedule([step.control for step in steps], PER_EPOCH, EPOCHS)
    third = driver(case, channels_last=False)
    assert same(list(rollout(third, replace(spec, controller=schedule))), steps)
    assert same(state(third), state(d))

    for cut in (2, 4):
        fourth, once_more = looped(case, text)
        fourth.restore(kept[cut])
        rest = rollout(fourth, once_more, epoch=cut // PER_EPOCH, batch=cut % PER_EPOCH)
        assert same(list(rest), steps[cut:])
        assert same(fourth.snapshot(), d.snapshot())


class Marked(PgdAT):
    """Assigns an entry of its memory at the start of every epoch."""

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        ctx.memory["mark"] = torch.tensor(10.0 * ctx.epoch + u["steps"])


@pytest.mark.parametrize("text", TEXTS, ids=controllers.names())
def test_what_a_hook_does_at_the_start_of_an_epoch_is_kept_and_noticed_once(text: str) -> None:
    _, spec = looped(PLAIN["pgd_at"], text)
    d = driver(Marked(), channels_last=False)
    rec = Recording.of(d, spec)
    last = rec.steps[-1].control["steps"]
    assert float(d.memory["mark"]) == 10 * (EPOCHS - 1) + last
    assert rec.events == [(e * PER_EPOCH, "set", "mark") for e in range(1, EPOCHS)]


@pytest.mark.parametrize("text", TEXTS, ids=controllers.names())
def test_the_cost_that_is_planned_is_at_least_what_is_counted(text: str) -> None:
    d, spec = looped(PLAIN["pgd_at"], text)
    steps = list(rollout(d, spec))
    decided = d.meter.gradients - sum(step.spent.gradients for step in steps)
    assert 0 < decided <= spec.decision_cost
    assert max(step.evaluations for step in steps) <= PLAIN["pgd_at"].method().controls.cost(spec.plan()[0])


def test_each_run_has_its_own_controller_of_one_that_serves_several() -> None:
    _, spec = looped(PLAIN["pgd_at"], TEXTS[0])
    loop: Any = spec.controller
    longer = replace(spec, epochs=7)
    assert loop.running is spec
    assert longer.controller.running is longer  # type: ignore[attr-defined]
    assert loop.running is spec
    assert longer.controller == loop
    assert str(loop) in repr(spec)


# ------------------------------------------------------------------------------------------- what is refused


def test_names_are_no_family_of_schedules() -> None:
    assert not set(controllers.names()) & set(FAMILIES)
    assert [entry["name"] for entry in controllers.describe()] == list(controllers.names())
    assert all(entry["what"] and entry["options"] and entry["source"] for entry in controllers.describe())


class Knobless:
    controls = ControlSpace({"width": Knob("real", 0.0, 2.0)}, cost=lambda u: 1.0)

    def updates(self, ctx: Any, batch: Any, u: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "method", "told"),
    [
        ("greedi", "pgd_at", "did you mean 'greedy'.*choose from: greedy, horizon, ratio"),
        ("greedy:gama=1", "pgd_at", "controller 'greedy' does not take gama; did you mean 'gamma'"),
        ("greedy:every=0", "pgd_at", "controller 'greedy:every=0': every must be >= 1, got 0"),
        ("greedy:every=1.5", "pgd_at", "every must be a whole number, got 1.5"),
        ("greedy:gamma=-1", "pgd_at", "gamma must be >= 0, got -1"),
        ("greedy:probe=1", "pgd_at", "probe must be >= 2, got 1"),
        ("greedy:alpha=0.1,steps=3", "pgd_at", "one candidate only: give several values.* of alpha, steps"),
        ("greedy:steps=0..3", "free", "steps must be >= 1, got 0"),
        ("greedy", "dynamic", "fosc has no default: give a value, fosc=a, or several, fosc=a:b"),
        ("greedy", Knobless(), "has neither alpha nor steps: name what to search, of width"),
        ("horizon:h=0", "pgd_at", "h must be >= 1, got 0"),
        ("horizon:terminal=clear", "pgd_at", "unknown terminal cost 'clear'; did you mean 'clean'"),
        ("ratio", "fast", "the method has no steps that could grow; it has alpha, random, start"),
        ("ratio:threshold=1", "pgd_at", "threshold must be > 1, got 1"),
        ("ratio:most=2,start=2", "pgd_at", "most must be above the K to start from, 2, got 2"),
        ("ratio:start=0", "free", "start must be a whole number >= 1, got 0"),
        ("ratio:alpha=0.1,tau=0.2", "pgd_at", "give one of alpha .fixed. and tau"),
        ("ratio:tau=0", "pgd_at", "tau must be > 0, got 0"),
        ("ratio", "dynamic", "fosc is missing"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(text: str, method: Any, told: str) -> None:
    made = method_of(method) if isinstance(method, str) else method
    with pytest.raises(ValueError, match=told):
        controllers.build(text, method=made, ball=BALL)


@pytest.mark.parametrize("name", controllers.names())
def test_without_room_for_an_attack_nothing_is_chosen(name: str) -> None:
    with pytest.raises(ValueError, match=f"controller '{name}' chooses attacks, and eps = 0 allows none"):
        controllers.build(name, method=method_of("pgd_at"), ball=Ball(0))


def test_a_run_and_what_is_held_out_are_needed() -> None:
    d, spec = looped(PLAIN["pgd_at"], TEXTS[0])
    loop = controllers.build(TEXTS[0], method=method_of("pgd_at"), ball=BALL)
    with pytest.raises(ValueError, match="Greedy measures on the samples of its run: give it to a RunSpec"):
        loop.control(Moment(0, 0, 3), d)
    bare = replace(spec, held_out=None, controller=looped(PLAIN["pgd_at"], TEXTS[1])[1].controller)
    with pytest.raises(ValueError, match="takes Phi on held-out samples: give the run held_out"):
        list(islice(rollout(d, bare), 1))


def test_knobs_of_any_method_are_searched_or_held() -> None:
    method = method_of("trades")
    loop: Any = controllers.build("greedy:beta=1:3,steps=2,alpha=0.05", method=method, ball=BALL)
    assert loop.first == Control(alpha=0.05, beta=1, steps=2)
    assert len(loop.candidates.around(method, loop.first)) == 2
    held: Any = controllers.build("ratio:beta=3,most=4", method=method, ball=BALL)
    assert held.most_expensive == Control(alpha=0.05, beta=3, steps=4)
    default: Any = controllers.build("greedy", method=method_of("pgd_at"), ball=BALL)
    assert default.candidates == Candidates.default(0.1, 10)
    assert default.most_expensive["steps"] == 10


def test_samples_of_one_kind_are_enough() -> None:
    """A probe larger than the training set is all of it."""
    d, spec = looped(PLAIN["pgd_at"], TEXTS[2].replace("probe=8", "probe=1000"))
    assert isinstance(spec.data, Split)
    list(rollout(d, spec, until=1))
    assert spec.decision_cost == EPOCHS * 5 * len(spec.data)
