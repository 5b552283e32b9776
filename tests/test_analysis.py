"""The committed tables of `analysis` follow from the result files beside them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import controlat
from controlat._util.files import read_json

HERE = Path(__file__).resolve().parent.parent / "analysis"
sys.path.insert(0, str(HERE))  # the scripts share a module
SCRIPT: dict[str, Any] = runpy.run_path(str(HERE / "_table1.py"))
SIZES = sorted(path.parent for path in (HERE / "amata_table1").glob("*/table.json"))


@pytest.mark.parametrize("folder", SIZES, ids=lambda path: path.name)
def test_table_1_follows_from_its_result_files(folder: Path) -> None:
    sweep = read_json(folder / "sweep.json")
    found = SCRIPT["digest"](sweep, read_json(folder / "printed.json"))
    assert found == read_json(folder / "table.json")
    assert SCRIPT["markdown"](found, sweep) == (folder / "table.md").read_text()


def test_kendalls_tau_by_hand() -> None:
    ranks = SCRIPT["ranks"]
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert ranks(a, a) == 1
    assert ranks(a, -a) == -1
    assert ranks(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(4 / 6)


def test_tau_of_the_papers_own_table() -> None:
    """Its C orders accuracies without exception; of the ten pairs it orders three as their cost."""
    rows = list(SCRIPT["PAPER"].values())
    c, robust, seconds = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    assert SCRIPT["ranks"](c, -robust) == 1.0
    assert SCRIPT["ranks"](c, seconds) == pytest.approx((3 - 7) / 10)


def test_the_interval_of_tau_covers_a_sure_order_and_an_unsure_one() -> None:
    def entry(mean: float, half: float) -> dict[str, Any]:
        return {
            "mean": mean,
            "interval": [mean - half, mean + half],
            "sd_over_seeds": None,
            "per_seed": [mean],
        }

    c = [entry(m, 0.01) for m in (1, 2, 3, 4, 5)]
    sure = SCRIPT["agreement"](c, [entry(m, 0.01) for m in (10, 20, 30, 40, 50)], 1)
    assert sure == {"tau": 1.0, "interval": [1.0, 1.0]}
    unsure = SCRIPT["agreement"](c, [entry(m, 100) for m in (10, 20, 30, 40, 50)], 1)
    assert unsure["interval"][0] < 0 < unsure["interval"][1]


@pytest.mark.skipif(not SIZES, reason="no result is committed")
def test_the_readme_shows_the_reduced_table() -> None:
    found = read_json(HERE / "amata_table1" / "reduced" / "table.json")
    shown = (HERE.parent / "README.md").read_text()
    assert SCRIPT["strategies"](found) in shown
    assert SCRIPT["orders"](found) in shown


WORTH: dict[str, Any] = runpy.run_path(str(HERE / "criterion_worth.py"))
PARTS = sorted(path.parent for path in (HERE / "criterion_worth").glob("*/result.json"))


@pytest.mark.parametrize("folder", PARTS, ids=lambda path: path.name)
def test_the_worth_of_c_is_shown_as_it_was_found(folder: Path) -> None:
    found = read_json(folder / "result.json")
    assert WORTH["tables"](found) == (folder / "table.md").read_text()
    shown = (HERE.parent / "README.md").read_text()
    assert WORTH["ranking"](found) in shown
    assert WORTH["sizes"](found) in shown


SEARCHED: dict[str, Any] = runpy.run_path(str(HERE / "search_worth.py"))
SEARCHES = sorted(path.parent for path in (HERE / "search_worth").glob("*/result.json"))


@pytest.mark.parametrize("folder", SEARCHES, ids=lambda path: path.name)
def test_the_worth_of_searching_is_shown_as_it_was_found(folder: Path) -> None:
    found = read_json(folder / "result.json")
    assert SEARCHED["table"](found) == (folder / "table.md").read_text()
    for row in found["rows"]:
        assert {q for at in row["levels"] for q in (len(at["J"]),)} == {
            SEARCHED["PARTS"][folder.name]["judges"]
        }
    if folder.name == "digits":
        assert SEARCHED["budgets"](found) in (HERE.parent / "README.md").read_text()


def test_rank_correlations_by_hand() -> None:
    runs = [[{"J": j, "good": 2 * j, "bad": -j} for j in (1.0, 2.0, 4.0, 3.0)] for _ in range(2)]
    found = WORTH["correlations"](runs)
    assert found["good"]["mean"] == found["good"]["of_means"] == pytest.approx(1)
    assert found["bad"]["interval"] == pytest.approx([-1, -1])
    values = np.random.default_rng(1).integers(0, 4, (2, 9)).astype(float)  # with ties
    assert WORTH["spearman"](values[0], values[1]) == pytest.approx(spearmanr(*values).statistic)
    assert np.isnan(WORTH["spearman"](values[0], np.ones(9)))


def test_a_certificate_that_reaches_one_level_everywhere_is_told_from_chance_no_better() -> None:
    """Where J(lambda) does not depend on the schedule, D orders as J whatever it is shuffled with."""
    j = np.array([[1.0, 2.0, 4.0, 3.0, 6.0, 5.0]] * 2)
    level = WORTH["shuffled"](j, np.full_like(j, 0.5))
    assert level["mean"] == level["of_means"] == pytest.approx(1)
    assert level["mean_above"] == 1
    noisy = WORTH["shuffled"](j, j[:, ::-1])
    assert -1 <= noisy["interval"][0] <= noisy["mean"] <= noisy["interval"][1] <= 1
    assert WORTH["of_room"](j, j - 1) == pytest.approx([1, 1, 1])


def test_there_are_fourteen_schedules_and_all_are_admissible() -> None:
    for part in WORTH["PARTS"].values():
        every = list(WORTH["runs"](part))
        assert len({name for _, _, name, _ in every}) == 14
        assert len(every) == 14 * len(part["seeds"]) * len(part["dynamics"])
        for _, _, _, text in every[:14]:
            controlat.parse_schedule(text, part["problem"]["epochs"])


LANDSCAPE: dict[str, Any] = runpy.run_path(str(HERE / "landscape_schedule.py"))
COMPARED = sorted(path.parent for path in (HERE / "landscape_schedule").glob("*/result.json"))


@pytest.mark.parametrize("folder", COMPARED, ids=lambda path: path.name)
def test_the_comparison_of_derived_schedules_follows_from_its_result_file(folder: Path) -> None:
    found = read_json(folder / "result.json")
    assert LANDSCAPE["markdown"](found) + "\n" == (folder / "table.md").read_text()
    assert LANDSCAPE["markdown"](found) in (HERE.parent / "README.md").read_text()
    assert found["measured"]["seed"] not in found["seeds"]
    for row in found["schedules"]:
        assert len(row["robust"]) == len(found["seeds"])


def test_the_costs_of_the_landscape_are_those_of_closed_forms() -> None:
    """On equation 11 with theta_0 = 1, tau = 10, T = 1, gamma = 0.01: theta = e^-t, K* = 20/(1 + e^-2t)."""
    found = {row["set"]: row for row in read_json(HERE / "landscape_checks" / "result.json")["sets"]}
    end, k = np.exp(-2) / 2, np.arange(11, 18)
    assert found["product"]["derived"] == pytest.approx(end + 0.1 * np.log((1 + np.exp(2)) / 2), rel=1e-9)
    switches = -np.log(20 / k - 1) / 2  # where K* passes a whole number
    rounded = end + 0.01 * np.diff([0, *switches, 1]) @ np.arange(11, 19)
    for name in ("integer", "free", "overshoot"):
        assert found[name]["derived"] == pytest.approx(rounded, rel=1e-6)
    assert found["free"]["best"] == pytest.approx(end + 0.01, rel=1e-5)  # one exact step


def test_paired_differences_have_students_interval() -> None:
    found = LANDSCAPE["difference"]([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])
    assert found["mean"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of two degrees of freedom at 97.5 %
    assert found["interval"] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-5)


def test_the_linear_ramp_beside_a_schedule_takes_as_many_steps() -> None:
    schedule = controlat.parse_schedule("table:steps=1:3:5:7:8:9:9:9:10:10:10:10,tau=0.3", 12)
    ramp = controlat.parse_schedule(LANDSCAPE["equal_cost"](schedule, 0.3), 12)
    mean = [np.mean(LANDSCAPE["steps"](s)) for s in (schedule, ramp)]
    assert mean[0] == pytest.approx(mean[1], abs=0.1)


def test_the_derivation_that_is_shown_follows_from_its_result_file() -> None:
    from controlat.report.derivation.document import markdown

    found = read_json(HERE / "derive" / "result.json")
    assert markdown(found) == (HERE / "derive" / "summary.md").read_text()
    assert found["verification"]["holds"]


def test_the_checks_of_the_landscape_follow_from_their_result_file_and_are_what_the_text_says() -> None:
    script = runpy.run_path(str(HERE / "landscape_checks.py"))
    found = read_json(HERE / "landscape_checks" / "result.json")
    assert script["markdown"](found) + "\n" == (HERE / "landscape_checks" / "table.md").read_text()
    lost = [row for row in found["cases"] if row["better"]]
    assert (len(found["cases"]), len(lost)) == (60, 4)
    assert all((row["C"] > 1e-9) == row["better"] for row in found["cases"])  # the two checks agree
    assert {(row["tau"], row["theta0"]) for row in lost} == {(1, 2)}
    text = " ".join((HERE / "mathematics.md").read_text().split())
    assert "in 56 of 60 cases" in text
    for row in found["sets"]:
        shown = next(line for line in text.split("| `") if line.startswith(f"{row['set']}`"))
        assert f"| {row['derived']:.5f} |" in shown
        assert ("none better" in shown) == (not row["better"])
        assert row["better"] == any(f"| {row['best']:.4f}{end}" in shown for end in (" |", ":"))
    grid = [f"{row['grid']:.4f}" for row in found["sets"]]
    assert f"{', '.join(grid[:-1])} and {grid[-1]}: K kept" in text
    ends = {tau: [row["raised"] for row in found["ties"] if row["tau"] == tau] for tau in (1, 10)}
    assert f"relative {ends[10][0]:.0e} to {ends[10][-1]:.0e} for tau = 10".replace("e-0", "e-") in text
    assert (
        f"by {ends[1][0]:.0%} to {ends[1][-1]:.0%} for tau = 1".replace("% to", " to").replace("%", " %")
        in text
    )
    limits = [row["gamma"] for row in found["limits"]]
    assert limits[-1] is None
    for gamma, digits in zip(limits, ("0.603", "0.0063", "0.302", "0.0031", "0.0068"), strict=False):
        assert digits in text
        assert gamma == pytest.approx(float(digits), rel=0.02)
    for rows in found["bounds"].values():  # the form that the argument gives at once is never larger
        for row in rows:
            assert row["sharper"] <= row["corrected"] * (1 + 1e-12)
            if row["sigma"] == row["delta"] == 0:
                assert row["sharper"] == pytest.approx(row["corrected"], rel=1e-12)
    left = [row["left"] for row in found["bounds"]["no noise"]]
    assert left[:3] == pytest.approx([1, 0.41, 0.045], rel=0.02)
    assert [row["printed_holds"] for row in found["bounds"]["sigma = 0.1"]] == [False, False, True, True]
    assert all(row["corrected_holds"] for rows in found["bounds"].values() for row in rows)
