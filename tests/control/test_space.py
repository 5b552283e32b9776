"""Numbers, controls, knobs, the admissible set, and the short texts they are written in."""

import copy
import math
import pickle
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat._util.checks import number
from controlat._util.texts import numbers, only, split
from controlat.control.space import Control, ControlSpace, Knob

seeded = settings(derandomize=True, deadline=None, max_examples=100)

# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8/255", 8 / 255),
        ("2/255", 2 / 255),
        (" 0.3 ", 0.3),
        ("1e-3", 0.001),
        ("-7", -7.0),
        ("1/3", 1 / 3),
        (3, 3.0),
        (0.1, 0.1),
        (Fraction(1, 4), 0.25),
    ],
)
def test_number_reads_exactly(given: object, expected: float) -> None:
    found = number(given)
    assert type(found) is float
    assert found == expected


@seeded
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_number_of_a_fraction_is_the_nearest_float(p: int, q: int) -> None:
    assert number(f"{p}/{q}") == p / q  # Python rounds the quotient of two integers correctly


@seeded
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_reads_back_what_repr_writes(value: float) -> None:
    assert number(repr(value)) == value


@pytest.mark.parametrize(
    "bad", ["", "a", "1/0", "1,5", "nan", "inf", None, True, False, [1], {}, 1j, 10**400]
)
def test_number_refuses_what_is_no_number(bad: object) -> None:
    with pytest.raises(ValueError, match=r"eps must be a number such as 0.3, 1e-3 or 8/255, got") as info:
        number(bad, "eps")
    assert repr(bad) in str(info.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_number_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be finite, got {bad!r}"):
        number(bad, "alpha")


# ------------------------------------------------------------------------------------------------ controls


def test_control_is_a_mapping_that_passes_as_keyword_arguments() -> None:
    u = Control(steps=10, alpha=0.01)
    assert (lambda **knobs: knobs)(**u) == {"alpha": 0.01, "steps": 10}
    assert dict(u) == {"alpha": 0.01, "steps": 10}
    assert list(u) == ["alpha", "steps"]
    assert len(u) == 2
    assert "alpha" in u
    assert "eps" not in u


def test_control_is_frozen() -> None:
    u = Control(alpha=0.01, steps=10)
    with pytest.raises(TypeError):
        u["alpha"] = 1.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        u.other = 1  # type: ignore[attr-defined]


def test_control_without_steps_has_no_step_size() -> None:
    assert dict(Control(alpha=0.3, steps=0)) == {"alpha": 0.0, "steps": 0}
    assert len({Control(alpha=0.3, steps=0), Control(alpha=0, steps=0), Control(alpha=7, steps=0.0)}) == 1
    assert dict(Control(steps=0)) == {"steps": 0}


@pytest.mark.parametrize("steps", [10, 10.0, "10", Fraction(10)])
def test_integral_steps_become_int(steps: object) -> None:
    found = Control(alpha=0.1, steps=steps)["steps"]  # type: ignore[arg-type]
    assert type(found) is int
    assert found == 10


def test_control_reads_fractions() -> None:
    assert Control(alpha="2/255", steps=1)["alpha"] == 2 / 255  # type: ignore[arg-type]


def test_control_equality_and_hash_ignore_the_order_of_knobs() -> None:
    assert Control(alpha=0.1, steps=2) == Control(steps=2, alpha=0.1) == {"alpha": 0.1, "steps": 2}
    assert hash(Control(alpha=0.1, steps=2)) == hash(Control(steps=2, alpha=0.1))
    assert Control(alpha=0.1, steps=2) != Control(alpha=0.1, steps=3)


def test_control_names_its_knobs_when_printed() -> None:
    assert repr(Control(alpha=0.01, steps=10)) == "Control(alpha=0.01, steps=10)"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_control_copies_and_pickles(again) -> None:
    assert again(Control(alpha=0.01, steps=10)) == Control(alpha=0.01, steps=10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "fast", None, True])
def test_control_refuses_a_knob_that_is_no_number(bad: object) -> None:
    with pytest.raises(ValueError, match=f"^alpha must be .*{re.escape(repr(bad))}"):
        Control(alpha=bad, steps=1)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- knobs and the set G

SPACE = ControlSpace(
    {"alpha": Knob("real", 0.0, 0.5), "steps": Knob("integer", 0)}, cost=lambda u: u["steps"] + 1
)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.25])
def test_a_knob_admits_its_bounds(value: float) -> None:
    Knob("real", 0.0, 0.5).check("alpha", value)


