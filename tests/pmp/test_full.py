"""The criterion over any horizon, and the meaning of its size, on small systems in float64."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Counted, flat, same, split
from systems import LONG, PLAIN, Case, constant, driver, each_optimizer

from controlat._util.errors import NonFiniteError
from controlat._util.files import read_json, write_json
from controlat._util.rng import generator, scoped
from controlat.attacks.balls import Ball
from controlat.control.schedule_text import parse_schedule
from controlat.control.space import Control, ControlSpace, Knob
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.methods import Batch, Context, Update
from controlat.pmp import (
    AdversarialLoss,
    Candidates,
    Criterion,
    Trust,
    backward,
    examine,
    looked_at,
    trust,
)
from controlat.pmp.hamiltonian import Gains
from controlat.pmp.relaxed import relaxed

GRID, GAMMA = Candidates.of((0.02, 0.08), 3), 0.05
SETTINGS = {
    "plain": SGDSettings(0.0),
    "momentum": SGDSettings(0.9, weight_decay=1e-3),
    "Nesterov": SGDSettings(0.9, nesterov=True),
}
every = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
optimizers = each_optimizer(SETTINGS)


def phi(seed: int = 9) -> AdversarialLoss:
    return AdversarialLoss(*split(8, (1, 4, 4), seed=seed).take(torch.arange(8)), Ball(0.1), steps=3)


def recorded(case: Case, o: SGDSettings = SETTINGS["momentum"], **spec: Any) -> Recording:
    p = constant(case.control(), n=10, epochs=2, held_out=split(8, (1, 4, 4), seed=5))
    return Recording.of(driver(case, optimizer=o, channels_last=False), replace(p, **spec))


@every
@each_optimizer(SETTINGS, ["Nesterov"])
def test_g_is_the_slope_of_the_objective_towards_the_maximisers(case: Case, o: SGDSettings) -> None:
    """One control per epoch: the whole block switches, and dJ/dlambda at 0 is -G."""
    r, terminal = recorded(case, o), phi()
    found = examine(r, terminal, GRID, gamma=GAMMA)
    best = {b.index: b.maximiser for b in found.best()}
    others = {i: best[index] for i, index in enumerate(found.blocks)}
    h = 1e-5  # forward, as carried perturbations cannot go beyond the edge of the ball
    j = [relaxed(r, others, part, terminal).objective(found.price) for part in (0.0, h, 2 * h)]
    assert found.total() > 0
    slope, tolerance = (3 * j[0] - 4 * j[1] + j[2]) / (2 * h), 1e-6
    if case.own.meets_edge and found.dropped:  # pixels that come back to 0 and then to the edge: a true kink
        (share,) = re.findall(r"lie on a clip \((\S+)% of their costate", *found.dropped)
        tolerance = float(share) / 100
        assert 0 < tolerance < 0.2
    else:
        assert found.dropped == ()
    assert slope == pytest.approx(found.total(), rel=tolerance)
    assert found.value() == pytest.approx(found.total() / (r.spec.mean_rate() * 6))


def test_the_work_of_c_grows_with_the_number_of_steps_and_not_with_its_square() -> None:
    """Every step is a block of its own: comparisons of block numbers, in all that is read off a criterion."""
    controls = tuple(Control(alpha=0.1, steps=k) for k in range(3))

    def compared(steps: int) -> int:
        blocks = tuple(Counted(n) for n in range(steps))
        worth = {1: np.array([0.0, 1.0, -1.0])}
        looked = tuple(Gains(n, n, controls, np.ones(3), worth, np.ones(3), {1: 1.0}) for n in range(steps))
        norms = tuple((n, 1.0) for n in range(steps))
        c = Criterion(looked, blocks, 0, 0.1, 0.1, 1.0, 1.0, 0.0, norms, (), 0, 0)

        def work() -> None:
            assert c.value() == pytest.approx(10)
            assert len(c.interval() or ()) == 2
            assert len(c.cosines()) == len(c.per_block()) == steps
            assert len([c.surface(block.index) for block in c.best()]) == steps
            assert looked_at(blocks, 1) == list(range(steps))

        return Counted.during(work)

    short, long = compared(50), compared(200)
    assert long < 1.1 * 4 * (short + 50)


@every
def test_a_schedule_that_maximises_has_c_zero_and_more_candidates_never_lower_it(case: Case) -> None:
    r, terminal = recorded(case), phi()
    small = examine(r, terminal, Candidates.of((0.02,), 1), gamma=GAMMA)
    large = examine(r, terminal, GRID, gamma=GAMMA)
    for h in small.horizons:
        assert 0 <= small.value(h) <= large.value(h) + 1e-15
    for g in large.looked:
        assert g.value(6, large.price)[0] == 0
        assert g.controls[0] == case.control()


@optimizers
def test_blocks_are_summed_before_the_maximum_is_taken(o: SGDSettings) -> None:
    found = examine(recorded(PLAIN["pgd_at"], o), phi(), GRID, gamma=GAMMA, horizons=[1, 3])
    assert found.horizons == (1, 3, 6)
    assert found.blocks == (0, 0, 0, 1, 1, 1)
    for h in found.horizons:
        steps = [g.value(h, found.price) for g in found.looked]
        assert all(g.controls == found.looked[0].controls for g in found.looked)
        blocks = [max(0.0, float(sum(steps[i : i + 3]).max())) for i in (0, 3)]
        assert found.total(h) == pytest.approx(sum(blocks), rel=1e-12)
        assert found.per_block(h) == pytest.approx([b / found.rate / 3 for b in blocks])
        assert found.per_step(h) == pytest.approx([s.max() / found.rate for s in steps])
        assert found.per_step(h).mean() >= found.value(h) - 1e-15


def test_blocks_follow_the_schedule_and_end_with_the_epoch() -> None:
    schedule = parse_schedule("table:steps=0:1:2:3,alpha=0.05,resolution=0.5", 2)
    r = recorded(PLAIN["pgd_at"], controller=schedule, batch_size=3)  # 4 steps for an epoch
    found = examine(r, phi(), GRID, gamma=GAMMA)
    assert found.blocks == (0, 0, 1, 1, 2, 2, 3, 3)
    assert [b.control["steps"] for b in found.best()] == [0, 1, 2, 3]


def test_some_steps_stand_for_all_of_their_block() -> None:
    r, terminal = recorded(PLAIN["pgd_at"], batch_size=1), phi()  # 10 steps for an epoch
    all_, some = (examine(r, terminal, GRID, gamma=GAMMA, looks=n) for n in (None, 5))
    assert [g.number for g in some.looked] == list(range(1, 20, 2))
    for g in some.looked:
        assert np.array_equal(g.rewards[20], all_.looked[g.number].rewards[20])
    for b in some.best():
        index = some.looked[0].controls.index(b.maximiser)
        members = [g for g in some.looked if some.blocks[g.number] == b.index]
        assert b.gain == pytest.approx(2 * sum(g.value(20, some.price)[index] for g in members))
        assert (b.looked, b.steps) == (5, 10)
    low, high = some.interval() or (math.nan, math.nan)
    assert low < some.value() < high


def test_the_interval_is_students_over_the_steps_of_each_block() -> None:
    """Of a finite population: three of five steps were looked at in each block."""
    found = examine(recorded(PLAIN["pgd_at"], batch_size=2), phi(), GRID, gamma=GAMMA, looks=3)
    low, high = found.interval() or (math.nan, math.nan)
    parts = []
    for b in found.best():
        members = [g for g in found.looked if found.blocks[g.number] == b.index]
        parts.append(np.array([g.value(10, found.price)[g.controls.index(b.maximiser)] for g in members]))
    spread = math.sqrt(sum(25 * p.var(ddof=1) / 3 * (1 - 3 / 5) for p in parts)) / (10 * found.rate)
    assert (high - low) / 2 == pytest.approx(2.7764451 * spread, rel=1e-6)  # t of 4 degrees of freedom
    assert (high + low) / 2 == pytest.approx(found.value())


def test_what_was_looked_at_entirely_has_no_interval_left() -> None:
    every_ = examine(recorded(PLAIN["pgd_at"]), phi(), GRID, gamma=GAMMA)
    assert every_.interval() == (every_.value(), every_.value())
    single = examine(recorded(PLAIN["pgd_at"], batch_size=10), phi(), GRID, gamma=GAMMA)
    assert single.interval() == (single.value(), single.value())
    one = examine(recorded(PLAIN["pgd_at"]), phi(), GRID, gamma=GAMMA, looks=1)
    assert one.interval() is None


def test_where_u_is_the_best_of_a_few_steps_another_may_be_better_in_all() -> None:
    found = examine(recorded(PLAIN["pgd_at"], batch_size=2), phi(), GRID, gamma=GAMMA, looks=3)
    u = found.looked[0].controls[0]

    def gains_of(g: Any, worth: float) -> Any:
        """Every candidate loses 1, but for noise in the first steps of the blocks."""
        value = np.where([v == u for v in g.controls], 0.0, worth)
        free = found.price * (g.evaluations - g.evaluations[0])
        return replace(g, rewards=dict.fromkeys(g.rewards, value + free))

    noisy = tuple(gains_of(g, -1.0 if i % 3 else 0.5) for i, g in enumerate(found.looked))
    low, high = replace(found, looked=noisy).interval() or (math.nan, math.nan)
    assert low == 0
    mean, spread = 5 * np.mean([0.5, -1, -1]), 5 * np.std([0.5, -1, -1], ddof=1) * math.sqrt(0.4 / 3)
    unit = 10 * found.rate
    assert high == pytest.approx(2 * (mean + 2.7764451 * spread) / unit, rel=1e-6)
    sure = tuple(gains_of(g, -1.0) for g in found.looked)
    assert replace(found, looked=sure).interval() == (0, 0)


def test_gamma_enters_by_the_cost_alone() -> None:
    r, terminal = recorded(PLAIN["pgd_at"]), phi()
    cheap, dear = (examine(r, terminal, GRID, gamma=gamma) for gamma in (0.0, "1000"))
    assert cheap.objective == cheap.phi
    assert dear.objective == pytest.approx(dear.phi + 1000 * dear.rate * 6 * 3)
    assert replace(cheap, gamma=1000.0).total() == pytest.approx(dear.total())
    assert {b.maximiser["steps"] for b in dear.best()} == {0}


def test_what_is_found_survives_a_file(tmp_path: Any) -> None:
    found = examine(recorded(PLAIN["free"]), phi(), GRID, gamma=GAMMA, horizons=[2])
    write_json(tmp_path / "c.json", found.to_json())
    again = Criterion.from_json(read_json(tmp_path / "c.json"))
    assert again.value() == found.value()
    assert again.interval(2) == found.interval(2)
    assert again.norms == found.norms
    assert again.dropped == found.dropped
    assert found.dropped[1:] == ("what the method carries beyond the end of a window",)
    assert "carried perturbations lie on a clip" in found.dropped[0]


@pytest.mark.parametrize("case", LONG)
def test_the_recorded_run_is_left_at_its_end(case: Case) -> None:
    r, terminal = recorded(case), phi()
    meter, end = r.driver.meter.copy(), r.driver.snapshot()
    found = examine(r, terminal, GRID, gamma=GAMMA, horizons=[2])
    trust(r, found, terminal)
    assert same(r.driver.snapshot(), end)
    assert r.driver.meter == meter
    assert found.evaluations * 10 / 3 == pytest.approx(meter.gradients, rel=0.5)


# ------------------------------------------------------------------------------------------------------ trust


def model(outcomes: dict[float, float], gain: float = 2.0, **more: float) -> Trust:
    given: dict[str, Any] = {"objective": 3.0, "sizes": 4.0, "bound": 1.0, "spent": 0} | more
    return Trust(gain, outcomes=outcomes, **given)


def test_a_parabola_is_read_off_exactly() -> None:
    """J(lambda) = 3 - 2 lambda + 5 lambda^2 / 2."""
    c = model({part: 3 - 2 * part + 2.5 * part**2 for part in (0.5, 0.25)})
    assert c.curvature == pytest.approx(5)
    assert c.model_gain == pytest.approx(4 / 10)
    assert c.rho == pytest.approx(5 / 4)
    assert c.certificate == pytest.approx(max(1 - 0.625, 0.5 - 0.15625))
    assert c.reliability(0.25) == pytest.approx(0.34375 / 0.5)
    assert c.trusted
    assert c.kappa == pytest.approx(1.0)
    flat_ = model({0.5: 2.1, 0.25: 2.51})  # M = 0.8 < G: the whole way
    assert flat_.model_gain == pytest.approx(2 - flat_.curvature / 2)


def test_what_is_not_trusted_says_so() -> None:
    assert not model({0.5: 4.0, 0.25: 2.9}).trusted
    assert model({0.5: 4.0, 0.25: 2.9}).certificate == pytest.approx(0.1)
    assert model({0.5: 4.0, 0.25: 3.5}).certificate == 0
    nothing = model({0.5: 3.0, 0.25: 3.0}, gain=0.0)
    assert nothing.trusted
    assert math.isnan(nothing.reliability(0.5))
    assert math.isnan(model({0.5: 3.0}, bound=-math.inf).kappa)
    assert model({0.5: 3.0}, sizes=0.0).rho == 0


@optimizers
def test_relaxed_roll_outs_are_what_trust_reports(o: SGDSettings) -> None:
    r, terminal = recorded(PLAIN["pgd_at"], o), phi()
    found = examine(r, terminal, GRID, gamma=GAMMA)
    c = trust(r, found, terminal, lambdas=(0.5, 1e-4))
    best = {b.index: b.maximiser for b in found.best()}
    others = {i: best[index] for i, index in enumerate(found.blocks)}
    assert c.outcomes[0.5] == relaxed(r, others, 0.5, terminal).objective(found.price)
    assert c.objective == found.objective == relaxed(r, others, 0.0, terminal).objective(found.price)
    assert c.reliability(1e-4) == pytest.approx(1, abs=2e-3)
    assert c.bound == pytest.approx(found.price * 6)
    assert c.spent > 0
    with pytest.raises(ValueError, match=r"lambdas must be in \(0, 1\]"):
        trust(r, found, terminal, lambdas=(0.0,))


def test_reach_is_the_largest_part_that_keeps_a_quarter_of_its_promise() -> None:
    """J(lambda) = 3 - 2 lambda + M lambda^2 / 2 keeps r = 1 - M lambda / 4: r >= 1/4 up to lambda = 3/M."""
    parts = (0.5, 0.25, 0.125, 0.0625)
    for m, reach in ((2.0, 0.5), (6.0, 0.5), (6.1, 0.25), (20.0, 0.125), (40.0, 0.0625), (50.0, None)):
        c = model({part: 3 - 2 * part + m / 2 * part**2 for part in parts})
        assert c.reach == reach
        assert c.trusted == (m <= 12)
        assert c.certificate == pytest.approx(max(0, *(2 * part - m / 2 * part**2 for part in parts)))
    assert model(dict.fromkeys(parts, 3.0), gain=0.0).reach is None


def test_lambda_is_halved_until_a_quarter_of_the_promise_is_kept() -> None:
    """Armijo's rule on a run whose costate is made to promise more than there is."""
    r, terminal = recorded(PLAIN["pgd_at"]), phi()
    honest = examine(r, terminal, GRID, gamma=GAMMA)
    kept = trust(r, honest, terminal)
    assert list(kept.outcomes) == [0.5], "one roll-out where first order reaches so far"
    assert kept.trusted
    looked = tuple(replace(g, rewards={h: 1e3 * v for h, v in g.rewards.items()}) for g in honest.looked)
    boastful = replace(honest, looked=looked)
    told: list[float] = []
    c = trust(r, boastful, terminal, halvings=4, progress=told.append)
    assert sorted(c.outcomes) == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert told == [part for part in sorted(c.outcomes, reverse=True) for _ in r.steps]
    assert not c.trusted
    assert c.reach is None
    assert sorted(trust(r, boastful, terminal).outcomes) == [0.125, 0.25, 0.5]
    assert sorted(trust(r, boastful, terminal, lambdas=(0.5, 0.25), halvings=0).outcomes) == [0.25, 0.5]
    best = {b.index: b.maximiser for b in boastful.best()}
    others = {i: best[index] for i, index in enumerate(boastful.blocks)}
    again = relaxed(r, others, 1 / 16, terminal).objective(boastful.price)
    assert c.outcomes[1 / 16] == again


