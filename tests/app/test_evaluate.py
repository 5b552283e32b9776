"""`evaluate`, `train` and `attack` as Python calls on real data: they write what was computed."""

import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import forked
from helpers import shorten_autoattack
from PIL import Image

import controlat
from controlat import Surface, load_schedule, parse_schedule
from controlat._util.errors import NonFiniteError
from controlat._util.files import read_json, read_json_lines
from controlat.app import full_criterion
from controlat.app.estimate import estimate
from controlat.app.evaluate import labels
from controlat.app.settings import EvaluateSettings
from controlat.app.trainer import load_checkpoint
from controlat.pmp import FORMS, Criterion

SMALL: dict[str, Any] = {
    "schedules": ["none", "pgd:steps=3,alpha=0.06"],
    "seeds": [0, 1],
    "epochs": 2,
    "train_points": 200,
    "test_points": 80,
    "lr": 0.2,
    "attacks": ["fgsm", "pgd-5"],
    "checks": 0,
    "threads": 1,
    "progress": False,
}
TRAINED, HELD_OUT, TESTED = 180, 20, 80

# Kills its process at the pass in training mode that KILL names: of training, or of the criterion.
STOPPABLE = """
import os, signal
from torch import nn
from controlat.models import build

passes = 0

class Stoppable(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        global passes
        passes += self.training
        if os.environ.get("KILL") == str(passes):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)

def net(in_shape, num_classes):
    return Stoppable(build("mlp", in_shape, num_classes))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    controlat.evaluate(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(out / "result.json")
    return found


def _runs(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for schedule in result["schedules"]:
        for run in schedule["runs"]:
            yield schedule, run


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _numbers(v)
    elif isinstance(value, float):
        yield value


def _timeless(value: Any) -> Any:
    """Without times and without the machine."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if "seconds" not in k and k != "environment"}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------ the result file


def test_the_result_holds_every_schedule_seed_and_epoch(result: dict[str, Any]) -> None:
    assert result["format"] == "controlat evaluation"
    parts = {"validation": HELD_OUT // 2, "phi": HELD_OUT // 2}
    assert result["sizes"] == {"train": TRAINED, "held_out": HELD_OUT, "test": TESTED} | parts
    assert [s["text"] for s in result["schedules"]] == SMALL["schedules"]
    assert result["environment"]["torch"] == str(torch.__version__)
    for schedule, run in _runs(result):
        assert [r["seed"] for r in schedule["runs"]] == [0, 1]
        assert [e["epoch"] for e in run["epochs"]] == [e["epoch"] for e in run["criterion"]] == [0, 1]
        for epoch in run["criterion"]:
            for form in FORMS:
                assert epoch[form]["value"] >= 0
                assert len(epoch[form]["jackknife"]) == 4  # 64 samples, two batches in each half
                assert epoch[form]["cross_fitted"] is not None
                assert epoch[form]["interval"][0] >= 0
            assert epoch["candidates"] == 5 * 3 + 1 + (schedule["text"] != "none")
            assert epoch["scale"] == pytest.approx(1 / (1 - 0.9))
        assert set(run["evaluation"]["after"]) == set(SMALL["attacks"])


def test_the_result_holds_no_nan_and_nothing_infinite(out: Path, result: dict[str, Any]) -> None:
    found = list(_numbers(result))
    assert len(found) > 200
    assert all(map(math.isfinite, found))
    text = (out / "result.json").read_text()
    assert not {"NaN", "Infinity", '"nan"', '"inf"'} & set(text.replace(",", " ").split())


def test_the_returned_result_is_the_file(out: Path, result: dict[str, Any]) -> None:
    assert controlat.evaluate(out, **SMALL) == result


def test_seeds_differ(result: dict[str, Any]) -> None:
    assert len({r["epochs"][0]["loss"] for _, r in _runs(result)}) == 4
    none = result["schedules"][0]["runs"]
    rewards = [run["criterion"][0]["costate"]["reward"][1] for run in none]
    assert rewards[0] != pytest.approx(rewards[1], rel=1e-3)


def test_all_schedules_are_scored_at_the_same_initial_state(out: Path, result: dict[str, Any]) -> None:
    for seed in (0, 1):
        surfaces = [
            _surfaces(out / "runs" / schedule["runs"][seed]["directory"])[0][1]
            for schedule in result["schedules"]
        ]
        shared = set(surfaces[0].controls) & set(surfaces[1].controls)
        assert len(shared) == 16
        rows = [[s.gram[s.controls.index(u)] for u in sorted(shared, key=repr)] for s in surfaces]
        assert np.allclose(rows[0], rows[1], rtol=1e-6)


def test_costs_are_counted(result: dict[str, Any]) -> None:
    for schedule, run in _runs(result):
        n = 1 if schedule["text"] == "none" else 4
        assert run["gradients"] == n * TRAINED * SMALL["epochs"]
        assert [e["gradients"] for e in run["epochs"]] == [n * TRAINED] * 2
        found = run["evaluation"]
        survivors = (found["clean"]["correct"], found["after"]["fgsm"]["correct"])
        assert found["gradients"] == survivors[0] * 1 + survivors[1] * 5
    for schedule in result["schedules"]:
        s = schedule["summary"]
        assert s["gradients"]["mean"] == statistics.fmean(r["gradients"] for r in schedule["runs"])
        assert s["evaluation_gradients"] == sum(r["evaluation"]["gradients"] for r in schedule["runs"])


# --------------------------------------------------------------------------------------- C from the surfaces


def _surfaces(run: Path) -> list[tuple[int, Surface]]:
    lines = read_json_lines(run / "criterion.jsonl")
    return [(line["epoch"], Surface.from_json(line["surface"])) for line in lines]


def _table_row(out: Path, text: str) -> str:
    lines = (out / "summary.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {text} "))


