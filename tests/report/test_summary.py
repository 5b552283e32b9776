"""What is printed and written of a result: word for word as before, and numbers that follow from the runs."""

import copy
import json
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from controlat import report
from controlat._util.files import read_json, write_json
from controlat.pmp import FORMS
from controlat.robust_accuracy import wilson

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "analysis" / "demo"
RELEASED = ROOT / "tests" / "records" / "release_0_1" / "evaluated"


@pytest.fixture
def demo() -> dict[str, Any]:
    """Six schedules, three seeds each."""
    result: dict[str, Any] = read_json(DEMO / "result.json")
    return result


@pytest.fixture
def released() -> dict[str, Any]:
    """Two schedules, one seed."""
    result: dict[str, Any] = read_json(RELEASED / "result.json")
    return result


def tables(text: str, title: str) -> list[list[dict[str, str]]]:
    """The tables of a section, a dict for each row."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    every = []
    for block in section.split("\n\n"):
        if block.startswith("|"):
            heads, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in block.splitlines())
            every.append([dict(zip(heads, row, strict=True)) for row in rows])
    return every


@pytest.mark.parametrize("folder", [DEMO, RELEASED], ids=["demo", "release 0.1"])
def test_the_summary_is_word_for_word_what_it_was(folder: Path) -> None:
    assert report.summary(report.read(folder / "result.json")) == (folder / "summary.md").read_text()


def test_what_is_there_is_not_written_again(demo: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("mine")
    for name in report.figures(demo):
        (tmp_path / name).write_bytes(b"mine")
    report.write(demo, tmp_path)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"mine"}


def test_what_the_runs_come_to_is_what_release_0_1_stored(released: dict[str, Any]) -> None:
    parts = {k: v for k, v in copy.deepcopy(released).items() if k not in ("format", "version")}
    for entry in parts["schedules"]:
        del entry["summary"]
    assert_alike(json.loads(json.dumps(report.assemble(**parts))), released)


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same up to the rounding of intervals, which that release computed itself."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_alike(ours[name], value)
    elif isinstance(theirs, list):
        for mine, value in zip(ours, theirs, strict=True):
            assert_alike(mine, value)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-12) if isinstance(theirs, float) else theirs)


def test_the_summary_numbers_are_means_over_seeds_of_the_stored_ones(demo: dict[str, Any]) -> None:
    points = demo["sizes"]["test"]
    for entry in demo["schedules"]:
        for form in FORMS:
            stored = [statistics.fmean(e[form]["value"] for e in run["criterion"]) for run in entry["runs"]]
            c = entry["summary"]["criterion"][form]
            assert c["per_seed"] == pytest.approx(stored)
            assert c["mean"] == pytest.approx(statistics.fmean(stored))
            assert c["sd_over_seeds"] == pytest.approx(statistics.stdev(stored))
        robust = entry["summary"]["robust"]
        mean = statistics.fmean(run["evaluation"]["robust"]["value"] for run in entry["runs"])
        assert robust["mean"] == pytest.approx(mean)
        assert robust["interval"] == pytest.approx(list(wilson(round(mean * points), points)))


def test_the_table_shows_these_numbers(demo: dict[str, Any]) -> None:
    heads, cells = report.rows(demo)
    for entry, row in zip(demo["schedules"], cells, strict=True):
        shown, s = dict(zip(heads, row, strict=True)), entry["summary"]
        assert shown["schedule"] == entry["text"]
        assert shown["J"] == f"{s['full']['objective']['mean']:.3g}"
        assert shown["C norm"].startswith(f"{s['criterion']['norm']['mean']:.3g} [")
        assert shown["robust %"].startswith(f"{100 * s['robust']['mean']:.1f} [")
        assert shown["C full"].endswith("not trusted") == bool(s["full"]["uncalibrated"])


def test_the_full_criterion_and_what_its_size_means_follow_from_the_runs(demo: dict[str, Any]) -> None:
    text = report.summary(demo)
    (by_horizon,), (trust,) = tables(text, "The full criterion"), tables(text, "What its size means")
    (changes,) = tables(text, "What the full maximum principle would change")
    assert len(changes) == demo["settings"]["epochs"]
    for entry, horizons, size in zip(demo["schedules"], by_horizon, trust, strict=True):
        full = [run["full"] for run in entry["runs"]]
        calibrations = [f["calibration"] for f in full]

        def mean(values: list[Any]) -> str:
            known = [v for v in values if v is not None]
            return f"{statistics.fmean(known):.3g}" if known else "-"

        assert horizons["schedule"] == size["schedule"] == entry["text"]
        for i, head in enumerate(list(horizons)[1 : 1 + len(full[0]["horizons"])]):
            assert head in (f"h = {full[0]['horizons'][i]['steps']}", "whole run")
            assert horizons[head].startswith(mean([f["horizons"][i]["value"] for f in full]))
        assert horizons[list(horizons)[-1]] == mean([f["prices"][-1]["value"] for f in full])
        for head, key in (("J", "objective"), ("G", "gain"), ("D", "certificate"), ("model", "model_gain")):
            assert size[head] == mean([c[key] for c in calibrations])
        for name in ("cosine", "growth", "C_rho"):
            assert size[name] == mean([f[name] for f in full])
        for part in ("0.5", "0.25", "0.125"):
            if (head := f"r({Fraction(part)})") in size:
                assert size[head] == mean([c["reliability"].get(part) for c in calibrations])
        gains = [float(row[entry["text"]].split("+")[1]) for row in changes if "+" in row[entry["text"]]]
        assert sum(gains) == pytest.approx(calibrations[0]["gain"], rel=1e-2)


def test_a_schedule_without_finite_costates_stands_beside_the_others(released: dict[str, Any]) -> None:
    failed = released["schedules"][0]
    failed["summary"]["full"] = failed["runs"][0]["full"] = {"failed": "the costate is not finite"}
    heads, cells = report.rows(released)
    assert [dict(zip(heads, cells[0], strict=True))[head] for head in ("J", "C full", "D")] == [
        "-",
        "not finite",
        "-",
    ]
    name = failed["text"]
    assert f"WARNING, {name}: no C full, the costate is not finite." in report.notes(released)
    for title in ("The full criterion", "What its size means"):
        (rows,) = tables(report.summary(released), title)
        assert [row["schedule"] for row in rows] == [released["schedules"][1]["text"]]


def test_j_is_shown_without_the_full_criterion(released: dict[str, Any]) -> None:
    for entry in released["schedules"]:
        del entry["summary"]["full"], entry["runs"][0]["full"]
    assert "J" not in report.rows(released)[0]
    for j, entry in enumerate(released["schedules"]):
        entry["summary"]["objective"] = {"mean": 1.25 + j, "sd_over_seeds": None, "per_seed": [1.25 + j]}
    heads, cells = report.rows(released)
    assert heads[:3] == ["schedule", "J", "C norm"]
    assert [row[1] for row in cells] == ["1.25", "2.25"]
    assert "J = Phi + gamma eta sum n, with Phi" in report.notes(released)[1]
    assert {"horizons.png", "costates.png", "surfaces.png"}.isdisjoint(report.figures(released))


def test_the_notes_name_what_the_greedy_forms_leave_out(demo: dict[str, Any]) -> None:
    assert not any("leave out" in line or "leaves out" in line for line in report.notes(demo))
    demo["settings"]["weight_decay"] = 5e-4
    for i, entry in enumerate(demo["schedules"][:2]):
        entry["summary"]["criterion"]["norm"]["dropped"] = [f"{k} of 9 trials" for k in range(2 + 3 * i)]
    lines = report.notes(demo)
    left_out = "0 of 9 trials; 1 of 9 trials; 2 of 9 trials; 2 more in result.json"
    assert f"C norm, C costate leave out: {left_out}." in lines
    assert "C norm leaves out weight decay, which moves theta, too; in C costate it cancels." in lines


def test_what_does_not_fit_together_is_a_damaged_file(released: dict[str, Any], tmp_path: Path) -> None:
    del released["schedules"][1]["summary"]["criterion"]["norm"]["prices"][0]
    released["schedules"][1]["summary"]["after"].pop("fgsm")
    write_json(tmp_path / "result.json", released)
    with pytest.raises(ValueError, match=r"result\.json: its parts do not fit together"):
        report.read(tmp_path / "result.json")
