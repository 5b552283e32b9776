"""Tasks on a local Ray of two workers: order, errors, workers that die, and none that is left behind."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tasks
from helpers import GUARD

from controlat._util.ray_pool import RayPool
from controlat._util.tasks import Task, WorkerDied

ROOT = Path(__file__).parents[2]
KNOWN = importlib.util.find_spec("ray") is not None
on_ray = pytest.mark.skipif(not KNOWN, reason="Ray is missing")


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'controlat\[ray\]', or take processes"):
        RayPool(2)


@on_ray
@pytest.mark.slow
def test_an_address_where_no_cluster_answers_is_refused_at_once() -> None:
    with socket.socket() as taken:  # bound, so that nobody else is, and deaf
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"at address '{address}' .*refused"), RayPool(address=address):
            pass
    for address in ("nonsense", "here:there"):
        with pytest.raises(ValueError, match=f"at address '{address}'"), RayPool(address=address):
            pass


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    before = signal.getsignal(signal.SIGTERM)
    with RayPool(2) as made:
        assert signal.getsignal(signal.SIGTERM) is before
        yield made
    import ray

    assert not ray.is_initialized()


@on_ray
@pytest.mark.slow
def test_results_come_in_the_order_of_the_tasks_and_are_told_as_they_end(
    pool: RayPool, tmp_path: Path
) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    work = [
        Task("0", tasks.after, (last, 0)),
        Task("1", tasks.leave, (first, 1)),
        Task("2", tasks.after, (first, 2)),
    ]
    told: list[tuple[int, int]] = []

    def done(i: int, value: int) -> None:
        told.append((i, value))
        if len(told) == 2:
            last.touch()

    assert pool.map(work, done) == [0, 1, 2]
    assert told == [(1, 1), (2, 2), (0, 0)]
    a, b = tmp_path / "a", tmp_path / "b"
    assert pool.map([Task("a", tasks.meet, (a, b)), Task("b", tasks.meet, (b, a))]) == ["a", "b"]
    assert pool.map([]) == []


@on_ray
@pytest.mark.slow
def test_no_more_tasks_are_under_way_than_asked_for(pool: RayPool, tmp_path: Path) -> None:
    with RayPool(1) as narrow:  # on the Ray that is there, and stays
        work = [Task(str(i), tasks.alone, (tmp_path / "alone",)) for i in range(4)]
        assert narrow.map(work) == [True] * 4
    assert pool.map([Task("folder", os.getcwd)]) == [os.getcwd()]


@on_ray
@pytest.mark.slow
def test_what_a_task_prints_is_printed_by_the_parent(
    pool: RayPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.map([Task("talk", tasks.talk)])
    shown = capsys.readouterr()
    assert shown.out == "said so\n"
    assert shown.err == "bar 2%\nmourned\n"


@on_ray
@pytest.mark.slow
def test_the_first_error_by_order_is_raised_when_those_before_have_ended(
    pool: RayPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hanging = tmp_path / "hanging"
    work = [
        Task("first", tasks.fail_after_the_end_of, (hanging,)),
        Task("second", tasks.hang, (hanging,)),
        Task("third", tasks.leave, (tmp_path / "third", 3)),
    ]
    killer = threading.Thread(target=_end, args=(hanging,))
    killer.start()
    with pytest.raises(ValueError, match="the first") as caught:
        pool.map(work)
    killer.join()
    assert caught.value.__notes__ == ["a note"]
    assert "in fail_after_the_end_of\n" in str(caught.value.__cause__)
    shown = capsys.readouterr().err
    assert shown.startswith("controlat: warning: second: its worker was lost (The worker died unexpectedly")
    tasks.until(lambda: not tasks.alive(int(hanging.read_text())))  # begun once more, and stopped
    with pytest.raises(RuntimeError, match="TwoArguments: 1 and 2"):
        pool.map([Task("awkward", tasks.fail_awkwardly)])
    with pytest.raises(TypeError, match="pickle"):
        pool.map([Task("a lock", threading.Lock)])


def _end(path: Path) -> None:
    tasks.until(path.exists)
    os.kill(int(path.read_text()), signal.SIGKILL)


@on_ray
@pytest.mark.slow
def test_a_worker_that_dies_costs_one_more_try_and_no_second(
    pool: RayPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = [Task("other", abs, (-2,)), Task("mortal", tasks.die, (tmp_path / "tries", 1))]
    assert pool.map(work) == [2, ".."]
    told = capsys.readouterr().err
    assert told.startswith("controlat: warning: mortal: its worker was lost (The worker died unexpectedly")
    assert told.endswith("; begun once more\n")
    with pytest.raises(WorkerDied, match=r"^quitter: its worker was lost \(.*\), 2 times; where memory"):
        pool.map([Task("quitter", tasks.quit_, (3,))])
    with pytest.raises(WorkerDied, match="mortal"):
        pool.map([Task("mortal", tasks.die, (tries := tmp_path / "again", 9))])
    assert tries.read_text() == ".."


CLIENT = """
import sys
from controlat._util.ray_pool import RayPool
from controlat._util.tasks import Task
import tasks

if __name__ == "__main__":
    with RayPool(address=sys.argv[1]) as pool:
        print(pool.map([Task("a", tasks.variable, ("HOME",))]))
"""
GPUS = """
import ray
from pathlib import Path
from controlat._util.ray_pool import RayPool
from controlat._util.tasks import Task
import os, sys, tasks

if __name__ == "__main__":
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    a, b = Path(sys.argv[1], "a"), Path(sys.argv[1], "b")
    with RayPool(gpu_share=1 / 4) as pool:
        print(pool.map([Task("a", tasks.meet, (a, b)), Task("b", tasks.meet, (b, a))]))
        print(pool.map([Task("card", tasks.variable, ("CUDA_VISIBLE_DEVICES",))]))
    with RayPool(1, gpu_share=1 / 4) as pool:
        print(len(set(pool.map([Task(str(i), os.getpid) for i in range(3)]))))
    print(ray.is_initialized())
"""
PARENT = """
import signal, sys
from pathlib import Path
from controlat._util.ray_pool import RayPool
from controlat._util.tasks import Task
import tasks

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
folder = Path(sys.argv[1])
with RayPool(2) as pool:
    pool.map([Task(str(i), tasks.hang, (folder / str(i), True)) for i in range(3)])
"""


def _program(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@on_ray
@pytest.mark.slow
def test_another_program_may_use_a_cluster_by_its_address_and_leaves_it_there(pool: RayPool) -> None:
    import ray

    # A Ray of one's own asks for a token, which it leaves in the home folder, and has set RAY_AUTH_MODE here.
    client = _program(CLIENT, ray.get_runtime_context().gcs_address)
    said, complaint = client.communicate(timeout=GUARD)
    assert (said, complaint) == (f"[{os.environ['HOME']!r}]\n", "")
    assert pool.map([Task("still there", abs, (-1,))]) == [1]
    with (
        pytest.raises(ValueError, match="connected to a Ray already; leave out address 'auto'"),
        RayPool(address="auto"),
    ):
        pass


@on_ray
@pytest.mark.slow
def test_tasks_share_a_gpu_and_stay_in_their_process(tmp_path: Path) -> None:
    """One that there is by Ray's word alone; the program's own Ray serves, and stays."""
    said, _ = _program(GPUS, str(tmp_path)).communicate(timeout=GUARD)
    assert said.splitlines() == ["['a', 'b']", "['0']", "1", "True"]


@on_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_ray_of_its_own_and_all_its_workers_end_with_the_parent(tmp_path: Path, number: int) -> None:
    parent = _program(PARENT, str(tmp_path))
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
