"""What README says is run, and its figures are those of the result file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import controlat
from controlat import methods, report
from controlat._util.files import read_json
from controlat._util.pool import InProcess
from controlat.data import load
from controlat.pmp import controllers, terminal

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_loop_of_the_readme_runs_on_the_users_model_and_loader(
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = README.partition("## Your own model and loop")[2].partition("\n## ")[0]
    _, block = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    data = load("digits")
    x, y = data.train.take(torch.arange(256))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(x[:128], y[:128]), (x[128:], y[128:])],
        "epochs": 3,
        "eps": 0.1,
        "x_probe": x,
        "y_probe": y,
        "x_test": x,
        "y_test": y,
    }
    exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert "C = " in printed[0]
    assert "%" in printed[-1]


def test_the_users_model_and_tensors_are_searched_for_and_trained_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README.partition("## Your own model and loop")[2].partition("\n## ")[0]
    block, _ = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("controlat.app.search.workers_of", lambda _: InProcess())
    x, y = load("digits").train.take(torch.arange(120))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    few: dict[str, Any] = {"epochs": 2, "progress": False}
    less = {"spaces": ["constant"], "budget": "1trainings", "max_steps": 1, "judge_seeds": [0]}
    less |= {"against": ["none"], "attacks": ["fgsm"], "jobs": 1}
    names: dict[str, Any] = {"model": model, "x": x[20:], "y": y[20:], "x_test": x[:20], "y_test": y[:20]}
    names["less"] = iter([few | less, few])  # of the search, of the training
    exec(block.replace("eps=8 / 255", "eps=8 / 255, **next(less)"), names)
    assert controlat.load_schedule("found/schedule.json").text == names["found"]
    model.load_state_dict(torch.load("run/best.pt")["model"])


def test_every_schedule_text_of_the_readme_parses() -> None:
    section = README.partition("## Schedules")[2].partition("\n## ")[0]
    texts = [t for t in re.findall(r"^\| `([^`]+)`", section, flags=re.M) if not t.endswith(".json")]
    assert len(texts) >= 8
    for text in texts:
        controlat.parse_schedule(text, epochs=20)


def test_the_table_of_the_readme_is_that_of_the_result_file() -> None:
    shown = README.partition("<!-- demo table -->\n")[2].partition("\n<!-- end of demo table -->")[0]
    result = read_json(ROOT / "analysis" / "demo" / "result.json")
    assert shown == report.table(*report.rows(result))


def test_the_table_of_the_search_is_that_of_its_result_file() -> None:
    shown = README.partition("<!-- search table -->\n")[2].partition("\n<!-- end of search table -->")[0]
    assert shown == report.search_table(read_json(ROOT / "analysis" / "search_digits" / "result.json"))


def test_the_mathematics_of_the_readme_is_what_derive_prints() -> None:
    shown = README.partition("<!-- derived -->\n```\n")[2].partition("\n```\n<!-- end of derived -->")[0]
    assert len(shown.splitlines()) > 10
    assert shown in str(controlat.derive(checks=False, progress=False))


def test_commands_of_the_readme_are_accepted(tmp_path: Path) -> None:
    from controlat.app.cli import _underscored
    from controlat.app.parser import build_parser

    blocks = re.findall(r"```\n(controlat .*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) >= 3
    for line in lines:
        build_parser().parse_args([_underscored(a) for a in shlex.split(line)[1:]])


def test_the_stored_surfaces_give_c_for_another_gamma_as_the_mathematics_says(tmp_path: Path) -> None:
    text = (ROOT / "analysis" / "mathematics.md").read_text()
    code = "\n".join(
        line[4:] for line in re.findall(r"^    (?:import|from|line|surface|gap) .*$", text, flags=re.M)
    )
    demo = [entry["text"] for entry in read_json(ROOT / "analysis" / "demo" / "result.json")["schedules"]]
    controlat.evaluate(  # up to the schedule whose directory the text names
        tmp_path / "out",
        epochs=1,
        train_points=200,
        test_points=50,
        schedules=demo[:4],
        seeds=[0],
        attacks=["fgsm"],
        checks=0,
        probe=64,
        full=False,
        threads=1,
        progress=False,
    )
    found: dict[str, Any] = {}
    exec(code.replace("demo-results", str(tmp_path / "out")), found)
    assert found["gap"].value >= 0


def test_the_methods_of_the_readme_are_those_of_the_folder() -> None:
    shown = README.partition("<!-- methods -->\n")[2].partition("\n<!-- end of methods -->")[0]
    assert shown == report.methods_table(methods.describe())


def test_the_terminal_costs_of_the_readme_are_those_of_the_folder() -> None:
    shown = README.partition("<!-- terminals -->\n")[2].partition("\n<!-- end of terminals -->")[0]
    assert shown == report.terminals_table(terminal.describe())


def test_the_closed_loops_of_the_readme_are_those_of_the_folder() -> None:
    shown = README.partition("<!-- controllers -->\n")[2].partition("\n<!-- end of controllers -->")[0]
    assert shown == report.controllers_table(controllers.describe())