def test_nothing_is_rolled_out_where_nothing_is_to_be_gained() -> None:
    r, terminal = recorded(PLAIN["pgd_at"]), phi()
    found = examine(r, terminal, GRID, gamma=GAMMA)
    looked = tuple(
        replace(g, rewards={h: 0 * v - 1e9 * (v != 0) for h, v in g.rewards.items()}) for g in found.looked
    )
    flat_ = replace(found, looked=looked, gamma=0.0)
    c = trust(r, flat_, terminal)
    assert (c.gain, c.spent, c.certificate, c.reach) == (0, 0, 0, None)
    assert c.trusted


@optimizers
def test_cosines_and_growth_are_those_of_the_costates(o: SGDSettings) -> None:
    """All steps looked at: the cosine by two steps taken by hand, ||p|| from the backward pass itself."""
    r, terminal = recorded(PLAIN["free"], o), phi()
    found = examine(r, terminal, GRID, gamma=GAMMA)
    norms = {s.visit.number: s.norms[6] for s in backward(r, terminal)}
    assert found.growth == pytest.approx(norms[0] / norms[5])
    for block, cosine in zip(found.best(), found.cosines(), strict=True):
        members = [g for g in found.looked if found.blocks[g.number] == block.index]
        where = [g.controls.index(block.maximiser) for g in members]
        by_hand = [
            g.rewards[6][i] / (norms[g.number] * g.sizes[i] ** 0.5) if g.sizes[i] else 0.0
            for g, i in zip(members, where, strict=True)
        ]
        assert cosine == pytest.approx(np.mean(by_hand))
        assert -1 <= cosine <= 1


