"""Runs that go on from what another has left: the same bits as whole ones, for the cost of what is new."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import forked
from rules import Rising

import controlat
from controlat._util.files import read_json_lines
from controlat._util.sending import Common
from controlat.app.experiment import Experiment
from controlat.app.prefix import Prefix
from controlat.app.search_judge import _experiment, trained
from controlat.app.settings import SearchSettings
from controlat.control.cost import Meter
from controlat.schedule_search.trials import Answer, Question

SMALL: dict[str, Any] = {
    "epochs": 4,
    "train_points": 120,
    "held_out": 40,
    "test_points": 40,
    "batch_size": 32,
    "lr": 0.1,
    "spaces": ["constant"],
    "proposer": "random",
}
TEXT = "step:steps=1.4:2.3:1,at=1:3,alpha=0.05,rounding=dither"


def sent(**changes: Any) -> Common:
    return Common(SearchSettings(**SMALL | changes))


def asked(text: str = TEXT, until: int | None = None, seed: int = 7) -> Question:
    return Question(text, seed, 4, until=until)


def timeless(answer: Answer) -> Answer:
    return answer._replace(seconds=0.0)


# Batch statistics; perturbations that go on to later steps, and per sample; a curriculum between epochs.
@pytest.mark.parametrize(
    ("method", "model", "text"),
    [
        ("pgd_at", "cnn_bn", TEXT),
        ("free", "mlp", "step:steps=2:3:1,at=1:3,alpha=0.05"),
        ("atta", "mlp", TEXT),
        ("cat", "mlp", "set:steps=2:3:1@1:3"),
    ],
)
def test_a_run_that_goes_on_has_the_bits_of_a_whole_one(
    tmp_path: Path, method: str, model: str, text: str
) -> None:
    space = "set:steps=1~3~whole" if method == "cat" else "constant"
    problem = sent(method=method, model=model, spaces=[space], against=[text])
    whole = trained(problem, asked(text))
    ends = (1, 3, None)
    alone = [trained(problem, asked(text, until)) for until in ends]
    parts = [trained(problem, asked(text, until), tmp_path) for until in ends]
    assert timeless(alone[-1]) == timeless(whole)
    assert [a[:2] for a in parts] == [a[:2] for a in alone]
    assert 0 < parts[0].mean_cost < parts[1].mean_cost < whole.mean_cost, "the cost so far"
    assert len(list(tmp_path.iterdir())) == 2
    phi = _cost_of_phi(problem)
    for i in (1, 2):
        assert parts[i].gradients == alone[i].gradients - (alone[i - 1].gradients - phi)


def _cost_of_phi(problem: Common) -> float:
    experiment, meter = Experiment.of(problem.value), Meter()
    experiment.terminal(7).value(experiment.driver(7), meter)
    return meter.gradients


def test_what_begins_in_another_way_is_trained_whole(tmp_path: Path) -> None:
    trained(sent(), asked(until=1), tmp_path)
    again = {
        "same": (sent(), asked()),
        "seed": (sent(), asked(seed=8)),
        "control": (sent(), asked(TEXT.replace("0.05", "0.06"))),
        "rounding": (sent(), asked(TEXT.replace("1.4", "1.7"))),
        "problem": (sent(momentum=0.8), asked()),
        "points": (sent(), asked()._replace(points=60)),
        "later": (sent(), asked(TEXT.replace("2.3", "0"))),
        "stopped": (sent(), asked(until=1)),
    }
    cheaper = {name for name, q in again.items() if trained(*q, tmp_path).gradients < trained(*q).gradients}
    assert cheaper == {"same", "later"}


@pytest.mark.parametrize("damage", ["truncated", "other", "empty"])
def test_a_damaged_state_is_trained_again(tmp_path: Path, damage: str) -> None:
    trained(sent(), asked(until=1), tmp_path)
    (state,) = tmp_path.iterdir()
    content = state.read_bytes()
    state.write_bytes(
        {"truncated": content[:-100], "empty": b"", "other": pickle.dumps({"model": {}})}[damage]
    )
    assert timeless(trained(sent(), asked(), tmp_path)) == timeless(trained(sent(), asked()))


def test_a_closed_loop_is_trained_whole(tmp_path: Path) -> None:
    experiment = Experiment.of(sent().value)
    spent = [
        Prefix(tmp_path, driver, experiment.spec(Rising(), 7), experiment.problem)
        .objective(experiment.terminal(7), until)
        .training_gradients
        for until, driver in ((1, experiment.driver(7)), (None, experiment.driver(7)))
    ]
    assert 0 < 3 * spent[0] < spent[1]
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_has_a_cost() -> None:
    answer = trained(sent(lr=1e6, weight_decay=1.0), asked())
    assert answer.phi is None
    assert 0 < answer.gradients < trained(sent(), asked()).gradients


def test_fewer_samples_leave_phi_on_the_same_ones() -> None:
    few, all_ = (_experiment(sent(), 2, points, "") for points in (30, None))
    assert (len(few.training), len(all_.training)) == (30, 80)
    assert few.phi.fingerprint() == all_.phi.fingerprint()
    assert few.problem.epochs == 2


# ---------------------------------------------------------------------------------------------------- kill -9

STAGED: dict[str, Any] = {
    "spaces": ["stages"],
    "proposer": "pbt",
    "budget": "18trainings",
    "max_steps": 2,
    "judge_seeds": [0],
    "against": ["none"],
    "attacks": ["pgd-2"],
    "jobs": 1,
    "progress": False,
}


def _killed_at(out: Path, lines: int) -> None:
    """Search, and be killed as the answer after so many lines comes, which has left its state already."""
    from controlat.schedule_search import trials

    def append(path: Path, line: object) -> None:
        if path.exists() and len(read_json_lines(path)) == lines:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, line)

    write, trials.append_json_line = trials.append_json_line, append
    controlat.search(out, **SMALL | STAGED)


def _rows(out: Path) -> list[dict[str, Any]]:
    return [
        {**row, "answer": row["answer"] | {"seconds": 0}} for row in read_json_lines(out / "trainings.jsonl")
    ]


@pytest.mark.slow
def test_killed_at_any_answer_it_makes_the_same_trials_at_the_same_cost(tmp_path: Path) -> None:
    whole = controlat.search(tmp_path / "whole", **SMALL | STAGED)
    rows = _rows(tmp_path / "whole")
    assert {row["question"].get("until") for row in rows} >= {1, 2, 3, None}
    assert not (tmp_path / "whole" / "states").exists()
    out = tmp_path / "out"
    for lines in (1, 5, 14, 20):
        assert forked(_killed_at, out, lines) == -signal.SIGKILL
        assert len(_rows(out)) == lines
        assert any((out / "states").iterdir())
    again = controlat.search(out, **SMALL | STAGED)
    assert _rows(out) == rows
    assert again["found"] == whole["found"]
    assert not (out / "states").exists()
