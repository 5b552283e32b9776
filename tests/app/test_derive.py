"""The job `derive`: files, the command, the schedule in the trainer, and calibration to a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat._util.files import read_json, read_json_lines, write_json
from controlat.app.cli import main
from controlat.app.settings import DeriveSettings, settings_from

FEW: dict[str, Any] = {"train_points": 300, "test_points": 50, "progress": False, "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    controlat.train(out, epochs=12, schedule="amata:min=1,max=10,tau=0.3", seed=3, threads=1, progress=False)
    return out


@pytest.fixture(scope="module")
def amata(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, controlat.Derived]:
    out = tmp_path_factory.mktemp("derived") / "out"
    return out, controlat.derive(out=out, progress=False)


def test_the_files_are_there_and_hold_the_result(amata: tuple[Path, controlat.Derived]) -> None:
    out, found = amata
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert {"result.json", "schedule.json", "summary.md", "settings.json"} <= names
    assert {"landscape.png", "schedule.png", "network.png", "principle.png", "bound.png"} <= names
    assert "calibration.png" not in names
    assert read_json(out / "result.json") == json.loads(json.dumps(found.result))
    assert controlat.load_schedule(out / "schedule.json") == found.schedule
    assert found.verification is not None
    assert found.verification.holds


def test_again_it_gives_the_same_result_and_other_settings_are_refused(
    amata: tuple[Path, controlat.Derived],
) -> None:
    out, found = amata
    again = controlat.derive(out=out, progress=False)
    changing = ("seconds", "environment")
    for key in set(found.result) - set(changing):
        assert again.result[key] == found.result[key], key
    with pytest.raises(ValueError, match=r"other settings \(theta0: 1 there, 2 here\)"):
        controlat.derive(out=out, theta0=2, progress=False)


def test_the_schedule_runs_the_trainer(amata: tuple[Path, controlat.Derived], tmp_path: Path) -> None:
    out, found = amata
    controlat.train(tmp_path / "run", schedule=str(out / "schedule.json"), epochs=12, **FEW)
    used = [line["control"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")]
    assert used == [dict(found.schedule(epoch)) for epoch in range(12)]
    assert used[0]["steps"] == 1
    assert used[-1]["steps"] == 10


def test_another_length_of_training_is_noted(
    amata: tuple[Path, controlat.Derived], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controlat.train(tmp_path / "run", schedule=str(amata[0] / "schedule.json"), epochs=2, **FEW)
    assert "made for 12 epochs, training has 2: only its beginning is used" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is a directory; its schedule is .*schedule\.json"):
        controlat.train(tmp_path / "other", schedule=str(amata[0]), epochs=2, **FEW)


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="derive has no setting kmin; did you mean 'k_min'"):
        controlat.derive(kmin=2)


def test_what_a_run_decides_cannot_be_given_beside_it(run: Path) -> None:
    with pytest.raises(ValueError, match="tau is fitted to the run with calibrate: leave it out"):
        controlat.derive(calibrate=str(run), tau=3)


@pytest.mark.slow
def test_direct_transcription_is_an_option(amata: tuple[Path, controlat.Derived]) -> None:
    assert amata[1].result["verification"]["transcription"] is None
    assert "Direct transcription" not in str(amata[1])
    both = controlat.derive(transcription=True, progress=False)
    assert both.result["verification"]["transcription"]["better"] is False
    assert "Direct transcription, 40 intervals, 3 starts" in " ".join(str(both).split())


def test_the_set_follows_the_landscape() -> None:
    assert settings_from(DeriveSettings, {}, "derive").admissible == "product"
    cosh = settings_from(DeriveSettings, {"landscape": "theta^2/2 + 1 - cosh(x - theta)"}, "derive")
    assert cosh.admissible == "integer"


def test_for_another_network(amata: tuple[Path, controlat.Derived]) -> None:
    schedule = amata[1].for_network(epochs=30, k_min=2, k_max=7, tau=8 / 255)
    k = [schedule(epoch)["steps"] for epoch in range(30)]
    assert k[0] == 2
    assert k[-1] == 7
    assert k == sorted(k)
    assert schedule(29)["alpha"] == pytest.approx(8 / 255 / 7)


def test_the_command_prints_mathematics_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--landscape",
        "a*theta^2/2-(x-theta)^2",
        "--parameters.a",
        "2",
    ]
    arguments += [
        "--theta0",
        "1/2",
        "--checks",
        "false",
        "--x-range",
        "-5",
        "5",
        "--k-max",
        "8",
        "--progress",
        "false",
    ]
    assert main(["derive", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "K*" in printed
    assert "controlat train --out RUN --schedule" in printed
    result = read_json(tmp_path / "out" / "result.json")
    assert result["task"]["parameters"] == {"a": 2.0}
    assert result["task"]["x_range"] == [-5.0, 5.0]
    assert result["formulas"]["theta"]["text"] == "theta_0*exp(-a*t)"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--landscape", "__import__('os').system('ls')"], "at character"),
        (["--landscape", "theta.x"], "at character"),
        (["--landscape", "9^9^9^9*x"], "at character"),
        (["--landscape", "theta^2 + x^2"], "no inner maximum"),
        (["--landscape", "theta^2 + b*x - x^2"], "b"),
        (["--k-min", "5", "--k-max", "2"], "k_min <= k_max"),
        (["--tau-net", "0"], "tau_net must be > 0"),
        (["--measure", "speed"], "measure must be one of convergence, curvature"),
        (["--admissible", "everything"], "admissible"),
        (["--landscape", "1 - cosh(x - theta)", "--admissible", "product"], "not quadratic in x"),
        (["--admissible", "free", "--transcription", "true"], "transcription is for product only"),
        (["--calibrate", "nowhere"], "nowhere"),
        (["--theta-range", "1"], "theta_range must be two numbers"),
        (["--epochs", "0"], "epochs must be a whole number >= 1"),
        (["--resolution", "0"], "resolution must be >= 0.001, got 0"),
        (["--resolution", "20", "--epochs", "12"], "resolution must be at most the 12 epochs, got 20"),
        (["--since", "-5"], "since must be >= 0, got -5"),
        (["--parameters.a", "2"], "a = 2 was given, but the formula has no such name"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["derive", "--out", str(tmp_path / "out"), "--progress", "false", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.glob("out/*.json"))  # other settings may be tried in the same directory


@pytest.mark.slow
def test_calibration_fits_the_run_and_repeats_without_measuring_again(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = controlat.derive(out=out, calibrate=str(run), checks=False, progress=False)
    calibration = found.result["calibration"]
    assert calibration["measured"]["same"] is True
    assert found.fit is not None
    assert found.fit.times[-1] == 12
    assert len(found.fit.residuals) == len(found.fit.times)
    # K* is in steps of the network: at the end it is what was needed there, but for the residual.
    assert float(found.K(float(found.derivation.task.horizon))) == pytest.approx(
        found.fit.fitted[-1], rel=1e-3
    )
    assert found.schedule.epochs == 12
    assert found.schedule(0)["alpha"] * found.schedule(0)["steps"] == pytest.approx(0.3)
    assert (out / "calibration.png").exists()
    before = (run / "calibration.json").stat().st_mtime_ns
    again = controlat.derive(out=out, calibrate=str(run), checks=False, progress=False)
    assert (run / "calibration.json").stat().st_mtime_ns == before
    assert again.fit == found.fit
    # Another fit to the same measurement, and a run that has changed since is measured again.
    controlat.derive(out=tmp_path / "other", calibrate=str(run), since=1, checks=False, progress=False)
    assert (run / "calibration.json").stat().st_mtime_ns == before
    kept = read_json(run / "calibration.json")
    write_json(run / "calibration.json", kept | {"key": kept["key"] | {"steps": 10}})
    assert controlat.derive(calibrate=str(run), checks=False, progress=False).fit == found.fit
    assert read_json(run / "calibration.json")["key"] == kept["key"]


def test_calibration_to_curvature_gives_k_of_the_network_too(run: Path) -> None:
    found = controlat.derive(calibrate=str(run), measure="curvature", checks=False, progress=False)
    assert found.fit is not None
    k = float(found.K(float(found.derivation.task.horizon)))
    assert k == pytest.approx(0.3 * found.fit.fitted[-1], rel=1e-3)  # tau_net/alpha*


@pytest.mark.slow
def test_a_script_without_a_main_guard_derives(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("import controlat\nprint(controlat.derive(checks=False).derivation.formula('K'))\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2*tau*exp(2*t)/(theta_0**2", "+", "exp(2*t))"]
