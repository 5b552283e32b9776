"""Where the trainings of a search run: on Ray they come to the same, also where a worker is killed."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import controlat
from controlat.app.cli import main
from controlat.app.settings import SearchSettings

SMALL: dict[str, Any] = {
    "model": "mortal_network:Mortal",
    "spaces": ["pgd:steps=1~3~whole,alpha=0.05~0.2~log"],
    "proposer": "random",
    "budget": "3trainings",
    "max_steps": 2,
    "judge_seeds": [0],
    "against": ["none"],
    "attacks": ["pgd-2"],
    "epochs": 2,
    "train_points": 200,
    "test_points": 40,
    "jobs": 2,
    "progress": False,
}
# A module of the user's own. Where the file `kill` stands beside it, the first worker that has come to the
# middle of a training dies; the process whose number is in the file does not.
NETWORK = """
import os, signal
from pathlib import Path
from torch import nn

KILL = Path(__file__).with_name("kill")

class Mortal(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 10 and KILL.exists() and KILL.read_text() != str(os.getpid()):
            KILL.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is missing")
def test_on_ray_trials_and_answers_are_the_same_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mortal_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    there = controlat.search(tmp_path / "processes", **SMALL)
    kill = tmp_path / "kill"
    kill.write_text(str(os.getpid()))
    here = controlat.search(tmp_path / "ray", engine="ray", **SMALL)
    assert not kill.exists()
    told = capsys.readouterr().err
    assert told.count("its worker was lost") == told.count("begun once more") == 1
    assert _timeless(here) == _timeless(there)
    assert _answers(tmp_path / "ray") == _answers(tmp_path / "processes")
    file = tmp_path / "ray" / "trainings.jsonl"  # one engine goes on with what another one began
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    assert _timeless(controlat.search(tmp_path / "ray", **SMALL)) == _timeless(there)


def _timeless(content: Any) -> Any:
    """Results without what the machine decides: seconds, and its description."""
    if isinstance(content, dict):
        return {k: _timeless(v) for k, v in content.items() if k not in ("environment", "seconds")}
    return [_timeless(v) for v in content] if isinstance(content, list) else content


def _answers(out: Path) -> list[str]:
    """All lines of the ledger, in an order of their own."""
    rows = [_timeless(json.loads(line)) for line in (out / "trainings.jsonl").read_text().splitlines()]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def test_the_command_says_how_to_get_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--out", str(tmp_path / "out"), "--engine", "ray"])
    assert stopped.value.code == 2
    assert "the engine ray needs Ray: pip install 'controlat[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"engine": "rey"}, "engine must be one of processes, ray, got 'rey'"),
        ({"address": "auto"}, "address 'auto' is that of a Ray cluster; give engine ray with it"),
        ({"engine": "ray", "device": "cuda:1"}, "auto, cpu or cuda with engine ray, .* got 'cuda:1'"),
    ],
)
def test_what_no_engine_can_do_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SearchSettings(**given)
