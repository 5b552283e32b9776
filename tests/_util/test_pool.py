"""Tasks in processes of their own: order, errors, processes that die, and none that is left behind."""

import io
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tasks
from helpers import GUARD

from controlat._util.pool import Pool, Task, WorkerDied

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------- results


def test_results_come_in_the_order_of_the_tasks_whatever_the_order_of_their_ends(tmp_path: Path) -> None:
    with Pool(2) as pool:
        first, last = tmp_path / "first", tmp_path / "last"
        work = [
            Task("0", tasks.after, (last, 0)),
            Task("1", tasks.leave, (first, 1)),
            Task("2", tasks.leave, (last, 2)),
        ]
        assert pool.map(work) == [0, 1, 2]
        a, b = tmp_path / "a", tmp_path / "b"
        assert pool.map([Task("a", tasks.meet, (a, b)), Task("b", tasks.meet, (b, a))]) == ["a", "b"], (
            "at the same time"
        )
        assert pool.map([]) == []


def test_workers_stay_for_the_next_tasks_and_end_with_the_block() -> None:
    with Pool(1) as pool:
        (one,), (two,) = (pool.map([Task("pid", os.getpid)]) for _ in range(2))
        assert one == two != os.getpid()
        assert tasks.alive(one)
        os.kill(one, signal.SIGKILL)
        tasks.until(lambda: not tasks.alive(one))
        (three,) = pool.map([Task("pid", os.getpid)])
        assert three != one, "one that died in between is replaced"
    assert not tasks.alive(three)


def test_workers_take_their_environments_in_turn() -> None:
    work = [Task(str(i), tasks.variable, ("CARD",)) for i in range(2)]
    with Pool(1, environments=[{"CARD": "7"}]) as pool:
        assert pool.map(work) == ["7", "7"]


def test_what_a_task_prints_is_printed_by_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(1) as pool:
        pool.map([Task("talk", tasks.talk)])
    shown = capsys.readouterr()
    assert shown.out == "said so\n"
    assert shown.err == "bar 2%\nmourned\n"


def test_one_bar_shows_where_all_tasks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if "1 half way 50%; 2 half way 50%" in text:
                (tmp_path / "seen").touch()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Pool(2, show=True, unit="runs") as pool:
        pool.map([Task(str(i), tasks.half, (tmp_path / "seen",)) for i in range(2)])
    assert "0/2 runs, " in terminal.getvalue()


def test_a_task_may_have_a_process_of_its_own() -> None:
    with Pool(1) as pool:
        ((divisor, parent), pid) = pool.map([Task("child", tasks.ask_a_child), Task("pid", os.getpid)])
    assert divisor == 6
    assert parent == pid


# ----------------------------------------------------------------------------------------------------- errors


def test_the_first_error_by_order_is_raised_when_those_before_have_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hanging = tmp_path / "hanging"
    work = [
        Task("first", tasks.fail_after_the_end_of, (hanging,)),
        Task("second", tasks.fail, (hanging, ArithmeticError("earlier, but the second"))),
        Task("third", tasks.hang, (hanging,)),
        Task("fourth", tasks.leave, (tmp_path / "fourth", 3)),
    ]
    with Pool(3) as pool:
        with pytest.raises(ValueError, match="the first") as caught:
            pool.map(work)
        assert caught.value.__notes__ == ["a note"]
        assert "in fail_after_the_end_of\n" in str(caught.value.__cause__)
        assert not tasks.alive(int(hanging.read_text())), "a later task was stopped"
        assert not (tmp_path / "fourth").exists(), "and the last never begun"
        told = "controlat: second failed (earlier, but the second); waiting for the 1 before it\n"
        assert capsys.readouterr().err == told
        assert pool.map([Task("again", math.gcd, (4, 6))]) == [2]


def test_an_error_that_cannot_be_sent_comes_as_its_text() -> None:
    with Pool(1) as pool, pytest.raises(RuntimeError, match="TwoArguments: 1 and 2") as caught:
        pool.map([Task("awkward", tasks.fail_awkwardly)])
    assert "in fail_awkwardly" in str(caught.value.__cause__)
    with Pool(1) as pool, pytest.raises(TypeError, match="pickle"):
        pool.map([Task("a lock", threading.Lock)])


def test_a_function_of_the_program_itself_is_refused() -> None:
    def function() -> None: ...

    function.__module__ = "__main__"
    with Pool(1) as pool, pytest.raises(ValueError, match="function is defined in the program itself"):
        pool.map([Task("own", function)])
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        Pool(0)


# ----------------------------------------------------------------------------------------- processes that die


def test_a_process_that_dies_costs_one_more_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(2) as pool:
        work = [Task("other", math.gcd, (4, 6)), Task("mortal", tasks.die, (tmp_path / "tries", 1))]
        assert pool.map(work) == [2, ".."]
    told = "controlat: warning: mortal: its process was killed by SIGKILL; begun once more\n"
    assert capsys.readouterr().err == told


def test_a_task_whose_process_dies_twice_is_named(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    with Pool(1) as pool:
        killed = (
            r"^mortal: its process was killed by SIGKILL, 2 times; where memory is short, give fewer jobs$"
        )
        with pytest.raises(WorkerDied, match=killed):
            pool.map([Task("mortal", tasks.die, (tries, 9))])
        assert tries.read_text() == ".."
        with pytest.raises(WorkerDied, match="quitter: its process ended with exit code 3, 2 times"):
            pool.map([Task("quitter", tasks.quit_, (3,))])


# ----------------------------------------------------------------------------------------- nobody left behind

PARENT = """
import signal, sys
from pathlib import Path
from controlat._util.files import write_text
from controlat._util.pool import Pool, Task
import tasks

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
folder = Path(sys.argv[1])
with Pool(2) as pool:
    pool.map([Task(str(i), tasks.hang, (folder / str(i), True)) for i in range(3)])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_workers_and_their_children_end_with_the_parent(tmp_path: Path, number: int) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    files = [tmp_path / "0", tmp_path / "1"]
    tasks.until(lambda: all(file.exists() for file in files))
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert all(map(tasks.alive, pids))
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as Ctrl-C on a terminal
    else:
        parent.send_signal(number)
    _, said = parent.communicate(timeout=GUARD)
    assert parent.returncode == -number
    tasks.until(lambda: not any(map(tasks.alive, pids)))
    assert said.count("Traceback") == (number == signal.SIGINT), "the parent's own, and no worker's"


def test_a_worker_is_deaf_to_ctrl_c() -> None:
    with Pool(1) as pool:
        one, two = pool.map([Task(str(i), tasks.interrupt) for i in range(2)])
    assert one == two
