"""Closed loops: the roll-out, its recording and the schedule of its controls are one run, bit for bit."""

from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import same, split
from rules import Follow
from systems import CASES, PLAIN, Case, constant, driver

from controlat._util.parallel import World
from controlat.control.controller import Moment, Recorded, as_schedule
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.dynamics.feedback import decide
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Epoch, build
from controlat.methods.pgd_at import PgdAT

PER_EPOCH, EPOCHS = 3, 2
STEPS = PER_EPOCH * EPOCHS
NAMES = ("pgd_at", "atta reset", "cat curriculum", "fast early stop", "free", "trades", "yopo")
several = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)


def looped(case: Case) -> tuple[Driver, RunSpec]:
    spec = constant(case.control(), epochs=EPOCHS, held_out=split(8, (1, 4, 4), seed=5))
    return driver(case, channels_last=False), replace(spec, controller=Follow(case))


def state(d: Driver) -> dict[str, Any]:
    """z without what the controller remembers, which replays do not ask, and without rows."""
    return replace(d.snapshot(), controller={}, rows={}).to_dict()


@several
def test_rollout_recording_and_schedule_of_the_controls_are_one_run(case: Case) -> None:
    d, spec = looped(case)
    steps = list(rollout(d, spec))
    if "alpha" in steps[0].control:
        assert len({step.control for step in steps}) == STEPS, "the loop must do something"

    other, again = looped(case)
    rec = Recording.of(other, again, stride=4)
    assert same(rec.steps, steps)
    assert same(other.snapshot(), d.snapshot())
    assert other.meter == d.meter
    assert rec.spec.controller == Recorded([step.control for step in steps], 0, steps[0].control)

    schedule = as_schedule([step.control for step in steps], PER_EPOCH, EPOCHS)
    third = driver(case, channels_last=False)
    assert same(list(rollout(third, replace(spec, controller=schedule))), steps)
    assert same(state(third), state(d))


@several
def test_a_recorded_closed_loop_is_visited_without_asking_it_again(case: Case) -> None:
    d, spec = looped(case)
    before = []
    steps = list(rollout(d, spec, before=lambda _: before.append(state(d))))

    other, again = looped(case)
    rec = Recording.of(other, again, stride=4)
    asked = list(again.controller.asked)  # type: ignore[attr-defined]
    moments = [Moment(*divmod(n, PER_EPOCH), PER_EPOCH) for n in range(len(steps))]
    assert asked == moments, "each moment is decided once"
    with rec.put_back():
        for visit in rec.backward():
            assert visit.control == steps[visit.number].control
            assert same(state(other), before[visit.number])
    third = driver(case, channels_last=False)
    assert same(list(rec.again(third)), steps)
    assert rec.spec.blocks(0, len(steps)) == spec.blocks(0, len(steps)) or "alpha" not in steps[0].control
    assert again.controller.asked == asked  # type: ignore[attr-defined]


@several
def test_a_control_that_was_asked_for_before_its_epoch_is_not_decided_again(case: Case) -> None:
    d, spec = looped(case)
    steps = list(rollout(d, spec))
    other, again = looped(case)
    first = again.control_at(0, 0, other)
    assert same(list(rollout(other, again, decided=True)), steps)
    assert first == steps[0].control
    assert again.controller.asked == spec.controller.asked  # type: ignore[attr-defined]
    assert same(other.snapshot(), d.snapshot())


