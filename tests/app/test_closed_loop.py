"""A closed loop in the commands: trained, killed and resumed, saved as a schedule, evaluated."""

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
from controlat.app.experiment import Experiment
from controlat.app.settings import EvaluateSettings, TrainSettings
from controlat.app.trainer import load_checkpoint
from controlat.control.controller import unrolled
from controlat.control.schedules import load_schedule
from controlat.dynamics.recording import Recording
from controlat.report import read

RULE = "rules:rising"
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
    "checks": 0,
    "attacks": ["pgd-5"],
    "test_points": 50,
}
SECONDS = ("seconds", "total_seconds", "validation_seconds", "epoch_seconds")
STATE = ("model", "optimizer", "memory", "rows", "kept", "stopped", "controller")


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in SECONDS}


def log(run: Path) -> list[dict[str, Any]]:
    return [*map(timeless, read_json_lines(run / "log.jsonl"))]


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run under a rule whose K rises within epochs."""
    out = tmp_path_factory.mktemp("looped") / "run"
    controlat.train(out, controller=RULE, **SMALL)
    return out


def test_every_control_is_logged_and_saved_as_a_schedule(looped: Path) -> None:
    lines = log(looped)
    steps = [u["steps"] for line in lines for u in unrolled(line["controls"], 4)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 2)
    assert any(len(line["controls"]) > 1 for line in lines), "the control changes within an epoch"
    assert [line["control"] for line in lines] == [line["controls"][0][1] for line in lines]
    sizes = [32, 32, 32, 24] * 3
    assert sum(line["gradients"] for line in lines) == sum(
        (k + 1) * n for k, n in zip(steps, sizes, strict=True)
    )

    schedule = load_schedule(looped / "schedule.json")
    assert [schedule(n / 4)["steps"] for n in range(12)] == steps
    assert schedule.text == RULE
    stored = load_checkpoint(looped / "last.pt")
    assert "schedule" not in stored
    assert stored["controller"]["below"] > 0
    assert stored["tally"]["forwards"] == 12, "what the rule measures is counted"
    settings = read_json(looped / "settings.json")
    assert settings["controller"] == RULE
    assert "schedule" not in settings


def test_trainer_recording_and_replayed_schedule_end_with_the_same_bits(looped: Path, tmp_path: Path) -> None:
    stored = load_checkpoint(looped / "last.pt")
    chosen = TrainSettings(controller=RULE, **SMALL)
    experiment = Experiment.of(chosen)
    driver = experiment.driver(0)
    rec = Recording.of(driver, experiment.spec(chosen.planned, 0))
    assert same(driver.model.state_dict(), stored["model"])
    assert [dict(s.control) for s in rec.steps] == [
        dict(u) for line in log(looped) for u in unrolled(line["controls"], 4)
    ]
    controlat.train(tmp_path / "again", schedule=str(looped / "schedule.json"), **SMALL)
    again = load_checkpoint(tmp_path / "again" / "last.pt")
    assert all(same(again[part], stored[part]) for part in STATE if part != "controller")
    assert log(tmp_path / "again") == log(looped)
    assert read_json(tmp_path / "again" / "schedule.json") == read_json(looped / "schedule.json")


def _killed(out: Path, kill: str) -> int | None:
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    words += ["--controller", RULE, "--checkpoint_minutes", "1e-9", "--resume"]
    return talking(cli.main, ["train", "--out", str(out), *words], cwd=out.parent, KILL=kill)().code


def test_killed_in_the_middle_of_epochs_and_resumed_it_decides_the_same(looped: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = [unrolled(line["controls"], 4) for line in log(looped)]
    for epoch, batch in ((0, 3), (1, 2)):
        assert _killed(out, f"{epoch} {batch}") == -signal.SIGKILL
        tally = load_checkpoint(out / "last.pt")["tally"]
        assert (tally["epoch"], tally["batch"]) == (epoch, batch)
        assert unrolled(tally["controls"], batch) == whole[epoch][:batch]
        assert not (out / "schedule.json").exists()
    assert _killed(out, "") == 0
    assert log(out) == log(looped)
    assert read_json(out / "schedule.json") == read_json(looped / "schedule.json")
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(looped / name), load_checkpoint(out / name)
        assert all(same(one[part], two[part]) for part in STATE), name
        assert timeless(one["tally"]) == timeless(two["tally"])


def test_a_closed_loop_is_evaluated_beside_a_schedule_and_by_its_run(looped: Path, tmp_path: Path) -> None:
    found = controlat.evaluate(tmp_path / "out", schedules=[RULE, "pgd:steps=2,alpha=0.05"], **FEW)
    loop, plain = found["schedules"]
    assert loop["text"] == RULE
    assert loop["schedule"] == read_json(looped / "schedule.json")
    assert loop["closed_loop"] is True
    assert "closed_loop" not in plain
    assert plain["schedule"]["text"] == "pgd:steps=2,alpha=0.05"
    (run,) = loop["runs"]
    assert [*map(timeless, run["epochs"])] == log(looped)
    assert [line["epoch"] for line in run["criterion"]] == [0, 1, 2]
    assert run["full"]["same"] is True
    assert run["full"]["evaluations"] == pytest.approx(
        sum(u["steps"] + 1 for line in log(looped) for u in unrolled(line["controls"], 4))
    )
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert f"Closed loop ({RULE}): controls depend on the state, and so on the seed" in summary
    assert "tables of controls show those that were taken under seed 0." in summary
    assert {p.name for p in (tmp_path / "out").glob("*.png")} >= {"schedules.png", "tradeoff.png"}
    assert read(tmp_path / "out" / "result.json") == read_json(tmp_path / "out" / "result.json")

    # The schedule that was taken is what the network of a finished run is evaluated under.
    again = controlat.evaluate(
        tmp_path / "run",
        run=str(looped),
        probe=64,
        checks=0,
        attacks=["pgd-5"],
        full=False,
        threads=1,
        progress=False,
    )
    assert again["reproduced"] is True

    attacked = controlat.attack(looped, attacks=["pgd-5"], checks=0, points=50, threads=1, progress=False)
    assert attacked["schedule"] == RULE


def test_lost_lines_of_the_criterion_are_scored_again_as_they_were(tmp_path: Path) -> None:
    options = FEW | {"schedules": [RULE], "full": False, "epochs": 2}
    controlat.evaluate(tmp_path / "out", **options)
    (file,) = (tmp_path / "out").rglob("criterion.jsonl")
    lines = read_json_lines(file)
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    (tmp_path / "out" / "result.json").unlink()
    controlat.evaluate(tmp_path / "out", **options)
    assert [*map(timeless, read_json_lines(file))] == [*map(timeless, lines)]


def test_an_estimate_takes_the_most_expensive_control_or_says_that_the_cost_is_not_known() -> None:
    known = estimate(schedules=[RULE], full=False, **FEW)["gradients"]["training"]
    assert known == 4 * 3 * 120
    with pytest.raises(
        ValueError,
        match=r"closed loop Rising are not known before the run: give it an attribute `most_expensive`",
    ):
        estimate(schedules=["rules:unbounded", "pgd:steps=1,alpha=0.1"], **FEW)
    with pytest.raises(ValueError, match="max_steps is missing"):
        estimate(schedules=["rules:unbounded"], **FEW)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"schedule": "none", "controller": RULE}, "give schedule or controller, not both"),
        ({"controller": "pgd:steps=1,alpha=0.1"}, "controller must read 'package.module:factory'"),
        ({"controller": "rules:missing"}, "module 'rules' has no attribute 'missing'"),
        ({"controller": "no_such_module:rule"}, "cannot import module 'no_such_module'"),
        ({"controller": "rules:nothing"}, "'rules:nothing' makes no controller.*got None"),
    ],
)
def test_a_controller_that_is_none_is_refused_before_anything_is_trained(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainSettings(**given)
    if "schedule" not in given and not told.startswith("controller must"):
        with pytest.raises(ValueError, match=told):
            EvaluateSettings(schedules=[given["controller"]])


def test_both_flags_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--out", str(tmp_path / "run"), "--schedule", "none", "--controller", RULE])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not both" in error
    assert not (tmp_path / "run").exists()


def test_another_controller_does_not_go_on_with_a_run(looped: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(controller: 'rules:rising' there, None here"):
        controlat.train(looped, resume=True, schedule="none", **SMALL)