def test_c_in_the_table_follows_from_the_stored_surfaces(out: Path, result: dict[str, Any]) -> None:
    for schedule in result["schedules"]:
        u = parse_schedule(schedule["text"], SMALL["epochs"])
        for form in FORMS:
            values = [
                surface.gap(u(epoch), 0.04, form).value
                for run in schedule["runs"]
                for epoch, surface in _surfaces(out / "runs" / run["directory"])
            ]
            assert len(values) == 4
            mean = statistics.fmean(values)
            assert mean == pytest.approx(schedule["summary"]["criterion"][form]["mean"])
            assert f" {mean:.3g} [" in _table_row(out, schedule["text"])


def test_c_for_another_gamma_needs_no_other_run(out: Path, result: dict[str, Any], tmp_path: Path) -> None:
    again = controlat.evaluate(tmp_path / "again", **SMALL | {"gamma": "0.5", "seeds": [1]})
    for before, after in zip(result["schedules"], again["schedules"], strict=True):
        u = parse_schedule(before["text"], SMALL["epochs"])
        folder = out / "runs" / before["runs"][1]["directory"]
        for form in FORMS:
            values = [surface.gap(u(epoch), 0.5, form).value for epoch, surface in _surfaces(folder)]
            measured = after["summary"]["criterion"][form]
            assert statistics.fmean(values) == pytest.approx(measured["mean"])
    costly = (s["schedules"][1]["summary"]["criterion"]["norm"]["per_seed"][-1] for s in (again, result))
    assert next(costly) > next(costly), "a price of evaluations tells against three steps"


def test_the_whole_cost_of_the_most_expensive_schedule_weighs_what_is_said(
    out: Path, result: dict[str, Any]
) -> None:
    price, (none, pgd) = result["price"], result["schedules"]
    for run in (r["objective"] for entry in (none, pgd) for r in entry["runs"]):
        assert run["J"] == run["phi"] + run["price"] * run["evaluations"]
    assert pgd["runs"][0]["objective"]["price"] * pgd["runs"][0]["objective"]["evaluations"] == (
        pytest.approx(0.2, rel=1e-12)
    )
    assert none["runs"][0]["objective"]["price"] * none["runs"][0]["objective"]["evaluations"] == (
        pytest.approx(0.2 / 4, rel=1e-12)  # n = 1 beside 4
    )
    told = f"gamma = {price['gamma']:.4g}: the whole cost of pgd:steps=3,alpha=0.06, the most expensive one"
    assert told in (out / "summary.md").read_text()
    same = {k: v for k, v in SMALL.items() if k not in ("schedules", "seeds", "attacks", "checks")}
    alone = controlat.objective(pgd["text"], seed=1, gamma=price["gamma"], **same)
    assert alone["J"] == pgd["runs"][1]["objective"]["J"]


