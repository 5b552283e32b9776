"""Schedules: every family against values written out by hand; files come back equal or are refused."""

import contextlib
import copy
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import guarded, split
from hypothesis import given, settings
from hypothesis import strategies as st

import controlat
from controlat.app.trainer import Tally
from controlat.app.trainer import _bar as progress_of_training
from controlat.attacks.balls import Ball
from controlat.control.curves import CURVES, Curve
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import FAMILIES, parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build, names
from controlat.report.sections import problem

seeded = settings(derandomize=True, deadline=None, max_examples=100)


def steps(text: str, epochs: int) -> list[float]:
    """K of every epoch."""
    schedule = parse_schedule(text, epochs)
    return [schedule(t)["steps"] for t in range(epochs)]


def alphas(text: str, epochs: int) -> list[float]:
    """alpha of every epoch."""
    schedule = parse_schedule(text, epochs)
    return [schedule(t)["alpha"] for t in range(epochs)]


# ------------------------------------------------------------------------------------- the families, by hand


def test_none_is_no_attack() -> None:
    assert dict(parse_schedule("none", 3)(2)) == {"alpha": 0.0, "steps": 0}


def test_anneal_is_real_k_on_lines_through_knots_and_a_line_of_log_alpha() -> None:
    schedule = parse_schedule("anneal:steps=0:2:8,alpha=0.4:0.1", 4)
    assert [schedule(t)["steps"] for t in (0, 1, 2, 3)] == [0, 1, 2, 5]
    assert [schedule(t)["alpha"] for t in (1, 2)] == pytest.approx([0.4 * 4**-0.25, 0.2])
    assert schedule(0)["alpha"] == 0  # no attack
    half = parse_schedule("anneal:steps=0:1,alpha=0.1", 2)
    assert half(1)["steps"] == 0.5  # real: dithered over the batches
    assert sum(half.at(1, b, 10)["steps"] for b in range(10)) == 5
    assert steps("anneal:steps=3,tau=0.3", 2) == [3, 3]
    assert alphas("anneal:steps=1:3,tau=0.3,rounding=half_up", 2) == pytest.approx([0.3, 0.15])


def test_delayed_starts_late() -> None:
    assert steps("delayed:steps=7,alpha=0.1,since=2", 4) == [0, 0, 7, 7]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("anneal:steps=0:-1,alpha=0.1", "needs K >= 0, got -1"),
        ("anneal:steps=0:1,alpha=0.1:0", "one alpha or two > 0"),
        ("anneal:steps=0:1,alpha=0.1:0.2:0.3", "one alpha or two > 0"),
        ("anneal:steps=0:1,alpha=0.1:0.2,tau=1", "not both"),
        ("anneal:steps=0:1", "needs one of tau"),
        ("delayed:steps=7,alpha=0.1", "since"),
    ],
)
def test_anneal_and_delayed_say_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_schedule(text, 4)


def test_fgsm_is_one_step() -> None:
    assert dict(parse_schedule("fgsm:alpha=10/255", 3)(1)) == {"alpha": 10 / 255, "steps": 1}


def test_pgd_is_constant_and_its_fractions_exact() -> None:
    s = parse_schedule("pgd:steps=10,alpha=2/255", 30)
    assert {s(t) for t in range(30)} == {Control(alpha=2 / 255, steps=10)}
    assert s(0)["alpha"] == float(Fraction(2, 255))


def test_amata_from_5_to_40_in_7_epochs() -> None:
    text = "amata:min=5,max=40,tau=0.4"
    assert steps(text, 7) == [5, 10, 15, 20, 25, 30, 35]
    assert alphas(text, 7) == [0.4 / 5, 0.4 / 10, 0.4 / 15, 0.4 / 20, 0.4 / 25, 0.4 / 30, 0.4 / 35]


def test_amata_rounds_half_up_or_down() -> None:
    # 2 + 3 t / 6: 2, 2.5, 3, 3.5, 4, 4.5; Python's own round would give 2 and 4 for 2.5 and 4.5
    assert steps("amata:min=2,max=5,tau=1", 6) == [2, 3, 3, 4, 4, 5]
    assert steps("amata:min=2,max=5,tau=1,rounding=half_up", 6) == [2, 3, 3, 4, 4, 5]
    assert steps("amata:min=2,max=5,tau=1,rounding=floor", 6) == [2, 2, 3, 3, 4, 4]


