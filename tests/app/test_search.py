"""The command `search`: what it leaves, that it goes on where it was, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import controlat
from controlat._util.files import read_json_lines
from controlat.app.search import _contenders, _rungs
from controlat.app.settings import SearchSettings
from controlat.schedule_search.loop import Branch, Plan, Rung, Search
from controlat.schedule_search.space import Space
from controlat.schedule_search.trials import Answer, Ledger, Question, Trial

SMALL: dict[str, Any] = {
    "spaces": ["pgd:steps=1~3~whole,alpha=0.05~0.2~log", "delayed"],
    "proposer": "random",
    "budget": "4trainings",
    "max_steps": 2,
    "judge_seeds": [0, 1],
    "against": ["none", "pgd:steps=2,alpha=0.1"],
    "attacks": ["pgd-2"],
    "epochs": 3,
    "train_points": 200,
    "test_points": 40,
    "jobs": 2,
    "progress": False,
}


@pytest.mark.slow
def test_it_leaves_a_schedule_and_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = SMALL | {"budget": "2trainings", "fidelity": ["epochs=2/3,points=1/2"]}
    first = controlat.search(tmp_path / "out", **settings)
    file = tmp_path / "out" / "trainings.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    schedule = controlat.load_schedule(tmp_path / "out" / "schedule.json")
    assert dict(schedule(0)) == dict(SearchSettings(**SMALL).schedule_of(first["found"])(0))
    asked = [json.loads(line)["question"] for line in lines]
    assert {(q["epochs"], q.get("points")) for q in asked} == {(2, 90), (3, None)}
    assert asked[1]["epochs"] == 2, "cheaper ones come first"
    names = [row["name"] for row in first["rows"]]
    assert names[0] == "found"
    assert names[1].startswith("best ")
    assert names[2:] == SMALL["against"]
    for row in first["rows"]:
        assert row["J"] == [p + first["price"] * n for p, n in zip(row["phi"], row["mean_cost"], strict=True)]
        assert all(
            0 <= robust <= clean <= 1 for robust, clean in zip(row["robust"], row["clean"], strict=True)
        )
    assert first["price"] * 3 == pytest.approx(0.2)  # the whole cost of PGD-2
    file.write_text("".join(lines[:-3]) + lines[-3][:20])
    again = controlat.search(tmp_path / "out", **settings)
    for key in ("trainings", "gradients"):
        assert again["spent"][key] == first["spent"][key]  # those of the judgement are not counted
    assert again["found"] == first["found"]
    assert [row["J"] for row in again["rows"]] == [row["J"] for row in first["rows"]]
    seeds: dict[bool, set[int]] = {True: set(), False: set()}
    for question in asked:
        seeds[question.get("attacked", False)].add(question["seed"])
    assert seeds[True] == {0, 1}
    assert min(seeds[False]) == 10_000


OWN_DATA = """
from dataclasses import replace
from controlat.data import Split, load

def relabelled():
    data = load("digits")
    return replace(data, test=replace(data.test, y=9 - data.test.y))

