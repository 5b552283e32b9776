"""Surfaces in a search: a training that is looked back upon, and a whole search that goes by them."""

import json
from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat._util.sending import Common
from controlat.app.search_judge import trained
from controlat.app.settings import SearchSettings
from controlat.schedule_search.gain_model import GainModel
from controlat.schedule_search.trials import Question

SMALL: dict[str, Any] = {
    "spaces": ["anneal"],
    "proposer": "msa",
    "max_steps": 2,
    "judge_seeds": [0, 1],
    "against": ["none"],
    "attacks": ["pgd-2"],
    "epochs": 2,
    "train_points": 200,
    "test_points": 20,
    "jobs": 2,
    "progress": False,
}


def test_a_training_with_its_surface_is_the_same_training_and_costs_more() -> None:
    sent = Common(SearchSettings(**SMALL))
    question = Question("anneal:steps=0:1.5,alpha=0.1", 0, 2)
    plain, looked = trained(sent, question), trained(sent, question._replace(surface=True))
    assert (looked.phi, looked.mean_cost) == (plain.phi, plain.mean_cost)
    assert plain.surface is None
    assert looked.gradients > 2 * plain.gradients
    surface = json.loads(json.dumps(looked.surface))
    assert surface == looked.surface
    assert [len(b["gains"]) for b in surface["blocks"]] == [len(surface["candidates"])] * 2
    assert dict(zip((k for _, k in surface["candidates"]), surface["evaluations"], strict=True))[2] == 3
    assert GainModel.of([surface]).evaluations.tolist() == [1, 2, 3]


@pytest.mark.slow
def test_a_search_that_goes_by_surfaces_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    first = controlat.search(tmp_path / "out", budget="30trainings", **SMALL)
    file = tmp_path / "out" / "trainings.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    looked = [i for i, row in enumerate(rows) if row["question"].get("surface")]
    assert len({rows[i]["question"]["seed"] for i in looked}) == 3
    assert "blocks" in rows[looked[0]]["answer"]["surface"]
    file.write_text("".join(lines[: looked[1]]))
    again = controlat.search(tmp_path / "out", budget="30trainings", **SMALL)
    assert again["rows"][0]["J"] == first["rows"][0]["J"]
    asked = [json.loads(line)["question"] for line in file.read_text().splitlines()]
    assert sorted(map(str, asked)) == sorted(str(row["question"]) for row in rows)
