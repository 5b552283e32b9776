"""The command line as a user meets it: words, files, exit codes, one line for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from forks import talking
from helpers import GUARD, shorten_autoattack, slow

import controlat
from controlat._util.files import read_json, read_json_lines
from controlat.app import cli
from controlat.app.settings import AttackSettings, EvaluateSettings, TrainSettings

TINY = ["--train_points", "200", "--test_points", "80", "--threads", "1", "--progress", "false"]
TRAIN = [*TINY, "--epochs", "2", "--schedule", "pgd:steps=2,alpha=0.1"]
EVALUATE = [
    *TINY,
    "--epochs",
    "1",
    "--schedules",
    "none",
    "fgsm:alpha=0.15",
    "--seeds",
    "0",
    "--attacks",
    "fgsm",
    "--checks",
    "0",
]


def _run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


def _refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The only line that a refused command prints."""
    with pytest.raises(SystemExit) as stopped:
        _run(*words)
    output, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert output == ""
    assert error.count("\n") == 1, error
    assert error.startswith("controlat: error: ")
    return error


def _child(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "controlat", *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=GUARD)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `controlat train`."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert _run("train", "--out", out, *TRAIN) == 0
    return out


# ----------------------------------------------------------------------------------------------- bad usage

BAD_ANYWHERE: list[tuple[list[str], str]] = [
    (["--nosuch", "3"], "unrecognized arguments"),
    (["--eps", "abc"], "eps must be a number such as 0.3, 1e-3 or 8/255, got 'abc'"),
    (["--eps", "-1"], "eps must be >= 0, got -1"),
    (["--eps", "8/0"], "eps must be a number"),
    (["--eps", "nan"], "eps must be"),
    (["--eps"], "expected one argument"),
    (["--norm", "l1"], "norm must be one of linf, l2, got 'l1'"),
    (["--lr", "0"], "a learning rate is a number > 0"),
    (["--lr", "fast"], "a learning rate is a number > 0"),
    (["--lr", "multistep:lr=0.1"], "lacks at"),
    (["--momentum", "1"], "momentum must be < 1, got 1.0"),
    (["--nesterov", "true", "--momentum", "0"], "nesterov needs momentum > 0"),
    (["--weight_decay", "-1"], "weight_decay must be >= 0"),
    (["--method", "trades9"], "has no 'trades9'; did you mean 'trades'? choose from: atta, awp"),
    (["--method", "nosuch:Cls"], "cannot import module 'nosuch'"),
    (["--method_options", "{foo: 1}"], "foo"),
    (["--method_options", "abc"], "--method-options"),
    (["--method_options", "{attack_mode: sleep}"], "attack_mode must be one of eval, train"),
    (["--device", "nope"], "device 'nope' cannot be used"),
    (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["--device", "meta"], "device 'meta' cannot be used"),
    (["--data", "nosuch", "--eps", "0.1"], "controlat.data has no 'nosuch'"),
    (["--data", "mnist"], "eps is missing: give the radius for mnist"),
    (["--data", "mnist", "--eps", "0.3", "--data_dir", "nowhere"], "mnist: no file"),
    (["--model", "nosuch"], "controlat.models has no 'nosuch'"),
    (["--model", "lenet"], "lenet cannot take images of 8 x 8 pixels"),
    (["--model", "nosuch:net"], "cannot import module 'nosuch'"),
    (["--model", "os:path"], "must be a function or class to call"),
    (["--epochs", "0"], "epochs must be a whole number >= 1, got 0"),
    (["--epochs", "1.5"], "epochs"),
    (["--batch_size", "-3"], "batch_size must be a whole number >= 1, got -3"),
    (["--threads", "0"], "threads must be a whole number >= 1"),
    (["--bf16", "3"], "bf16"),
    (["--train_points", "99999"], "asked for 99999 samples; give 1..1297"),
    (["--test_points", "501"], "asked for 501 samples; give 1..500"),
    (["--held_out", "200"], "held_out must be below the 200 training samples, got 200"),
    (["--held_out", "0"], "held_out must be a whole number >= 1"),
    (["--train_points", "1"], "held_out must be below the 1 training samples"),
    (["--config", "missing.yaml"], "missing.yaml"),
    (["--config", "broken.yaml"], "broken.yaml, line 2: not valid YAML (did not find expected"),
    (
        ["--config", "unknown.yaml"],
        "unknown.yaml, line 1: there is no setting 'epochz'; did you mean 'epochs'?",
    ),
    (["--config", "list.yaml"], "list.yaml: holds a list; it must hold settings"),
    (["--config", "wrong.yaml"], "wrong.yaml, line 1: --epochs must be a whole number from 1"),
]
BAD_TRAIN: list[tuple[list[str], str]] = [
    (["--schedule", "foo"], "unknown schedule 'foo'"),
    (["--schedule", ""], "unknown schedule ''"),
    (["--schedule", "pgd:steps=3"], "lacks alpha"),
    (["--schedule", "pgd:steps=3,alpha=-1"], "alpha must be >= 0"),
    (["--schedule", "pgd:steps=2.5,alpha=0.1"], "steps without rounding=dither must be a whole number"),
    (["--schedule", "nowhere.json"], "nowhere.json: no such file"),
    (["--schedule", "broken.json"], "not valid JSON"),
    (["--schedule", "version.json"], "schedule version 9"),
    (["--seed", "x"], "seed"),
    (["--seeds", "0", "1"], "unrecognized arguments"),
    (["--checkpoint_minutes", "0"], "checkpoint_minutes must be > 0"),
]
BAD_EVALUATE: list[tuple[list[str], str]] = [
    (["--schedules", "none", "none"], "schedules must be one or more different ones"),
    (["--schedules"], "expected at least one argument"),
    (["--schedules", "none", "foo"], "unknown schedule 'foo'"),
    (["--seeds", "0", "0"], "seeds must be one or more different ones, got [0, 0]"),
    (["--seeds", "a"], "seeds"),
    (["--attacks", "foo"], "unknown attack 'foo'"),
    (["--attacks", "fgsm", "fgsm"], "attacks must be one or more different ones"),
    (["--checks", "-1"], "checks must be a whole number >= 0, got -1"),
    (["--autoattack", "-5"], "autoattack must be a whole number >= 0, got -5"),
    (["--surrogate", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--gamma", "-1"], "gamma must be >= 0, got -1"),
    (["--gamma", "cheap"], "gamma must be a number"),
    (["--maximiser", "grid"], "maximiser must be one of sweep, tpe, got 'grid'"),
    (["--trials", "0"], "trials must be a whole number >= 1, got 0"),
    (["--terminal", "robust"], "unknown terminal cost 'robust'; choose from: adversarial, clean, margin, or"),
    (["--terminal", "clean*0.1"], "terminal 'clean*0.1' cannot be read from '*0.1' on"),
    (["--terminal", "adversarial+2*nosuch:phi"], "cannot import module 'nosuch'"),
    (["--terminal", "math:pi"], "terminal 'math:pi' is a float; it must be a function or class to call"),
    (["--probe", "1"], "probe must be a whole number >= 2, got 1"),
    (["--alphas", "0"], "must be > 0"),
    (["--alphas", "x"], "alphas must be a number"),
    (["--eps", "0"], "need eps > 0, got 0; give alphas"),
    (["--resume"], "unrecognized arguments"),
]
BAD_ATTACK: list[tuple[list[str], str]] = [
    ([], "checkpoint"),
    (["nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["."], "no such checkpoint"),
    (["broken.json"], "broken.json is damaged or not a checkpoint"),
    (["RUN", "--eps", "x"], "eps must be a number"),
    (["RUN", "--eps", "-1"], "eps must be >= 0"),
    (["RUN", "--norm", "l7"], "norm must be one of"),
    (["RUN", "--attacks", "foo"], "unknown attack 'foo'"),
    (["RUN", "--attacks", "fgsm", "fgsm"], "given twice"),
    (["RUN", "--points", "0"], "points must be a whole number >= 1, got 0"),
    (["RUN", "--points", "501"], "asked for 501 samples; give 1..500"),
    (["RUN", "--batch_size", "0"], "batch_size must be a whole number >= 1, got 0"),
    (["RUN", "--checks", "-1"], "checks must be a whole number >= 0, got -1"),
    (["RUN", "--autoattack", "1.5"], "autoattack"),
    (["RUN", "--surrogate", "broken.json"], "broken.json is damaged or not a checkpoint"),
    (["RUN", "--surrogate", "RUN"], "the surrogate has the weights of the network itself"),
    (["RUN", "--out", "new.png", "--sweeps", "true"], "give a name that ends in .json"),
    (["RUN", "--device", "nope"], "device 'nope' cannot be used"),
    (["RUN", "--out", "broken.json"], "broken.json exists; give another name"),
    (["RUN", "another"], "unrecognized arguments"),
]
BAD_WORDS: list[tuple[list[str], str]] = [
    ([], "command"),
    (["nosuch"], "there is no command 'nosuch'; choose from 'evaluate'"),
    (["--nosuch"], "unrecognized arguments: --nosuch"),
    (["train"], "out"),
    (["evaluate"], "out"),
    (["train", "--out"], "expected one argument"),
    (["train", "--out", "broken.json"], "broken.json is a file; give the name of a directory"),
    (["train", "--out", "broken.json/run"], "Not a directory"),
    (["train", "--out", "."], "holds other files and no settings.json"),
    (["evaluate", "--out", "/proc/nowhere", *EVALUATE], "No such file"),
]

FILES = {
    "broken.yaml": "epochs: [3\n",
    "unknown.yaml": "epochz: 3\n",
    "list.yaml": "- a\n- b\n",
    "wrong.yaml": "epochs: three\n",
    "broken.json": '{"format": 1',
    "version.json": '{"format": "controlat schedule", "version": 9}',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with files that cannot be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONTROLAT_DATA", raising=False)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def _cases(command: str, usual: list[str], *tables: list[tuple[list[str], str]]) -> list[Any]:
    """Every third runs always, the others with all tests."""
    return [
        (slow if i % 3 else pytest.param)(
            [command, "--out", "run", *usual, *words], reason, id=" ".join([command, *words])
        )
        for table in tables
        for i, (words, reason) in enumerate(table)
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        *_cases("train", TRAIN, BAD_ANYWHERE, BAD_TRAIN),
        *_cases("evaluate", EVALUATE, BAD_ANYWHERE[:14:5], BAD_ANYWHERE[17:24:2], BAD_EVALUATE),
        *(pytest.param(words, reason, id=" ".join(words) or "nothing") for words, reason in BAD_WORDS),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert reason in _refused(capsys, *words)
    assert {p.name for p in folder.iterdir()} <= {*FILES, "run"}
    assert {p.name for p in folder.glob("run/*")} <= {".lock"}, "the directory is free for another try"


@pytest.mark.parametrize(("words", "reason"), BAD_ATTACK)
def test_bad_usage_of_attack_is_one_line_and_code_2(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    words = [str(run / "best.pt") if word == "RUN" else word for word in words]
    assert reason in _refused(capsys, "attack", *words)
    assert {p.name for p in folder.iterdir()} == set(FILES)
    assert (folder / "broken.json").read_text() == FILES["broken.json"]


def test_a_process_refuses_bad_usage_in_one_line_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--out", "run", "--eps", "8 / 255 pixels"]
    done = talking(cli.main, words, cwd=tmp_path)()
    assert (done.code, done.output, done.error.count("\n")) == (2, "", 1)
    assert "Traceback" not in done.error
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLAT_DEBUG", "1")  # asks for the error itself, and Python for its traceback
    with pytest.raises(ValueError, match="eps must be a number"):
        _run(*words)


def test_a_missing_data_folder_can_be_mended_without_another_directory(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mnist = ["train", "--out", "run", "--data", "mnist", "--model", "lenet", "--eps", "0.3"]
    for _ in range(2):
        assert "mnist: no file" in _refused(capsys, *mnist, "--data_dir", "nowhere")
    assert _run("train", "--out", "run", *TRAIN) == 0


# ------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize(
    ("command", "settings", "more"),
    [
        ("evaluate", EvaluateSettings, ["--out", "--dry-run", "--config"]),
        ("train", TrainSettings, ["--out", "--resume", "--config"]),
        ("attack", AttackSettings, ["--out", "--config"]),
    ],
)
def test_help_names_and_explains_every_setting(
    capsys: pytest.CaptureFixture[str], command: str, settings: type, more: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run(command, "--help")
    assert stopped.value.code == 0
    output, error = capsys.readouterr()
    assert error == ""
    plain = " ".join(output.split())
    for field in fields(settings):  # type: ignore[arg-type]
        flag = field.name if field.name == "checkpoint" else f"--{field.name.replace('_', '-')}"
        assert re.search(rf"(?<![\w-]){flag}(?![\w])", output), flag
        (words,) = _explained(settings, field.name)
        assert words in plain, f"{flag} is not explained"
    for flag in more:
        assert flag in output


def _explained(settings: type, name: str) -> list[str]:
    """The first words of a setting's explanation, from the docstrings of its class and bases."""
    texts = [base.__doc__ or "" for base in settings.__mro__]
    pattern = rf"^ +{name}: (\S+ \S+)"
    return [found for text in texts for found in re.findall(pattern, text, re.MULTILINE)][:1] or [name]


def test_help_of_the_program_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run("--help")
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("evaluate", "train", "attack", "--version"))


def test_python_m_controlat_says_its_version(tmp_path: Path) -> None:
    done = _child(tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"controlat {controlat.__version__}"


# -------------------------------------------------------------------------------------------------- train


def test_train_prints_one_row_per_epoch_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("train", "--out", tmp_path / "run", *TRAIN) == 0
    output, error = capsys.readouterr()
    assert error == ""
    rows = [line for line in output.splitlines() if re.match(r"\| \d", line)]
    log = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert len(rows) == len(log) == 2
    for row, line in zip(rows, log, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:4] == [str(line["epoch"]), "2", "0.1", f"{line['loss']:.4f}"]
        assert cells[4:6] == [f"{100 * line['clean']:.1f}", f"{100 * line['robust']:.1f}"]
    assert f"controlat attack {tmp_path / 'run' / 'best.pt'}" in output
    assert "(finished before)" not in output


def test_train_again_reprints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir() if p.name != ".lock"}
    for words in ([], ["--resume"]):
        assert _run("train", "--out", run, *TRAIN, *words) == 0
        assert "(finished before)" in capsys.readouterr().out
    assert before == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir() if p.name != ".lock"
    }


def test_train_refuses_other_settings_in_a_used_directory(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _refused(capsys, "train", "--out", run, *TRAIN, "--lr", "0.3", "--resume")
    assert "made with other settings (lr: 'onecycle:lr=0.2' there, 0.3 here)" in error


def test_train_goes_on_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverging = [*TRAIN, "--lr", "multistep:lr=0.05,at=1,factor=1e9"]
    assert _run("train", "--out", tmp_path / "run", *diverging) == 1
    capsys.readouterr()
    error = _refused(capsys, "train", "--out", tmp_path / "run", *diverging)
    assert "holds an unfinished run of these settings; go on with --resume" in error
    assert _run("train", "--out", tmp_path / "run", *diverging, "--resume") == 1
    assert "epoch 1, batch" in capsys.readouterr().err


INTERRUPTING = """
import os, signal
from torch import nn
from controlat.models import build

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background

class Net(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.passes = net, 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 5 and os.environ.get("INTERRUPT"):
            os.kill(os.getpid(), signal.SIGINT)
        return self.net(x)

def net(in_shape, num_classes):
    return Net(build("mlp", in_shape, num_classes))
"""


def test_control_c_is_one_line_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    words = ["train", "--out", "run", *TRAIN, "--model", "interrupting:net"]
    done = talking(cli.main, words, cwd=tmp_path, INTERRUPT="1")()
    assert done.code == 128 + signal.SIGINT
    assert done.error == "controlat: interrupted; the same command with --resume goes on\n"
    monkeypatch.chdir(tmp_path)
    assert "--resume" in _refused(capsys, *words)
    assert _run(*words, "--resume") == 0
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == 2


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-m", "controlat", "methods"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as child:  # type: ignore[call-overload]
        child.stdout.close()
        error = child.stderr.read()
    assert (child.returncode, error) == (0, b"")


# ------------------------------------------------------------------------------------- settings, flags, files


def test_dashes_and_underscores_are_the_same_flags(tmp_path: Path) -> None:
    for name, words in (("a", TRAIN), ("b", [re.sub(r"(?<=\w)_", "-", word) for word in TRAIN])):
        assert _run("train", "--out", tmp_path / name, *words) == 0
    one, other = (read_json(tmp_path / name / "settings.json") for name in "ab")
    assert one == other
    assert one["train_points"] == 200


@pytest.mark.parametrize("flag", ["--data-dir", "--data_dir", "--data-dir=", "--data_dir="])
def test_the_data_folder_is_given_with_a_dash_or_an_underscore(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    given = [flag + "my-empty_folder"] if flag.endswith("=") else [flag, "my-empty_folder"]
    error = _refused(capsys, "train", "--out", "run", "--data", "mnist", "--eps", "0.3", *given)
    assert "my-empty_folder" in error, "the value keeps its dashes and underscores"


def test_flags_override_the_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "epochs: 3\nlr: 0.1\neps: 8/255\nschedule: fgsm:alpha=0.1\ntrain_points: 200\n"
        "threads: 1\nprogress: false\nmethod_options:\n  random_start: false\n"
    )
    config = ["--config", str(tmp_path / "my.yaml")]
    assert _run("train", "--out", tmp_path / "run", *config, "--epochs", "1", "--momentum", "0.5") == 0
    found = read_json(tmp_path / "run" / "settings.json")
    wanted = {"epochs": 1, "lr": 0.1, "eps": "8/255", "momentum": 0.5, "train_points": 200}
    assert {name: found[name] for name in wanted} == wanted
    assert found["method_options"] == {"random_start": False}
    assert found["schedule"]["text"] == "fgsm:alpha=0.1"


def test_a_file_of_settings_holds_lists_for_evaluate(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "schedules: [none, 'fgsm:alpha=0.15']\nseeds: [3, 4]\nattacks: [fgsm]\nalphas: [0.1, 2/10]\n"
        "checks: 0\nepochs: 1\ntrain_points: 200\ntest_points: 80\nthreads: 1\nprogress: false\n"
    )
    words = ["evaluate", "--config", tmp_path / "my.yaml", "--seeds", "5"]
    assert _run(*words, "--out", tmp_path / "out") == 0
    found = read_json(tmp_path / "out" / "result.json")
    assert found["settings"]["seeds"] == [5]
    assert found["grid"]["alphas"] == [0.1, 0.2]
    assert [s["text"] for s in found["schedules"]] == ["none", "fgsm:alpha=0.15"]


# ------------------------------------------------------------------------------------------ evaluate, attack


def test_evaluate_prints_the_table_of_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("evaluate", "--out", tmp_path / "out", *EVALUATE) == 0
    output, _ = capsys.readouterr()
    summary = (tmp_path / "out" / "summary.md").read_text().splitlines()
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert table == [line for line in summary if line.startswith("|")][:4]
    for name in ("result.json", "summary.md", "schedules.png", "criterion.png", "tradeoff.png"):
        assert name in output
        assert (tmp_path / "out" / name).is_file()
    assert _run("evaluate", "--out", tmp_path / "out", *EVALUATE) == 0
    assert capsys.readouterr().out == output


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for flag in ("--dry-run", "--dry_run"):
        assert _run("evaluate", "--out", "out", *EVALUATE, flag) == 0
        output, error = capsys.readouterr()
        assert error == ""
        assert re.search(r"training +540 gradient evaluations", output), "180 (1 + 2)"
        assert "nothing was written" in output
    assert not list(tmp_path.iterdir())


def test_attack_prints_the_accuracies_that_it_stores(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--points", "60", "--attacks", "fgsm", "pgd-3-2", "--checks", "0", "--progress", "false"]
    assert _run("attack", run / "best.pt", *few, "--eps", "2/255", "--out", tmp_path / "found.json") == 0
    output, error = capsys.readouterr()
    assert error == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["eps"] == 2 / 255
    assert found["points"] == found["clean"]["points"] == 60
    named = {"clean": found["clean"], "robust": found["robust"]}
    named |= {f"after {name}": accuracy for name, accuracy in found["after"].items()}
    assert set(named) == {"clean", "after fgsm", "after pgd-3-2", "robust"}
    for name, accuracy in named.items():
        assert re.search(rf"\| {name} +\| +60 \| +{accuracy['value']:.1%} \|", output)
    assert "60 points, linf eps 0.007843" in output


def test_attack_uses_the_radius_of_training_unless_told_otherwise(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--points", "60", "--attacks", "fgsm", "--checks", "0", "--progress", "false"]
    assert _run("attack", run / "best.pt", *few) == 0
    assert "linf eps 0.15" in capsys.readouterr().out
    assert _run("attack", run / "last.pt", *few, "--eps", "1", "--norm", "l2") == 0
    output = capsys.readouterr().out
    assert "l2 eps 1," in output
    assert "after 2 epochs of pgd:steps=2,alpha=0.1" in output


def _starts(patch: pytest.MonkeyPatch) -> None:
    """AutoAttack takes few steps, and says on stderr when it starts."""
    import pyautoattack

    shorten_autoattack(patch)
    short = pyautoattack.AutoAttack

    class Telling(short):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            print("it starts", file=sys.stderr)
            super().__init__(*args, **options)

    patch.setattr(pyautoattack, "AutoAttack", Telling)


LONGER = ["--train_points", "600", "--epochs", "6"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of two networks trained independently."""
    folder = tmp_path_factory.mktemp("two")
    for seed in "01":
        words = ["--schedule", "fgsm:alpha=0.1", "--seed", seed]
        assert _run("train", "--out", folder / seed, *TINY, *LONGER, *words) == 0
    return [folder / seed / "last.pt" for seed in "01"]


MORE = ["--sweeps", "true", "--autoattack", "4", "--checks", "20", "--threads", "1", "--progress", "false"]


def test_attack_prints_a_row_for_everything_that_it_stores(
    two: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _starts(monkeypatch)
    out = tmp_path / "F.json"
    model, other = two
    few = ["--points", "40", "--attacks", "fgsm", "--eps", "0.02", "--surrogate", other, "--out", out]
    assert _run("attack", model, *few, *MORE) == 0
    output, error = capsys.readouterr()
    first, *later = error.splitlines()
    assert re.fullmatch(
        r"AutoAttack on 4 points: at most \S+( k)? gradient evaluations and \S+( k)? forward passes, about "
        r"\d+ seconds on this machine",
        first,
    )
    assert set(later) == {"it starts"}, "what it costs is said before it starts, and nothing else"
    found = read_json(out)
    stored = {"clean": found["clean"], "robust": found["robust"], "after fgsm": found["after"]["fgsm"]}
    stored["transfer, fgsm"] = found["transfer"]["after"]["fgsm"]
    stored |= {f"AutoAttack, after {name}": a for name, a in found["autoattack"]["after"].items()}
    stored |= {f"pgd-20, eps {a['eps']:.4g}": a for a in found["curves"]["eps"]}
    stored |= {f"pgd, {a['steps']} steps": a for a in found["curves"]["steps"]}
    assert len(stored) == 3 + 1 + 4 + 8 + 7
    rows = [line for line in output.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(stored)
    for name, a in stored.items():
        assert re.search(rf"\| {re.escape(name)} +\| +{a['points']} \| +{a['value']:.1%} \|", output), name
    for title in ("Checks for gradient masking", "Transfer", "Sweeps"):
        assert title in output
    assert f"Written to {out} and {tmp_path / 'F.png'}" in output
    warned = [line for line in output.splitlines() if line.startswith("WARNING: ")]
    assert warned == [f"WARNING: {text}." for text in found["warnings"]]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"F.json", "F.png"}
    assert "F.json exists" in _refused(capsys, "attack", model, *few, *MORE)
    out.unlink()
    assert "F.png exists" in _refused(capsys, "attack", model, *few, *MORE)
    assert {p.name for p in tmp_path.iterdir()} == {"F.png"}


def test_attack_prints_its_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stepped.py").write_text(
        "from torch import nn\nfrom controlat.models import build\n\nclass Net(nn.Module):\n"
        "    def __init__(self, net):\n        super().__init__()\n        self.net = net\n"
        "    def forward(self, x):\n        return self.net((x * 4).round() / 4)\n\n"
        "def net(in_shape, num_classes):\n    return Net(build('mlp', in_shape, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert _run("train", "--out", "run", *TRAIN, "--model", "stepped:net", "--epochs", "4") == 0
    capsys.readouterr()
    few = ["--points", "60", "--attacks", "fgsm", "--progress", "false"]
    assert _run("attack", "run/last.pt", *few) == 0
    output, error = capsys.readouterr()
    assert error == ""
    warned = [line for line in output.splitlines() if line.startswith("WARNING: ")]
    assert "have an input gradient of exactly zero" in warned[0]
    assert "nothing found" not in output


@pytest.mark.slow
def test_evaluate_shows_everything_that_was_asked_for(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _starts(monkeypatch)
    other = two[0]
    words = ["evaluate", "--out", tmp_path / "out", *EVALUATE, *LONGER, *MORE, "--surrogate", other]
    assert _run(*words) == 0
    output, error = capsys.readouterr()
    assert error.index("AutoAttack on 4 points: at most") < error.index("it starts")
    heads = [head.strip() for head in output.splitlines()[0].split("|")]
    assert heads[2:5] == ["J", "C full", "D"]
    assert heads[7:11] == ["clean %", "robust %", "AutoAttack %", "transfer %"]
    assert "sweeps.png" in output
    assert (tmp_path / "out" / "sweeps.png").is_file()
    assert "AutoAttack (standard version, Croce and Hein 2020): on 4 of the test points." in output
    assert f"made on the surrogate {other}." in output
    assert "gradient masking" in output or "WARNING, " in output
    assert _run(*words, "--dry_run") == 0
    (shown,) = re.findall(r"evaluation +(\S+) k gradient evaluations", capsys.readouterr().out)
    runs = [
        run
        for schedule in read_json(tmp_path / "out" / "result.json")["schedules"]
        for run in schedule["runs"]
    ]
    parts = [run["evaluation"] | {"own": run["evaluation"]} for run in runs]
    names = ("own", "masking", "transfer", "curves", "autoattack")
    spent = sum(part[name]["gradients"] + part[name]["forwards"] / 3 for part in parts for name in names)
    assert spent <= 1000 * float(shown)