def test_a_backward_pass_takes_no_step_again_before_the_first_that_is_looked_at() -> None:
    r = recorded(PLAIN["pgd_at"])
    few = Recording.of(*system_of(r), stride=3)
    before = few.spent.gradients
    passed = list(backward(few, phi(), steps=[4]))
    assert [s.visit.number for s in passed] == [5, 4]
    per_step = sum(step.spent.gradients for step in r.steps) / 6
    assert few.spent.gradients - before == pytest.approx(2 * per_step, rel=0.5)  # steps 3 and 4, to be at 5
    assert list(backward(few, phi(), steps=[])) == []


def system_of(r: Recording) -> tuple[Any, Any]:
    return driver(PLAIN["pgd_at"], optimizer=r.driver.optimizer, channels_last=False), r.spec


def test_a_trust_region_lowers_the_gap_and_a_huge_one_leaves_nothing() -> None:
    found = examine(recorded(PLAIN["pgd_at"]), phi(), GRID, gamma=GAMMA)
    values = [found.value(rho=rho) for rho in (0.0, 1.0, 100.0, 1e9)]
    assert values == sorted(values, reverse=True)
    cheaper = [
        v
        for g in found.looked
        for v, s, n in zip(g.controls, g.sizes, g.evaluations, strict=True)
        if s == 0 and n < g.evaluations[0]
    ]
    assert (values[-1] > 0) == bool(cheaper)


