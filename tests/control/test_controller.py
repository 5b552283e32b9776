"""Controllers: what is one, what it may do, and the schedule of the controls that were taken."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlat.control.controller import (
    Moment,
    OpenLoop,
    Recorded,
    as_controller,
    as_schedule,
    is_open,
    run_lengths,
    unrolled,
)
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import load_schedule
from controlat.control.space import Control

AMATA = parse_schedule("amata:min=1,max=4,tau=0.3", 3)


class Closed:
    """A closed loop."""

    def control(self, now: Moment, z: Any) -> Control:
        return Control(steps=1)


controls = st.builds(
    lambda a, k, m: Control(alpha=a, steps=k, inner=m),
    st.floats(0, 1, allow_subnormal=False),
    st.integers(0, 9),
    st.integers(1, 4),
)


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_the_schedule_of_controls_takes_these_controls(data: Any, batches: int, epochs: int) -> None:
    few = data.draw(st.lists(controls, min_size=1, max_size=4))
    each = st.integers(0, len(few) - 1)
    drawn = data.draw(st.lists(each, min_size=1, max_size=batches * epochs))
    taken = [few[i] for i in drawn]
    schedule = as_schedule(taken, batches, epochs)
    assert [schedule(n / batches) for n in range(len(taken))] == taken
    assert [schedule.control(Moment(*divmod(n, batches), batches)) for n in range(len(taken))] == taken
    assert type(schedule(0)["inner"]) is int


@given(st.lists(controls, min_size=1, max_size=9))
def test_run_lengths_of_an_epoch_are_unrolled_to_it(taken: list[Control]) -> None:
    runs = run_lengths(taken)
    assert unrolled(runs, len(taken)) == taken
    assert all(a[1] != b[1] for a, b in pairwise(runs))


def test_the_resolution_is_the_coarsest_that_keeps_every_control(tmp_path: Path) -> None:
    u, v = Control(alpha=0.1, steps=1), Control(alpha=0.1, steps=2)
    for taken, resolution in (
        ([u] * 24, 1.0),
        ([u] * 12 + [v] * 12, 1.0),
        ([u] * 6 + [v] * 18, 0.5),
        ([u] * 16 + [v] * 8, 1 / 3),
        ([u] * 17 + [v] * 7, 1 / 12),
    ):
        found = as_schedule(taken, 12, 2, "mine:rule")
        assert found.resolution == pytest.approx(resolution)
        assert found.curves["alpha"].kind == "constant"
        found.save(tmp_path / f"{resolution}-{taken.index(v) if v in taken else 0}.json")
    for file in tmp_path.iterdir():
        assert load_schedule(file).text == "mine:rule"


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ([], "needs 1 to 4 controls, got 0"),
        ([Control(steps=1)] * 5, "needs 1 to 4 controls, got 5"),
        ([Control(steps=1), Control(alpha=0.1, steps=1)], "same knobs"),
    ],
)
def test_controls_that_are_no_schedule_are_refused(taken: list[Control], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        as_schedule(taken, 2, 2)


def test_a_schedule_and_a_function_of_t_are_open_loops_which_need_no_state() -> None:
    now = Moment(1, 2, 4)
    assert as_controller(AMATA) is AMATA
    function = as_controller(lambda t: Control(steps=int(t * 4)))
    assert isinstance(function, OpenLoop)
    assert function(1.5) == function.control(now) == Control(steps=6)
    assert AMATA.control(now) == AMATA(1.5)
    replay = Recorded((Control(steps=6), Control(steps=7)), first=6, opening=Control(steps=4))
    assert [replay.control(Moment(1, b, 4))["steps"] for b in (2, 3, 0)] == [6, 7, 4]
    with pytest.raises(ValueError, match=re.escape("steps 6..7 were recorded, not of step 8")):
        replay.control(Moment(2, 0, 4))
    assert all(map(is_open, (AMATA, function, replay)))
    assert not is_open(as_controller(Closed()))


@pytest.mark.parametrize("wrong", [None, 3, "pgd:steps=1,alpha=0.1", SimpleNamespace(control=3)])
def test_what_is_no_controller_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=re.escape("have a method control(now, z), got")):
        as_controller(wrong)
    with pytest.raises(TypeError, match="got the class Closed: call it"):
        as_controller(Closed)