@several
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_closed_loop_goes_on_from_any_snapshot_with_the_same_bits(case: Case, cut: int) -> None:
    d, spec = looped(case)
    steps = rollout(d, spec)
    list(islice(steps, cut))
    kept = d.snapshot()
    rest = list(steps)
    other, again = looped(case)
    other.restore(kept)
    assert same(list(rollout(other, again, epoch=cut // PER_EPOCH, batch=cut % PER_EPOCH)), rest)
    assert same(other.snapshot(), d.snapshot())
    third, once_more = looped(case)
    third.restore(kept)
    assert same(Recording.of(third, once_more, first=cut).steps, rest)


class Listening(PgdAT):
    """Writes down the control that its hooks are given."""

    @cached_property
    def heard(self) -> list[tuple[str, int, Control]]:
        return []

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        self.heard.append(("start", ctx.epoch, u))

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        self.heard.append(("end", ctx.epoch, u))


def test_hooks_between_epochs_are_given_the_control_of_the_first_step() -> None:
    method, spec = Listening(), looped(PLAIN["pgd_at"])[1]
    steps = list(rollout(driver(method, channels_last=False), spec))
    first = [steps[e * PER_EPOCH].control for e in range(EPOCHS)]
    wanted = [(when, e, first[e]) for e in range(EPOCHS) for when in ("start", "end")]
    assert method.heard == wanted

    d, spec = driver(Listening(), channels_last=False), looped(PLAIN["pgd_at"])[1]
    list(islice(rollout(d, spec), 2))
    rec = Recording.of(d, spec, first=2, stride=4)
    assert rec.spec.control_at(0, 0) == first[0]
    d.method.heard.clear()  # type: ignore[attr-defined]
    with rec.put_back():
        list(rec.forward())
    assert set(d.method.heard) <= set(wanted)  # type: ignore[attr-defined]
    assert ("end", 0, first[0]) in d.method.heard  # type: ignore[attr-defined]


def test_a_second_run_of_a_driver_asks_for_its_first_control_anew() -> None:
    d, spec = looped(PLAIN["pgd_at"])
    for _ in range(2):
        list(rollout(d, spec, until=1))
    assert [now.batch for now in spec.controller.asked] == 2 * [0, 1, 2]  # type: ignore[attr-defined]


def test_what_is_known_ahead_of_a_closed_loop_is_its_most_expensive_control_and_no_block() -> None:
    _, spec = looped(PLAIN["pgd_at"])
    assert not spec.open_loop
    with pytest.raises(
        ValueError,
        match="closed loop Follow are not known before the run: give it an attribute `most_expensive`",
    ):
        spec.plan()
    spec.controller.most_expensive = {"alpha": 0.1, "steps": 3}  # type: ignore[attr-defined]
    assert spec.plan(2) == [Control(alpha=0.1, steps=3)] * (STEPS - 2)
    assert spec.blocks(1, 4) == (0, 1, 2)


def test_what_a_controller_measures_is_counted_apart_from_steps() -> None:
    class Measuring(Follow):
        def control(self, now: Moment, z: Any) -> Control:
            z.meter.gradients += 7
            return super().control(now, z)

    d, spec = looped(PLAIN["pgd_at"])
    plain = list(rollout(d, spec))
    other, _ = looped(PLAIN["pgd_at"])
    steps = list(rollout(other, replace(spec, controller=Measuring(PLAIN["pgd_at"]))))
    assert same(steps, plain)
    assert other.meter.gradients == d.meter.gradients + 7 * STEPS


# ------------------------------------------------------------------------ asking

SPACE = build("fast").controls


def promised(**memory: Any) -> Any:
    """As much of a driver as a controller is promised."""
    return SimpleNamespace(
        seed=0,
        device=torch.device("cpu"),
        method=SimpleNamespace(controls=SPACE),
        meter=Meter(),
        controller_memory=memory,
    )


class Fixed:
    """Takes what it was given, and draws, counts and remembers on the way."""

    def __init__(self, u: Any, memory: Any = None) -> None:
        self.u, self.memory = u, memory

    def control(self, now: Moment, z: Any) -> Any:
        z.meter.gradients += 5
        z.controller_memory["drawn"] = float(torch.rand(())) if self.memory is None else self.memory
        return self.u


U = {"alpha": 0.1}


def test_a_control_is_completed_by_the_methods_defaults_and_draws_by_its_moment() -> None:
    z, global_state = promised(), torch.random.get_rng_state()
    u = decide(Fixed(U), Moment(0, 1, 4), z, World())
    assert u == SPACE.check(U)
    assert len(u) > len(U)
    first = z.controller_memory["drawn"]
    decide(Fixed(U), Moment(0, 2, 4), z, World())
    assert z.controller_memory["drawn"] != first
    decide(Fixed(U), Moment(0, 1, 4), z, World())
    assert z.controller_memory["drawn"] == first
    assert torch.equal(torch.random.get_rng_state(), global_state)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Fixed({"alpha": 0.1, "stepps": 1}), "not stepps, did you mean 'steps'"),
        (Fixed({"alpha": float("nan")}), "alpha must be"),
        (Fixed({"alpha": -1}), "alpha must be >= 0"),
        (Fixed(U, torch.zeros(2)), "must be plain data.*got"),
        (Fixed(U, float("inf")), "must be plain data"),
        (Fixed(U, (1, 2)), "must be plain data"),
        (Fixed(U, {1: 2}), "must be plain data"),
    ],
)
def test_a_controller_that_goes_wrong_is_named_with_the_moment(wrong: Fixed, told: str) -> None:
    with pytest.raises(ValueError, match=rf"controller Fixed \(epoch 2, batch 1\): .*{told}"):
        decide(wrong, Moment(2, 1, 4), promised(), World())
