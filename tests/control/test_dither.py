"""Dithered knobs: whole numbers for every step whose sums are those of real ones, up to less than 1."""

import copy
import itertools
import json
import math
import pickle
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import controlat
from controlat.control.curves import Curve, dithered
from controlat.control.schedule_text import FAMILIES, parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Control
from controlat.methods import build

seeded = settings(derandomize=True, deadline=None, max_examples=200)
reals = st.fractions(0, 40, max_denominator=64).map(float) | st.floats(0, 40)


def steps_of(s: Schedule, epoch: int, batches: int, knob: str = "steps") -> list[int]:
    return [s.at(epoch, batch, batches)[knob] for batch in range(batches)]


# ---------------------------------------------------------------------------------------- the sequence


def test_a_constant_is_taken_in_the_pattern_written_by_hand() -> None:
    assert list(dithered([2.5] * 6)) == [2, 3, 2, 3, 2, 3]
    assert list(dithered([2.75] * 8)) == [2, 3, 3, 3, 2, 3, 3, 3]
    assert list(dithered([1 / 3] * 6, phase=0.5)) == [0, 1, 0, 0, 1, 0]
    assert list(dithered([3.0] * 5, phase=0.99)) == [3] * 5
    assert list(dithered([0.5, 1.5, 2.5, 3.5])) == [0, 2, 2, 4]


def test_the_pattern_is_that_of_exact_fractions() -> None:
    """k_b = floor((b + 1) K + phase) - floor(b K + phase), in rational arithmetic."""
    for k, phase in itertools.product(
        [Fraction(23, 10), Fraction(7, 3), Fraction(1, 64)], [0, Fraction(3, 8)]
    ):
        exact = [math.floor((b + 1) * k + phase) - math.floor(b * k + phase) for b in range(5000)]
        assert list(dithered([float(k)] * 5000, float(phase))) == exact


@seeded
@given(st.lists(reals, min_size=1, max_size=60), st.floats(0, 0.99))
def test_any_stretch_of_any_curve_is_exact_to_less_than_one(values: list[float], phase: float) -> None:
    taken = list(dithered(values, phase))
    assert all(type(k) is int for k in taken)
    assert all(math.floor(v + 1e-9) <= k <= math.ceil(v) for k, v in zip(taken, values, strict=True))
    off = [0.0, *itertools.accumulate(k - v for k, v in zip(taken, values, strict=True))]
    assert max(off) - min(off) < 1


def test_the_golden_sequence_alone_would_not_be_exact() -> None:
    """Why the numbers are not compared with a fixed sequence: it is off by more than a batch."""
    golden = (math.sqrt(5) - 1) / 2
    taken = [(b + 1) * golden % 1 < 0.5 for b in range(3000)]
    off = [sum(taken[:n]) - n / 2 for n in range(3000)]
    assert max(map(abs, off)) > 1


@seeded
@given(reals, st.integers(1, 200), st.integers(0, 300))
def test_an_epoch_of_a_constant_costs_what_it_should_to_less_than_one_step(
    k: float, batches: int, epoch: int
) -> None:
    s = parse_schedule(f"pgd:steps={k!r},alpha=0.1,rounding=dither", 5)
    taken = steps_of(s, epoch, batches)
    assert abs(sum(taken) - batches * k) < 1
    assert set(taken) <= {u["steps"] for u in s.controls}
    assert s(epoch)["steps"] == pytest.approx(k, abs=1e-9)


def test_a_run_has_the_real_mean_and_its_epochs_begin_at_either_number() -> None:
    s = parse_schedule("pgd:steps=2.3,alpha=0.1,rounding=dither", 200)
    epochs = [steps_of(s, epoch, 10) for epoch in range(200)]
    assert {sum(taken) for taken in epochs} == {23}
    first = [taken[0] for taken in epochs]
    assert sum(first) / 200 == pytest.approx(2.3, abs=0.02)
    one = [steps_of(s, epoch, 1)[0] for epoch in range(200)]  # a step is an epoch
    assert sum(one) / 200 == pytest.approx(2.3, abs=0.02)


