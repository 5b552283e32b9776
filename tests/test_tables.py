"""The two tables of Amata are worked on in parts: what is finished is kept, the rest goes on anywhere."""

from __future__ import annotations

import fcntl
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import GUARD, same

from controlat import NonFiniteError
from controlat._util.files import read_json
from controlat.app.trainer import load_checkpoint
from controlat.control.schedule_text import parse_schedule
from controlat.methods import build

HERE = Path(__file__).resolve().parent.parent / "analysis"
sys.path.insert(0, str(HERE))  # the scripts share a module
TABLES: dict[str, Any] = runpy.run_path(str(HERE / "_tables.py"))
ONE: dict[str, Any] = runpy.run_path(str(HERE / "amata_table1.py"))
TWO: dict[str, Any] = runpy.run_path(str(HERE / "amata_table2.py"))


@dataclass
class Fake:
    """A row that is finished at once, never, or not finite."""

    name: str
    directory: Path
    seed: int = 0
    end: str = "at once"
    worked: list[str] = field(default_factory=list)

    def finished(self) -> bool:
        return (self.directory / "done").exists()

    def work(self) -> None:
        self.worked.append(self.name)
        if self.end == "never":
            signal.pause()
        if self.end == "not finite":
            raise NonFiniteError("the loss is nan")
        (self.directory / "done").touch()

    def state(self) -> str:
        return "1 of 2 epochs" if self.worked else ""


def test_the_minutes_end_a_row_in_progress_and_the_table_has_what_is_finished(tmp_path: Path) -> None:
    ends = {"first": "at once", "second": "not finite", "third": "never", "fourth": "at once"}
    rows = [Fake(name, tmp_path / name, end=end) for name, end in ends.items()]
    rows[3].directory.mkdir()
    written: list[tuple[list[str], list[str]]] = []

    def write(stands: Any) -> None:
        written.append(([row.name for row in stands.finished], [u["state"] for u in stands.unfinished]))

    stands = TABLES["fill"](rows, 0.02, "cpu", write)
    left = ["the loss is nan", "1 of 2 epochs", "not begun"]
    assert written[0] == (["first"], ["not begun"] * 3)
    assert written[-1] == (["first"], left)
    assert TABLES["finished"](stands) == 3
    assert "the loss is nan" in TABLES["pending"](stands.unfinished)
    rows[2].end = "at once"
    with open(rows[3].directory / ".lock", "a") as file:  # another process has the fourth
        fcntl.flock(file, fcntl.LOCK_EX)
        assert TABLES["fill"](rows, None, "cpu", write).finished == [rows[0], rows[2]]
    assert TABLES["fill"](rows, None, "cpu", write).finished == [rows[0], rows[2], rows[3]]
    assert [len(row.worked) for row in rows] == [1, 1, 2, 1]
    assert len(TABLES["machines"](rows[2].directory)) == 1  # the same machine twice


