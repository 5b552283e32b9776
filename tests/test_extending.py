"""The folders that are lists: one new file, and the commands know what it brings. The files are README's."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import GUARD
from PIL import Image

import controlat

PACKAGE = Path(controlat.__file__).parent
README = (PACKAGE.parent / "README.md").read_text()
SECTION = README.partition("## Adding your own\n")[2].partition("\n## ")[0]
NEW = dict(re.findall(r"^`(controlat/[\w/]+\.py)`[^\n]*\n\n```python\n(.*?)```", SECTION, flags=re.S | re.M))
(EVALUATE,) = re.findall(r"```\ncontrolat (evaluate .*?)\n```", SECTION, flags=re.S)
FEW = "--train-points 100 --test-points 40 --attacks fgsm --checks 0 --looks 1 --threads 1 --progress false"
COMMANDS = {
    "methods": "methods",
    "method": "methods smoothed",
    "help": "evaluate --help",
    "train": "train --out run --method smoothed --schedule pgd:steps=1,alpha=0.1,smoothing=0.2..0 --epochs 2 "
    "--train-points 100 --threads 1 --progress false",
    "evaluate": EVALUATE.replace("\\\n", " ") + " " + FEW,
    "mistyped": "evaluate --out no --terminal briar",
}
# One process for all commands: what takes time is importing torch.
RUN = """
import contextlib, io, json, shlex, sys
from controlat.app.cli import main
said = {}
for name, command in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(shlex.split(command))
        except SystemExit as stop:
            code = stop.code
    said[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the new files, and nothing else changed."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, copy / "controlat", ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in NEW.items():
        assert not (copy / path).exists()
        (copy / path).write_text(code)
    return copy


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, tuple[int, str, str]]:
    """What the commands did there: exit code, output, errors."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(COMMANDS),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str, str]] = json.loads(done.stdout)
    return found


def lines(text: str) -> Iterator[list[str]]:
    """The rows of the tables in a text."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_readme_shows_one_file_for_each_folder() -> None:
    assert [str(Path(path).parent) for path in NEW] == [
        "controlat/methods",
        "controlat/pmp/terminal",
        "controlat/report/sections",
    ]


def test_a_new_method_is_listed_described_and_trained_with(
    folder: Path, said: dict[str, tuple[int, str, str]]
) -> None:
    assert [said[name][0] for name in ("methods", "method", "train")] == [0, 0, 0], said
    (row,) = (row for row in lines(said["methods"][1]) if row[0] == "smoothed")
    assert row[2:] == [
        "alpha, steps, smoothing (0.1)",
        "K + 1 gradient evaluations",
        "Szegedy et al. (2016), section 7",
    ]
    assert "smoothing: share of the label that all classes get (0 to 1; default 0.1)" in said["method"][1]
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [epoch["control"]["smoothing"] for epoch in log] == [0.2, 0.1]
    assert [epoch["gradients"] for epoch in log] == [2 * 90] * 2


def test_a_new_terminal_cost_is_offered_and_part_of_a_sum(
    folder: Path, said: dict[str, tuple[int, str, str]]
) -> None:
    known = "adversarial, brier, clean, margin"
    assert known in said["help"][1]
    assert said["mistyped"][0] == 2
    assert f"unknown terminal cost 'briar'; did you mean 'brier'? choose from: {known}" in said["mistyped"][2]
    assert said["evaluate"][0] == 0, said["evaluate"][2]
    result = json.loads((folder / "mine" / "result.json").read_text())
    n = result["sizes"].get("phi", result["sizes"]["held_out"])
    phi = f"1 * (Brier's score on {n} held-out points) + 0.1 * (clean cross-entropy on {n} held-out points)"
    assert result["terminal"] == phi
    assert f"with Phi {phi}" in said["evaluate"][1]


def test_a_new_section_adds_to_table_summary_and_figures(
    folder: Path, said: dict[str, tuple[int, str, str]]
) -> None:
    result = json.loads((folder / "mine" / "result.json").read_text())
    last = [f"{entry['runs'][0]['epochs'][-1]['loss']:.3f}" for entry in result["schedules"]]
    summary = (folder / "mine" / "summary.md").read_text()
    for text in (said["evaluate"][1], summary):
        heads, _, *cells = list(lines(text))[:4]
        assert heads[-1] == "last loss", "behind the sections of a smaller order"
        assert [row[-1] for row in cells] == last
    assert "## Training loss\n\nIn the table" in summary
    assert "![training loss per epoch](losses.png)" in summary
    assert "losses.png" in said["evaluate"][1]
    with Image.open(folder / "mine" / "losses.png") as image:
        assert image.format == "PNG"
        assert image.width > 300