# ---------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("resolution", [1, 0.25, 0.1])
@pytest.mark.parametrize(
    "text",
    [
        "linear:start=0,end=8,alpha=0.1",
        "exponential:min=1,max=7,alpha=0.1",
        "cosine:min=0.5,max=6,tau=0.3",
        "step:steps=0:2.25:7.5,at=1:2.5,tau=0.3",
        "table:steps=0.5:1.25:3,alpha=0.1:0.2:0.3",
        "set:steps=0.5..4@3,alpha=0.1",
    ],
)
def test_every_family_is_exact_in_every_epoch(text: str, resolution: float) -> None:
    s, batches = parse_schedule(f"{text},rounding=dither,resolution={resolution}", 4), 37
    for epoch in range(6):
        us = [s.at(epoch, b, batches) for b in range(batches)]
        real = [s(epoch + b / batches)["steps"] for b in range(batches)]
        assert {type(u["steps"]) for u in us} == {int}
        assert all(math.floor(k) <= u["steps"] <= math.ceil(k) for u, k in zip(us, real, strict=True))
        assert abs(sum(u["steps"] for u in us) - sum(real)) < 1
        assert set(us) <= set(s.controls)


def test_a_text_is_written_out_by_hand() -> None:
    """Phases 0.618 and 0.236: 0.5 rises to 1.5 after two batches of the second epoch."""
    s = parse_schedule("step:steps=0.5:1.5,at=1.5,alpha=0.1,rounding=dither,resolution=0.5", 2)
    assert steps_of(s, 0, 4) == [1, 0, 1, 0]
    assert steps_of(s, 1, 4) == [0, 1, 1, 2]
    assert [s(t) for t in (0, 1.5)] == [Control(alpha=0.1, steps=0.5), Control(alpha=0.1, steps=1.5)]


def test_alpha_divides_by_the_steps_taken_or_by_the_real_number() -> None:
    text = "linear:start=2.5,end=2.5,tau=0.3,rounding=dither"
    taken, real = parse_schedule(text, 2), parse_schedule(f"{text},alpha_from=real", 2)
    for b in range(6):
        u, v = taken.at(0, b, 6), real.at(0, b, 6)
        assert u["steps"] == v["steps"] in (2, 3)
        assert u["alpha"] == 0.3 / u["steps"]
        assert v["alpha"] == 0.3 / 2.5
    assert taken(0) == real(0) == Control(alpha=0.3 / 2.5, steps=2.5)
    rare = parse_schedule("linear:start=0.25,end=0.25,tau=0.3,rounding=dither", 2)
    assert rare(0) == Control(alpha=0.3, steps=0.25)  # as in the steps that attack
    assert rare.controls == (Control(alpha=0, steps=0), Control(alpha=0.3, steps=1))


def test_several_knobs_are_each_exact_and_meet_in_all_ways() -> None:
    space = build("yopo").controls
    s = parse_schedule("set:steps=2.5,alpha=0.1,inner=1.5,rounding=dither", 40, space).bound(space)
    pairs = []
    for epoch in range(40):
        us = [s.at(epoch, b, 8) for b in range(8)]
        assert sum(u["steps"] for u in us) == 20
        assert sum(u["inner"] for u in us) == 12
        pairs += [(u["steps"], u["inner"]) for u in us]
    assert {type(u["inner"]) for u in s.controls} == {int}
    assert all(pairs.count(pair) > 40 for pair in itertools.product((2, 3), (1, 2)))


@pytest.mark.parametrize("text", [f.example for f in FAMILIES.values()])
def test_every_family_takes_it_and_whole_numbers_stay_as_they_are(text: str) -> None:
    plain = parse_schedule(text, 40)
    s = parse_schedule(text + ("," if ":" in text else ":") + "rounding=dither", 40)
    assert s.curves["steps"].rounding == "dither"
    for t in range(40):
        if s(t)["steps"] == int(s(t)["steps"]):
            assert {s.at(t, b, 3) for b in range(3)} == {plain(t)} == {s(t)}
            assert type(s(t)["steps"]) is int