def test_a_gamma_that_is_given_holds_in_every_form_and_settings_of_before_are_the_same() -> None:
    chosen = EvaluateSettings(**SMALL, gamma="1/25")
    assert chosen.greedy_gamma == 0.04
    assert "weight" not in chosen.to_json()
    assert EvaluateSettings(**SMALL).to_json()["weight"] == 0.2
    with pytest.raises(ValueError, match="weight must be"):
        EvaluateSettings(**SMALL, weight=0)


# -------------------------------------------------------------------------------------- texts and figures


def test_the_summary_names_every_schedule_attack_and_figure(out: Path) -> None:
    text = (out / "summary.md").read_text()
    for word in [*SMALL["schedules"], *SMALL["attacks"], "C norm", "C costate", "80 test", "seeds 0, 1"]:
        assert word in text, word
    for name in ("schedules.png", "criterion.png", "tradeoff.png"):
        assert f"({name})" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[:4]}) == 1


TINY: dict[str, Any] = SMALL | {"seeds": [0], "train_points": 100, "test_points": 40, "lr": 0.1}


@pytest.mark.slow
def test_the_terminal_cost_is_what_is_asked_for(tmp_path: Path) -> None:
    """It enters the costate form and J, not the norm form; results say which it was."""
    found = {t: controlat.evaluate(tmp_path / t[:3], terminal=t, **TINY) for t in ("adversarial", "clean")}
    for schedule in range(2):
        ours = [f["schedules"][schedule]["runs"][0] for f in found.values()]
        assert [e["norm"]["value"] for e in ours[0]["criterion"]] == [
            e["norm"]["value"] for e in ours[1]["criterion"]
        ]
        assert ours[0]["criterion"][1]["costate"]["value"] != ours[1]["criterion"][1]["costate"]["value"]
        assert ours[0]["full"]["phi"] > ours[1]["full"]["phi"]
    for name, text in (("adv", "adversarial cross-entropy on"), ("cle", "clean cross-entropy on")):
        assert text in (tmp_path / name / "summary.md").read_text()


@pytest.mark.slow
def test_mixed_precision_is_looked_back_upon_as_it_was_trained(tmp_path: Path) -> None:
    found = controlat.evaluate(tmp_path, bf16=True, **TINY)
    for schedule in found["schedules"]:
        full = schedule["runs"][0]["full"]
        assert full["same"] is True
        assert full["dropped"] == ["rounding to bfloat16"]
    text = (tmp_path / "summary.md").read_text()
    assert "Costates leave out: rounding to bfloat16." in text
    assert "did not end with the bits" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", "0.3"), ("epochs", 5), ("seeds", [1, 2]), ("schedules", ["none"]), ("test_points", 50)],
)
def test_settings_that_contradict_the_run_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    """Who asks for eps 0.3 would otherwise publish the numbers of 0.15."""
    few = {"epochs": 1, "train_points": 100, "test_points": 40, "threads": 1, "progress": False}
    controlat.train(tmp_path / "run", schedule="fgsm:alpha=0.15", **few)
    with pytest.raises(ValueError, match=f"{name} .* contradicts .*, which has"):
        EvaluateSettings(run=str(tmp_path / "run"), **{name: value})
    assert EvaluateSettings(run=str(tmp_path / "run"), epochs=1, eps=0.15).seeds == [0]
    with pytest.raises(ValueError, match=r"last\.pt is not the directory of a controlat train"):
        EvaluateSettings(run=str(tmp_path / "run" / "last.pt"))


def test_one_schedule_whose_costates_are_not_finite_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = full_criterion.examine

    def examine(recording: Any, *arguments: Any, **options: Any) -> Criterion:
        if recording.steps[0].control["steps"] == 3:
            raise NonFiniteError("the costate after step 4 (horizon 7) is not finite")
        return plain(recording, *arguments, **options)

    monkeypatch.setattr(full_criterion, "examine", examine)
    found = controlat.evaluate(tmp_path / "out", **TINY)
    none, pgd = (s["summary"]["full"] for s in found["schedules"])
    assert none["objective"]["mean"] > 0
    assert "costate after step 4" in pgd["failed"]
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "WARNING, pgd:steps=3,alpha=0.06: no C full, seed 0: the costate after step 4" in text
    row = next(line for line in text.splitlines() if line.startswith("| pgd:steps=3"))
    cells = [c.strip() for c in row.split("|")][2:5]
    assert cells == [f"{found['schedules'][1]['summary']['objective']['mean']:.3g}", "not finite", "-"]
    for name in FIGURES:
        assert (tmp_path / "out" / name).exists()


