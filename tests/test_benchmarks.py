"""The benchmark for GPUs runs on a CPU too, with tiny sizes, to its end or to the end of its minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from controlat._util.files import read_json

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


def run(out: Path, minutes: float, *more: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--repeats", "1", "--minutes", str(minutes)]
    done = subprocess.run([*command, "--out", str(out), *more], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return read_json(out), done.stdout


@pytest.mark.slow
def test_every_case_is_measured_and_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    none, told = run(out, 1e-9)
    assert none["cases"] == {}
    assert len(none["not_reached"]) == 11
    assert "not reached within the minutes: call; call, LeNet;" in told
    every, _ = run(out, 10)
    assert every["failed"] == {}
    assert every["not_reached"] == []
    for case in every["cases"].values():
        assert case["contenders"][case["over"]]["ratio"] == 1
        assert {t[name] for t in case["targets"] for name in ("contender", "over")} <= set(case["contenders"])
    step = every["cases"]["step"]["contenders"]
    assert {"plain loop, bf16", "controlat, bf16", "controlat, float32, not deterministic"} <= set(step)
    again, _ = run(out, 1e-9, "--resume")
    assert again["cases"] == every["cases"]