def test_means_over_seeds_have_standard_errors_and_wilsons_interval() -> None:
    share = TABLES["accuracy"]([{"value": v, "points": 100} for v in (0.4, 0.6)])
    assert share["mean"] == pytest.approx(0.5)
    assert share["standard_error"] == pytest.approx(0.1)
    assert share["interval"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert TABLES["percent"](share) == "50.0 [40.4, 59.6] ±10.0"
    assert TABLES["percent"](None) == ""


def test_rows_come_from_the_cheapest_to_the_dearest() -> None:
    """By gradient evaluations of the whole training, at most: FAT and Dynamic stop attacks early."""

    def cost(method: str, text: str) -> float:
        space = build(method).controls
        schedule = parse_schedule(text, 100, space).bound(space)
        return sum(space.cost(schedule.at(e, b, 10)) for e in range(100) for b in range(10)) / 1000

    two = [cost(s.method, s.text(100)) for s in TWO["STRATEGIES"]]
    assert two == sorted(two)
    assert two[:3] == [1, 2, 3]
    assert two[-3:] == [11, 11, 11]
    schedules = list(ONE["PAPER"])
    one = [cost("pgd_at", schedules[i]) for i in ONE["CHEAPEST"]]
    assert one == sorted(one)
    assert len(one) == 5


def test_strategies_change_where_their_papers_do() -> None:
    texts = {s.name: s.text(120) for s in TWO["STRATEGIES"]}
    assert texts["FAT"] == "pgd:steps=10,alpha=2/255,slack=0:1:2@50:90"
    assert texts["Dynamic"] == "pgd:steps=10,alpha=2/255,fosc=0.5..0@100"
    for scale in TWO["SCALES"].values():
        for s in TWO["STRATEGIES"]:
            parse_schedule(s.text(scale["train"]["epochs"]), 120, build(s.method).controls)


def command(script: str, work: Path, out: Path, *more: str) -> list[str]:
    where = ["--scale", "smoke", "--threads", "1", "--device", "cpu", "--work", str(work), "--out", str(out)]
    return [sys.executable, str(HERE / script), *where, *more]


def killed_after(run: list[str], there: Path) -> None:
    """Start a script and kill it with SIGKILL as soon as a file is there."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + GUARD
    while not there.exists():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_table_2_killed_goes_on_in_a_copy_of_its_directory_to_the_same_numbers(tmp_path: Path) -> None:
    few = ("--autoattack", "0")
    whole = command("amata_table2.py", tmp_path / "whole", tmp_path / "expected", *few)
    subprocess.run(whole, check=True, capture_output=True, timeout=GUARD)
    row = "Amata2..10-seed0"
    first = command("amata_table2.py", tmp_path / "work", tmp_path / "out", *few)
    killed_after(first, tmp_path / "work" / row / "run" / "last.pt")  # in its first epoch, of four batches
    shutil.copytree(tmp_path / "work", tmp_path / "elsewhere" / "copy")
    shutil.rmtree(tmp_path / "work")
    before = (tmp_path / "elsewhere" / "copy" / "PGD-2-seed0" / "run" / "last.pt").stat().st_mtime_ns
    again = command("amata_table2.py", tmp_path / "elsewhere" / "copy", tmp_path / "out", *few)
    stopped = subprocess.run([*again, "--minutes", "1e-6"], capture_output=True, text=True, timeout=GUARD)
    assert stopped.returncode == 3
    table = read_json(tmp_path / "out" / "table.json")
    assert [r["name"] for r in table["rows"]] == ["ERM", "N-FGSM", "PGD-2", "K 0..10, dithered"]
    assert table["unfinished"][0]["name"] == "Amata(2..10)"
    assert "of 2 epochs" in table["unfinished"][0]["state"]
    assert table["unfinished"][-1] == {"name": "PGD-10", "seed": 0, "state": "not begun"}
    subprocess.run(again, check=True, capture_output=True, timeout=GUARD)
    table, expected = (read_json(tmp_path / name / "table.json") for name in ("out", "expected"))
    for line in (*table["rows"], *expected["rows"]):
        del line["seconds"]
    assert table == expected
    assert len(table["rows"]) == 8
    after = tmp_path / "elsewhere" / "copy"
    assert (after / "PGD-2-seed0" / "run" / "last.pt").stat().st_mtime_ns == before  # kept, not made again
    ends = [load_checkpoint(d / row / "run" / "last.pt")["model"] for d in (after, tmp_path / "whole")]
    assert same(*ends)


@pytest.mark.slow
def test_table_1_is_written_from_the_rows_that_are_finished(tmp_path: Path) -> None:
    run = command("amata_table1.py", tmp_path / "work", tmp_path / "out")
    second = tmp_path / "work" / "rows" / "pgd-steps=20-alpha=0.01-seed0" / "evaluation" / "runs"
    killed_after(run, second)
    shutil.move(tmp_path / "work", tmp_path / "moved")
    shutil.rmtree(tmp_path / "out")
    again = command("amata_table1.py", tmp_path / "moved", tmp_path / "out", "--minutes", "1e-6")
    stopped = subprocess.run(again, capture_output=True, text=True, timeout=GUARD)
    assert stopped.returncode == 3, stopped.stderr
    table, text = read_json(tmp_path / "out" / "table.json"), (tmp_path / "out" / "table.md").read_text()
    assert [row["name"] for row in table["rows"]] == ["PGD-10"]
    assert table["orders"] == {}  # five strategies are ordered, not one
    assert re.search(r"\| Amata\(10\.\.40\) +\| +0 \| +not begun", text)
    assert (tmp_path / "out" / "table1.png").exists()