def test_numbers_out_of_range_are_refused() -> None:
    r = recorded(PLAIN["pgd_at"])
    with pytest.raises(ValueError, match="gamma must be >= 0"):
        examine(r, phi(), GRID, gamma=-1)
    with pytest.raises(ValueError, match="looks must be a whole number >= 1, got 0"):
        examine(r, phi(), GRID, gamma=1, looks=0)
    with pytest.raises(ValueError, match=r"looks must be a whole number >= 1, got 2\.0"):
        examine(r, phi(), GRID, gamma=1, looks=2.0)  # type: ignore[arg-type]
    found = examine(r, phi(), GRID, gamma=1, horizons=[3])
    for ask in (found.value, found.interval, found.per_block, found.cosines):
        with pytest.raises(ValueError, match=r"horizon 7 was not examined; there are \(3, 6\)"):
            ask(7)
    other = Recording.of(driver(PLAIN["pgd_at"], optimizer=SETTINGS["momentum"]), r.spec, last=4)
    with pytest.raises(ValueError, match=r"steps 0\.\.5, the roll-out has 0\.\.3"):
        trust(other, found, phi())


@dataclass(frozen=True)
class Fails:
    """A user's terminal cost that is not a number, or a gradient that is not."""

    bad_value: bool
    lower = 0.0

    def value(self, driver: Any, meter: Any = None) -> float:
        return math.nan if self.bad_value else 1.0

    def gradient(self, driver: Any, meter: Any = None) -> list[torch.Tensor]:
        return [torch.full_like(p, math.inf) for p in driver.parameters]

    def dropped(self, driver: Any) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(
    ("bad_value", "text"), [(True, "terminal cost is nan"), (False, "costate after step 5")]
)
def test_numbers_that_are_not_finite_stop_the_examination(bad_value: bool, text: str) -> None:
    with pytest.raises(NonFiniteError, match=text):
        examine(recorded(PLAIN["pgd_at"]), Fails(bad_value), GRID, gamma=1)