def test_the_training_itself_is_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is trained already is rolled out again, with the same result to the bit."""
    plain, again = full_criterion._rolled_out, []
    monkeypatch.setattr(full_criterion, "_rolled_out", lambda *a: again.append(a) or plain(*a))
    settings = TINY | {"batch_size": 20, "memory": 6e-4}
    found = controlat.evaluate(tmp_path, **settings)
    assert not again
    assert {run["full"]["stride"] for _, run in _runs(found)} == {2}, "of 5 steps per epoch"
    for file in (*tmp_path.glob("runs/*/full.json"), tmp_path / "result.json"):
        file.unlink()
    assert _timeless(controlat.evaluate(tmp_path, **settings)) == _timeless(found)
    assert len(again) == 2


def test_states_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"full criterion: .*--full false"):
        controlat.evaluate(tmp_path / "out", memory=1e-6, **TINY)
    assert not (tmp_path / "out" / "runs").exists()
    with pytest.raises(ValueError, match="full criterion"):
        estimate(memory=1e-6, **TINY)


FIGURES = ["schedules.png", "criterion.png", "tradeoff.png", "horizons.png", "costates.png", "surfaces.png"]


def test_every_run_leaves_its_checkpoints_schedule_log_and_surfaces(
    out: Path, result: dict[str, Any]
) -> None:
    names = {run["directory"] for _, run in _runs(result)}
    assert names == {p.name for p in (out / "runs").iterdir()}
    assert "02-pgd-steps=3-alpha=0.06-seed1" in names
    for schedule, run in _runs(result):
        folder = out / "runs" / run["directory"]
        wanted = {"criterion.jsonl", "objective.json", "full.json", "evaluation.json", "last.pt", "best.pt"}
        wanted |= {"log.jsonl", "schedule.json"}
        assert {p.name for p in folder.iterdir()} == wanted
        assert load_schedule(folder / "schedule.json") == parse_schedule(schedule["text"], 2)
        assert read_json_lines(folder / "log.jsonl") == run["epochs"]


# ---------------------------------------------------------------------------------------------- interrupted


def _evaluate(folder: Path, passes: int) -> None:
    os.chdir(folder)
    os.environ["KILL"] = str(passes)
    controlat.evaluate("killed", **SMALL | {"model": "stoppable:net"})


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    (tmp_path / "stoppable.py").write_text(STOPPABLE)
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"model": "stoppable:net"}
    wanted = controlat.evaluate("undisturbed", **settings)
    moments = [
        (20, 0, 0),  # in the criterion of epoch 0
        (72, 1, 0),  # in the training of epoch 0
        (10, 1, 1),  # in the criterion of epoch 1
        (124, 2, 1),  # in the full criterion of the first run
        (174, 3, 2),  # in the second run
    ]
    for passes, instants, checkpoints in moments[:kills]:
        assert forked(_evaluate, tmp_path, passes) == -signal.SIGKILL, passes
        assert not (tmp_path / "killed" / "result.json").exists()
        scored = [read_json_lines(file) for file in tmp_path.glob("killed/runs/*/criterion.jsonl")]
        assert sum(map(len, scored)) == instants
        assert len(list(tmp_path.glob("killed/runs/*/last.pt"))) == checkpoints
    found = controlat.evaluate("killed", **settings)
    assert _timeless(found) == _timeless(wanted)


# ------------------------------------------------------------------------------------------ other candidates


@pytest.mark.slow
def test_tpe_searches_with_hyperopt_and_scores_the_schedules_own_control(tmp_path: Path) -> None:
    settings = SMALL | {"maximiser": "tpe", "trials": 8, "seeds": [0], "epochs": 1}
    found = controlat.evaluate(tmp_path / "tpe", **settings)
    for schedule, run in _runs(found):
        (epoch,) = run["criterion"]
        assert epoch["norm"]["value"] >= 0
        assert 2 <= epoch["candidates"] <= 9
        (line,) = read_json_lines(tmp_path / "tpe" / "runs" / run["directory"] / "criterion.jsonl")
        controls = line["surface"]["controls"]
        assert dict(parse_schedule(schedule["text"], 1)(0)) == line["control"] == controls[0]
        low, high = 0.15 / 40, 2 * 0.15
        assert all(low * 0.999 <= u["alpha"] <= high * 1.001 for u in controls if u["steps"])
    again = controlat.evaluate(tmp_path / "again", **settings)
    assert _timeless(again) == _timeless(found), "the search is a function of the seed"
    assert "8 trials of hyperopt's TPE" in (tmp_path / "tpe" / "summary.md").read_text()


def test_a_schedule_file_is_a_candidate_like_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "step:steps=0:2,at=1,alpha=0.05"
    parse_schedule(text, 2).save("mine.json")
    settings = TINY | {"schedules": ["mine.json", text]}
    found = controlat.evaluate("out", **settings)
    one, other = (_timeless(s["runs"][0]) for s in found["schedules"])
    assert one.pop("directory") == "01-mine.json-seed0"
    other.pop("directory")
    assert one == other
    parse_schedule("pgd:steps=1,alpha=0.1", 2).save("mine.json", overwrite=True)
    with pytest.raises(ValueError, match=r"made with other settings.*schedules"):
        controlat.evaluate("out", **settings)


OWN = """
import torch
from torch import nn
import controlat