@pytest.mark.parametrize("value", [-1e-300, 0.5000001, math.inf, math.nan])
def test_a_knob_refuses_what_lies_outside(value: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 0.5\], got {value:g}"):
        Knob("real", 0.0, 0.5).check("alpha", value)


@pytest.mark.parametrize("value", [0.5, math.inf, math.nan])
def test_an_integer_knob_refuses_other_numbers(value: float) -> None:
    with pytest.raises(ValueError, match=f"steps must be an integer, got {value:g}"):
        Knob("integer", 0).check("steps", value)


def test_a_knob_without_upper_bound_says_only_the_lower_one() -> None:
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        Knob("integer", 0).check("steps", -1)


def test_a_knob_needs_a_known_kind_and_ordered_bounds() -> None:
    with pytest.raises(ValueError, match="must be one of real, integer, got 'whole'"):
        Knob("whole", 0)
    with pytest.raises(ValueError, match=r"low <= high, got \[1, 0\]"):
        Knob("real", 1, 0)
    with pytest.raises(ValueError, match="low <= high"):
        Knob("real", math.nan)


def test_the_set_returns_controls_with_integer_steps() -> None:
    u = SPACE.check({"alpha": "1/4", "steps": 3.0})  # type: ignore[dict-item]
    assert dict(u) == {"alpha": 0.25, "steps": 3}
    assert type(u["steps"]) is int
    assert SPACE.cost(u) == 4
    assert SPACE.check(u) == u


def test_the_set_is_a_mapping_of_knobs() -> None:
    assert list(SPACE) == ["alpha", "steps"]
    assert len(SPACE) == 2
    assert SPACE["alpha"].high == 0.5


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"alpha": 0.1}, "has alpha, steps; got alpha"),
        ({}, "has alpha, steps; got nothing"),
        ({"alpha": 0.1, "steps": 1, "gamma": 2}, "has alpha, steps; got alpha, gamma, steps"),
        ({"alpha": 0.6, "steps": 1}, r"alpha must be in \[0, 0.5\], got 0.6"),
        ({"alpha": 0.1, "steps": 1.5}, "steps must be an integer, got 1.5"),
        ({"alpha": 0.1, "steps": -1}, "steps must be >= 0, got -1"),
        ({"alpha": math.nan, "steps": 1}, "alpha must be finite, got nan"),
        ({"alpha": 0.1, "steps": True}, "steps must be a number .* got True"),
    ],
)
def test_the_set_refuses_what_is_not_in_it(control: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.check(control)


# ------------------------------------------------------------------------------------------------ short texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ("none", {})),
        ("none:", ("none", {})),
        (" pgd : steps = 10 , alpha = 2/255 ", ("pgd", {"steps": "10", "alpha": "2/255"})),
        ("step:steps=0:2:10,at=3:8", ("step", {"steps": "0:2:10", "at": "3:8"})),
        ("", ("", {})),
    ],
)
def test_split(text: str, expected: object) -> None:
    assert split(text) == expected


@pytest.mark.parametrize("item", ["steps", "steps=", "=3", ""])
def test_split_refuses_what_is_not_name_and_value(item: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expected name=value, got {item!r} in")):
        split(f"pgd:alpha=1,{item}")


def test_split_refuses_a_name_given_twice() -> None:
    with pytest.raises(ValueError, match="steps is given twice in 'pgd:steps=1,steps=2'"):
        split("pgd:steps=1,steps=2")


def test_only_names_what_is_missing_and_what_is_unknown() -> None:
    only({"a": 1, "b": 2}, ["a"], ["b", "c"], "it")
    with pytest.raises(ValueError, match=r"it lacks a, d$"):
        only({"b": 2}, ["d", "a"], ["b"], "it")
    with pytest.raises(ValueError, match=r"it does not take x; it takes a, b$"):
        only({"a": 1, "x": 2}, ["a"], ["b"], "it")
    with pytest.raises(ValueError, match=r"it takes nothing$"):
        only({"x": 2}, [], [], "it")


def test_numbers_reads_a_list() -> None:
    assert numbers("0:1:5/2", "steps") == (0.0, 1.0, 2.5)
    assert numbers("7", "steps") == (7.0,)
    with pytest.raises(ValueError, match=r"steps must be a number .* got ''"):
        numbers("1::2", "steps")
