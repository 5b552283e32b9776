"""Roll-outs under a dithered schedule: cost to the last evaluation, states to the last bit, hooks, blocks."""

import math
from dataclasses import replace

import pytest
from helpers import same
from systems import CASES, PLAIN, Case, constant, driver

from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule
from controlat.control.space import Control
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.pmp import AdversarialLoss, Candidates, examine

EPOCHS, BATCHES = 3, 5
KNOBS = [
    (name, knob)
    for name, case in CASES.items()
    for knob, bounds in case.method().controls.items()
    if bounds.kind == "integer" and bounds.low < bounds.high
]


def planned(case: Case, knob: str, more: float = 0.4) -> Schedule:
    """A schedule in which one integer knob is between two whole numbers."""
    space, u = case.method().controls, case.control()
    knobs = {k: f"{v:g}" for k, v in u.items()} | {knob: f"{u[knob] + more:g}"}
    text = "set:rounding=dither," + ",".join(f"{k}={v}" for k, v in knobs.items())
    return parse_schedule(text, EPOCHS, space).bound(space)


def spec_of(schedule: Schedule) -> RunSpec:
    return replace(constant(Control(steps=0), 4 * BATCHES, epochs=EPOCHS), controller=schedule)


def test_every_method_with_an_integer_knob_is_here() -> None:
    assert {"atta", "awp", "cat", "dynamic", "fat", "free", "pgd_at", "trades", "yopo"} == {
        CASES[name].name for name, _ in KNOBS
    }


every = pytest.mark.parametrize(("name", "knob"), KNOBS, ids=[f"{name}-{knob}" for name, knob in KNOBS])
COUNTED = "cat", "dynamic", "fat"  # their cost depends on the data; what is declared is for planning


@every
def test_an_epoch_costs_what_the_real_knob_costs_to_less_than_one_batch(name: str, knob: str) -> None:
    schedule, d = planned(CASES[name], knob), driver(CASES[name])
    real, cost = schedule(0)[knob], d.method.controls.cost
    low = math.floor(real)
    floor, ceiling = (cost(Control(**{**schedule(0), knob: v})) for v in (low, low + 1))
    mean = floor + (real - low) * (ceiling - floor)
    steps = list(rollout(d, spec_of(schedule)))
    assert d.meter.gradients == sum(step.spent.gradients for step in steps)
    for epoch in range(EPOCHS):
        here = steps[epoch * BATCHES : (epoch + 1) * BATCHES]
        assert {s.control[knob] for s in here} == {low, low + 1}
        assert abs(sum(s.control[knob] for s in here) - BATCHES * real) < 1
        assert abs(sum(cost(s.control) for s in here) - BATCHES * mean) <= abs(ceiling - floor)
        if name in PLAIN and name not in COUNTED:
            assert [s.spent.gradients for s in here] == [s.samples * cost(s.control) for s in here]


@every
def test_bits_and_ledger_are_those_of_the_whole_numbers_given_one_by_one(name: str, knob: str) -> None:
    schedule = planned(CASES[name], knob)
    spec = spec_of(schedule)

    def one_by_one(t: float) -> Control:
        return schedule.at(*divmod(round(t * BATCHES), BATCHES), BATCHES)

    found = [driver(CASES[name]) for _ in range(2)]
    runs = [
        list(rollout(d, replace(spec, controller=s)))
        for d, s in zip(found, (schedule, one_by_one), strict=True)
    ]
    assert runs[0] == runs[1]
    assert found[0].meter == found[1].meter
    assert same(found[0].snapshot(), found[1].snapshot())


def test_a_piece_of_a_dithered_knob_is_one_block_and_its_candidates_are_held_throughout() -> None:
    """A constant candidate equal to a control that some steps take gains nothing in those."""
    case = CASES["pgd_at"]
    schedule = parse_schedule("pgd:steps=1.5,alpha=0.05,rounding=dither", EPOCHS)
    spec = spec_of(schedule)
    assert spec.blocks(0, EPOCHS * BATCHES) == tuple(e for e in range(EPOCHS) for _ in range(BATCHES))
    d = driver(case)
    recording = Recording.of(d, spec)
    phi = AdversarialLoss(spec.data.x, spec.data.y, d.ball)
    found = examine(recording, phi, Candidates.of((0.05,), 2), gamma=0.01)
    for index in range(EPOCHS):
        surface = found.surface(index)
        gains = dict(surface[1:])
        assert surface[0][1] == 0
        assert {v["steps"] for v in gains} == {0, 1, 2}
        looked = found.looked[index * BATCHES : (index + 1) * BATCHES]
        for k in (1, 2):
            v = Control(alpha=0.05, steps=k)
            each = [g.value(15, found.price)[g.controls.index(v)] for g in looked]
            taken = [g.controls[0]["steps"] == k for g in looked]
            assert all(value == 0 for value, same_ in zip(each, taken, strict=True) if same_)
            assert any(value != 0 for value in each)
            assert gains[v] == pytest.approx(sum(each), rel=1e-12)