def net(in_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], num_classes))

def data(root=None):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = 0.2 + 0.2 * torch.rand(240, 2, 4, 4, generator=draw)
    x[torch.arange(240), 0, y, 0] += 0.6
    return controlat.Dataset("bars", controlat.Split(x[:200], y[:200]), controlat.Split(x[200:], y[200:]), 3)
"""


def test_the_users_own_network_and_data_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_code.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = {"data": "own_code:data", "model": "own_code:net", "eps": "8/255", "lr": 0.5, "threads": 1}
    found = controlat.train("run", schedule="pgd:steps=2,alpha=4/255", epochs=6, progress=False, **own)
    assert found["gradients"] == 6 * 3 * 180
    measured = controlat.attack("run/last.pt", attacks=["pgd-10"], progress=False)
    assert measured["points"] == 40
    assert measured["warnings"] == []
    assert measured["robust"]["value"] > 0.9
    assert measured["eps"] == 8 / 255
    assert str(tmp_path) not in sys.path


def test_a_data_factory_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_code.py").write_text("def data():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"gave a int; it must be a controlat\.data\.Dataset"):
        controlat.train("run", data="wrong_code:data", eps=0.1)
    with pytest.raises(ValueError, match="accepts no keyword 'root'"):
        controlat.train("run", data="wrong_code:data", eps=0.1, data_dir="folder")
    assert not list(tmp_path.rglob("settings.json")), "the directory is free for another try"


# ----------------------------------------------------------------------------------------------- estimation


def test_the_estimate_of_training_is_what_a_run_counts_and_the_rest_bounds_it(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cost = estimate(**SMALL)
    runs = [run for _, run in _runs(result)]
    gradients = cost["gradients"]
    assert gradients["training"] == sum(run["gradients"] for run in runs)
    criterion = sum(s["summary"]["criterion_gradients"] for s in result["schedules"])
    assert criterion <= gradients["criterion"] <= 1.02 * criterion
    evaluation = sum(run["evaluation"]["gradients"] + run["evaluation"]["forwards"] / 3 for run in runs)
    assert evaluation <= gradients["evaluation"] == 4 * ((1 + 5) + (1 + 2) / 3) * TESTED
    validation = sum(e["validation_gradients"] for run in runs for e in run["epochs"])
    assert validation <= gradients["validation"] == 4 * 2 * 10 * HELD_OUT // 2
    assert gradients["Phi"] == sum(run["objective"]["gradients"]["Phi"] for run in runs)
    assert gradients["total"] == sum(v for k, v in gradients.items() if k != "total")
    assert 0 < cost["seconds"] < math.inf
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_estimate_of_a_schedule_that_varies_within_an_epoch_is_close(tmp_path: Path) -> None:
    settings = SMALL | {"schedules": ["linear:start=4,end=0,tau=0.2,resolution=0.25"], "seeds": [0]}
    settings |= {"batch_size": 50, "epochs": 1, "attacks": ["fgsm"]}
    (entry,) = controlat.evaluate(tmp_path / "run", **settings)["schedules"]
    steps = [parse_schedule(entry["text"], 1)(b / 4)["steps"] for b in range(4)]
    assert steps == [4, 3, 2, 1]
    counted = entry["runs"][0]["gradients"]
    assert counted == 50 * 5 + 50 * 4 + 50 * 3 + 30 * 2
    estimated = estimate(**settings)["gradients"]["training"]
    assert estimated == pytest.approx(counted, rel=0.05), "but for the smaller last batch"


# --------------------------------------------------------------------------------------------------- attack


def test_attack_repeats_the_evaluation_of_the_run(out: Path, result: dict[str, Any]) -> None:
    for schedule, run in _runs(result):
        checkpoint = out / "runs" / run["directory"] / "last.pt"
        found = controlat.attack(
            checkpoint, attacks=SMALL["attacks"], points=TESTED, seed=run["seed"], checks=0, progress=False
        )
        for name in ("clean", "after", "robust", "gradients"):
            assert found[name] == run["evaluation"][name]
        assert (found["epoch"], found["schedule"]) == (2, schedule["text"])


def test_attack_with_another_radius_norm_and_file(out: Path, result: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = out / "runs" / result["schedules"][0]["runs"][0]["directory"] / "best.pt"
    few = {"attacks": ["pgd-3"], "points": 50, "checks": 0, "progress": False}
    weak, strong = (controlat.attack(checkpoint, eps=eps, **few) for eps in ("1/255", 0.5))
    assert weak["eps"] == 1 / 255
    assert weak["clean"] == strong["clean"]
    assert strong["robust"]["value"] < weak["robust"]["value"]
    none = controlat.attack(checkpoint, eps=0, **few)
    assert none["robust"] == none["clean"]
    other = controlat.attack(checkpoint, eps=0.2, norm="l2", out=tmp_path / "l2.json", **few)
    assert other["norm"] == "l2"
    assert read_json(tmp_path / "l2.json") == json.loads(json.dumps(other))
    before = (tmp_path / "l2.json").read_bytes()
    with pytest.raises(ValueError, match=r"l2\.json exists; give another name"):
        controlat.attack(checkpoint, out=tmp_path / "l2.json", **few)
    assert (tmp_path / "l2.json").read_bytes() == before


def test_attack_of_something_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.pt is damaged or not a checkpoint"):
        controlat.attack(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        controlat.attack(tmp_path / "y.pt")


# --------------------------------------------------------------- checks, AutoAttack, transfer attacks, sweeps

DOWNHILL = """
import torch
from torch import nn
from controlat.models import build

