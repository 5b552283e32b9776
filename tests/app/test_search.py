"""The command `search`: what it leaves, that it goes on where it was, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat.app.search import _rungs
from controlat.app.settings import SearchSettings
from controlat.schedule_search.loop import Rung

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
    judged = [line for line in file.read_text().splitlines() if '"attacked": true' in line]
    assert {seed for line in judged for seed in (0, 1) if f'"seed": {seed},' in line} == {0, 1}
    assert all('"seed": 10' in line for line in lines if '"attacked": false' in line)


def test_cheaper_trainings_come_first_and_keep_thrice_as_many() -> None:
    chosen = SearchSettings(
        **SMALL | {"epochs": 8, "spaces": ["constant"], "fidelity": ["epochs=1/4,points=1/2", "epochs=1/2"]}
    )
    assert _rungs(chosen, 180) == (Rung(2, 90), Rung(4, keep=12), Rung(8, seeds=3, keep=4))
    assert _rungs(SearchSettings(**SMALL), 180) == (Rung(3), Rung(3, seeds=3, keep=4))
    assert SearchSettings(budget="2trainings").allowance(50.0) == (100.0, "gradients")
    assert SearchSettings(budget="600 seconds").allowance(50.0) == (600.0, "seconds")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": "much"}, "budget must read 3trainings, 2e8gradients or 600seconds, got 'much'"),
        ({"spaces": ["amatta"]}, "did you mean 'amata'"),
        ({"judge_seeds": [3, 10_001]}, "below 10000, where the search's own begin"),
        ({"against": ["pgd:steps=2"]}, "alpha"),
        ({"attacks": ["pdg-2"]}, "unknown attack"),
        ({"weight": 0}, "weight must be"),
        ({"proposer": "tpee"}, "did you mean 'tpe'"),
        ({"proposer": "pbt", "spaces": ["delayed"]}, "takes a space of stages, as --spaces stages"),
        ({"fidelity": ["0.5"]}, "expected name=value, got '0.5'"),
        ({"fidelity": ["epoch=1/2"]}, "did you mean 'epochs'"),
        ({"fidelity": ["epochs=2"]}, "above 0 and at most 1, got 'epochs=2'"),
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