def test_a_relaxed_roll_out_that_diverges_keeps_nothing_of_its_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    r, terminal = recorded(PLAIN["pgd_at"]), phi()
    found = examine(r, terminal, GRID, gamma=GAMMA)

    def diverges(recording: Any, others: Any, part: float, *rest: Any, **more: Any) -> Any:
        if part >= 0.5:
            raise NonFiniteError("training loss inf")
        return relaxed(recording, others, part, *rest, **more)

    monkeypatch.setattr(import_module("controlat.pmp.trust"), "relaxed", diverges)
    c = trust(r, found, terminal)
    assert c.outcomes[0.5] == math.inf
    assert c.reliability(0.5) == -math.inf
    assert c.certificate == pytest.approx(max(0, c.objective - c.outcomes[0.25]))
    plain = c.to_json()
    assert plain["outcomes"]["0.5"] is None
    assert plain["rho"] is plain["reliability"]["0.5"] is None
    assert c.model_gain == 0
    with pytest.raises(ValueError, match="at least one step"):
        examine(r, phi(), GRID, gamma=1, horizons=[0])


def test_at_puts_the_driver_before_any_step() -> None:
    r = recorded(PLAIN["free"])
    states = {v.number: flat(r.driver.parameters) for v in r.forward()}
    for number in (4, 0, 5):
        visit = r.at(number)
        assert visit.number == number
        assert same(flat(r.driver.parameters), states[number])
        assert visit.control == Control(**PLAIN["free"].control())
    with pytest.raises(ValueError, match=r"has the steps 0\.\.5, not 6"):
        r.at(6)