class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g

class Downhill(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(Flip.apply(x))

def net(in_shape, num_classes):
    return Downhill(build("mlp", in_shape, num_classes))
"""
SENTENCES = (
    "the loss does not rise with steps",
    "random search without gradients broke",
    "transfer attacks broke",
    "AutoAttack broke",
    "accuracy under PGD is still",
)
EXTRAS: dict[str, Any] = {"checks": 60, "autoattack": 30, "sweeps": True, "surrogate": "honest/last.pt"}
FITTED = {"epochs": 6, "train_points": 600, "eps": 0.15, "threads": 1, "progress": False, "test_points": 80}


@pytest.fixture(scope="module")
def downhill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a surrogate, a network whose input gradient points downhill, and an evaluation of two."""
    folder = tmp_path_factory.mktemp("downhill")
    (folder / "downhill.py").write_text(DOWNHILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shorten_autoattack(patch, queries=200)
        controlat.train("honest", schedule="fgsm:alpha=0.1", seed=9, **FITTED)
        controlat.train("masked", schedule="none", model="downhill:net", **FITTED)
        settings = FITTED | EXTRAS | {"schedules": ["none", "fgsm:alpha=0.05"], "attacks": ["pgd-5"]}
        controlat.evaluate("out", seeds=[0, 1], model="downhill:net", **settings)
        yield folder


@pytest.mark.slow
def test_every_part_of_an_evaluation_is_stored_and_shown(downhill: Path) -> None:
    found = read_json(downhill / "out" / "result.json")
    summary = (downhill / "out" / "summary.md").read_text()
    for schedule, run in _runs(found):
        evaluation = run["evaluation"]
        assert evaluation["autoattack"]["points"] == 30
        assert evaluation["masking"]["points"] == 60
        assert evaluation["robust"]["value"] > evaluation["autoattack"]["robust"]["value"] + 0.1
        for sentence in SENTENCES:
            assert any(sentence in text for text in evaluation["warnings"]), (schedule["text"], sentence)
    for schedule in found["schedules"]:
        told = schedule["summary"]["warnings"]
        assert {seed for warning in told for seed in warning["seeds"]} == {0, 1}
        for name in ("autoattack", "transfer"):
            stored = [run["evaluation"][name]["robust"]["value"] for run in schedule["runs"]]
            assert schedule["summary"][name]["mean"] == pytest.approx(statistics.fmean(stored))
            assert f" {100 * statistics.fmean(stored):.1f} [" in _table_row(
                downhill / "out", schedule["text"]
            )
    heads = next(line for line in summary.splitlines() if line.startswith("| schedule "))
    assert [head.strip() for head in heads.split("|")][8:11] == ["robust %", "AutoAttack %", "transfer %"]
    assert "on 30 of the test points" in summary
    assert "made on the surrogate honest/last.pt" in summary
    assert summary.count("WARNING, none, seed ") >= len(SENTENCES)
    assert "nothing found" not in summary
    assert "](sweeps.png)" in summary
    with Image.open(downhill / "out" / "sweeps.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    width = pixels.shape[1]
    for panel in range(3):
        part = pixels[:, panel * width // 3 : (panel + 1) * width // 3]
        assert (np.ptp(part, axis=2) > 60).sum() > 100, "there are curves in every panel"


@pytest.mark.slow
def test_the_estimate_bounds_every_part_of_an_evaluation(
    downhill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(downhill)
    result = read_json("out/result.json")
    settings = FITTED | EXTRAS | {"schedules": ["none", "fgsm:alpha=0.05"], "attacks": ["pgd-5"]}
    settings |= {"seeds": [0, 1], "model": "downhill:net"}
    bound = estimate(**settings)["gradients"]["evaluation"]
    parts = ("masking", "transfer", "curves", "autoattack")
    spent = [
        part["gradients"] + part["forwards"] / 3
        for _, run in _runs(result)
        for part in (run["evaluation"], *(run["evaluation"][name] for name in parts))
    ]
    assert 0.5 * bound < sum(spent) <= bound
    without = estimate(**settings | {"checks": 0, "autoattack": 0, "sweeps": False, "surrogate": None})
    assert without["gradients"]["evaluation"] == round(4 * 80 * (5 + 2 / 3))
    for name in EXTRAS:
        less = {"checks": 0, "autoattack": 0, "sweeps": False, "surrogate": None}[name]
        assert estimate(**settings | {name: less})["gradients"]["evaluation"] < bound


@pytest.mark.slow
def test_attack_repeats_every_part_of_the_evaluation(downhill: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(downhill)
    (_, run), *_ = _runs(read_json("out/result.json"))
    found = controlat.attack(
        f"out/runs/{run['directory']}/last.pt",
        attacks=["pgd-5"],
        points=80,
        threads=1,
        progress=False,
        **EXTRAS,
    )
    for name in ("clean", "robust", "masking", "transfer", "curves", "autoattack", "warnings"):
        assert _timeless(found[name]) == _timeless(run["evaluation"][name]), name


def test_attack_writes_its_file_and_figure_whole_and_over_nothing(
    out: Path, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = out / "runs" / result["schedules"][0]["runs"][0]["directory"] / "last.pt"
    few: dict[str, Any] = {"attacks": ["fgsm"], "checks": 0, "points": 10, "threads": 1, "progress": False}
    controlat.attack(checkpoint, out=tmp_path / "plain.json", **few)
    controlat.attack(checkpoint, out=tmp_path / "f.json", sweeps=True, **few)
    assert {p.name for p in tmp_path.iterdir()} == {"plain.json", "f.json", "f.png"}
    assert read_json(tmp_path / "f.json")["curves"]["eps"][0]["eps"] == 0
    with Image.open(tmp_path / "f.png") as image:
        assert image.format == "PNG"
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "g.png").write_bytes(b"mine")
    for name, reason in [("f.json", r"f\.json exists"), ("g.json", r"g\.png exists")]:
        with pytest.raises(ValueError, match=reason):
            controlat.attack(checkpoint, out=tmp_path / name, sweeps=True, **few)
    with pytest.raises(ValueError, match=r"new\.png would be the name of the figure too"):
        controlat.attack(checkpoint, out=tmp_path / "new.png", sweeps=True, **few)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before | {tmp_path / "g.png": b"mine"}
    controlat.attack(checkpoint, out=tmp_path / "g.json", **few)
    assert (tmp_path / "g.png").read_bytes() == b"mine", "no figure is made without sweeps"

    def fail(*args: Any, **options: Any) -> None:
        args[1].write(b"half a figure")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        controlat.attack(checkpoint, out=tmp_path / "h.json", sweeps=True, **few)
    assert not (tmp_path / "h.png").exists()
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".png")]


def test_autoattack_needs_its_library_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match=r"pip install 'controlat\[autoattack\]'"):
        controlat.evaluate(tmp_path / "out", **SMALL | {"autoattack": 5})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- never reached


def test_what_training_never_comes_to_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"epochs": 2, "train_points": 40, "threads": 1, "progress": False}
    with pytest.warns(UserWarning, match="never comes to"):
        late = parse_schedule("step:steps=1:2:3,at=1:2,alpha=0.1:0.2:0.3", 2)
    late.save(tmp_path / "late.json")
    texts = ["set:steps=1..3@9,alpha=0.1:0.2@1", str(tmp_path / "late.json"), "amata:min=1,max=2,tau=0.1"]
    notes = []
    for i, text in enumerate(texts):
        controlat.train(
            tmp_path / str(i), schedule=text, lr="multistep:lr=0.1,at=1:2:3" if i == 2 else 0.1, **few
        )
        notes.append([line for line in capsys.readouterr().err.splitlines() if "note:" in line])
    pieces = "it has 2 epochs, in pieces of 1"
    assert notes == [
        [f"controlat: note: {texts[0]}: steps never reaches the value of epoch 9; {pieces}"],
        [f"controlat: note: {texts[1]}: steps, alpha never reach the value of epoch 2; {pieces}"],
        [
            "controlat: note: lr multistep:lr=0.1,at=1:2:3: never changes at epoch 2, 3, "
            "as training has 2 epochs"
        ],
    ]


def test_a_schedule_longer_than_a_file_name_trains_under_a_short_label(tmp_path: Path) -> None:
    steps = ":".join(str(i % 2) for i in range(200))
    texts = [f"table:steps={steps},alpha={a},resolution=1/100" for a in (0.1, 0.2)]
    few: dict[str, Any] = {"epochs": 2, "train_points": 40, "threads": 1, "progress": False}
    controlat.train(tmp_path / "out", schedule=texts[0], **few)
    assert load_schedule(tmp_path / "out" / "schedule.json").text == texts[0]
    names = labels([*texts, texts[0].replace(":0:", ":1:"), "none"])
    assert [len(label) <= 110 for label in names] == [True] * 4
    assert len(set(names)) == 4
    assert names[3] == "none"


# ---------------------------------------------------------------------------------------------------- MNIST

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the MNIST files are not in {MNIST}")
def test_mnist_end_to_end_with_lenet(tmp_path: Path) -> None:
    settings = SMALL | {"data": "mnist", "data_dir": str(MNIST), "model": "lenet", "eps": "0.3", "lr": 0.05}
    settings |= {"schedules": ["none", "amata:min=1,max=3,tau=0.6"], "seeds": [0], "test_points": 50}
    found = controlat.evaluate(tmp_path / "mnist", **settings | {"alphas": ["0.1", 0.3], "probe": 64})
    none, amata = found["schedules"]
    assert found["grid"] == {"alphas": [0.1, 0.3], "least": 0, "max_steps": 2, "others": []}
    assert none["runs"][0]["gradients"] == 2 * 180
    assert amata["runs"][0]["gradients"] == (2 + 3) * 180
    for schedule, run in _runs(found):
        assert run["epochs"][1]["loss"] < run["epochs"][0]["loss"], schedule["text"]
        assert run["evaluation"]["points"] == 50
    saved = load_checkpoint(tmp_path / "mnist" / "runs" / none["runs"][0]["directory"] / "last.pt")
    assert saved["settings"]["data_dir"] == str(MNIST)
