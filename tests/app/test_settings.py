"""Settings: ranges, defaults that follow eps, paths, YAML files, streams, signals, and a fuzz of it all."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import talking
from helpers import GUARD, guarded
from torch import Tensor

import controlat
import controlat.app.train as job
from controlat._util.files import read_json
from controlat._util.parallel import PeerLost, _exchange, started
from controlat.app import cli
from controlat.app.parser import build_parser
from controlat.app.ranges import RANGES, Range, range_of
from controlat.app.settings import (
    AttackSettings,
    DeriveSettings,
    EvaluateSettings,
    TrainSettings,
    default_schedules,
)
from controlat.app.settings_file import parse_yaml, read_settings

KINDS: dict[str, type] = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "attack": AttackSettings,
    "derive": DeriveSettings,
}
SMALL: dict[str, Any] = {
    "epochs": 1,
    "train_points": 120,
    "test_points": 30,
    "threads": 1,
    "progress": False,
}


def _made(kind: type, **given: Any) -> Any:
    usual: dict[type, dict[str, Any]] = {AttackSettings: {"checkpoint": "x.pt"}}
    return kind(**usual.get(kind, {}) | given)


# ------------------------------------------------------------------------------------------------- ranges


def _numbers() -> Iterator[tuple[type, str]]:
    for kind in KINDS.values():
        for field in fields(kind):
            if re.search(r"\b(int|float)\b", str(field.type)):
                yield kind, field.name


@pytest.mark.parametrize(("kind", "name"), list(_numbers()))
def test_every_number_has_a_range_and_beyond_it_is_refused_by_its_name(kind: type, name: str) -> None:
    (field,) = (f for f in fields(kind) if f.name == name)
    allowed = range_of(field)
    assert allowed is not None, "add it to controlat.app.ranges"
    listed = "Sequence" in str(field.type)
    beyond = [allowed.high * 2 + 1, allowed.low - 1, "1e39", "nan", float("inf"), "text", True]
    for value in beyond + [allowed.low + 0.5] * allowed.whole:
        with pytest.raises(ValueError, match=rf"\b{name}\b|a learning rate"):
            _made(kind, **{name: [value, value] if listed else value})


@pytest.mark.parametrize(("command", "kind"), list(KINDS.items()))
def test_help_states_the_ranges(command: str, kind: type) -> None:
    text = build_parser()._subcommands_action._name_parser_map[command].format_help()
    shown = " ".join(text.split())
    for field in fields(kind):
        if (allowed := range_of(field)) is not None:
            assert str(allowed) in shown, field.name
    assert "default: null" not in shown
    assert not re.search(r"--\w+_", shown), "dashes, as in the README"


def test_a_range_says_what_it_has_at_its_ends() -> None:
    closed, opened = Range(0, 1), Range(0, 1, open_low=True, open_high=True)
    for value in (0, 1, "1/2"):
        closed.check("a", value)
    for value in (0, 1):
        with pytest.raises(ValueError, match=rf"^a must be [<>] {value}, got {value}$"):
            opened.check("a", value)
    with pytest.raises(ValueError, match=r"^a must be a whole number >= 0, got 1\.5$"):
        Range(0, 9, whole=True).check("a", 1.5)


# ---------------------------------------------------------------------- defaults that depend on the data


@pytest.mark.parametrize("eps", ["0.15", "8/255", 0.3, "1/100"])
def test_default_schedules_are_those_of_the_demo_in_units_of_eps(eps: str | float) -> None:
    chosen = EvaluateSettings(eps=eps)
    radius = chosen.ball.eps
    demo = EvaluateSettings()
    for text, usual in zip(default_schedules(eps), demo.schedules, strict=True):
        for t in range(12):
            mine, theirs = chosen.schedule_of(text)(t), demo.schedule_of(usual)(t)
            assert mine["steps"] == theirs["steps"]
            assert mine["alpha"] / radius == pytest.approx(theirs["alpha"] / 0.15, rel=1e-12)


def test_train_without_a_schedule_takes_steps_in_proportion_to_eps() -> None:
    assert TrainSettings().schedule == "amata:min=1,max=10,tau=0.3"
    other = TrainSettings(data="cifar10", eps="8/255")
    assert max(other.planned(t)["alpha"] for t in range(12)) == 16 / 255, "2 eps, once K is 1"


def test_a_radius_is_never_taken_over_to_another_norm_or_data_set() -> None:
    for given in ({"norm": "l2"}, {"data": "cifar10"}):
        with pytest.raises(ValueError, match="eps is missing"):
            TrainSettings(**given)
    with pytest.raises(ValueError, match=r"controlat\.data has no 'cifar11'; did you mean 'cifar10'"):
        TrainSettings(data="cifar11")


@pytest.mark.parametrize("call", [controlat.train, controlat.evaluate])
def test_a_misspelt_setting_of_a_call_is_answered_with_the_nearest(call: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no setting epoch; did you mean 'epochs'"):
        call(tmp_path / "out", epoch=1)


# --------------------------------------------------------------------------------------------------- YAML


BOMBS = {
    "anchors": "a: &a [x, x]\nb: [*a, *a]\n",
    "deep": "[" * 100_000,
    "long": "epochs: " + "9" * 5000,
    "binary": "eps: !!binary aGVsbG8=\n",
    "timestamp": "eps: !!timestamp 2001-01-01\n",
    "python": "eps: !!python/object/apply:os.system ['false']\n",
    "twice": "epochs: 3\nlr: 0.1\nepochs: 4\n",
    "twice within": "method_options: {a: 1, a: 2}\n",
    "documents": "epochs: 3\n---\nepochs: 4\n",
    "list as key": "? [a]\n: 3\n",
    "dashed twice": "train-points: 3\ntrain_points: 4\n",
    "unknown": "epochs: 1\nepohcs: 3\n",
    "type": "epochs: 1\nprogress: perhaps\n",
    "range": "epochs: 1\nthreads: 1000000000\n",
    "no YAML": "epochs: [3\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_with_more_than_plain_settings_is_refused_with_its_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(BOMBS[name])
    with guarded(), pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--out", str(tmp_path / "run"), "--config", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    where = "" if name == "range" else rf"{re.escape(str(path))}, line [123]: "
    assert re.match(f"controlat: error: {where}", line), line
    assert line.endswith("(see controlat train --help)")
    assert len(line) < 500
    assert not (tmp_path / "run").exists()


def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    (tmp_path / "latin").write_bytes("epochs: 3\nmodel: é\n".encode("latin-1"))
    told = {
        "pipe": "named pipe",
        "huge": "at most 1,048,576 are read",
        "latin": "line 2: not UTF-8",
        "missing": "no such file",
    }
    for name, reason in told.items():
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match="device"):
        read_settings("/dev/zero")


def test_words_and_numbers_are_read_as_they_stand() -> None:
    text = "a: 1e-3\nb: 8/255\nc: 1:30\nd: 0x10\ne: 2001-01-01\nf: null\ng: 'true'\nh: -.5\ni: on\n"
    assert parse_yaml(text) == {
        "a": 0.001,
        "b": "8/255",
        "c": "1:30",
        "d": "0x10",
        "e": "2001-01-01",
        "f": None,
        "g": "true",
        "h": -0.5,
        "i": "on",
    }


def test_keys_may_have_dashes_and_one_value_stands_for_a_list(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train-points: 120\nschedules: none\nseeds: [1, 2]\ndata-dir: ~/x\n")
    found = build_parser().parse_args(["evaluate", "--out", "o", "--config", str(tmp_path / "my.yaml")])
    chosen = found.evaluate
    assert (chosen.train_points, chosen.schedules, chosen.seeds) == (120, ["none"], [1, 2])


# --------------------------------------------------------------------------------------------------- paths


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    controlat.train("~/run", schedule="fgsm:alpha=0.1", data_dir="~/data", **SMALL)
    assert (home / "run" / "best.pt").is_file()
    schedule = "~/run/schedule.json"
    assert TrainSettings(schedule=schedule, epochs=1).planned.text == "fgsm:alpha=0.1"
    (home / "my.yaml").write_text("epochs: 1\n")
    assert read_settings("~/my.yaml")[0] == {"epochs": 1}
    chosen = EvaluateSettings(run="~/run", surrogate="~/run/last.pt")
    assert chosen.surrogate == str(home / "run" / "last.pt")
    assert chosen.data_dir == str(home / "data"), "the run's own"
    assert DeriveSettings(calibrate="~/run").calibrate == str(home / "run")
    found = controlat.attack("~/run", attacks=["fgsm"], checks=0, points=20, out="~/a.json", progress=False)
    assert found["checkpoint"] == "best.pt"
    assert read_json(home / "a.json")["points"] == 20
    (home / "run" / "best.pt").unlink()
    assert AttackSettings("~/run").checkpoint == str(home / "run" / "last.pt")
    with pytest.raises(ValueError, match=r"eps is missing: 0\.15 is the radius of training in linf"):
        controlat.attack("~/run", norm="l2")
    with pytest.raises(ValueError, match="no such checkpoint; the directory has neither"):
        AttackSettings("~")
    with pytest.raises(ValueError, match="no home folder of that name"):
        controlat.train("~nobody-of-that-name/run", **SMALL)
    assert not (tmp_path / "~").exists()


# ------------------------------------------------------------------------- streams, signals, other processes


def _child(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("environment", {})
    command = [sys.executable, "-c", code, *words]
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, env=variables, text=True, timeout=GUARD, **usual | options)


MAIN = "import sys; from controlat.app.cli import main; sys.exit(main())"


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8_gets_replacements(tmp_path: Path) -> None:
    words = ["train", "--out", str(tmp_path / "é"), "--epochs", "1", "--train-points", "120"]
    done = _child(MAIN, *words, environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "?/best.pt" in done.stdout


@pytest.mark.slow
def test_closed_streams_are_no_error() -> None:
    close = "import os; os.close({0})\nos.execv(sys.executable, [sys.executable, '-c', {1!r}, *sys.argv[1:]])"
    for number, code in ((1, 0), (2, 2)):
        words = ["models"] if number == 1 else ["models", "--nosuch"]
        done = _child("import sys\n" + close.format(number, MAIN), *words)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_an_interruption_during_imports_is_one_line() -> None:
    early = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = _child(early + MAIN, "train", "--out", "run")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "controlat: interrupted; the same command with --resume goes on\n"


def terminated(*words: str) -> int:
    job.train = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]
    return cli.main(list(words))


def test_sigterm_ends_as_an_interruption_does(tmp_path: Path) -> None:
    done = talking(terminated, "train", "--out", str(tmp_path / "run"), cwd=tmp_path)()
    assert done.code == 128 + signal.SIGTERM
    assert done.error == "controlat: interrupted; the same command with --resume goes on\n"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_what_torchrun_sets_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for value in ("x", "-1", "", "1e9", "99999999999"):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            started()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "2")
    if name != "WORLD_SIZE":
        with pytest.raises(ValueError, match=f"{name} must be below WORLD_SIZE = 2, got 2"):
            started()


def test_a_lost_process_is_one_sentence_with_the_cure() -> None:
    def lost(t: Tensor) -> None:
        raise dist.DistBackendError("[pair.cc:538] Connection closed by peer [::1]:7. This is\nlong")

    with pytest.raises(PeerLost, match=r"ended \(Connection closed by peer \[::1\]:7\);.*--resume") as caught:
        _exchange(lost, torch.zeros(1))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- fuzz

EXTREMES = (
    "1e39",
    "1e-308",
    "-1",
    "nan",
    "inf",
    "1e9",
    "0",
    "0.5",
    "",
    "text",
    "1e308",
    "9" * 400,
    "-0",
    "[]",
)


def command_line(draw: random.Random) -> list[str]:
    """A small command with extreme values for one or two of its flags."""
    command = draw.choice(list(KINDS))
    words = [command]
    small = {"epochs": "1", "train-points": "120", "test-points": "30", "attacks": "fgsm", "checks": "0"}
    small |= {"full": "false", "max-steps": "2", "threads": "1", "progress": "false"}
    if command == "attack":
        words.append("no.pt")
    if command in ("train", "evaluate", "derive"):
        words += ["--out", "out"]
    names = [f.name for f in fields(KINDS[command]) if f.name != "checkpoint"]
    small |= {"schedules": "none", "seeds": "0"} | ({"checks": "false"} if command == "derive" else {})
    for name, value in small.items():
        if name.replace("-", "_") in names:
            words += [f"--{name}", value]
    for name in draw.sample([n for n in names if n in RANGES], draw.choice((1, 1, 2))):
        value = draw.choice(EXTREMES)
        both = [value] * (2 if name.endswith("_range") else 1)
        words += [f"--{name}={value}"] if value[:1] == "-" and len(both) == 1 else [f"--{name}", *both]
    return words


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """How a command ends, after looking at what it says."""
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code in (0, 1, 2), words
    assert "Traceback" not in error, words
    if code == 2:
        assert error.splitlines()[-1].startswith("controlat: error: "), words
    return code


@pytest.mark.parametrize("seed", range(60))
def test_extreme_numbers_end_in_a_sentence_or_in_work_that_is_done(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome(command_line(random.Random(seed)), capsys)
