"""Runs of an evaluation in processes of their own: as many as fit, and the same results as one by one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import forked
from helpers import GUARD

import controlat
from controlat._util.errors import NonFiniteError
from controlat._util.files import read_json
from controlat._util.pool import WorkerDied
from controlat.app import estimate as estimation
from controlat.app import jobs
from controlat.app.cli import main
from controlat.app.experiment import Experiment
from controlat.app.settings import EvaluateSettings

SMALL: dict[str, Any] = {
    "schedules": ["none", "pgd:steps=2,alpha=0.06"],
    "seeds": [0, 1],
    "epochs": 2,
    "train_points": 100,
    "test_points": 40,
    "lr": 0.2,
    "attacks": ["fgsm"],
    "checks": 0,
    "full": False,
    "threads": 1,
    "progress": False,
}

# In a worker: kills it or its parent once, at the pass in training mode that a file `kill` names.
MORTAL = """
import contextlib, os, signal, sys
from pathlib import Path
from torch import nn
from controlat.models import build

passes = 0

class Mortal(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        global passes
        passes += self.training
        order = Path("kill")
        if order.exists() and "pytest" not in sys.modules:
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                who, at = order.read_text().split()
                if passes >= int(at):
                    order.rename("killed")
                    os.kill(os.getppid() if who == "parent" else os.getpid(), signal.SIGKILL)
        return self.net(x)

def net(in_shape, num_classes):
    return Mortal(build("mlp", in_shape, num_classes))
"""

# A closed loop that says when it is made, and refuses to go on where it is told to.
RULE = """
import os, sys
from rules import Rising

class Stubborn(Rising):
    def control(self, now, z):
        if now.epoch == 1 and os.environ.get("REFUSE"):
            raise RuntimeError("no further")
        return super().control(now, z)

def rule():
    print("made here", file=sys.stderr)
    return Stubborn()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a user's own network and controller."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    (tmp_path / "stubborn.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _timeless(value: Any) -> Any:
    """Without times and without the machine."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if "seconds" not in k and k != "environment"}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# ----------------------------------------------------------------------------------------------- the results


def test_runs_at_a_time_give_the_results_of_one_by_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = SMALL | {"schedules": ["pgd:steps=2,alpha=0.06", "stubborn:rule"], "model": "mortal:net"}
    own |= {"progress": True, "alphas": [0.05], "full": True}
    wanted = controlat.evaluate("one", jobs=1, **own)
    capsys.readouterr()
    got = controlat.evaluate("two", jobs=2, **own)
    assert _timeless(got) == _timeless(wanted)
    assert _files(folder / "two") == _files(folder / "one")
    assert [r["environment"]["jobs"] for r in (wanted, got)] == [1, 2]
    assert got["environment"]["threads"] == 1
    said = capsys.readouterr().err
    for title in ("[1/4] pgd:steps=2,alpha=0.06, seed 0", "[4/4] stubborn:rule, seed 1"):
        assert said.count(f"{title}: J ") == 1
    assert said.count("made here") > 2, "what workers print is printed"
    assert controlat.evaluate("two", jobs=1, **own) == got, "it is no setting of the results"


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = SMALL | {"model": "mortal:net", "seeds": [0]}
    wanted = controlat.evaluate("undisturbed", **own)
    (folder / "kill").write_text("self 30")
    got = controlat.evaluate("disturbed", jobs=2, **own)
    assert (folder / "killed").exists()
    assert ": its process was killed by SIGKILL; begun once more" in capsys.readouterr().err
    assert _timeless(got) == _timeless(wanted)


def _evaluate(folder: Path, settings: dict[str, Any]) -> None:
    os.chdir(folder)
    controlat.evaluate("disturbed", jobs=2, **settings)


@pytest.mark.slow
def test_an_evaluation_whose_parent_is_killed_goes_on(folder: Path) -> None:
    own = SMALL | {"model": "mortal:net", "seeds": [0]}
    wanted = controlat.evaluate("undisturbed", **own)
    (folder / "kill").write_text("parent 30")
    assert forked(_evaluate, folder, own) == -signal.SIGKILL
    assert (folder / "killed").exists()
    assert not (folder / "disturbed" / "result.json").exists()
    assert _timeless(controlat.evaluate("disturbed", jobs=2, **own)) == _timeless(wanted)


# ------------------------------------------------------------------------------------------------ the errors


def test_a_training_that_diverges_is_told_as_one_by_one_and_others_are_kept(folder: Path) -> None:
    told = []
    for at_a_time in (1, 2):
        with pytest.raises(NonFiniteError, match=r"epoch \d+, batch \d+") as caught:
            controlat.evaluate(f"{at_a_time}", jobs=at_a_time, **SMALL | {"lr": 1e4, "seeds": [0]})
        told.append(str(caught.value).replace(f"{at_a_time}/runs", "runs"))
        assert (folder / f"{at_a_time}" / "runs" / "01-none-seed0" / "evaluation.json").exists()
    assert told[0] == told[1]


@pytest.mark.slow
def test_an_error_comes_with_its_traceback_in_the_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SMALL | {"schedules": ["none", "stubborn:rule"], "seeds": [0], "alphas": [0.05]}
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(RuntimeError, match="no further") as caught:
        controlat.evaluate("out", jobs=2, **own)
    assert "stubborn.py" in str(caught.value.__cause__)


def test_a_run_whose_processes_die_is_one_line_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: object, **__: object) -> None:
        raise WorkerDied("[3/4] none, seed 0: its process was killed by SIGKILL, 2 times")

    monkeypatch.setattr("controlat.app.evaluate.evaluate", die)
    assert main(["evaluate", "--out", str(tmp_path)]) == 1
    told = "controlat: stopped: [3/4] none, seed 0: its process was killed by SIGKILL, 2 times\n"
    assert capsys.readouterr().err == told


# ------------------------------------------------------------------------------------------------- how many


def _number(settings: dict[str, Any] = {}, **more: Any) -> int:  # noqa: B006
    chosen = EvaluateSettings(**SMALL | settings | more)
    return jobs.number_of_jobs(chosen, Experiment.of(chosen))


LONG = {"epochs": 500}


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "available_cores", lambda: 8)
    monkeypatch.setattr(jobs, "_available", lambda: 64.0 * 2**30)


@pytest.mark.usefixtures("eight_cores")
def test_as_many_as_cores_runs_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _number() == 1, "starting processes would take longer"
    assert _number(LONG) == 4, "as there are runs"
    assert _number(LONG, seeds=[*range(9)]) == 8, "as there are cores"
    monkeypatch.setattr(jobs, "_available", lambda: 3.0 * 2**30)
    few = _number(LONG)
    assert 1 < few < 4, "as memory allows"
    assert _number(epochs=50_000, full=True) == 1, "states of a whole run are recorded"
    assert _number(jobs=3) == 3, "as asked for"
    assert _number(jobs=9) == 4


@pytest.mark.usefixtures("eight_cores")
def test_one_where_processes_work_on_one_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert _number(LONG) == _number(jobs=1) == 1
    with pytest.raises(ValueError, match="jobs must be 1 under torchrun, got 2"):
        _number(jobs=2)


@pytest.mark.parametrize("value", [0, 1.5, "many"])
def test_a_number_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="jobs must be a"):
        EvaluateSettings(**SMALL | {"jobs": value})


def test_the_estimated_time_is_shared_by_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimation, "seconds_per_evaluation", lambda *_: 1e-3)
    costs = {n: estimation.estimate(jobs=n, **SMALL) for n in (1, 2, 3, 4)}
    assert len({str(cost["gradients"]) for cost in costs.values()}) == 1
    seconds = {n: cost["seconds"] for n, cost in costs.items()}
    assert seconds[2] == seconds[3] == seconds[1] / 2, "two times two runs, or three and one"
    assert seconds[4] == seconds[1] / 4


SCRIPT = """
import sys
import controlat
from controlat.models import build

def net(in_shape, num_classes):
    return build("mlp", in_shape, num_classes)

print("begins")
result = controlat.evaluate(sys.argv[2], model=sys.argv[1], jobs=2, **{small!r})
print(result["environment"]["jobs"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "number"), [("mlp", 2), pytest.param("__main__:net", 1, marks=pytest.mark.slow)]
)
def test_a_script_needs_no_guard_and_its_own_network_is_trained_by_itself(
    tmp_path: Path, model: str, number: int
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(small=SMALL | {"seeds": [0]}))
    done = subprocess.run(
        [sys.executable, "script.py", model, "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(controlat.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert done.stdout == f"begins\n{number}\n", done.stderr
    note = "controlat: note: __main__:net is part of the program itself, which other processes do not "
    assert done.stderr == (note + "import; runs are made one after the other\n") * (number == 1)
    assert read_json(tmp_path / "out" / "result.json")["environment"]["jobs"] == number
