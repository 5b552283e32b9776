"""Search spaces: the ranges in a schedule's text, by hand; every point is a schedule."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat.attacks.balls import Ball
from controlat.methods import build
from controlat.pmp import controllers
from controlat.schedule_search.space import CLOSED_LOOPS, SPACES, Parameter, Space, named_space


def space(name: str) -> Space:
    return named_space(name, eps=0.15, max_steps=8, epochs=12, knobs=build("pgd_at").controls)


def test_ranges_by_hand() -> None:
    s = Space("step:steps=0~4~whole:5:1/2~3/2,at=3:6,alpha=0.1~0.4~log,rounding=dither", 12)
    assert s.parameters == (
        Parameter("steps[0]", 0, 4, "whole"),
        Parameter("steps[1]", 0.5, 1.5),
        Parameter("alpha", 0.1, 0.4, "log"),
    )
    point = s.point([0.5, 0.25, 0.5])
    assert point == {"steps[0]": 2, "steps[1]": 0.75, "alpha": 0.2}
    assert s.text_of(point) == "step:steps=2:5:0.75,at=3:6,alpha=0.2,rounding=dither"
    assert [s.parameters[0].value(share) for share in (0, 0.19, 0.21, 0.99, 1)] == [0, 0, 1, 4, 4]
    assert Parameter("steps", 0, 8, "root").value(0.5) == 2


@pytest.mark.parametrize("name", SPACES)
def test_a_design_begins_with_what_the_literature_trains_with_and_fills_the_space(name: str) -> None:
    s = space(name)
    points = list(itertools.islice(s.design(3), 64))
    assert points == list(itertools.islice(s.design(3), 64))
    for start, point in zip(s.starts, points, strict=False):
        assert list(point.values()) == pytest.approx(list(start), rel=1e-3)
    shares = np.array([s.shares(p) for p in points])
    assert (np.ptp(shares, axis=0) > 0.8).all()
    assert s.schedule(points[0])(11)["steps"] > 0


@pytest.mark.parametrize("name", SPACES)
@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data())
def test_every_point_is_a_schedule_and_has_coordinates(name: str, data: st.DataObject) -> None:
    s = space(name)
    shares = data.draw(st.lists(st.floats(0, 1), min_size=len(s.parameters), max_size=len(s.parameters)))
    point = s.point(shares)
    schedule = s.schedule(point)
    assert all(0 <= schedule(t)["steps"] <= 8 for t in range(12))
    assert s.point(s.shares(point)) == pytest.approx(point, rel=2e-3)
    coarse = [0 if p.scale != "whole" else 1 / (p.high - p.low + 1) for p in s.parameters]
    assert (np.abs(np.subtract(s.shares(point), shares)) <= np.add(coarse, 1e-3)).all()


def test_any_knob_of_any_method() -> None:
    s = Space("set:alpha=0.1~0.3~log,noise=0~3", 4, build("nfgsm").controls)
    assert s.schedule(s.point([0, 1]))(0)["noise"] == 3


def test_every_closed_loop_has_a_space_whose_points_it_takes() -> None:
    assert set(CLOSED_LOOPS) == set(controllers.names())
    for name in CLOSED_LOOPS:
        s = space(name)
        assert not s.open_loop
        for point in itertools.islice(s.design(0), 3):
            controllers.build(s.text_of(point), method=build("pgd_at"), ball=Ball(0.15))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pgd:steps=3,alpha=0.1", "needs a range"),
        ("pgd:steps=3~3,alpha=0.1", "from a number to a larger one, got 3~3~linear"),
        ("pgd:steps=3,alpha=0~0.1~log", "starts above 0"),
        ("pgd:steps=1.5~3~whole,alpha=0.1", "between whole numbers"),
        ("pgd:steps=1~3~cubic,alpha=0.1", "one of linear, log, root, whole"),
        ("pgd:steps=1~3~log~whole,alpha=0.1", "low~high or low~high~scale"),
        ("pgd:steps=a~3,alpha=0.1", "steps"),
        ("amatta:min=1~3", "unknown schedule 'amatta'"),
        ("anneal:steps=-1~3,alpha=0.1", "K >= 0"),
    ],
)
def test_what_is_wrong_is_said(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Space(text, 4)


def test_an_unknown_space_is_refused_with_its_likely_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'amata'"):
        space("amatta")
