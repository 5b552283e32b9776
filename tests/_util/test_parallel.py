"""Several processes end in one state, which is that of one process on whole batches; and the commands."""

import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from forks import Ended, talking
from helpers import GUARD, same, slow
from hypothesis import given
from hypothesis import strategies as st
from systems import CASES, batch, constant, driver
from torch import Tensor

import controlat
from controlat._util.files import read_json, read_json_lines
from controlat._util.parallel import Share, World, current, joined
from controlat.app import cli
from controlat.app.trainer import load_checkpoint
from controlat.data import Augment

counts = pytest.mark.parametrize("count", [2, slow(3)])


def of_each(cases: dict[int, list[Any]]) -> list[Any]:
    """The cases of two processes, and of three where all tests run."""
    return [*((2, case) for case in cases[2]), *(slow(3, case) for case in cases[3])]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(count: int, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [f"--master-port={free_port()}", "--master-addr=127.0.0.1", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=GUARD)


def together(
    count: int, work: Callable[..., object], *given: Any, cwd: Path, **environment: str
) -> list[Ended]:
    """Call a function in several processes that find what torchrun would tell them, without its start."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | environment
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [end() for end in [talking(work, *given, cwd=cwd, **variables) for variables in own]]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], dict[str, Any]]:
    """(count, rank) -> what that process found."""
    out = tmp_path_factory.mktemp("processes")

    @functools.cache
    def ranks(count: int) -> list[dict[str, Any]]:
        tasks = [name for name in processes.TASKS if name != "twins" or count == 2]
        for ended in together(count, processes.run, out, tasks, cwd=out):
            assert ended.code == 0, ended.error
        return [torch.load(out / f"{count}-{rank}.pt", weights_only=True) for rank in range(count)]

    return lambda count, rank: ranks(count)[rank]


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested structure, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for child in value for t in tensors(child)] if isinstance(value, (list, tuple)) else []


# ------------------------------------------------------------------------------------------------- the driver


@pytest.mark.parametrize(("count", "case"), of_each(processes.RUNS))
def test_several_processes_take_the_steps_of_one_on_whole_batches(
    several: Any, case: tuple[str, str], count: int
) -> None:
    name, norm = case
    found, expected = several(count, 0)[f"{name}, {norm}"], processes.one_case(World(), name, norm)
    for part in ("model", "optimizer", "memory", "rows", "kept"):
        assert list(found[part]) == list(expected[part])
        for mine, theirs in zip(tensors(found[part]), tensors(expected[part]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert found["stopped"] == expected["stopped"]
    # In training mode a process attacks its rows no longer than one of its own still moves.
    counted = name != "fat train"
    assert found["meter"] == expected["meter"] or (not counted and found["meter"][0] < expected["meter"][0])
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-9)
        assert (mine[0], mine[3]) == (theirs[0], theirs[3])
        assert mine[2] == theirs[2] or not counted
    first = torch.cat([t.flatten() for t in driver(CASES[name]).parameters])
    assert (torch.cat([t.flatten() for t in found["model"].values()]) - first).norm() > 1e-3


@counts
def test_several_processes_agree_on_dithered_knobs(several: Any, count: int) -> None:
    expected = processes.dithered(World())["dithered"]
    assert {u["steps"] for u in expected["controls"]} == {1, 2, 3}
    for rank in range(count):
        found = several(count, rank)["dithered"]
        assert found["controls"] == expected["controls"]
        assert found["meter"] == expected["meter"]
        assert same(found["model"], several(count, 0)["dithered"]["model"])
        for mine, theirs in zip(tensors(found["model"]), tensors(expected["model"]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@counts
def test_all_processes_hold_the_same_bits(several: Any, count: int) -> None:
    for rank in range(1, count):
        mine, first = several(count, rank), several(count, 0)
        names = [name for name in mine if name.partition(",")[0] in CASES]
        assert len(names) == len(processes.RUNS[count]) + len(processes.NAMES[count])
        for name in names:
            assert same(mine[name], first[name]), name


@counts
@pytest.mark.parametrize("name", ["pgd_at", "cat curriculum", "free"])
def test_the_first_process_decides_for_all_and_one_alone_decides_the_same(
    several: Any, name: str, count: int
) -> None:
    expected = processes.closed_loop(World())[f"closed loop, {name}"]
    for rank in range(count):
        found = several(count, rank)[f"closed loop, {name}"]
        assert found["asked"] == (len(expected["controls"]) if rank == 0 else 0)
        assert found["controller"]["rank"] == 0
        assert same(found, several(count, 0)[f"closed loop, {name}"] | {"asked": found["asked"]})
        for mine, theirs in zip(found["controls"], expected["controls"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)
        for mine, theirs in zip(tensors(found["model"]), tensors(expected["model"]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@counts
@pytest.mark.parametrize("name", ["greedy", "horizon", "ratio"])
def test_what_a_loop_measures_in_the_first_process_leaves_all_in_one_state(
    several: Any, name: str, count: int
) -> None:
    expected = processes.measured(World())[name]
    for rank in range(count):
        found = several(count, rank)[name]
        first = several(count, 0)[name]
        assert same(found, first | {"meter": found["meter"]}), (
            "the first process alone counts what it measures"
        )
        assert found["controls"] == expected["controls"]
        for mine, theirs in zip(tensors(found["model"]), tensors(expected["model"]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("count", "case"), of_each(processes.NAMES))
def test_batchnorm_dropout_and_mixed_precision_are_no_obstacle(several: Any, case: str, count: int) -> None:
    found = several(count, count - 1)[case]
    assert {t.dtype for t in found["model"].values()} == {torch.float32, torch.int64}
    assert all(bool(torch.isfinite(t.double()).all()) for t in tensors(found["model"]))
    assert all(0 < loss < 20 for _, loss, *_ in found["steps"])
    seen = [value for name, value in found["model"].items() if name.endswith("num_batches_tracked")]
    assert seen
    assert all(int(n) > 0 for n in seen)


def test_batchnorm_over_equal_halves_is_batchnorm_over_the_whole(several: Any) -> None:
    found, expected = several(2, 0)["twins"], processes.twins(World())["twins"]
    for name, value in expected["model"].items():
        if "running_var" not in name:  # which is divided by n - 1
            torch.testing.assert_close(found["model"][name], value, rtol=1e-9, atol=1e-12)
    assert [loss for _, loss, *_ in found["steps"]] == pytest.approx([s[1] for s in expected["steps"]])


@counts
def test_what_is_exchanged_arrives_in_all_processes(several: Any, count: int) -> None:
    for rank in range(count):
        found = several(count, rank)["exchanges"]
        assert same(found["all_gather"], torch.arange(7.0))
        assert same(found["mask"], torch.arange(7) > 2)
        assert int(found["sum"]) == count * (count + 1) // 2
        torch.testing.assert_close(found["mean"], [torch.tensor(3.0), torch.full((2, 2), 3.0).double()])
        assert found["told"] == {"rank": 0, "text": "é"}
        assert found["bytes"] == [0, 7]
        assert found["nothing"] == []
        assert "no longer hold the same network" in found["checked"]
        drifting = several(count, rank)["drifting"]
        assert list(drifting) == ["network", "stopped", "controller"]
        assert all("no longer hold the same network" in said for said in drifting.values())


@given(total=st.integers(1, 300), size=st.integers(1, 9))
def test_shares_cover_a_batch_in_order_and_are_equal_but_for_one_sample(total: int, size: int) -> None:
    rows = [Share(rank, size, total).rows for rank in range(size)]
    assert rows[0].start == 0
    assert rows[-1].stop == total
    assert all(a.stop == b.start for a, b in pairwise(rows))
    sizes = [r.stop - r.start for r in rows]
    assert max(sizes) - min(sizes) <= 1
    assert total < size or min(sizes) > 0


def test_a_process_that_is_alone_exchanges_nothing() -> None:
    share, rows = World().share(4), torch.rand(4, 2)
    assert share.alone
    assert share.all_gather(rows) is rows
    assert share.mean([rows])[0] is rows
    assert same(share.sum(rows), rows)
    with joined("cpu") as world:
        assert world == current() == World()
    World().check([torch.tensor(1.0)])


def test_too_many_processes_for_the_last_batch_are_refused() -> None:
    u = CASES["pgd_at"].control()
    with pytest.raises(ValueError, match="last batch of an epoch has 2 samples for 3 processes"):
        constant(u, 10, batch_size=4, world=World(0, 3))
    assert constant(u, 12, batch_size=4, world=World(0, 3)).batches_per_epoch == 3


def test_every_process_sees_its_rows_of_the_batch_and_of_the_augmentation() -> None:
    p = replace(constant(CASES["pgd_at"].control(), 13, batch_size=5), augment=Augment(1, True))
    parts = [list(replace(p, world=World(rank, 2)).batches(1)) for rank in range(2)]
    for whole, *shares in zip(p.batches(1), *parts, strict=True):
        for name in ("x", "y", "indices"):
            assert same(torch.cat([getattr(b, name) for b in shares]), getattr(whole, name))
        for name in ("top", "left", "flip"):
            assert same(
                torch.cat([getattr(b.placement, name) for b in shares]), getattr(whole.placement, name)
            )
        assert whole.share is None
        assert [b.share.total for b in shares] == [len(whole.x)] * 2


def test_scoring_a_whole_batch_needs_no_others() -> None:
    d, b, u = driver(CASES["free"]), batch(), CASES["free"].control()
    assert same(d.field(b, u), d.field(b._replace(share=Share(0, 1, len(b.x))), u))


# ----------------------------------------------------------------------------------------------- the commands

# 120 training samples in batches of 32, 32, 32, 24; 40 held out; no dropout, so that masks play no part.
SETTINGS: dict[str, Any] = {
    "schedule": "amata:min=1,max=4,tau=0.15",
    "epochs": 3,
    "train_points": 160,
    "held_out": 40,
    "batch_size": 32,
    "threads": 1,
    "model": "killable_net:net",
    "method": "atta",
    "device": "cpu",
}
KILLABLE = """
import os, signal
from torch import nn
from controlat.models import build

class Net(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x):
        self.seen += self.training
        if os.environ.get("KILL") == f"{os.environ.get('RANK')} {self.seen}" and self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)