def tested_on_training():
    data = load("digits")
    return replace(data, test=data.train)
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for a data set of the module own_digits."""
    (tmp_path / "own_digits.py").write_text(OWN_DATA)
    monkeypatch.chdir(tmp_path)
    return {"eps": "0.15", "lr": "onecycle:lr=0.2"}


@pytest.mark.slow
def test_what_is_found_does_not_depend_on_test_samples(tmp_path: Path, own_data: dict[str, Any]) -> None:
    few = SMALL | own_data | {"budget": "1trainings", "against": ["none"]}
    first = controlat.search(tmp_path / "first", **few)
    other = controlat.search(tmp_path / "other", **few | {"data": "own_digits:relabelled"})
    assert other["found"] == first["found"]
    assert [row["J"] for row in other["rows"]] == [row["J"] for row in first["rows"]]
    assert other["rows"][0]["clean"] != first["rows"][0]["clean"]


def test_data_that_are_tested_on_what_is_trained_on_are_refused(
    tmp_path: Path, own_data: dict[str, Any]
) -> None:
    given = SMALL | own_data | {"data": "own_digits:tested_on_training", "test_points": 40}
    with pytest.raises(ValueError, match=r"of 40 test samples are trained on too.* mend the data set"):
        controlat.search(tmp_path / "out", **given)


@pytest.mark.slow
def test_closed_loops_and_other_methods_take_part(tmp_path: Path) -> None:
    loops = {"spaces": ["ratio:threshold=1.01~1.2,most=2,tau=0.2"], "budget": "2trainings"}
    result = controlat.search(tmp_path / "out", **SMALL | loops | {"against": ["nfgsm", "trades@none"]})
    _, nfgsm, trades = result["rows"]
    assert (nfgsm["method"], nfgsm["schedule"], nfgsm["mean_cost"]) == ("nfgsm", "fgsm:alpha=0.15", [2, 2])
    assert (trades["method"], trades["mean_cost"]) == ("trades", [1, 1])

    taken = tmp_path / "out" / "schedule.json"
    names = ("epochs", "train_points", "progress")
    trained = {name: SMALL[name] for name in names} | {"seed": 0, "threads": 1}
    controlat.train(tmp_path / "run", controller=result["found"], **trained)
    assert taken.read_text() == (tmp_path / "run" / "schedule.json").read_text()

    steps = [int(controlat.load_schedule(taken)(epoch)["steps"]) for epoch in range(3)]
    deciding = sum(k + 2 for k in [0, *steps[:-1]] if k < 2)  # attacks of K and of 2 steps, K = 0 before all
    (answer,) = (
        line["answer"]
        for line in read_json_lines(tmp_path / "out" / "trainings.jsonl")
        if line["question"].get("attacked") and line["question"]["text"] == result["found"]
        if line["question"]["seed"] == 0
    )
    assert answer["mean_cost"] == pytest.approx(np.mean([k + 1 for k in steps]))
    assert answer["gradients"] == 180 * sum(k + 1 for k in steps) + 180 * deciding + 20 * 10  # and Phi


def test_the_best_of_a_space_is_among_what_was_trained_the_furthest() -> None:
    chosen = SearchSettings(**SMALL)
    ledger, seeds = Ledger(None, lambda *_: None), chosen.search_seeds(9)
    plan = Plan(100.0, 0.1, (Rung(3), Rung(3, seeds=2, first=1)), seeds)

    def made(space: Space, share: float, phi: float, until: int | None = None) -> Trial:
        point = space.point([share] * len(space.parameters))
        question = Question(space.text_of(point), seeds[0], 3, until=until)
        return Trial(space, point, (question,), (Answer(phi, 1.0, 10.0, 1.0),))

    own, delayed = chosen.space_list()
    winner, whole = made(own, 0.5, 0.1), made(delayed, 0.4, 0.9)
    short = made(delayed, 0.6, 0.2, until=1)
    branches = [Branch(own, None, 0.5, [winner]), Branch(delayed, None, 0.5, [short, whole])]  # type: ignore[arg-type]
    found = _contenders(None, chosen, Search(branches, ledger, plan), winner)  # type: ignore[arg-type]
    assert found["best delayed"] == ("", whole.text)


def test_cheaper_trainings_come_first_and_keep_thrice_as_many() -> None:
    chosen = SearchSettings(
        **SMALL | {"epochs": 8, "spaces": ["constant"], "fidelity": ["epochs=1/4,points=1/2", "epochs=1/2"]}
    )
    assert _rungs(chosen, 180) == (
        Rung(2, 90),
        Rung(4, first=1),
        Rung(8, first=1),
    )
    assert _rungs(SearchSettings(**SMALL), 180) == (Rung(3), Rung(3, first=1))
    assert SearchSettings(budget="2trainings").allowance(50.0) == (100.0, "gradients")
    assert SearchSettings(budget="600 seconds").allowance(50.0) == (600.0, "seconds")


@pytest.mark.parametrize(
    ("given", "spaces", "most"),
    [
        ({"max_steps": 1}, ["anneal", "amata", "delayed", "constant"], "pgd:steps=1,alpha=0.3"),
        ({"epochs": 1}, ["anneal", "amata", "constant"], "pgd:steps=10,alpha=0.0375"),
        ({"method": "free"}, ["anneal", "amata", "constant"], "pgd:steps=10,alpha=0.0375"),
        ({"method": "fast"}, ["anneal", "amata", "constant"], "pgd:steps=1,alpha=0.3"),
    ],
)
def test_what_is_left_out_is_as_far_as_the_method_and_the_length_of_a_run_allow(
    given: dict[str, Any], spaces: list[str], most: str
) -> None:
    chosen = SearchSettings(**given)
    assert (chosen.spaces, chosen.most) == (spaces, most)
    assert any(text.startswith("delayed") for text in chosen.against) == ("delayed" in spaces)
    for text in filter(lambda given: given != "ramp", chosen.against):
        method, schedule = chosen.contender(text)
        chosen.controller(schedule, chosen.epochs, method)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": "much"}, "budget must read 3trainings, 2e8gradients or 600seconds, got 'much'"),
        ({"budget": "0seconds"}, "budget must read .* got '0seconds'"),
        ({"budget": "..seconds"}, "budget must be a .*number"),
        ({"gamma": 0}, "gamma must be > 0, got 0"),
        ({"gamma": "dear"}, "gamma must be a .*number"),
        ({"spaces": ["stages"]}, "stages needs runs of at least 4 epochs, got 3"),
        ({"method": "free", "spaces": ["delayed"]}, "steps must be >= 1, got 0"),
        ({"spaces": ["amatta"]}, "did you mean 'amata'"),
        ({"judge_seeds": [3, 10_001]}, "below 10000, where the search's own begin"),
        ({"against": ["pgd:steps=2"]}, "alpha"),
        ({"against": ["nfgsm@pgd:steps=3,alpha=0.1"]}, r"steps must be in \[1, 1\], got 3"),
        ({"spaces": ["ratio:threshold=0.5~2,tau=0.3"]}, "threshold must be > 1"),
        ({"attacks": ["pdg-2"]}, "unknown attack"),
        ({"weight": 0}, "weight must be"),
        ({"proposer": "tpe", "proposer_options": {"warmup": 3}}, "its options: startup"),
        ({"proposer": "tpee"}, "did you mean 'tpe'"),
        ({"proposer": "pbt", "spaces": ["delayed"]}, "takes a space of stages, as --spaces stages"),
        ({"fidelity": ["0.5"]}, "expected name=value, got '0.5'"),
        ({"fidelity": ["epoch=1/2"]}, "did you mean 'epochs'"),
        ({"fidelity": ["epochs=2"]}, "above 0 and at most 1, got 'epochs=2'"),
        (
            {"method": "free", "max_steps": 2, "spaces": ["delayed"]},
            "free cannot be searched on delayed: .*>= 1",
        ),
        ({"fidelity": ["epochs=1/9"]}, "'epochs=1/9' is less than one of the 3 epochs"),
        ({"fidelity": ["epochs=2/3", "epochs=1/3"]}, "the cheapest first, got epochs=2/3 epochs=1/3"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(
    tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        controlat.search(tmp_path / "out", **SMALL | given)
    assert not (tmp_path / "out" / "trainings.jsonl").exists()