def test_amata_2_to_10_in_100_epochs_as_in_the_paper() -> None:
    half_up, floor = (steps(f"amata:min=2,max=10,tau=20/255,rounding={r}", 100) for r in ("half_up", "floor"))
    assert (half_up[0], half_up[-1], floor[-1]) == (2, 10, 9)
    # exact integers: floor(2 + 8 t / 100 + 1/2) and floor(2 + 8 t / 100)
    assert half_up == [(500 + 16 * t) // 200 for t in range(100)]
    assert floor == [(200 + 8 * t) // 100 for t in range(100)]
    # mean(K + 1) / (K_max + 1)
    assert sum(k + 1 for k in half_up) / 1100 == pytest.approx(0.633, abs=5e-4)
    assert sum(k + 1 for k in floor) / 1100 == pytest.approx(0.589, abs=5e-4)


def test_amata_keeps_tau_with_rounded_steps_and_follows_the_curve_with_real_ones() -> None:
    text = "amata:min=2,max=5,tau=20/255"
    tau, real = 20 / 255, [2, 2.5, 3, 3.5, 4, 4.5]
    assert alphas(text, 6) == [tau / k for k in (2, 3, 3, 4, 4, 5)]
    assert alphas(text + ",alpha_from=rounded", 6) == alphas(text, 6)
    assert alphas(text + ",alpha_from=real", 6) == [tau / k for k in real]


def test_amata_with_a_fixed_step_size() -> None:
    assert alphas("amata:min=2,max=10,alpha=2/255", 5) == [2 / 255] * 5


def test_amata_with_equal_bounds_is_pgd() -> None:
    amata, pgd = (
        parse_schedule("amata:min=10,max=10,tau=0.1", 9),
        parse_schedule("pgd:steps=10,alpha=0.01", 9),
    )
    assert [amata(t) for t in range(9)] == [pgd(t) for t in range(9)]


def test_linear_falls_and_has_no_step_size_without_steps() -> None:
    text = "linear:start=4,end=0,tau=0.4"
    assert steps(text, 8) == [4, 4, 3, 3, 2, 2, 1, 1]  # 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5
    assert steps(text + ",rounding=floor", 8) == [4, 3, 3, 2, 2, 1, 1, 0]
    assert alphas(text + ",rounding=floor", 8)[-1] == 0.0
    assert alphas(text + ",rounding=floor,alpha_from=real", 8)[-1] == 0.0
    assert alphas(text, 8)[:3] == [0.1, 0.1, 0.4 / 3]


def test_exponential() -> None:
    assert steps("exponential:min=1,max=16,tau=1", 4) == [1, 2, 4, 8]
    assert steps("exponential:start=16,end=1,tau=1", 4) == [16, 8, 4, 2]
    assert steps("exponential:min=1,max=8,tau=1,rounding=floor", 6) == [1, 1, 2, 2, 4, 5]  # 2^(t/2)
    assert alphas("exponential:min=1,max=16,tau=1", 4) == [1.0, 0.5, 0.25, 0.125]


def test_cosine() -> None:
    # 10 (1 - cos(pi t / 6)) / 2 = 0, 0.67, 2.5, 5, 7.5, 9.33
    assert steps("cosine:min=0,max=10,tau=20/255", 6) == [0, 1, 3, 5, 8, 9]
    assert steps("cosine:min=0,max=10,tau=20/255,rounding=floor", 6) == [0, 0, 2, 5, 7, 9]
    assert alphas("cosine:min=0,max=10,tau=20/255", 6)[:2] == [0.0, 20 / 255]


def test_step_changes_at_the_start_of_the_named_epochs() -> None:
    text = "step:steps=0:2:10,at=3:8,tau=20/255"
    assert steps(text, 10) == [0, 0, 0, 2, 2, 2, 2, 2, 10, 10]
    assert alphas(text, 10) == [0.0] * 3 + [10 / 255] * 5 + [2 / 255] * 2


def test_step_with_a_list_of_step_sizes() -> None:
    assert alphas("step:steps=1:2,at=2,alpha=0.5:0.25", 4) == [0.5, 0.5, 0.25, 0.25]
    assert alphas("step:steps=1:2,at=2,alpha=0.5", 4) == [0.5] * 4


def test_table_lists_the_pieces_and_holds_its_last_value() -> None:
    assert steps("table:steps=0:1:2:7,tau=1", 4) == [0, 1, 2, 7]
    assert steps("table:steps=0:1,tau=1", 5) == [0, 1, 1, 1, 1]
    assert alphas("table:steps=0:1:2:4,tau=1", 4) == [0.0, 1.0, 0.5, 0.25]
    assert alphas("table:steps=3:1:2,alpha=0.1:0.2:0.3", 3) == [0.1, 0.2, 0.3]
    assert alphas("table:steps=0:1:2,alpha=0.1:0.2", 3) == [0.0, 0.2, 0.2]


def test_every_family_has_an_example_that_parses_and_comes_back() -> None:
    for name, family in FAMILIES.items():
        s = parse_schedule(family.example, 100)
        assert s.text.partition(":")[0] == name
        assert {"alpha", "steps"} <= set(s(0))
        assert Schedule.from_json(json.loads(json.dumps(s.to_json()))) == s


# ------------------------------------------------------------------------------------------------------ time


@pytest.mark.filterwarnings("ignore:.* never comes to")  # fewer epochs than the example has
@pytest.mark.parametrize("text", [f.example for f in FAMILIES.values()])
def test_a_schedule_is_constant_on_an_epoch_and_beyond_the_end(text: str) -> None:
    s = parse_schedule(text, 20)
    assert all(s(t + f) == s(t) for t in range(20) for f in (0.25, 0.5, 0.999))
    assert s(20) == s(20.5) == s(1e9) == s(1.7e308) == s(19)


def test_resolution_finer_than_an_epoch() -> None:
    s = parse_schedule("linear:start=0,end=8,tau=1,resolution=0.25", 2)
    assert s.pieces == 8
    assert [s(i / 4)["steps"] for i in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert s(0.249)["steps"] == 0


def test_resolution_coarser_than_an_epoch_and_not_a_divisor() -> None:
    s = parse_schedule("linear:start=0,end=10,tau=1,resolution=4", 10)
    assert s.pieces == 3
    assert [s(t)["steps"] for t in range(11)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]


def test_a_table_counts_pieces_not_epochs() -> None:
    s = parse_schedule("table:steps=1:2:3:4,alpha=0.1,resolution=0.5", 2)
    assert [s(t)["steps"] for t in (0, 0.5, 1, 1.5)] == [1, 2, 3, 4]


@pytest.mark.parametrize("resolution", [0.1, 0.7, 1 / 3, 1 / 390, 0.001])
def test_float_trouble_does_not_move_a_piece(resolution: float) -> None:
    n = 1000
    s = parse_schedule(
        f"linear:start=0,end={n},tau=1,resolution={resolution!r},rounding=floor", n * resolution
    )
    assert s.pieces == n
    assert [s(i * resolution)["steps"] for i in range(n)] == list(range(n))  # 0.1 * 3 and the like
    totals, t = [], 0.0
    for _ in range(n):
        totals.append(s(t)["steps"])
        t += resolution  # rounding adds up
    assert totals == list(range(n))


def test_a_step_at_a_multiple_of_the_resolution_is_taken_there() -> None:
    s = parse_schedule("step:steps=1:2,at=0.3,alpha=0.1,resolution=0.1", 1)
    assert [s(i * 0.1)["steps"] for i in range(10)] == [1, 1, 1] + [2] * 7
    assert s(0.3) == s(0.1 * 3) == s(0.1 + 0.2)


@pytest.mark.parametrize("t", [-1, -1e-9, math.nan, math.inf, "later", None])
def test_a_time_that_is_none_is_refused(t: Any) -> None:
    with pytest.raises(ValueError, match=r"t must be|starts at t = 0, got t = -"):
        parse_schedule("none", 3)(t)


# ---------------------------------------------------------------------------------------- as controls of pgd


def test_a_saved_schedule_is_used_as_keyword_arguments_of_pgd(tmp_path: Path) -> None:
    parse_schedule("amata:min=0,max=4,tau=0.2", 4).save(tmp_path / "amata.json")
    schedule, eps = load_schedule(tmp_path / "amata.json"), 0.1
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    x, y = torch.rand(5, 1, 4, 4), torch.arange(5) % 3
    for epoch in range(4):
        torch.manual_seed(epoch)
        found = controlat.pgd(model, x, y, eps=eps, **schedule(epoch))
        torch.manual_seed(epoch)
        alpha = 0.2 / epoch if epoch else 0.0
        assert torch.equal(found, controlat.pgd(model, x, y, eps=eps, alpha=alpha, steps=epoch))
    assert torch.equal(controlat.pgd(model, x, y, eps=eps, **schedule(0)), x)


# ----------------------------------------------------------------------------------------------- round trips

positive = st.floats(1e-3, 1e3)
whole = st.integers(0, 50).map(float)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Random schedules of every kind of curve."""
    epochs = draw(st.integers(1, 30) | st.floats(1, 30))
    resolution = draw(st.sampled_from([1.0, 0.5, 0.1, 1 / 3]))
    kind = draw(st.sampled_from([k for k in CURVES if k != "ratio"]))
    rounding = draw(st.sampled_from(["half_up", "floor"]))
    at: tuple[float, ...] = ()
    if kind == "step":
        at = tuple(sorted(draw(st.sets(st.floats(0.01, 40), max_size=4))))
        values = draw(st.lists(whole, min_size=len(at) + 1, max_size=len(at) + 1))
    elif kind == "table":
        values = draw(st.lists(whole, min_size=1, max_size=max(1, int(epochs))))
    elif kind == "constant":
        values = [draw(whole)]
    else:
        values = [draw(positive), draw(positive)]
        at = (draw(st.floats(0.01, 40)),) if kind == "ramp" else ()
    k = Curve(kind, tuple(values), at, rounding)
    alpha = draw(
        st.builds(lambda v: Curve("constant", (v,)), positive)
        | st.builds(lambda a, b: Curve("linear", (a, b)), positive, positive)
        | st.builds(lambda v, r: Curve("ratio", (v,), of="steps", rounded=r), positive, st.booleans())
    )
    return Schedule({"steps": k, "alpha": alpha}, epochs, resolution, draw(st.text(max_size=5)))


@seeded
@given(schedules())
def test_json_brings_back_an_equal_schedule(s: Schedule) -> None:
    again = Schedule.from_json(json.loads(json.dumps(s.to_json())))
    assert again == s
    assert hash(again) == hash(s)
    times = [i * s.epochs / 17 for i in range(20)]
    assert [again(t) for t in times] == [s(t) for t in times]


@seeded
@given(schedules())
def test_every_control_is_admissible(s: Schedule) -> None:
    for i in range(s.pieces):
        u = s(i * s.resolution)
        assert type(u["steps"]) is int
        assert u["steps"] >= 0
        assert 0 <= u["alpha"] < math.inf
        assert u["alpha"] == 0 or u["steps"] > 0


@seeded
@given(st.integers(0, 20), st.integers(0, 30), st.integers(1, 60), positive)
def test_amata_never_falls_and_keeps_its_travel(low: int, rise: int, epochs: int, tau: float) -> None:
    s = parse_schedule(f"amata:min={low},max={low + rise},tau={tau!r}", epochs)
    us = [s(t) for t in range(epochs)]
    ks = [u["steps"] for u in us]
    assert ks == sorted(ks)
    assert ks[0] == low
    assert ks[-1] <= low + rise
    assert all(u["steps"] * u["alpha"] == pytest.approx(tau, rel=1e-12) for u in us if u["steps"])
    assert ks == [
        math.floor(Fraction(low) + Fraction(rise * t, epochs) + Fraction(1, 2)) for t in range(epochs)
    ]


@pytest.mark.parametrize("text", [f.example for f in FAMILIES.values()])
def test_file_round_trip(tmp_path: Path, text: str) -> None:
    s = parse_schedule(text, 40)
    s.save(tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == s
    assert load_schedule(str(tmp_path / "s.json")).text == text


def test_a_file_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    parse_schedule("none", 1).save(file)
    with pytest.raises(
        FileExistsError, match=re.escape(f"{file} exists; give another name or overwrite=True")
    ):
        parse_schedule("fgsm:alpha=1", 1).save(file)
    assert load_schedule(file) == parse_schedule("none", 1)
    parse_schedule("fgsm:alpha=1", 1).save(file, overwrite=True)
    assert load_schedule(file) == parse_schedule("fgsm:alpha=1", 1)


AGAIN: dict[str, Callable[[Schedule], Schedule]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "replace": replace,
    "json": lambda s: Schedule.from_json(json.loads(json.dumps(s.to_json()))),
}


def bound(method: str) -> Iterator[tuple[Schedule, Schedule]]:
    """What the method must be given, and the families that have such controls: plain and bound."""
    space = build(method).controls
    least = (f"{n}={min(max(k.low, 1), k.high):g}" for n, k in space.items() if k.default is None)
    for text in ["set:" + ",".join(least), *(f.example for f in FAMILIES.values())]:
        with contextlib.suppress(ValueError):
            plain = parse_schedule(text, 8, space)
            yield plain, plain.bound(space)


@pytest.mark.filterwarnings("ignore:.* never comes to")  # fewer epochs than the example has
@pytest.mark.parametrize("method", names())
def test_what_a_schedule_was_bound_to_survives_every_copy(method: str) -> None:
    pairs, space = list(bound(method)), build(method).controls
    assert pairs
    for plain, s in pairs:
        known = {name: knob.default for name, knob in space.items() if name not in plain.curves}
        for name, again in AGAIN.items():
            found = again(s)
            assert (found, hash(found), repr(found)) == (s, hash(s), repr(s)), name
            for t in range(8):
                assert dict(found(t)) == dict(plain(t)) | known
                assert dict(found.at(t, 0, 4)) == dict(space.check(plain.at(t, 0, 4)))
                assert [type(v) for v in found(t).values()] == [type(v) for v in s(t).values()]
        assert (s == plain, repr(s) == repr(plain)) == (not known, not known)


def test_the_defaults_of_fast_by_hand() -> None:
    s = parse_schedule("fgsm:alpha=0.1", 5).bound(build("fast").controls)
    assert dict(pickle.loads(pickle.dumps(s))(4)) == {"alpha": 0.1, "random": 1.0, "start": 1.0, "steps": 1}
    other = s.bound(build("pgd_at").controls)  # what another method filled in is no choice of the user's
    assert other == parse_schedule("fgsm:alpha=0.1", 5)
    assert replace(s, defaults={**s.defaults, "start": 0.5})(0)["start"] == 0.5
    with pytest.raises(ValueError, match="alpha cannot have both a curve and a default"):
        replace(s, defaults={"alpha": 1})


def test_a_whole_number_comes_as_int_from_a_file_without_rounding() -> None:
    knobs = {"steps": Curve("constant", (2,)), "alpha": Curve("constant", (0.1,))}
    s = Schedule({**knobs, "reset": Curve("step", (3, 5), at=(1,))}, 2).bound(build("atta").controls)
    assert [(type(u["reset"]), u["reset"]) for u in map(s, (0, 1))] == [(int, 3), (int, 5)]


def test_equal_schedules_have_equal_hashes() -> None:
    a, b = (Schedule({"sigma": Curve("constant", (v,))}, 3) for v in (0.0, -0.0))
    assert a == b
    assert hash(a) == hash(b)


def test_schedules_compare_by_value_and_are_frozen() -> None:
    s = parse_schedule("pgd:steps=2,alpha=0.1", 5)
    assert s == parse_schedule("pgd:steps=2,alpha=0.1", 5.0)
    assert s != parse_schedule("pgd:steps=2,alpha=0.1", 6)
    assert s != parse_schedule("pgd:steps=2,alpha=0.2", 5)
    with pytest.raises(AttributeError):
        s.epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        s.curves["steps"] = Curve("constant", (1,))  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ not reached


@pytest.mark.parametrize(
    ("text", "epochs", "expected"),
    [
        ("step:steps=0:2:10,at=3:8,alpha=0.1", 5, {"steps": (8,)}),
        ("step:steps=0:2:10,at=3:8,alpha=0.1", 8, {"steps": (8,)}),  # training ends where it would change
        ("step:steps=0:2:10,at=3:8,alpha=0.1", 9, {}),
        ("step:steps=0:2:10,at=6:8,alpha=0.1:0.2:0.3", 5, {"steps": (6, 8), "alpha": (6, 8)}),
        ("step:steps=0:2:10,at=3:4.5,alpha=0.1", 5, {"steps": (4.5,)}),  # in the last piece
        ("step:steps=0:2:10,at=3:4.5,alpha=0.1,resolution=0.5", 5, {}),
        ("step:steps=0:2:10,at=3.2:3.4,alpha=0.1", 5, {"steps": (3.2,)}),  # both within one piece
        ("set:steps=1,alpha=0.1:0.2@8,start=0..1@9", 5, {"alpha": (8,), "start": (9,)}),
        ("set:steps=1,alpha=0.1:0.2@4,start=0..1@5", 5, {}),  # as a..b, whose end is T
        ("amata:min=1,max=5,tau=1", 5, {}),
        ("table:steps=1:2:3:4:5,alpha=0.1", 5, {}),
        ("pgd:steps=1,alpha=0.1", 5, {}),
    ],
)
def test_switches_that_training_never_comes_to(text: str, epochs: int, expected: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="never comes to") if expected else contextlib.nullcontext():
        s = parse_schedule(text, epochs)
    assert s.unreached() == expected
    assert Schedule.from_json(s.to_json()).unreached() == expected
    for knob in (k for k in expected if s.curves[k].kind == "step"):  # by looking at every piece
        taken = {s(i * s.resolution)[knob] for i in range(s.pieces)}
        values = dict(zip(s.curves[knob].at, s.curves[knob].values[1:], strict=True))
        assert not taken & {values[e] for e in expected[knob]}


# ----------------------------------------------------------------------------------------------- many pieces


def _calls(work: Callable[[], object]) -> int:
    """Calls of functions of controlat, generators that go on included."""
    found = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal found
        found += event == "call" and "controlat" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def _whole_path(text: str, n: int, folder: Path) -> None:
    """All that the commands do with a schedule of n pieces, one for each of n steps."""
    space, data = build("pgd_at").controls, split(20)
    s = parse_schedule(text, n / 20, space).bound(space)
    s.save(folder / "s.json", overwrite=True)
    again = load_schedule(folder / "s.json")
    assert again == s == pickle.loads(pickle.dumps(s))
    assert hash(again) == hash(s)
    assert s.unreached() == {}
    p = RunSpec(
        data, 1, n // 20, s, parse_rate("multistep:lr=0.1,at=" + ":".join(map(str, range(1, n // 20))))
    )
    assert len(p.blocks(0, n)) == n
    assert p.mean_rate() > 0
    driver = Driver(torch.nn.Linear(4, 3), build("pgd_at"), Ball(0.1), SGDSettings())
    progress_of_training(p, driver, Tally(), "train", False)
    problem.draw({"schedules": [{"text": "many", "schedule": s.to_json()}]}, folder / "s.png")


@pytest.mark.parametrize("kind", ["table", "step", "amata"])
def test_the_work_grows_with_the_number_of_pieces_not_its_square(tmp_path: Path, kind: str) -> None:
    def text(n: int) -> str:
        steps = ":".join(str(i % 3) for i in range(n))
        at = ":".join(f"{i}/20" for i in range(1, n))
        return {
            "table": f"table:steps={steps},tau=0.3,resolution=1/20",
            "step": f"step:steps={steps},at={at},tau=0.3,resolution=1/20",
            "amata": "amata:min=1,max=10,tau=0.3,alpha_from=real,resolution=1/20",
        }[kind]

    few, many = (_calls(lambda n=n: _whole_path(text(n), n, tmp_path)) for n in (100, 800))  # type: ignore[misc]
    assert many / few < 1.6 * 8  # 8 in proportion, 64 as its square; a bisection adds log(800) / log(100)


# ------------------------------------------------------------------------------------------- malformed files


def good() -> dict[str, Any]:
    """The JSON of a schedule with a table, a step and a ratio, to be spoiled."""
    curves = {
        "steps": Curve("table", (1, 2, 3)),
        "alpha": Curve("ratio", (0.1,), of="steps"),
        "sigma": Curve("step", (1, 2), at=(2,)),
    }
    found: dict[str, Any] = json.loads(json.dumps(Schedule(curves, 4).to_json()))
    return found


def spoilt(path: str, value: object) -> dict[str, Any]:
    """good() with one entry replaced, or left out where the value is `...`."""
    found = good()
    *folders, name = path.split(".")
    at = found
    for folder in folders:
        at = at[folder]
    if value is ...:
        del at[name]
    else:
        at[name] = value
    return found


def test_the_file_to_be_spoilt_is_good(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(good()))
    assert dict(load_schedule(tmp_path / "s.json")(2)) == {"alpha": 0.1 / 3, "sigma": 2, "steps": 3}


@pytest.mark.parametrize("content", [b"", b"amata:min=2,max=10,tau=1", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file)) + ".*not valid JSON"):
        load_schedule(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'no.json'}: no such file")):
        load_schedule(tmp_path / "no.json")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", 1 << 40)
    for name, what in (("pipe", "is a named pipe"), ("zero", "is a device"), ("folder", "is a folder")):
        with guarded(), pytest.raises(ValueError, match=f"{name}.json: {what}"):
            load_schedule(tmp_path / f"{name}.json")
    with guarded(), pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, but at most"):
        load_schedule(tmp_path / "huge.json")


MALFORMED: list[tuple[Any, str]] = [
    *[(spoilt("defaults", v), '"defaults" must map') for v in (None, [], 3, "beta")],
    *[(spoilt("defaults", {"beta": v}), "defaults: expected plain") for v in ("2", None, [2], True)],
    *[(spoilt("defaults", {"beta": v}), "finite") for v in (math.nan, math.inf)],
    (spoilt("defaults", {"steps": 1}), "steps cannot have both a curve and a default"),
    (None, "not a schedule"),
    ([], "not a schedule"),
    ("amata", "not a schedule"),
    ({}, 'expected an object with "format": "controlat schedule"'),
    (spoilt("format", "other"), "not a schedule"),
    (spoilt("version", 2), "version 2; this release reads version 1"),
    (spoilt("version", ...), "version None"),
    (spoilt("version", "1"), "version '1'"),
    (spoilt("epochs", ...), "lacks epochs"),
    (spoilt("knobs", ...), "lacks knobs"),
    (spoilt("text", ...), "lacks text"),
    (spoilt("other", 1), "does not take other; it takes defaults, epochs"),
    (spoilt("text", None), "text must be a string, got None"),
    *[(spoilt("epochs", v), "epochs") for v in ("4", None, [4], {}, True, 0, -1, 1e300)],
    *[(spoilt("epochs", v), "finite") for v in (math.nan, math.inf)],
    *[(spoilt("resolution", v), "resolution") for v in ("1", None, [1], True, 0, -1, 5, 1e-300)],
    (spoilt("resolution", math.nan), "finite"),
    *[(spoilt("knobs", v), '"knobs" must map') for v in (None, [], "steps", {"steps": 3}, {"steps": [1]})],
    (spoilt("knobs", {}), "at least one knob"),
    (spoilt("knobs.steps.curve", ...), "the curve of steps lacks curve"),
    (spoilt("knobs.steps.values", ...), "the curve of steps lacks values"),
    (spoilt("knobs.steps.speed", 1), "the curve of steps does not take speed"),
    *[(spoilt("knobs.steps.curve", v), "") for v in ("tabel", None, 3, [], {})],
    *[(spoilt("knobs.steps.values", v), "must be lists") for v in (3, None, "123", {"0": 1})],
    *[
        (spoilt("knobs.steps.values", [1, v]), "curve of steps: expected plain numbers, got")
        for v in ("2", "2/1", None, [2], {}, True)
    ],
    *[(spoilt("knobs.steps.values", [1, v]), "finite") for v in (math.nan, math.inf, -math.inf)],
    (spoilt("knobs.steps.values", [1, 10**400]), "must be a number"),
    (spoilt("knobs.steps.values", []), "some values, got 0"),
    (spoilt("knobs.steps.values", [1, 2.5]), "steps without rounding=dither must be a whole number, got 2.5"),
    (spoilt("knobs.steps.values", [1, -2]), "steps must be >= 0, got -2"),
    (spoilt("knobs.steps.values", [1] * 5), "has 5 values, but 4 epochs at a resolution of 1 have 4 pieces"),
    *[(spoilt("knobs.sigma.at", v), "must be lists") for v in (2, None, "2")],
    *[(spoilt("knobs.sigma.at", [v]), "expected plain numbers") for v in ("2", None, [2], True)],
    *[(spoilt("knobs.sigma.at", [v]), "") for v in (math.nan, math.inf, 0, -1)],
    (spoilt("knobs.sigma.at", [2, 3]), "takes 3 values, got 2"),
    *[(spoilt("knobs.steps.rounding", v), "") for v in ("up", 3, [], {})],
    *[(spoilt("knobs.alpha.of", v), "") for v in ("speed", "alpha", 3, [], None)],
    (spoilt("knobs.alpha.of", ...), "names the knob it divides by"),
    *[(spoilt("knobs.alpha.rounded", v), "rounded is true or false") for v in ("no", 0, None)],
    (spoilt("knobs.alpha.values", [-0.1]), "alpha must be >= 0, got -0.1"),
    (spoilt("knobs.sigma", {"curve": "constant", "values": [1], "at": [2]}), "constant curve got at"),
    (spoilt("knobs.steps", {"curve": "linear", "values": [1e308, -1e308], "rounding": "floor"}), "finite"),
    (spoilt("knobs.sigma", {"curve": "exponential", "values": [1e-300, 1e300]}), "finite"),
    (spoilt("knobs.sigma", {"curve": "exponential", "values": [0, 1]}), "start and end > 0"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_a_malformed_schedule_is_a_value_error_that_names_the_file(
    tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(str(file))) as info:
        load_schedule(file)
    assert type(info.value) is ValueError
    assert message in str(info.value)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)
paths = st.sampled_from(
    [
        *("text", "epochs", "resolution", "knobs", "knobs.steps", "knobs.alpha"),
        *(
            f"knobs.{k}.{f}"
            for k in ("steps", "alpha", "sigma")
            for f in ("curve", "values", "at", "rounding", "of")
        ),
    ]
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(paths, values)
def test_whatever_is_put_into_a_file_gives_a_schedule_or_a_value_error(path: str, value: object) -> None:
    try:
        s = Schedule.from_json(spoilt(path, value))
    except (ValueError, TypeError):  # which load_schedule turns into one ValueError
        return
    assert Schedule.from_json(s.to_json()) == s


# ----------------------------------------------------------------------------------------------- wrong texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown schedule '' in ''; write one of: none; fgsm:alpha=10/255; pgd"),
        (
            "amatta:min=1",
            "unknown schedule 'amatta' in 'amatta:min=1'; did you mean 'amata'? write one of: none",
        ),
        ("none:steps=0", "schedule 'none' (such as none) does not take steps; it takes nothing"),
        ("pgd:steps=10", "schedule 'pgd' (such as pgd:steps=10,alpha=2/255) lacks alpha"),
        ("pgd:steps=10,alpha=1,eps=3", "does not take eps; did you mean 'steps'? it takes alpha, steps"),
        ("fgsm:alpha=1,steps=1", "does not take steps"),
        ("pgd:steps=2.5,alpha=1", "steps without rounding=dither must be a whole number, got 2.5 at epoch 0"),
        ("pgd:steps=-1,alpha=1", "steps must be >= 0, got -1"),
        ("pgd:steps=1,alpha=-1", "alpha must be >= 0, got -1"),
        ("pgd:steps=ten,alpha=1", "steps must be a number such as 0.3, 1e-3 or 8/255, got 'ten'"),
        ("pgd:steps=inf,alpha=1", "steps must be a number"),
        ("pgd:steps=1,alpha=1/0", "alpha must be a number such as 0.3, 1e-3 or 8/255, got '1/0'"),
        ("pgd:steps", "expected name=value, got 'steps'"),
        ("pgd:steps=1,steps=2,alpha=1", "steps is given twice"),
        ("amata:min=1,max=2", "amata needs one of tau (alpha = tau/K) and alpha (fixed)"),
        ("amata:min=1,max=2,tau=1,alpha=1", "amata needs one of tau (alpha = tau/K) and alpha (fixed)"),
        ("amata:min=1,max=2,tau=0", "tau must be > 0, got 0"),
        ("amata:min=1,max=2,tau=-1", "tau must be > 0, got -1"),
        ("amata:min=3,max=2,tau=1", "amata needs min <= max, got 3 > 2; use start and end to fall"),
        ("amata:min=-1,max=2,tau=1", "amata needs K >= 0, got -1"),
        ("linear:start=3,end=-2,tau=1", "linear needs K >= 0, got -2"),
        ("amata:min=1,tau=1", "amata needs min and max, or start and end"),
        ("amata:tau=1", "amata needs min and max, or start and end"),
        ("amata:min=1,max=2,start=1,tau=1", "amata needs min and max, or start and end"),
        ("linear:start=1,end=2,max=3,tau=1", "linear needs min and max, or start and end"),
        ("linear:min=1,end=2,tau=1", "linear needs min and max, or start and end"),
        ("amata:min=1,max=2,tau=1,rounding=up", "rounding is one of half_up, floor, dither, got 'up'"),
        ("amata:min=1,max=2,tau=1,alpha_from=both", "alpha_from is rounded or real, got 'both'"),
        ("amata:min=1,max=2,alpha=1,alpha_from=real", "takes alpha_from only with tau"),
        ("amata:min=1,max=2,tau=1,at=3", "does not take at"),
        ("exponential:min=0,max=2,tau=1", "an exponential curve needs start and end > 0"),
        ("step:steps=1:2,tau=1", "lacks at"),
        ("step:steps=1:2,at=2:3,tau=1", "a step curve takes 3 values, got 2"),
        ("step:steps=1:2:3,at=3:2,tau=1", "a step changes at increasing epochs > 0"),
        ("step:steps=1:2,at=0,tau=1", "a step changes at increasing epochs > 0"),
        ("step:steps=1:2,at=2,alpha=1:2,tau=1", "a list of alpha, or tau and alpha_from, not both"),
        ("step:steps=1:2,at=2,alpha=1:2:3", "a step curve takes 2 values, got 3"),
        ("table:steps=1:2:3:4:5:6,tau=1", "has 6 values, but 5 epochs"),
        ("table:steps=1:2.5,tau=1", "whole number, got 2.5 at epoch 1"),
        ("none:resolution=0", "resolution must be > 0 and at most the 5 epochs, got 0"),
        ("none:resolution=6", "resolution must be > 0 and at most the 5 epochs, got 6"),
        ("none:resolution=1e-9", "more than 1,000,000 pieces; take a coarser resolution"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_schedule(text, 5)


def test_the_error_of_a_value_quotes_the_text_and_gives_an_example() -> None:
    with pytest.raises(
        ValueError, match=r"\(in schedule 'pgd:steps=-1,alpha=1'; write for example pgd:steps=10"
    ):
        parse_schedule("pgd:steps=-1,alpha=1", 5)


@pytest.mark.parametrize("epochs", [0, -3, math.nan, math.inf, "many", None, True, 1e300])
def test_a_number_of_epochs_that_is_none_is_refused(epochs: Any) -> None:
    with pytest.raises(ValueError, match="epochs"):
        parse_schedule("none", epochs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wave", (1,)), "a curve is one of constant, linear, .* got 'wave'"),
        (("linear", (1,)), "a linear curve takes 2 values, got 1"),
        (("constant", ()), "a constant curve takes 1 values, got 0"),
        (("table", ()), "a table curve takes some values, got 0"),
        (("constant", ("a",)), "value of a constant curve must be a number .* got 'a'"),
        (("ratio", (1,)), "names the knob it divides by"),
        (("constant", (1,), (), None, "steps"), "a ratio curve, and only that"),
        (("constant", (1,), (2,)), "only a step changes at given epochs"),
    ],
)
def test_a_curve_checks_its_numbers(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(*arguments)


@pytest.mark.parametrize("rounded", [True, False])
def test_a_ratio_is_zero_where_its_knob_is(rounded: bool) -> None:
    n = Curve("linear", (0, 4), rounding="floor")  # 0, 0.5, 1, 1.5, ...: rounded to 0, 0, 1, 1
    s = Schedule({"n": n, "sigma": Curve("ratio", (3,), of="n", rounded=rounded)}, 8)
    assert [s(t)["sigma"] for t in range(4)] == [0, 0, 3, 3 if rounded else 2]


def test_a_ratio_needs_a_curve_to_divide_by() -> None:
    with pytest.raises(ValueError, match="alpha divides by 'steps', which has no curve of its own here"):
        Schedule({"alpha": Curve("ratio", (1,), of="steps")}, 3)


def test_knobs_stand_in_the_order_of_the_text_whatever_the_seed_of_hashes() -> None:
    assert "".join(parse_schedule("set:f=1,h=1,b=1,d=1,a=1,g=1,e=1,c=1", 1).to_json()["knobs"]) == "fhbdagec"
