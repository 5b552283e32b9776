"""Closed loops by name in the commands: trained, killed, resumed, replayed, evaluated, estimated."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import talking
from helpers import same

import controlat
from controlat._util.files import read_json, read_json_lines
from controlat.app import cli
from controlat.app.estimate import estimate
from controlat.app.settings import EvaluateSettings, TrainSettings, names_controller
from controlat.app.trainer import load_checkpoint
from controlat.control.controller import Moment, unrolled
from controlat.control.schedules import load_schedule
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.pmp.controllers.ratio import Ratio

TEXTS = {
    "greedy": "greedy:gamma=0.001,probe=64,steps=0..3",
    "horizon": "horizon:h=3,looks=1,points=20,steps=0..3",
    "ratio": "ratio:threshold=1.0001,most=3,probe=64",
}
# 120 training samples in 4 batches of 32, 32, 32, 24; 40 held out.
SMALL: dict[str, Any] = {
    "epochs": 3,
    "train_points": 160,
    "held_out": 40,
    "batch_size": 32,
    "threads": 1,
    "progress": False,
}
FEW: dict[str, Any] = SMALL | {
    "seeds": [0],
    "probe": 64,
    "max_steps": 3,
    "checks": 0,
    "attacks": ["pgd-5"],
    "test_points": 50,
}
SECONDS = ("seconds", "total_seconds", "validation_seconds", "epoch_seconds")
SPENT = ("gradients", "total_gradients", "forwards")
STATE = ("model", "optimizer", "memory", "rows", "kept", "stopped", "controller")
by_name = pytest.mark.parametrize("name", TEXTS)


def timeless(line: dict[str, Any], apart: tuple[str, ...] = ()) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in SECONDS and k not in apart}


def log(run: Path, apart: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [timeless(line, apart) for line in read_json_lines(run / "log.jsonl")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each."""
    out = tmp_path_factory.mktemp("runs")
    for name, text in TEXTS.items():
        controlat.train(out / name, controller=text, **SMALL)
    return out


@by_name
def test_what_it_did_is_a_schedule_that_ends_with_the_same_bits(
    runs: Path, tmp_path: Path, name: str
) -> None:
    run = runs / name
    schedule = load_schedule(run / "schedule.json")
    assert schedule.text == TEXTS[name]
    assert [dict(schedule(n / 4)) for n in range(12)] == [
        dict(u) for line in log(run) for u in unrolled(line["controls"], 4)
    ]
    assert read_json(run / "settings.json")["controller"] == TEXTS[name]
    controlat.train(tmp_path / "again", schedule=str(run / "schedule.json"), **SMALL)
    one, two = (load_checkpoint(r / "last.pt") for r in (run, tmp_path / "again"))
    assert all(same(one[part], two[part]) for part in STATE if part != "controller")
    assert log(tmp_path / "again", SPENT) == log(run, SPENT)
    # What it measured is counted as evaluations of training, and not in sum n.
    assert one["tally"]["gradients"] > two["tally"]["gradients"]
    assert one["tally"]["evaluations"] == two["tally"]["evaluations"]
    assert read_json(tmp_path / "again" / "schedule.json") == read_json(run / "schedule.json")


def dying(words: list[str]) -> int:
    """The program, killed before the step whose epoch and batch are named in the environment."""
    take = Driver.step

    def step(self: Driver, batch: Any, *rest: Any) -> Any:
        if os.environ.get("KILL") == f"{batch.epoch} {batch.number} {len(self.controller_memory)}":
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, batch, *rest)

    Driver.step = step  # type: ignore[method-assign]
    return cli.main(words)


@by_name
def test_killed_and_resumed_it_decides_the_same(runs: Path, tmp_path: Path, name: str) -> None:
    out, words = tmp_path / "run", [f"--{key}={value}" for key, value in SMALL.items()]
    words += ["--controller", TEXTS[name], "--checkpoint_minutes", "1e-9", "--resume"]
    for kill, code in (("1 2 2", -signal.SIGKILL), ("", 0)):
        ended = talking(dying, ["train", "--out", str(out), *words], cwd=tmp_path, KILL=kill)()
        assert ended.code == code, ended.error
        if kill:
            tally = load_checkpoint(out / "last.pt")["tally"]
            assert (tally["epoch"], tally["batch"]) == (1, 2)
    assert log(out) == log(runs / name)
    assert read_json(out / "schedule.json") == read_json(runs / name / "schedule.json")
    one, two = (load_checkpoint(r / "last.pt") for r in (runs / name, out))
    assert all(same(one[part], two[part]) for part in STATE)
    assert timeless(one["tally"]) == timeless(two["tally"])


