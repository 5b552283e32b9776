"""The time limit of a derivation: numbers, formulas and checks as far as it goes, and what it left out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

import controlat
from controlat._util.limits import LATE, TimeLimit, limited, within
from controlat.bolza import convergence, verify
from controlat.symbolic import Branch, Landscape
from controlat.symbolic.questions import tidy

HANGS = "erf(x)*theta - x^2*theta^2"  # sympy integrates 1/theta' for minutes


def branch() -> Branch:
    return Branch(Landscape(), 1.0, 1.0, (-3, 3))


def test_a_derivation_ends_at_its_limit_with_the_numbers_and_names_the_rest() -> None:
    derivation = controlat.derive(HANGS, seconds=2, progress=False)
    x = brentq(lambda v: np.exp(-v * v) / np.sqrt(np.pi) - v, 0, 1)  # l_x(1, x) = 0
    assert float(derivation.K(0.0)) == pytest.approx(10 * 2 / np.sqrt(np.pi) / x, rel=1e-9)
    assert derivation.result["left_out"]
    assert "NOTE: left out at the time limit of 2 seconds (--seconds): " in str(derivation)


def test_numbers_that_take_longer_than_the_limit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlat.app.derive._NUMBERS", 1e-6)
    with pytest.raises(ValueError, match=r"seconds: the numbers alone take longer than 1e-06 seconds; give"):
        controlat.derive(seconds=1e-6, progress=False)


def test_a_deadline_ends_questions_and_numbers() -> None:
    with within(1e-9), within(60):  # the earlier one counts
        with pytest.raises(TimeLimit):
            limited(tidy, Landscape().expression)
        with pytest.raises(TimeLimit):
            Landscape()("x")(1.0, 0.0)
    assert float(Landscape()("x")(1.0, 0.0)) == 1


def test_checks_without_time_say_so() -> None:
    there = branch()
    with within(1e-9):
        with pytest.raises(TimeLimit):
            verify(there, 1.0, 10.0, 1.0, 0.01)
        assert convergence(there, 1.0).reason == LATE


class _Clock:
    """Stands for the deadline of `limits.within`: the time is over after a number of evaluations."""

    def __init__(self) -> None:
        self.calls, self.last = 0, 10**9

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > self.last:
            raise TimeLimit(LATE)


@pytest.mark.slow
def test_what_was_checked_in_time_is_as_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    there, clock, seen = branch(), _Clock(), set[int]()
    monkeypatch.setattr("controlat.symbolic.landscape.check", clock)
    whole = verify(there, 1.0, 10.0, 1.0, 0.01)
    total = clock.calls
    for share in (0.2, 0.99):
        clock.calls, clock.last = 0, int(share * total)
        checked = verify(there, 1.0, 10.0, 1.0, 0.01)
        seen.add(len(checked.left_out))
        assert checked.derived["C"] == whole.derived["C"]
        for mine, row in zip(checked.sets, whole.sets, strict=True):
            late = f"dynamic programming for the set '{row['admissible']}'" in checked.left_out
            empty = {"admissible": row["admissible"], "formula": row["formula"], "error": LATE}
            assert mine == (empty if late else row)
        assert (checked.gamma is None) == ("the range of gamma" in checked.left_out)
        assert (checked.transcription == {"error": LATE}) == ("direct transcription" in checked.left_out)
        assert bool(checked.comparisons) == ("other schedules" not in checked.left_out)
        assert checked.left_out
    assert len(seen) > 1
