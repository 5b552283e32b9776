"""What a search found, as it is told and drawn: the verdict, the front, what matters, and the figures."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from controlat import parse_schedule, report
from controlat._util.files import write_json
from controlat.report.search import search_use, verdict
from controlat.report.search.trials import at_prices, explained, front, full_length, spent_after
from controlat.schedule_search.space import Space

SPACES = {"ours": "anneal:steps=0~8,alpha=0.01~0.1~log", "late": "delayed:steps=4,alpha=0.05,since=1~9"}
PGD = "pgd:steps=10,alpha=0.04"


def run(seed: int, phi: float | None, n: float = 3.0) -> dict[str, Any]:
    return {"seed": seed, "phi": phi, "mean_cost": n, "gradients": 100.0 * n, "seconds": 0.5}


def row(name: str, schedule: str, j: list[float], robust: float, gradients: float = 300.0) -> dict[str, Any]:
    values = {"J": j, "phi": j, "clean": [0.9] * len(j), "robust": [robust + 0.01 * i for i in range(len(j))]}
    cost = {"mean_cost": [gradients / 100] * len(j), "gradients": gradients, "seconds": 1.0}
    return {"name": name, "schedule": schedule, "errors": [], **values, **cost}


def trial(space: str, shares: list[float], phi: list[float | None], stage: str = "explore") -> dict[str, Any]:
    points = Space(SPACES[space], 12)
    point = points.point(shares)
    runs = [run(100 + i, value, 1 + 8 * shares[0]) for i, value in enumerate(phi)]
    what = {"stage": stage, "space": space, "schedule": points.text_of(point), "point": point}
    return {**what, "epochs": 12, "points": None, "until": None, "runs": runs}


@pytest.fixture
def result() -> dict[str, Any]:
    """Trials whose Phi depends on alpha alone, some of which failed; the last is what was found."""
    rng = np.random.default_rng(0)
    trials = [trial("ours", [a, b], [(b - 0.6) ** 2 + 1]) for a, b in rng.random((30, 2))]
    trials += [trial("late", [a], [None if a > 0.5 else 2.0]) for a in rng.random(4)]
    short = trial("ours", [0.2, 0.6], [0.1]) | {"until": 4}
    found = trial("ours", [0.3, 0.6], [1.0, 1.1, 0.9], "promote")
    text = found["schedule"]
    spaces = [
        {"name": name, "text": space, "parameters": [vars(p) for p in Space(space, 12).parameters]}
        for name, space in SPACES.items()
    ]
    settings = {"data": "digits", "model": "mlp", "method": "pgd_at", "norm": "linf", "eps": 0.15}
    settings |= {"epochs": 12, "proposer": "tpe", "budget": "3trainings", "judge_seeds": [0, 1, 2, 3]}
    rows = [
        row("found", text, [1.0, 1.1, 1.2, 1.1], 0.58),
        row(PGD, PGD, [1.2, 1.31, 1.39, 1.3], 0.56, 1100.0),
        row("none", "none", [4.0, 4.2, 4.1, 4.0], 0.1, 100.0),
        row("best " + 90 * "x", "pgd:" + 90 * "x", [4.0, 1.2, 8.1, 4.0], 0.1) | {"gradients": 123e6},
        {"name": "broken", "schedule": "pgd:steps=3,alpha=0.3", "errors": ["diverged"]},
    ]
    return {
        "format": "controlat search",
        "version": 1,
        "settings": settings,
        "environment": {"controlat": "0", "torch": "2", "hardware": "a machine", "threads": 1},
        "price": 0.02,
        "found": text,
        "spent": {"gradients": 5000.0, "trainings": 38, "seconds": 20.0},
        "unit": {"schedule": PGD, "mean_cost": 11.0, "gradients": run(100, 0.9, 11.0)["gradients"]},
        "spaces": spaces,
        "trials": [*trials, short, found],
        "schedules": {t: parse_schedule(t, 12).to_json() for t in (text, trials[0]["schedule"])},
        "rows": rows,
    }


def test_the_table_is_narrow_and_differences_are_paired(result: dict[str, Any]) -> None:
    lines = report.search_table(result).splitlines()
    assert max(map(len, lines)) <= 110
    assert "-2.0 [-2.0, -2.0]" in lines[3]  # the seeds shift both alike
    assert "failed" in lines[-1]


def judged(*contenders: tuple[str, list[float]]) -> dict[str, Any]:
    return {"rows": [row(name, f"{name}:at=1", j, 0.5) for name, j in contenders]}


@pytest.mark.parametrize(
    ("contenders", "told"),
    [
        (
            [("found", [1.0, 1.1, 1.2]), ("a", [1.5, 1.6, 1.71])],
            "Use found:at=1, which was found: its J, 1.100, is the lowest. That is decided against all "
            "others.",
        ),
        (
            [("found", [1.0, 1.1, 1.2]), ("a", [1.2, 1.0, 1.2]), ("b", [2.0, 2.1, 2.3])],
            "Use found:at=1, which was found: its J, 1.100, is the lowest. a cannot be told apart from it by "
            "J, the other is decidedly worse.",
        ),
        (
            [("found", [1.0, 1.1, 1.2]), ("a", [0.9, 1.1, 1.2]), ("b", [1.0, 1.3, 1.2])],
            "Use a:at=1, or what was found: its J is 1.067, that of what was found 1.100. What was found "
            "and b cannot be told apart from it by J.",
        ),
        ([("found", [1.0]), ("a", [2.0])], "is the lowest. One judging seed decides nothing."),
    ],
)
def test_the_verdict_says_which_to_use_and_whether_that_is_decided(
    contenders: list[tuple[str, list[float]]], told: str
) -> None:
    assert verdict(judged(*contenders)).endswith(told)


def test_the_verdict_where_trainings_failed(result: dict[str, Any]) -> None:
    share = 300 / 1100
    assert f"Robust accuracy against {PGD}: +2.0 [+2.0, +2.0] points, at {share:.2f} of its" in verdict(
        result
    )
    failed = {"name": "found", "schedule": "x", "errors": ["diverged"]}
    told = verdict({"rows": [failed, row("a", "a:at=1", [1.0, 1.1], 0.5)]})
    assert told == "Use a:at=1 (J 1.050): what was found failed under a judging seed."
    assert verdict({"rows": [failed]}).startswith("No schedule can be recommended")


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(p: tuple[float, float]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    edge = [points[i] for i in front(points)]
    assert set(edge) == {p for p in points if not dominated(p)}
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(edge))


def test_the_best_at_a_price_is_on_the_front_and_cheaper_at_a_higher_one(result: dict[str, Any]) -> None:
    every = full_length(result)
    points = [(t["runs"][0]["mean_cost"], float(np.mean([r["phi"] for r in t["runs"]]))) for t in every]
    edge = [every[i]["schedule"] for i in front(points)]
    best = at_prices(result)
    assert {t["schedule"] for _, t in best} <= set(edge)
    costs = [t["runs"][0]["mean_cost"] for _, t in best]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 1
    assert all(t["until"] is None for t in every)  # nothing that was trained in part
    assert [len(t["runs"]) for t in every if t["schedule"] == result["found"]] == [3]


def test_each_training_is_counted_once(result: dict[str, Any]) -> None:
    again = result["trials"][-1] | {"stage": "race"}
    again["runs"] = [*again["runs"], run(103, 1.0, 2.0)]
    spent = spent_after(result | {"trials": [*result["trials"], again]})
    trained = [r["gradients"] for t in result["trials"] for r in t["runs"]]
    assert spent[-2] == pytest.approx(sum(trained))
    assert spent[-1] - spent[-2] == pytest.approx(200)


def test_a_training_with_its_surface_is_another_one(result: dict[str, Any]) -> None:
    (first, *_), looked = result["trials"], json.loads(json.dumps(result["trials"][0]))
    looked["runs"][0] |= {"surface": True, "gradients": 900.0}
    spent = spent_after(result | {"trials": [first, looked, looked]})
    assert np.diff(spent) == pytest.approx([900.0, 0.0])


def test_what_matters_is_told_where_trials_are_enough(result: dict[str, Any]) -> None:
    ours, late = explained(result)
    assert ours.trials == 30
    assert ours.degree == 2
    assert ours.shares["alpha"] > 0.6 > 0.2 > ours.chance > ours.rest / 30
    assert ours.shares["steps"] < 0.2
    assert (late.degree, late.shares) == (0, {})
    told = report.search_summary(result)
    assert "Too few trials to tell: `late`" in told
    result["trials"] = result["trials"][-1:]
    assert "parameters.png" not in report.search_summary(result)
    assert "Too few trials to tell: `ours` (1 trials), `late` (0 trials)" in report.search_summary(result)


def test_all_is_made_again_from_the_result_alone(result: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", result)
    names = report.redraw(tmp_path)
    assert names == ["summary.md", "schedule.png", "progress.png", "pareto.png", "parameters.png"]
    told = (tmp_path / "summary.md").read_text()
    for name in names[1:]:
        assert f"]({name})" in told
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] > 700
        assert 0.005 < (pixels < 250).any(axis=2).mean() < 0.7
        assert (np.ptp(pixels.astype(int), axis=2) > 60).sum() > 300
    assert "WARNING: training failed under broken: diverged." in told
    assert "`controlat search --resume DIR --certificate true`" in told
    assert "controlat.load_schedule" in told
    sure = result | {"certificate": {"seeds": [0, 1], "C": 0.5, "D": 0.03, "trusted": False}}
    assert "|    0.5 | 0.03 | no      | 0, 1  |" in report.search_summary(sure)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trials": None}, "trials is missing"),  # as searches left it before their trials were kept
        ({"price": float("nan")}, "result.json"),
        ({"format": "controlat derivation"}, "no evaluation or search"),
    ],
)
def test_another_result_is_refused(
    result: dict[str, Any], change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    content = {k: v for k, v in (result | change).items() if v is not None}
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        report.redraw(tmp_path)


def test_the_command_to_train_by_is_that_of_what_is_recommended() -> None:
    kept = Path("out/schedule.json")
    ours = judged(("found", [1.0, 1.1]), ("a", [1.5, 1.6]))
    assert (
        search_use(ours, kept) == "Train under it: controlat train --out RUN --schedule out/schedule.json ..."
    )
    other = judged(("found", [1.5, 1.6]), ("a", [1.0, 1.1]))
    other["rows"][1]["method"] = "nfgsm"
    told = search_use(other, kept)
    assert "controlat train --out RUN --method nfgsm --schedule a:at=1 ..." in told
    assert told.endswith("out/schedule.json is what was found.")