@pytest.mark.slow
def test_they_are_evaluated_beside_a_schedule_and_greedy_leaves_no_gap(runs: Path, tmp_path: Path) -> None:
    texts = [*TEXTS.values(), "pgd:steps=2,alpha=0.05"]
    result = controlat.evaluate(tmp_path / "out", schedules=texts, gamma=0.001, **FEW)
    assert [entry.get("closed_loop", False) for entry in result["schedules"]] == [True] * 3 + [False]
    for name, entry in zip(TEXTS, result["schedules"], strict=False):
        assert entry["schedule"] == read_json(runs / name / "schedule.json")
        assert entry["runs"][0]["full"]["same"] is True
    greedy, *_, plain = ([line["norm"] for line in e["runs"][0]["criterion"]] for e in result["schedules"])
    assert [gap["value"] for gap in greedy] == [0.0] * 3, "scored as it decides"
    assert max(gap["value"] for gap in plain) > 0
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert f"Closed loop ({', '.join(TEXTS.values())}): controls depend on the state" in summary


@by_name
def test_an_estimate_is_at_least_what_training_takes(runs: Path, name: str) -> None:
    planned = estimate(schedules=[TEXTS[name]], full=False, **FEW)["gradients"]
    assert planned["training"] >= log(runs / name)[-1]["total_gradients"]
    plain = estimate(schedules=["pgd:steps=3,alpha=0.1"], full=False, **FEW)["gradients"]
    decided = planned["training"] - plain["training"]
    assert decided > 0, "the most expensive control has three steps"
    assert planned["criterion"] == plain["criterion"], "no decision is asked for twice"


def test_an_evaluation_decides_once_in_every_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decided, decide = [], Ratio.decide

    def counted(self: Ratio, now: Moment, z: Driver, u: Control) -> Control:
        decided.append(now.epoch)
        return decide(self, now, z, u)

    monkeypatch.setattr(Ratio, "decide", counted)
    result = controlat.evaluate(tmp_path / "out", schedules=[TEXTS["ratio"]], full=False, **FEW)
    assert decided == [0, 1, 2]
    scored = result["schedules"][0]["runs"][0]
    assert [line["norm"]["control"] for line in scored["criterion"]] == (
        [line["control"] for line in scored["epochs"]]
    )


def test_the_objective_takes_a_closed_loop_by_name() -> None:
    few = {key: value for key, value in SMALL.items() if key != "epochs"} | {"epochs": 1}
    result = controlat.objective(TEXTS["ratio"], **few)
    assert result["evaluations"] == 4 * 2
    assert result["gradients"]["training"] == 2 * 120 + 3 * 64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"controller": "greedy:gama=1"}, "controller 'greedy' does not take gama; did you mean 'gamma'"),
        ({"controller": "greedi"}, "or begin with one of greedy, horizon, ratio, got 'greedi'"),
        ({"schedule": "greedy"}, "schedule 'greedy' is a closed loop: give it as controller"),
        ({"controller": "horizon", "eps": 0}, "chooses attacks, and eps = 0 allows none"),
        ({"controller": "ratio", "method": "nfgsm"}, "the method has no steps that could grow; it has alpha"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainSettings(**given)
    if "schedule" not in given and given["controller"] != "greedi":
        rest = {key: value for key, value in given.items() if key != "controller"}
        with pytest.raises(ValueError, match=told):
            EvaluateSettings(schedules=[given["controller"]], **rest)


def test_a_module_of_ones_own_may_have_the_name_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "horizon.py").write_text(
        "def rule(ball):\n    return lambda t: {'alpha': ball.eps, 'steps': 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert names_controller("horizon:rule")
    assert dict(TrainSettings(controller="horizon:rule").planned(0)) == {"alpha": 0.15, "steps": 1}  # type: ignore[operator]