def test_without_dithering_a_step_has_the_control_of_its_time() -> None:
    s = parse_schedule("amata:min=1,max=7,tau=0.3,resolution=0.25", 3)
    assert [s.at(e, b, 7) for e in range(4) for b in range(7)] == [
        s(e + b / 7) for e in range(4) for b in range(7)
    ]
    assert s.controls == tuple(dict.fromkeys(s(t / 4) for t in range(12)))


def test_it_is_saved_and_loaded_copied_and_compared(tmp_path: object) -> None:
    s = parse_schedule("amata:min=1,max=7.5,tau=0.3,rounding=dither,resolution=0.5", 5)
    s.save(f"{tmp_path}/s.json")
    asked = [(e, b) for e in range(7) for b in range(9)]
    for again in (
        load_schedule(f"{tmp_path}/s.json"),
        Schedule.from_json(json.loads(json.dumps(s.to_json()))),
        copy.deepcopy(s),
        pickle.loads(pickle.dumps(s)),
        replace(s),
    ):
        assert again == s
        assert again.to_json() == s.to_json()
        assert [again.at(e, b, 9) for e, b in reversed(asked)] == [s.at(e, b, 9) for e, b in reversed(asked)]
    assert s.to_json()["knobs"]["steps"]["rounding"] == "dither"
    assert s.to_json()["version"] == 1  # releases of before name the roundings that they know


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("table:steps=1:2.5,tau=1", "steps without rounding=dither must be a whole number, got 2.5"),
        ("pgd:steps=2,alpha=1,rounding=floor", "rounding of pgd is dither or left out, got 'floor'"),
        ("amata:min=1,max=2,tau=1,rounding=up", "rounding is one of half_up, floor, dither, got 'up'"),
        ("linear:start=1,end=-1,alpha=1,rounding=dither", "linear needs K >= 0, got -1"),
        ("set:steps=1..-1,alpha=1,rounding=dither", "steps must be >= 0, got"),
    ],
)
def test_a_wrong_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_schedule(text, 4)


def test_a_ratio_is_not_dithered() -> None:
    with pytest.raises(ValueError, match="a ratio curve cannot have rounding dither: give it to the knob"):
        Curve("ratio", (1.0,), rounding="dither", of="steps")


def test_both_numbers_must_be_admissible() -> None:
    space = build("free").controls
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        parse_schedule("pgd:steps=0.5,alpha=0.1,rounding=dither", 3, space).bound(space)
    parse_schedule("pgd:steps=1.5,alpha=0.1,rounding=dither", 3, space).bound(space)


def test_a_real_number_of_steps_is_no_control_of_a_step_and_the_error_names_the_one_that_is() -> None:
    u = parse_schedule("pgd:steps=2.5,alpha=0.1,rounding=dither", 3)(0)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    message = re.escape(
        "steps must be an integer, got 2.5 (of a schedule with rounding=dither take schedule.at("
    )
    with pytest.raises(ValueError, match=message):
        controlat.pgd(model, x, y, eps=0.1, **u)
    with pytest.raises(ValueError, match=message):
        controlat.criterion(model, x, y, u, eps=0.1, gamma=0.01)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((0, 4, 4), "batch must be below the 4 batches of an epoch, got 4"),
        ((-1, 0, 4), "epoch must be a whole number >= 0, got -1"),
        ((0, -1, 4), "batch must be a whole number >= 0, got -1"),
        ((0.5, 0, 4), "epoch must be a whole number >= 0, got 0.5"),
        ((0, 0, 0), "batches must be a whole number >= 1, got 0"),
    ],
)
@pytest.mark.parametrize("rounding", ["", ",rounding=dither"])
def test_a_step_that_does_not_exist_is_refused(
    rounding: str, step: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_schedule("pgd:steps=2,alpha=0.1" + rounding, 3).at(*step)