# -------------------------------------------------------------------------- linear-quadratic, in closed form


@dataclass(frozen=True)
class Driven:
    """Loss 1/2 mean |W x|^2 - alpha <B, W> of a linear network: z' = M z + alpha N for each row of W."""

    x: torch.Tensor
    b: torch.Tensor
    controls = ControlSpace({"alpha": Knob("real", 0, 1)}, cost=lambda u: 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        def loss() -> torch.Tensor:
            quadratic = 0.5 * ctx.logits(self.x).square().sum(1).mean()
            return quadratic - u["alpha"] * ctx.logits(self.b).diagonal().sum()

        yield Update(loss)


@dataclass(frozen=True)
class Square:
    """Phi = 1/2 |W|^2."""

    lower = 0.0

    def value(self, driver: Driver, meter: Any = None) -> float:
        return float(0.5 * driver.parameters[0].detach().square().sum())

    def gradient(self, driver: Driver, meter: Any = None) -> list[torch.Tensor]:
        return [driver.parameters[0].detach().clone()]

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        return ()


@optimizers
def test_a_linear_quadratic_problem_has_its_criterion_in_closed_form(o: SGDSettings) -> None:
    """Costates are matrix powers, maximisers bang-bang, and J(lambda) a parabola."""
    classes, rate, u = 10, 0.05, 0.3
    x, b = (torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=generator(0, n)) for n in (20, classes))
    with scoped(0):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes, bias=False)).double()
    d = Driver(model, Driven(x, b), Ball(0.1), o, channels_last=False)
    r = Recording.of(d, constant(Control(alpha=u), 32, epochs=3, rate=rate), stride=5)
    grid, steps = Candidates.of((0.1, 0.3, 0.8), 1), r.last
    found = examine(r, Square(), grid, gamma=GAMMA)
    worth = trust(r, found, Square(), lambdas=(1.0, 0.5, 0.25))

    # One row of W and of its buffer: z = (W, v).
    a = x.flatten(1).T @ x.flatten(1) / len(x) + o.weight_decay * torch.eye(16, dtype=torch.float64)
    one, mu = torch.eye(16, dtype=torch.float64), o.momentum
    look = 1 + mu if o.nesterov else 1.0
    top = torch.cat([one - rate * look * a, -rate * mu * (mu if o.nesterov else 1.0) * one], 1)
    m = torch.cat([top, torch.cat([a, mu * one], 1)])
    n = torch.cat([rate * look * b.flatten(1), -b.flatten(1)], 1)  # what a unit of alpha adds, (classes, 32)
    powers = [n @ torch.linalg.matrix_power(m.T, steps - 1 - t) for t in range(steps)]
    end = d.parameters[0].detach()
    slopes = [-float((end * p[:, :16]).sum()) for p in powers]  # p_{t+1} . N
    moved, gain = torch.zeros_like(end), 0.0
    for block in found.best():
        members = [t for t in range(steps) if found.blocks[t] == block.index]
        c = sum(slopes[t] for t in members)
        v = 0.8 if c > 0 else 0.1
        assert block.maximiser == Control(alpha=v)
        assert block.gain == pytest.approx(c * (v - u), rel=1e-9)
        gain += c * (v - u)
        moved += sum(powers[t][:, :16] for t in members) * (v - u)
    assert found.total() == worth.gain == pytest.approx(gain, rel=1e-9)
    curvature = float(moved.square().sum())
    j = found.objective
    assert j == pytest.approx(0.5 * float(end.square().sum()) + GAMMA * rate * found.evaluations)
    for part, outcome in worth.outcomes.items():
        assert outcome == pytest.approx(j - part * gain + part**2 * curvature / 2, rel=1e-10)
        assert worth.reliability(part) == pytest.approx(1 - part * curvature / (2 * gain), rel=1e-6)
    assert worth.curvature == pytest.approx(curvature, rel=1e-8)
    best = min(1.0, gain / curvature)
    assert worth.model_gain == pytest.approx(best * gain - best**2 * curvature / 2, rel=1e-8)