def net(in_shape, num_classes):
    return Net(build("mlp", in_shape, num_classes))
"""
SECONDS = ("seconds", "total_seconds", "validation_seconds")


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def log(run: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(run / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in SECONDS} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes: one undisturbed, and its output."""
    found = tmp_path_factory.mktemp("torchrun")
    (found / "killable_net.py").write_text(KILLABLE)
    done = torchrun(2, "-m", "controlat", "train", "--out", "two", *flags(SETTINGS), cwd=found)
    assert done.returncode == 0, done.stderr
    (found / "output.txt").write_text(done.stdout)
    return found


def test_two_processes_train_as_one_does_and_the_first_alone_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    controlat.train("one", progress=False, **SETTINGS)
    one, two = log(folder / "one"), log(folder / "two")
    for mine, theirs in zip(two, one, strict=True):
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-4)
        for name in ("clean", "robust"):
            assert mine.pop(name) == pytest.approx(theirs.pop(name), abs=0.051)
        assert mine.pop("validation_gradients") > 0 < theirs.pop("validation_gradients")
        assert mine == theirs
    a, b = (load_checkpoint(folder / name / "last.pt") for name in ("one", "two"))
    assert b["environment"]["processes"] == 2
    assert a["environment"]["processes"] == 1
    assert a["tally"]["gradients"] == b["tally"]["gradients"] == one[-1]["total_gradients"]
    assert set(os.listdir("one")) == set(os.listdir("two"))
    table = (folder / "output.txt").read_text()
    assert table.count("gradient evaluations") == 1
    assert table.count("Test it") == 1


# A process, and its pass in training mode since it started: each in the second epoch.
@pytest.mark.parametrize("kills", [["1 6"], ["0 6", "1 2"]])
def test_killed_in_the_middle_of_an_epoch_and_resumed_two_processes_end_with_the_same_bits(
    folder: Path, kills: list[str]
) -> None:
    out = f"killed {len(kills)}"
    words = ["train", "--out", out, "--resume", *flags(SETTINGS)]
    for kill in kills:
        ended = together(2, cli.main, [*words, "--checkpoint_minutes", "1e-9"], cwd=folder, KILL=kill)
        killed = int(kill[0])
        assert [ended[killed].code, ended[1 - killed].code] == [-signal.SIGKILL, 1]
        assert "another process of this run ended" in ended[1 - killed].error
        tally = load_checkpoint(folder / out / "last.pt")["tally"]
        assert tally["epoch"] == 1
        assert 0 < tally["batch"] < 4
    assert [ended.code for ended in together(2, cli.main, words, cwd=folder)] == [0, 0]
    assert log(folder / out) == log(folder / "two")
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(folder / run / name) for run in ("two", out))
        for part in ("model", "optimizer", "memory", "rows", "kept", "stopped"):
            assert same(a[part], b[part]), (name, part)


def test_a_finished_run_is_only_reported(folder: Path) -> None:
    words = ["train", "--out", "two", *flags(SETTINGS)]
    first, second = together(2, cli.main, words, cwd=folder)
    assert (first.code, second.code) == (0, 0), first.error
    assert (first.output.count("finished before"), second.output) == (1, "")


@pytest.mark.slow
def test_schedules_are_evaluated_by_several_processes(folder: Path) -> None:
    settings = {k: v for k, v in SETTINGS.items() if k != "schedule"} | {"epochs": 2, "test_points": 50}
    words = ["--schedules", "none", "pgd:steps=2,alpha=0.05", "--seeds", "0", "--probe", "64"]
    words += ["--checks", "0", "--attacks", "pgd-5", "--out", "evaluated"]
    first, second = together(2, cli.main, ["evaluate", *words, *flags(settings)], cwd=folder)
    assert (first.code, second.code) == (0, 0), first.error
    assert (first.output.count("summary.md"), second.output) == (1, "")
    result = read_json(folder / "evaluated" / "result.json")
    assert result["environment"]["processes"] == 2
    for schedule in result["schedules"]:
        (run,) = schedule["runs"]
        assert [line["epoch"] for line in run["epochs"]] == [0, 1]
        assert run["criterion"]


def test_what_does_not_run_in_several_processes_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main(["attack", str(tmp_path / "last.pt")])
    assert "train and evaluate run in several processes, nothing else" in capsys.readouterr().err


def test_batches_that_cannot_be_shared_are_refused_by_all_processes(folder: Path) -> None:
    bad = SETTINGS | {"train_points": 137}  # 97 samples: the last batch has one
    for ended in together(2, cli.main, ["train", "--out", "bad", *flags(bad)], cwd=folder):
        assert ended.code == 2
        assert "last batch of an epoch has 1 samples for 2 processes" in ended.error
